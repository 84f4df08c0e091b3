"""The hospitals of a federated release: their signed statements going in, lying in the bundle, and verified by whoever has it.

federation.json         the plan that the sites signed for, which names them all, and what the coordinator counted: by site the rounds and
                        mechanisms, epsilon of one site and of all together
sites/NAME.dsse.json    the site's signed statement
sites/NAME.pub          its public key, by which the statement is verified; compare it with the one that the site gives out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dpsynth.artifacts import json_bytes, read_json
from dpsynth.data.images_digest import archive_digest
from dpsynth.errors import ArtifactError, DpsynthError, GateRefused, SignatureError
from dpsynth.privacy.guarantee import Guarantee, round_up
from dpsynth.release.federated_gate import FederatedRun, SitesQuestion, federated_problems, federated_run
from dpsynth.release.statement import SiteStatement, open_site_statement
from dpsynth.signing import key_id, load_public, public_bytes

SITES, RECORD = "sites", "federation.json"
_STATEMENT, _KEY = ".dsse.json", ".pub"


@dataclass(frozen=True, kw_only=True)
class SignedStatement:
    """A site's statement with the envelope in which it came and the key that signed it."""

    statement: SiteStatement
    envelope: Mapping[str, Any]
    public: Ed25519PublicKey


@dataclass(frozen=True, kw_only=True)
class FederatedSites:
    """What a bundle says of its sites, by name."""

    run: FederatedRun
    signed: Mapping[str, SignedStatement]

    @property
    def statements(self) -> dict[str, SiteStatement]:
        """The statements alone."""
        return {name: found.statement for name, found in self.signed.items()}

    def files(self) -> dict[str, bytes]:
        """Contents of the bundle's files by name."""
        found = {RECORD: json_bytes(self.run.model_dump(mode="json"))}
        for name, item in self.signed.items():
            found[f"{SITES}/{name}{_STATEMENT}"] = json_bytes(item.envelope)
            found[f"{SITES}/{name}{_KEY}"] = public_bytes(item.public)
        return found

    def key_ids(self) -> dict[str, str]:
        """Of the keys that signed."""
        return {name: key_id(item.public) for name, item in self.signed.items()}

    def lines(self) -> list[str]:
        """A line for each site, for the card."""
        spent = self.run.spending
        found = [f"{row['site']}: epsilon {row['epsilon']:.2f} in this study; approved these images" for row in self.rows()]
        return [
            *found,
            *(f"{name}: named in the study, and not asked for anything by the coordinator's count" for name in self.run.uncharged),
            f"a patient of one site loses epsilon {spent.disjoint:.2f} at most, one whom all sites hold {spent.overlapping:.2f}",
            over_all_studies(max((found.epsilons[1] for found in self.statements.values()), default=0.0)),
        ]

    def view(self) -> dict[str, Any]:
        """For the report."""
        return {"sites": self.rows(), "uncharged": list(self.run.uncharged), "overlapping": self.run.spending.overlapping}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each site that spoke."""
        return [
            {
                "site": name,
                "unit": item.statement.unit,
                "declared_patients": item.statement.declared_patients,
                "rounds": len(item.statement.rounds),
                "epsilon": item.statement.epsilons[0],
                "ledger_epsilon": item.statement.epsilons[1],
                "budget_epsilon": float(item.statement.budget_epsilon),
                "budget_delta": item.statement.budget_delta,
                "attempt": f"{item.statement.attempt} of {item.statement.max_attempts}",
                "required": ", ".join(item.statement.required),
                "outcomes": ", ".join(f"{check} {word}" for check, word in sorted(item.statement.outcomes.items())),
                "decision": item.statement.decision,
                "key": key_id(item.public),
            }
            for name, item in self.signed.items()
        ]


def read_statements(paths: Sequence[Path], keys: Mapping[str, Ed25519PublicKey]) -> dict[str, SignedStatement]:
    """The statements in these files by site. Raises SignatureError for one that no known key signed, or that speaks for another site."""
    found: dict[str, SignedStatement] = {}
    for path in paths:
        envelope = read_json(path)
        signer, statement = _opened(path, envelope, keys)
        if statement.site != signer:
            raise SignatureError(f"{path.name} was signed with the key of {signer} and speaks for {statement.site}. Ask both sites.")
        before = found.get(signer)
        if (
            before is not None
            and before.statement.images_sha256 == statement.images_sha256
            and before.statement.decision != statement.decision
        ):
            raise GateRefused(f"{signer} refused these images, and approved them in another statement. Ask the site; nothing was released.")
        if before is not None:
            raise ArtifactError(f"{path.name} is a second statement of {signer}. Name one of each site.")
        found[signer] = SignedStatement(statement=statement, envelope=envelope, public=keys[signer])
    return found


def _opened(path: Path, envelope: object, keys: Mapping[str, Ed25519PublicKey]) -> tuple[str, SiteStatement]:
    claimed = _claimed_key(envelope)
    signer = next((site for site, public in keys.items() if key_id(public) == claimed), None)
    if signer is None:
        raise SignatureError(
            f"{path.name} is signed by no key that this study knows. Add the site's signing.pub to site_keys, or ask the site."
        )
    try:
        return signer, open_site_statement(envelope, keys[signer])
    except (SignatureError, ArtifactError) as error:
        raise type(error)(f"{path.name}, of {signer}: {error}") from error


def _claimed_key(envelope: object) -> str:
    """The id by which an envelope names its key; it proves nothing."""
    try:
        return str(envelope["signatures"][0]["keyid"])  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return ""


def over_all_studies(ledger_epsilon: float) -> str:
    """What holds though no site can tell of which of its studies images were drawn."""
    return (
        f"whichever of the sites' studies these images come from, a patient of one site loses epsilon {round_up(ledger_epsilon, 2):.2f} at "
        "most: no site's ledger counts more over all runs so far"
    )


def uncharged_of(folder: Path) -> tuple[str, ...]:
    """Sites that a bundle's study names and that were asked for nothing, by the coordinator's count. Raises ArtifactError."""
    return federated_run(read_json(folder / RECORD)).uncharged if (folder / RECORD).is_file() else ()


def classes_of(folder: Path) -> list[str] | None:
    """Names of the labels by the plan that the sites of a bundle signed for; none in a release of one site. Raises ArtifactError."""
    found = federated_run(read_json(folder / RECORD)).plan["classes"] if (folder / RECORD).is_file() else None
    return None if found is None else [str(name) for name in found]


def file_names(predicate: Mapping[str, Any]) -> set[str]:
    """The sites' files in a bundle that was signed with `predicate`; none in a release of one site."""
    names = predicate.get(SITES)
    return {RECORD, *(f"{SITES}/{name}{suffix}" for name in names for suffix in (_STATEMENT, _KEY))} if names is not None else set()


