"""A site tests a study's candidates against its own patients: the suite of one site, with the coins that the ledger noted.

Everything that it finds stays in the study's folder of the guard's state. Each call is booked as a gate attempt before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsynth.artifacts import read_json, sha256_file, write_bytes, write_json
from dpsynth.checks.encoders import encoder_of
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.family import needed
from dpsynth.checks.kept import UnfinishedCheck
from dpsynth.checks.review import Answering, review_page
from dpsynth.checks.run import SEED
from dpsynth.checks.screening import screen_candidates
from dpsynth.checks.suite import run_checks
from dpsynth.checks.verdict import CONTENT, REVIEW, VERDICTS, Verdict
from dpsynth.data.attributes import by_cell, conditions_digest
from dpsynth.data.candidates import to_unit_range
from dpsynth.data.fingerprint import require_data
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import Split
from dpsynth.errors import ArtifactError, GateRefused, LedgerError
from dpsynth.privacy.accountant import account, epsilon_pld
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.ledger import Charge
from dpsynth.privacy.mechanism import Mechanism, merged
from dpsynth.progress import Progress, say_nothing
from dpsynth.release.gate import Allowed, Question, decide
from dpsynth.report.epsilon import epsilon_report
from dpsynth.report.html import render
from dpsynth.report.policy import policy_rows
from dpsynth.train.second_opinion import prv_epsilon
from federated.candidates import Carried, unpack
from federated.journal import Study, preparation
from federated.policy import data_config
from federated.proofs import proofs_of
from federated.site import Guard, charges_of

_FOLDER, _PAGE, _UNFINISHED = "check", "report.html", "unfinished"
_ANSWERING = Answering(
    command="dpsynth-site approve POLICY CANDIDATES --out FILE",
    words="Your name and words stay at the site, in its ledger.",
    refusing="dpsynth-site refuse POLICY CANDIDATES --out FILE --because 'NAME: WHY'",
)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A study that this site took part in, with its charges by round, in order, and candidates of it."""

    study: Study
    charges: tuple[tuple[int, Charge], ...]
    carried: Carried

    @property
    def run_id(self) -> str:
        """By which attempts and verdicts of the study are counted in the ledger: that of its first charge, which never changes."""
        return self.charges[0][1].run_id

    @property
    def rounds(self) -> tuple[int, ...]:
        """Rounds that were charged."""
        return tuple(sorted(number for number, _ in self.charges))

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What was booked for the study."""
        return merged([mechanism for _, charge in self.charges for mechanism in charge.mechanisms])

    @property
    def folder(self) -> Path:
        """Where what the checks found stays."""
        return self.study.folder / _FOLDER


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the site's checks found: for its own eyes."""

    verdicts: tuple[Verdict, ...]
    answer: object  # of the gate, before a person looked
    page: Path
    review: Path  # what a person is asked to look at


def joined(guard: Guard, path: Path) -> Joined:
    """Candidates and the study that they are of. Raises GateRefused when this site did not train it, or not with this coordinator."""
    policy = guard.policy
    carried = unpack(path, coordinators=guard.coordinators, data=policy.data, largest_bytes=policy.largest_message_bytes)
    name = carried.header.study
    charges, known = charges_of(guard.ledger, name), guard.journal.known(name)
    if not charges or known is None:
        raise GateRefused(f"This site took no part in the study {name}: its ledger or its state holds nothing of it. Nothing was checked.")
    study, plan, coordinator = known
    if (plan, coordinator) != (carried.header.plan_sha256, carried.key):
        raise GateRefused(f"The candidates are of another plan or another coordinator than the study {name} that this site trained.")
    return Joined(study=study, charges=tuple(charges), carried=carried)


