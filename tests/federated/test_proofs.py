"""What was proved round by round, as one: the worst counts, what lacks is lacking, and canaries of all rounds see what one round hides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpsynth.checks.accounting import ALWAYS, REQUIRED
from dpsynth.privacy.audit import BEFORE, DURING, Audit, outcome
from dpsynth.privacy.ledger import Charge
from dpsynth.privacy.mechanism import PoissonDpSgd
from federated.journal import Study
from federated.messages import Code, encode_refusal, encode_reply
from federated.proofs import Proofs, proofs_of, together

ROUND = PoissonDpSgd(noise_multiplier=3.0, clip_norm=1.0, sampling_probability=0.5, steps=4, declared_patients=100)


def audit(rng: np.random.Generator, *, noise: float = 1.0, mechanism: PoissonDpSgd = ROUND) -> Audit:
    """Scores of 1000 canaries of one round by the mechanism, its noise times `noise`."""
    inside = rng.random(1000) < 0.5
    drawn = rng.binomial(mechanism.steps, mechanism.sampling_probability, 1000) * inside
    scores = drawn + noise * mechanism.noise_multiplier * mechanism.steps**0.5 * rng.normal(size=1000)
    return outcome(scores, inside, mechanism)


def test_canaries_of_all_rounds_are_one_audit_that_sees_what_one_round_hides() -> None:
    """Ten rounds with a third of their noise are refuted together beyond what any of them shows; with all of it they are not."""
    rng = np.random.default_rng(0)
    weak, sound = [audit(rng, noise=0.3) for _ in range(10)], [audit(rng) for _ in range(10)]
    assert together(weak).p_value() < 1e-4
    assert together(weak).p_value() < min(found.p_value() for found in weak)
    assert together(sound).p_value() > 0.05
    whole = together(sound)
    assert (whole.cases, whole.guesses, whole.correct) == (10_000, 1000, sum(found.correct for found in sound))
    assert whole.calls.positives + whole.calls.negatives == 10_000
    assert whole.mechanism == ROUND, "a canary takes part in one round, not in ten"


def test_rounds_of_unequal_mechanisms_are_no_one_audit() -> None:
    rng = np.random.default_rng(1)
    same = audit(rng, mechanism=replace(ROUND, declared_patients=200))
    assert together([audit(rng), same]).cases == 2000
    with pytest.raises(ValueError, match="one mechanism"):
        together([audit(rng), audit(rng, mechanism=replace(ROUND, noise_multiplier=2.0))])


GOOD = {"ok": True, "detail": "fine", "statistic": 1.0, "threshold": 0.0}
AUDIT = audit(np.random.default_rng(2)).to_json()
TRAINED = {"findings": dict.fromkeys(REQUIRED, GOOD), "audits": {BEFORE: AUDIT, DURING: AUDIT}}


ROUNDS = (0, 1, 4, 5)  # two queries of the moments, two rounds of training


def charge(number: int, *, settled: bool = True) -> tuple[int, Charge]:
    kept = {"purpose": "x", "config_sha256": "", "mechanisms": (ROUND,), "settled": settled}
    return number, Charge(reservation=str(number), line=number, time=0.0, run_id=f"study/{number}/m-{number}", **kept)


def proofs(
    tmp_path: Path, *, answers: dict[int, bytes | None], found: dict[int, dict[str, object]], open_rounds: tuple[int, ...] = ()
) -> Proofs:
    study = Study(tmp_path)
    for number, reply in answers.items():
        message = study.message(f"m-{number}")
        message.begin("d" * 64)
        if number in found:
            message.note_proof(found[number])
        if reply is not None:
            message.answer("d" * 64, reply)
    return proofs_of(study, [charge(number, settled=number not in open_rounds) for number in ROUNDS], largest_bytes=1 << 20)


FACTS = {"unit": "patient", "declared_patients": 1, "max_images_per_patient": 1, "delta": 1e-5, "charged": (), "ledger_epsilon": 1.0}


def given() -> bytes:
    from federated.messages import Facts

    return encode_reply(request_sha256="0" * 64, facts=Facts.model_validate(FACTS), arrays={})


def test_all_rounds_proved_are_all_that_the_checks_ask_for(tmp_path: Path) -> None:
    moments = {"findings": dict.fromkeys(ALWAYS, GOOD), "audits": {}}
    whole = proofs(tmp_path, answers=dict.fromkeys(ROUNDS, given()), found={0: moments, 1: moments, 4: TRAINED, 5: TRAINED})
    assert set(whole.selfcheck) == {*ALWAYS, *REQUIRED}
    assert set(whole.canaries) == {BEFORE, DURING}
    assert whole.uses_sgd


def test_the_worst_round_counts_and_a_round_that_lacks_a_proof_leaves_a_gap(tmp_path: Path) -> None:
    moments = {"findings": dict.fromkeys(ALWAYS, GOOD), "audits": {}}
    bad = {**TRAINED, "findings": {**TRAINED["findings"], "noise_scale": {**GOOD, "ok": False}}}
    spoilt = proofs(tmp_path / "a", answers=dict.fromkeys(ROUNDS, given()), found={0: moments, 1: moments, 4: bad, 5: TRAINED})
    assert not spoilt.selfcheck["noise_scale"]["ok"]
    gap = proofs(tmp_path / "b", answers=dict.fromkeys(ROUNDS, given()), found={0: moments, 1: moments, 4: TRAINED})
    assert set(gap.selfcheck) == set(ALWAYS)
    assert not gap.canaries
    one_query = proofs(tmp_path / "d", answers=dict.fromkeys(ROUNDS, given()), found={0: moments, 4: TRAINED, 5: TRAINED})
    assert set(one_query.selfcheck) == set(REQUIRED), "the noise of one query was seen, that of another was not"
    forgotten = proofs(tmp_path / "c", answers=dict.fromkeys(ROUNDS[:-1], given()), found={0: moments, 1: moments, 4: TRAINED})
    assert not set(REQUIRED) & set(forgotten.selfcheck), "of a charged round without any trace nobody knows what left"


@pytest.mark.parametrize("part", [BEFORE, DURING])
@pytest.mark.parametrize("bad", [4, 5])
def test_the_canaries_of_every_round_count(tmp_path: Path, part: str, bad: int) -> None:
    """An engine that lost its noise in one round, or was faulty when one began."""
    careless = audit(np.random.default_rng(3), noise=0.1)
    faulty = {**TRAINED, "audits": {BEFORE: AUDIT, DURING: AUDIT, part: careless.to_json()}}
    found = proofs(tmp_path, answers={4: given(), 5: given()}, found={4: TRAINED, 5: TRAINED, bad: faulty})
    sound = Audit.from_json(AUDIT)
    whole = {name: Audit.from_json(found.canaries[name]) for name in (BEFORE, DURING)}
    assert whole[part].correct == sound.correct + careless.correct > 2 * sound.correct
    assert whole[DURING if part == BEFORE else BEFORE].correct == 2 * sound.correct
    assert whole[part].cases == 2000


def test_a_round_that_was_refused_or_cut_off_released_nothing_and_needs_no_proof(tmp_path: Path) -> None:
    failed = encode_refusal(Code.FAILED, request_sha256="0" * 64)
    found = proofs(tmp_path, answers={0: failed, 1: failed, 4: given(), 5: None}, found={4: TRAINED}, open_rounds=(5,))
    assert set(found.selfcheck) == {*ALWAYS, *REQUIRED}
    assert "released no moments" in found.selfcheck[ALWAYS[0]]["detail"]


def test_a_closed_charge_whose_answer_is_gone_needs_a_proof(tmp_path: Path) -> None:
    """It was kept, so it may have left; whoever deletes it and its proof hides what the noise was."""
    moments = {"findings": dict.fromkeys(ALWAYS, GOOD), "audits": {}}
    found = proofs(tmp_path, answers={0: given(), 1: None, 4: given(), 5: given()}, found={0: moments, 4: TRAINED, 5: TRAINED})
    assert set(found.selfcheck) == set(REQUIRED)


def test_a_query_without_its_noise_is_not_hidden_by_a_later_one(tmp_path: Path) -> None:
    good, bad = ({"findings": {key: {**GOOD, "ok": ok} for key in ALWAYS}, "audits": {}} for ok in (True, False))
    found = proofs(tmp_path, answers=dict.fromkeys(ROUNDS, given()), found={0: bad, 1: good, 4: TRAINED, 5: TRAINED})
    assert not any(found.selfcheck[name]["ok"] for name in ALWAYS)