def statements_of(folder: Path) -> dict[str, SiteStatement]:
    """The statements in a bundle by site, each verified by the key beside it; none in a release of one site. Raises what is wrong."""
    if not (folder / RECORD).is_file():
        return {}
    return {name: item.statement for name, item in _signed_of(folder).items()}


def _signed_of(folder: Path) -> dict[str, SignedStatement]:
    found = {}
    for path in sorted((folder / SITES).glob(f"*{_STATEMENT}")):
        name = path.name.removesuffix(_STATEMENT)
        public = load_public(path.with_name(name + _KEY))
        envelope = read_json(path)
        statement = open_site_statement(envelope, public)
        if statement.site != name:
            raise SignatureError(f"{path.name} speaks for {statement.site}.")
        found[name] = SignedStatement(statement=statement, envelope=envelope, public=public)
    return found


def site_problems(folder: Path, predicate: Mapping[str, Any], expected: Mapping[str, Ed25519PublicKey]) -> list[str]:
    """Why the sites' part of a bundle does not hold, whose files are those that `predicate` was signed with; empty for one site.

    expected: keys of sites as somebody knows them from elsewhere.
    """
    if not (folder / RECORD).is_file() and SITES not in predicate:
        return [f"{SITES}: this release has none, so none can be {name}" for name in expected]
    try:
        sites = FederatedSites(run=federated_run(read_json(folder / RECORD)), signed=_signed_of(folder))
        if sites.key_ids() != predicate.get(SITES):
            return [f"{SITES}: their keys are not those that were signed"]
        given = sites.key_ids()
        if absent := [name for name in expected if name not in given]:
            return [f"{SITES}: this release has no site {name}; it has {', '.join(sorted(given))}" for name in absent]
        if strange := [name for name, public in expected.items() if given.get(name) != key_id(public)]:
            return [f"{SITES}: {name}: its statement is not signed by the key that you have of it" for name in strange]
        question = SitesQuestion(
            run=sites.run,
            guarantee=Guarantee.from_json(read_json(folder / "guarantee.json")),
            required=tuple(read_json(folder / "verdicts.json")["required"]),
            statements=sites.statements,
            images_sha256=archive_digest(folder / "synthetic.npz"),
        )
        return [f"{SITES}: {problem}" for problem in federated_problems(question)]
    except (DpsynthError, KeyError, TypeError) as error:
        return [f"{SITES}: {error}"]