def check_candidates(guard: Guard, path: Path, *, progress: Progress, note: Callable[[str], object] = say_nothing) -> Checked:
    """Run all checks and write what they found. Raises BudgetExceeded when the study was checked too often.

    One that was killed goes on under the attempt that it had booked, as long as candidates, rounds and the policy's gate are the same.
    """
    work = joined(guard, path)
    carried, policy, ledger = work.carried, guard.policy, guard.ledger
    encoder_of(policy.gate.encoder)  # what it lacks is said before the attempt is booked
    split = _split(guard, work, progress)
    guarantee = _guarantee(guard, work)
    unfinished, looked_at = UnfinishedCheck(work.folder / _UNFINISHED), _looked_at(guard, work)
    with unfinished.alone():
        attempt = unfinished.booked(ledger, work.run_id, looked_at, note=note)
        guard.note_ledger()
        cells, content = policy.data.cells, policy.gate.content
        screening = screen_candidates(carried.candidates, cells, carried.moments, content, sample_key=split.key, progress=progress)
        proofs = proofs_of(work.study, work.charges, largest_bytes=policy.largest_message_bytes)
        evidence = Evidence(
            synthetic=to_unit_range(carried.candidates.images),
            synthetic_labels=carried.candidates.labels,
            training=split.training,
            control=split.control,
            in_pool=split.in_pool,
            epsilon=guarantee.epsilon,
            delta=guarantee.delta,
            selfcheck=proofs.selfcheck,
            canaries=proofs.canaries,
            accounting_problems=guarantee.problems(),
            ledger_problems=tuple(ledger.verify()),
            uses_sgd=proofs.uses_sgd,
            synthetic_attributes=carried.candidates.attributes,
            screening=screening,
            withheld=carried.header.withheld,
        )
        verdicts = run_checks(evidence, policy.gate, seed=SEED, progress=progress, keep=unfinished)
        record = work.folder / VERDICTS
        write_json(
            record,
            {**looked_at, "attempt": attempt, "guarantee": guarantee.to_json(), "verdicts": [v.to_json() for v in verdicts]},
            private=True,
        )
        write_json(work.folder / CONTENT, screening.log(carried.candidates.seeds), private=True)
        review, images = work.folder / REVIEW, carried.header.images_sha256
        page = review_page(evidence, verdicts, required=required(guard, work), answering=_ANSWERING, images_sha256=images)
        write_bytes(review, page.encode(), private=True)
        ledger.record_verdicts(work.run_id, sha256_file(record))
        question = question_of(guard, work, reviews={})
        answer = decide(question)
        report = work.folder / _PAGE
        write_bytes(report, _report(guard, work, question, answer).encode(), private=True)
        unfinished.forget()
        return Checked(verdicts=verdicts, answer=answer, page=report, review=review)


def question_of(guard: Guard, work: Joined, *, reviews: Mapping[str, str]) -> Question:
    """The gate's question about candidates that were checked. Raises ArtifactError when they were not, or when anything changed since."""
    ledger, found = guard.ledger, _record(guard, work)
    guarantee = Guarantee.from_json(found["guarantee"])
    return Question(
        guarantee=replace(guarantee, ledger_epsilon=epsilon_pld(ledger.charged_mechanisms(), guarantee.delta)),
        booked=work.mechanisms,
        budget_epsilon=ledger.budget_epsilon,
        spent_epsilon=ledger.spent(),
        configured_epsilon=guard.policy.study_epsilon,
        ledger_problems=tuple(ledger.verify()),
        verdicts=tuple(Verdict.from_json(value) for value in found["verdicts"]),
        required=required(guard, work),
        attempt=ledger.gate_attempts(work.run_id),
        max_attempts=int(ledger.genesis["max_gate_attempts"]),
        checked_sha256=str(found["images_sha256"]),
        candidates_sha256=work.carried.header.images_sha256,
        reviews=reviews,
        refusal=ledger.refusal(work.carried.header.images_sha256),
    )


def required(guard: Guard, work: Joined) -> tuple[str, ...]:
    """Checks without which nothing is approved: what the site's policy demands, and what the study does."""
    return needed((*guard.policy.gate.required, *work.carried.header.required))


