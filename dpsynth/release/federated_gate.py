"""The gate for images of several hospitals: pure, and fails closed, as the gate for one. Release and verification ask the same questions.

The coordinator has no patients, so each site's word stands in for the checks. A site is charged when its round was asked for, answered
or not; what it states must hold every round of which an answer was used, and none that was not asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpsynth.artifacts import json_bytes
from dpsynth.checks.family import needed
from dpsynth.config import finer_than_learnt
from dpsynth.errors import ArtifactError, LedgerError
from dpsynth.model.moment_release import QUERIES
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.mechanism import Mechanism, MomentRelease, PoissonDpSgd, from_json, merged
from dpsynth.release.gate import Allowed, Refused
from dpsynth.release.statement import Name, SiteStatement, plan_digest

_TOLERANCE = 1e-3  # between two computations of one epsilon
_REFUSING = ("fail", "inconclusive")


class SiteRecord(BaseModel):
    """What the coordinator counted of a site: rounds asked for and not refused, their mechanisms, and rounds whose answer was usable."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    site: Name
    rounds: tuple[int, ...]
    answered: tuple[int, ...]
    mechanisms: tuple[dict[str, Any], ...]

    @property
    def counted(self) -> tuple[Mechanism, ...]:
        """The mechanisms."""
        return tuple(from_json(value) for value in self.mechanisms)


class Spending(BaseModel):
    """Epsilon at one delta: of a patient of one site, and of one who is at all."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    delta: float = Field(gt=0, lt=1)
    disjoint: float
    overlapping: float


class FederatedRun(BaseModel):
    """A study as its coordinator counted it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    study: Name
    plan: dict[str, Any]
    sites: tuple[SiteRecord, ...]
    spending: Spending

    @model_validator(mode="after")
    def _with_named_sites(self) -> FederatedRun:
        if not all(isinstance(self.plan.get(name), list) for name in ("sites", "classes", "spatial_shape")):
            raise ValueError("the plan names no sites, classes or image size")
        if not {site.site for site in self.sites} <= {str(name) for name in self.plan["sites"]}:
            raise ValueError("the plan does not name every site of the record")
        return self

    @property
    def plan_sha256(self) -> str:
        """Digest of the plan, to which every site's statement is bound, and with it to the names of all sites."""
        return plan_digest(self.plan)

    @property
    def uncharged(self) -> tuple[str, ...]:
        """Sites that the plan names and that were asked for nothing, or refused everything, by the coordinator's count."""
        charged = {site.site for site in self.charged}
        return tuple(str(name) for name in self.plan["sites"] if name not in charged)

    @property
    def charged(self) -> tuple[SiteRecord, ...]:
        """Sites that may have released anything."""
        return tuple(site for site in self.sites if site.rounds)


@dataclass(frozen=True, kw_only=True)
class SitesQuestion:
    """Everything that this gate looks at. statements: by site, signatures verified. required: checks without which nothing is released."""

    run: FederatedRun
    guarantee: Guarantee
    required: tuple[str, ...]
    statements: Mapping[str, SiteStatement]
    images_sha256: str


def federated_run(value: object) -> FederatedRun:
    """The record of a federated run. Raises ArtifactError."""
    try:
        run = FederatedRun.model_validate_json(json_bytes(value))
        for site in run.sites:
            _ = site.counted
    except (ValidationError, ValueError, TypeError, LedgerError) as error:
        raise ArtifactError("Expected the record of a federated study, found something else. Run the study with this version.") from error
    return run


def data_name_of(study: str) -> str:
    """How a claim over several sites names the data."""
    return f"federation {study}"


def unprotected(
    *, sites: Sequence[str], overlapping: float, classes: Sequence[str], spatial_shape: Sequence[int], approved: Sequence[str] = ()
) -> tuple[str, ...]:
    """What a claim over several sites must name as not protected. approved: sites whose statements are in the release; none before it."""
    words = f"that each site approved these images, how often it was asked, and the head of its ledger: {', '.join(approved)}"
    return (
        f"which sites took part in which round, {json.dumps(list(sites))}, and their declared numbers of patients",
        f"a patient of several sites is protected less: by epsilon {overlapping:.2f} at most when all sites hold them",
        f"the list of classes, {json.dumps(list(classes))}, attributes, image size {list(spatial_shape)}",
        *([f"{finer}, from public images"] if (finer := finer_than_learnt(tuple(spatial_shape))) else []),
        "the training schedule, and when each site answered",
        *([words] if approved else []),
    )


