"""The officer's side of a site's word: what it says, and signing it where neither the guard nor whoever runs it has the key. Torch-free."""

from __future__ import annotations

from pathlib import Path

from dpsynth.artifacts import read_json, require_new, write_json
from dpsynth.release.statement import SiteStatement, sign_site_statement, site_statement
from dpsynth.signing import load_private


def sign(path: Path, *, key_path: Path, out: Path) -> SiteStatement:
    """Sign a statement that was written without a key: on a machine where the guard, and whoever runs it, has no access to the key."""
    private = load_private(key_path)
    require_new(out, kind="file")
    statement = site_statement(read_json(path))
    write_json(out, sign_site_statement(statement, private))
    return statement


def describe(statement: SiteStatement) -> list[str]:
    """Lines for the person who signs: what is signed, in the order in which it is compared."""
    own, whole = statement.epsilons
    budget = f"{float(statement.budget_epsilon):g} at delta {statement.budget_delta:g}"
    words = ", ".join(f"{check} {word}" for check, word in statement.outcomes.items()) or "none"
    return [
        f"{statement.site}, study {statement.study}: {statement.decision}",
        f"images     {statement.images_sha256}",
        f"plan       {statement.plan_sha256}",
        f"protected  each {statement.unit}, at most {statement.max_images_per_patient} images of one; "
        f"{statement.declared_patients} declared",
        f"epsilon    {own:.4g} of this study, {whole:.4g} of all runs on these data, at delta {statement.delta:g}; budget {budget}",
        f"attempt    {statement.attempt} of {statement.max_attempts}; required: {', '.join(statement.required)}",
        f"public     outcomes of checks: {words}",
        f"ledger     {statement.ledger_lines} lines, the last one {statement.ledger_sha256}",
    ]