def _record(guard: Guard, work: Joined) -> dict[str, Any]:
    path = work.folder / VERDICTS
    if not path.is_file():
        raise ArtifactError("These candidates have not been checked. Run `dpsynth-site check` first.")
    if sha256_file(path) != guard.ledger.verdicts_sha256(work.run_id):
        raise ArtifactError("The verdicts are not those that the ledger noted when the checks ran. Run `dpsynth-site check` again.")
    found: dict[str, Any] = read_json(path)
    now = _looked_at(guard, work)
    if found["rounds"] != now["rounds"]:
        raise ArtifactError("The study went on after the check, so other rounds are booked now. Run `dpsynth-site check` again.")
    if found["images_sha256"] == now["images_sha256"] and found["statement_sha256"] != now["statement_sha256"]:
        raise ArtifactError("The coordinator signed these images again, with other numbers beside them. Run `dpsynth-site check` again.")
    for name in ("gate", "data"):
        if found[name] != now[name]:
            raise ArtifactError(
                f"The policy's {name} is not the one that the checks ran under. Put it back, or run `dpsynth-site check` again."
            )
    return found


def _looked_at(guard: Guard, work: Joined) -> dict[str, Any]:
    """What the verdicts are about, beside the patients and their coins."""
    gate, data = guard.policy.gate.model_dump(mode="json"), preparation(guard.policy.data)
    signed = {"images_sha256": work.carried.header.images_sha256, "statement_sha256": work.carried.statement_sha256}
    return {**signed, "rounds": list(work.rounds), "gate": gate, "data": data}


def _split(guard: Guard, work: Joined, progress: Progress) -> Split:
    """The patients as they were trained on. Raises LedgerError for other data, or for coins that the ledger did not note beforehand."""
    data = guard.policy.data
    cohort = read_cohort(data)
    require_data(cohort, data, guard.ledger, progress=progress)
    guard.ledger.require_unchanged(work.run_id)
    images = prepare(cohort, data, progress=progress)
    cells = conditions_digest(by_cell(images, data), data, salt=guard.ledger.digest_salt)
    split = work.study.split(images, data, cells=cells, booked=True)
    if any(charge.coins_sha256 != split.commitment for _, charge in work.charges):
        raise LedgerError("The patients' coins are not those that the ledger noted before training. Restore the study's split.json.")
    return split


def _guarantee(guard: Guard, work: Joined) -> Guarantee:
    """The site's own claim for the study: from its own ledger, at the study's delta."""
    ledger, data, delta = guard.ledger, guard.policy.data, work.carried.header.delta
    return Guarantee(
        data_name=str(ledger.genesis["data_name"]),
        unit=data.unit,
        declared_patients=data.declared_patients,
        mechanisms=work.mechanisms,
        accounting=account(work.mechanisms, delta, second_opinion=prv_epsilon),
        ledger_epsilon=epsilon_pld(ledger.charged_mechanisms(), delta),
        max_images_per_patient=data.max_images_per_patient,
        unprotected=(
            "what the site's signed statement holds: approved or refused, rounds, attempts, declared numbers, lines of its ledger",
        ),
    )


def _report(guard: Guard, work: Joined, question: Question, answer: object) -> str:
    summary = guard.ledger.summary()
    budget = {name: summary[name] for name in ("epsilon", "delta", "spent", "left", "max_gate_attempts")}
    candidates, header = work.carried.candidates, work.carried.header
    view = epsilon_report(
        guarantee=question.guarantee,
        verdicts=question.verdicts,
        required=question.required,
        decision={"allowed": isinstance(answer, Allowed), "reasons": list(getattr(answer, "reasons", ()))},
        budget={**budget, "gate_attempts": question.attempt},
        method=data_config(guard.policy).method,
        title=f"Candidates of the study {header.study} at {guard.policy.site}",
        count=len(candidates.images),
        site=True,
        policy=policy_rows(guard.policy.gate),
        provenance={"images (SHA-256)": header.images_sha256, "plan (SHA-256)": header.plan_sha256},
    )
    return render(view, images=candidates.images, labels=candidates.labels, classes=guard.policy.data.classes)