def claimed_with(guarantee: Guarantee, run: FederatedRun, statements: Mapping[str, SiteStatement]) -> Guarantee:
    """The claim as it is released: no figure below that of a site's statement, and all named that is not protected."""
    said = statements.values()
    return replace(
        guarantee,
        data_name=data_name_of(run.study),
        declared_patients=max([guarantee.declared_patients, *(statement.declared_patients for statement in said)]),
        ledger_epsilon=max([guarantee.ledger_epsilon, *(statement.epsilons[1] for statement in said)]),
        max_images_per_patient=max([guarantee.max_images_per_patient, *(statement.max_images_per_patient for statement in said)]),
        unprotected=unprotected(
            sites=sorted(site.site for site in run.sites),
            overlapping=run.spending.overlapping,
            classes=run.plan["classes"],
            spatial_shape=run.plan["spatial_shape"],
            approved=sorted(statements),
        ),
    )


def decide_sites(question: SitesQuestion, *, configured_epsilon: float) -> Allowed | Refused:
    """Allow only when the claim stands and every charged site approved these very images."""
    reasons = federated_problems(question)
    if not question.guarantee.epsilon <= configured_epsilon * (1 + 1e-6):
        reasons.append(f"epsilon {question.guarantee.epsilon:.4g} is above the {configured_epsilon:g} of the study")
    return Refused(reasons=tuple(reasons)) if reasons else Allowed(candidates_sha256=question.images_sha256)


def federated_problems(question: SitesQuestion) -> list[str]:
    """Why the claim or a site's word does not hold; empty when all do."""
    run, statements = question.run, question.statements
    charged = {site.site: site for site in run.charged}
    reasons = [*_claim_problems(run, question.guarantee), *_understated(question)]
    reasons += [] if charged else ["no site was charged in this study"]
    reasons += [f"{name}: no approval of this site was given" for name in charged if name not in statements]
    reasons += [f"{name}: it speaks for a study in which it was not charged" for name in sorted(statements.keys() - charged.keys())]
    for name in sorted(statements.keys() & charged.keys()):
        found = [*_word_problems(question, statements[name]), *_ledger_problems(question, charged[name], statements[name])]
        reasons += [f"{name}: {problem}" for problem in found]
    return reasons


def _claim_problems(run: FederatedRun, guarantee: Guarantee) -> list[str]:
    if not math.isfinite(guarantee.epsilon):
        return ["epsilon is infinite: there is no privacy guarantee"]
    found, delta = list(guarantee.problems()), guarantee.delta
    if run.spending.delta != delta:
        found.append(f"the study counts at delta {run.spending.delta:.3g}, the guarantee at {delta:.3g}")
    worst = max((epsilon_pld(site.counted, delta) for site in run.sites), default=0.0)
    everyone = [_as_one(mechanism) for site in run.sites for mechanism in site.counted]
    if not any(_losses(guarantee.mechanisms) == _losses(site.counted) for site in run.sites):
        found.append("the claimed mechanisms are not those that any site was asked for")
    for name, stated, computed in (
        ("claimed epsilon", guarantee.epsilon, worst),
        ("largest epsilon of a site", run.spending.disjoint, worst),
        ("epsilon of a patient of all sites", run.spending.overlapping, epsilon_pld(everyone, delta)),
    ):
        if not _close(stated, computed):
            found.append(f"the {name}, {stated:.4g}, is not the {computed:.4g} of what the sites were asked for")
    return found


def _understated(question: SitesQuestion) -> list[str]:
    """Fields of the claim that are not as the sites' statements make them."""
    guarantee, due = question.guarantee, claimed_with(question.guarantee, question.run, question.statements)
    found = [
        f"the claim's {name.replace('_', ' ')} is {getattr(guarantee, name)}, and by the sites' statements {getattr(due, name)}"
        for name in ("data_name", "declared_patients", "ledger_epsilon", "max_images_per_patient")
        if getattr(guarantee, name) != getattr(due, name)
    ]
    lacking = [words for words in due.unprotected if words not in guarantee.unprotected]
    return found + [f"the claim does not name as unprotected: {words}" for words in lacking]


