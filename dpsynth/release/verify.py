"""Is a released folder complete, unchanged and signed by this key, and does its epsilon follow? Needs no data and no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dpsynth.artifacts import json_bytes, read_json, sha256_file
from dpsynth.detector.model import FILE as DETECTOR
from dpsynth.errors import ArtifactError, SignatureError
from dpsynth.privacy.guarantee import Guarantee, round_up
from dpsynth.privacy.ledger import Ledger
from dpsynth.release.bundle import MANIFEST, PREDICATE_TYPE, SIGNATURE, release_files
from dpsynth.release.contents import ARCHIVE, PICTURES, content_problems
from dpsynth.release.metadata import ALWAYS
from dpsynth.release.sites import SITES, classes_of, file_names, over_all_studies, site_problems, statements_of, uncharged_of
from dpsynth.signing import key_id, load_public, verify_envelope


def verify(folder: Path, public_key: Path, site_keys: Mapping[str, Path] | None = None) -> list[str]:
    """Problems, each naming its file; empty when all is well. Raises SignatureError or ArtifactError when there is nothing to verify.

    site_keys: for a release of several hospitals, keys that one got from them and not from the folder.
    """
    public, expected = load_public(public_key), {site: load_public(path) for site, path in (site_keys or {}).items()}
    if not folder.is_dir():
        raise ArtifactError(f"Expected a released folder at {folder}, found none.")
    try:
        statement = _statement(folder, public)
    except (ArtifactError, SignatureError) as error:
        return [f"{SIGNATURE}: {error}"]
    problems = _file_problems(folder, statement) or _claim_problems(folder, statement)
    return problems or site_problems(folder, statement["predicate"], expected) or _content_problems(folder, statement)


def verified(folder: Path, public_key: Path, site_keys: Mapping[str, Path] | None = None) -> list[str]:
    """What `verify` has established of a release in which it found no problem, a line each."""
    public = load_public(public_key)
    statement, manifest = _statement(folder, public), folder / MANIFEST
    guarantee, names = Guarantee.from_json(read_json(folder / "guarantee.json")), set(site_keys or {})
    several = SITES in statement["predicate"]
    title = (folder / "README.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    sites = [
        f"site       {site} approved these images; key {identity[:16]}, {'as you have it' if site in names else 'as the release names it'}"
        for site, identity in sorted(statement["predicate"].get(SITES, {}).items())
    ]
    sites += [
        f"site       {_printable(site)} is named in the study; the coordinator says that it released nothing"
        for site in uncharged_of(folder)
    ]
    return [
        f"release    {_printable(title)!r}, {statement['predicate']['release']}, {statement['predicate']['images']} synthetic images",
        f"signature  of {public_key}, key {key_id(public)[:16]}; {MANIFEST} has SHA-256 {sha256_file(manifest)}",
        f"files      {len(statement['subject'])} are there as they were signed, and no others",
        f"guarantee  epsilon {round_up(guarantee.epsilon, 2):.2f} at delta {guarantee.delta:.2g}, {guarantee.unit.value} level, "
        "computed again from what it says was run",
        *([f"ledgers    {over_all_studies(guarantee.ledger_epsilon)}"] if several else []),
        f"images     labels.csv and all files in {PICTURES} hold those of {ARCHIVE}{', which the sites approved' if several else ''}; "
        "what README.md, report.html and verdicts.json say beyond these lines is the signer's word",
        *sites,
    ]


def verified_ledger(path: Path, *, anchored: bool) -> list[str]:
    """What was established of a ledger in which no problem was found, a line each; `anchored`: a release named a line of it."""
    ledger = Ledger.load(path)
    summary, (lines, digest) = ledger.summary(), ledger.head()
    spent, budget = (value if isinstance(value, str) else f"{value:.3f}" for value in (summary["spent"], float(summary["epsilon"])))
    return [
        f"ledger   of {_printable(summary['data_name'])!r}: {lines} lines, chained; the head beside it has the last, SHA-256 {digest}",
        f"charges  {len(summary['charges'])}, epsilon {spent} together, within the budget of {budget}",
        f"release  {'its line of the ledger is there' if anchored else 'none named: an older copy put back is found with --release'}",
    ]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def ledger_anchors(folder: Path) -> list[tuple[int, str]]:
    """Number and digest of a ledger's last line when the folder was released; of several hospitals, each one's. Raises ArtifactError."""
    sites = statements_of(folder)
    return [(found.ledger_lines, found.ledger_sha256) for found in sites.values()] if sites else [ledger_anchor(folder)]


def require_signed(folder: Path, name: str, public_key: Path) -> None:
    """Raise SignatureError unless one file of a release is as it was signed, whatever became of the others."""
    statement = _statement(folder, load_public(public_key))
    signed = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    path = folder / name
    if name not in signed or path.is_symlink() or not path.is_file() or sha256_file(path) != signed[name]:
        raise SignatureError(f"Expected {name} as it was signed, found another or none. Get the release again.")


def ledger_anchor(folder: Path) -> tuple[int, str]:
    """Number and digest of the ledger's last line when the folder was released. Raises ArtifactError."""
    manifest = read_json(folder / MANIFEST)
    try:
        return int(manifest["ledger_head"]["lines"]), str(manifest["ledger_head"]["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"Expected a ledger head in {MANIFEST}, found none. Name a released folder.") from error


def _statement(folder: Path, public: Ed25519PublicKey) -> dict[str, Any]:
    if (folder / SIGNATURE).is_symlink():
        raise ArtifactError("it is a link, not a file")
    envelope = read_json(folder / SIGNATURE)
    if (folder / SIGNATURE).read_bytes() != json_bytes(envelope):
        raise SignatureError("Expected the file as it was written; spaces, order or number forms differ.")
    statement = verify_envelope(envelope, public)
    if statement.get("predicateType") != PREDICATE_TYPE:
        raise SignatureError(f"Expected a statement about a release, found {statement.get('predicateType')!r}.")
    return statement


def _file_problems(folder: Path, statement: dict[str, Any]) -> list[str]:
    """Every file against the signed digests; the signature itself covers the manifest."""
    signed = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    present = {*release_files(folder), *([MANIFEST] if (folder / MANIFEST).exists() else [])}
    problems = [f"{name}: missing" for name in sorted(signed.keys() - present)]
    problems += [f"{name}: not part of the release" for name in sorted(present - signed.keys())]
    needed = {parent.as_posix() for name in signed for parent in Path(name).parents}
    folders = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    problems += [f"{name}: a folder that is not part of the release" for name in sorted(folders) if name not in needed]
    for name in sorted(signed.keys() & present):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: it is a link or no regular file")
        elif sha256_file(path) != signed[name]:
            problems.append(f"{name}: changed since it was signed")
    return problems


def _content_problems(folder: Path, statement: dict[str, Any]) -> list[str]:
    """What lies there beside that which a release has, and what does not follow from its archive."""
    predicate, names = statement["predicate"], release_files(folder)
    needed = {*ALWAYS, *file_names(predicate)}
    strange = [name for name in names if name not in {*needed, DETECTOR} and not name.startswith(PICTURES)]
    problems = [f"{name}: missing; every release has it" for name in sorted(needed - {*names})]
    problems += [f"{name}: no release has such a file" for name in strange]
    return problems or content_problems(
        folder,
        names=names,
        release_id=str(predicate["release"]),
        number=predicate["images"],
        guarantee=Guarantee.from_json(read_json(folder / "guarantee.json")),
        classes=classes_of(folder),
    )


def _claim_problems(folder: Path, statement: dict[str, Any]) -> list[str]:
    try:
        value = read_json(folder / "guarantee.json")
        if value != statement["predicate"]["guarantee"]:
            return ["guarantee.json: it is not the guarantee that was signed"]
        guarantee = Guarantee.from_json(value)
        if value != json.loads(json_bytes(guarantee.to_json())):
            return ["guarantee.json: its sentence or another field does not follow from its mechanisms"]
    except (ArtifactError, KeyError) as error:
        return [f"guarantee.json: {error}"]
    return [f"guarantee.json: {problem}" for problem in guarantee.problems()]