def _word_problems(question: SitesQuestion, statement: SiteStatement) -> list[str]:
    """What the site said, and of what."""
    found = []
    if statement.decision != "approved":
        found.append("it refused")
    if statement.study != question.run.study or statement.plan_sha256 != question.run.plan_sha256:
        found.append("its statement is about another study or plan")
    if statement.images_sha256 != question.images_sha256:
        found.append("it approved other images than these")
    missing = sorted({*needed(question.required)} - set(statement.required))
    found += [f"it did not require the check {name!r}" for name in missing]
    found += [f"{check}: {word}" for check, word in statement.outcomes.items() if word in _REFUSING and check in statement.required]
    if not 1 <= statement.attempt <= statement.max_attempts:
        found.append(f"attempt {statement.attempt} of {statement.max_attempts} allowed")
    return found


def _ledger_problems(question: SitesQuestion, record: SiteRecord, statement: SiteStatement) -> list[str]:
    """What its ledger holds against what it was asked for."""
    found, delta = [], question.guarantee.delta
    if statement.unit != question.guarantee.unit.value and statement.unit == "image":
        found.append("it protects the image, and the guarantee speaks of the patient")
    lacking = sorted(set(record.answered) - set(statement.rounds))
    surplus = sorted(set(statement.rounds) - set(record.rounds))
    if lacking:
        found.append(f"its ledger states fewer rounds than it answered: {_listed(lacking)} missing")
    if surplus:
        found.append(f"its ledger states rounds that were not counted for it: {_listed(surplus)}")
    if not lacking and not surplus and _losses(statement.booked) != _losses(_of_rounds(record, statement.rounds)):
        found.append("its ledger booked other mechanisms than it was asked for")
    if statement.delta != delta:
        found.append(f"it counts at delta {statement.delta:.3g}, the study at {delta:.3g}")
        return found
    epsilon, ledger = statement.epsilons
    computed = epsilon_pld(statement.booked, delta)
    if not _close(epsilon, computed):
        found.append(f"it states epsilon {epsilon:.4g} where its mechanisms cost {computed:.4g}")
    if not (math.isfinite(ledger) and ledger >= epsilon * (1 - 1e-6)):
        found.append(f"it states epsilon {ledger:.4g} for its whole ledger, of which this study is a part")
    return found


def _of_rounds(record: SiteRecord, rounds: Sequence[int]) -> tuple[Mechanism, ...]:
    """The counted mechanisms as they are for some of the rounds: a query of the moments each, then equally many steps each."""
    first = len(QUERIES)
    trained, wanted = (sum(number >= first for number in numbers) for numbers in (record.rounds, rounds))
    asked = {QUERIES[number] for number in rounds if number < first}
    found: list[Mechanism] = []
    for mechanism in record.counted:
        if isinstance(mechanism, PoissonDpSgd):
            found += [replace(mechanism, steps=mechanism.steps // max(trained, 1) * wanted)] if wanted else []
        elif isinstance(mechanism, MomentRelease):
            found += [mechanism.alone(query.name) for query in mechanism.queries if query.name in asked]
    return merged(found)


def _losses(mechanisms: Sequence[Mechanism]) -> list[tuple[float | str, ...]]:
    """What of mechanisms costs privacy. Clip norms come from public images, which two machines may compute with another last digit."""
    found: list[tuple[float | str, ...]] = []
    for mechanism in merged([_as_one(mechanism) for mechanism in mechanisms]):
        if isinstance(mechanism, MomentRelease):
            noise = [(query.name, mechanism.query_noise_multiplier(query.name)) for query in mechanism.queries]
            found += [(mechanism.kind, name, float(f"{multiplier:.9g}")) for name, multiplier in noise]
        elif isinstance(mechanism, PoissonDpSgd):
            found.append((mechanism.kind, mechanism.noise_multiplier, mechanism.sampling_probability, float(mechanism.steps)))
        else:
            found.append((mechanism.kind,))
    return sorted(found, key=str)


def _as_one(mechanism: Mechanism) -> Mechanism:
    """Sites declare different numbers of patients, which changes no loss: as one, their steps add up exactly."""
    return replace(mechanism, declared_patients=1) if isinstance(mechanism, PoissonDpSgd) else mechanism


def _close(stated: float, computed: float) -> bool:
    return math.isfinite(stated) and abs(stated - computed) <= _TOLERANCE * max(computed, 1e-3)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
