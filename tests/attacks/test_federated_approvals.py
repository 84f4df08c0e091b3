"""Ways to release images of several hospitals without the word of one of them: each is refused by one line that names it."""

from __future__ import annotations

import html
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from joint_release_cases import SITES, Joint, played
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

import federated.site_checks as site_checks
from dpsynth.artifacts import RunFolder, read_json, sha256_file, write_bytes, write_json
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.verdict import Verdict
from dpsynth.config import GateConfig
from dpsynth.data.candidates import FILE, load_candidates, save_candidates, to_unit_range
from dpsynth.data.images_digest import images_digest
from dpsynth.data.split import split_patients
from dpsynth.errors import ArtifactError, BudgetExceeded, DpsynthError, GateRefused, LedgerError, SignatureError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.guarantee import Guarantee, round_up
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease, merged, to_json
from dpsynth.progress import silent
from dpsynth.release.bundle import MANIFEST, SIGNATURE, release_files
from dpsynth.release.federated import load_federated_run
from dpsynth.release.federated_gate import SiteRecord, SitesQuestion, claimed_with, decide_sites
from dpsynth.release.gate import Allowed, Refused
from dpsynth.release.statement import SiteStatement, open_site_statement, sign_site_statement, site_statement
from dpsynth.release.verify import ledger_anchors, verified, verify
from dpsynth.signing import generate_key, key_id, load_private, load_public, sign_statement, verify_envelope
from dpsynth.trained import read_claim
from federated.candidates import pack
from federated.policy import load_policy
from federated.site_approval import approve, refuse
from federated.site_checks import check_candidates


def opened(joint: Joint, site: str) -> SiteStatement:
    return open_site_statement(read_json(joint.statement(site)), load_public(joint.key(site).with_name("signing.pub")))


def says(joint: Joint, site: str, **changes: Any) -> None:
    """The site signs its statement with other values, as a site that lies can."""
    fields = {**opened(joint, site).model_dump(mode="json"), **changes}
    write_json(joint.statement(site), sign_site_statement(site_statement(fields), load_private(joint.key(site))))


def sealed(joint: Joint) -> None:
    """The stage's record fits its files again, as the owner of the run folder can make it."""
    run = RunFolder.open(joint.run)
    run.complete("generate", needs=("train",), facts=json.loads((joint.run / "generate" / "stage.json").read_text())["facts"])


def other_candidates(joint: Joint) -> None:
    run = RunFolder.open(joint.run)
    candidates = load_candidates(run)
    candidates.images[3, 0, 5, 5] ^= 1
    save_candidates(run, candidates)
    sealed(joint)


def swapped_labels(joint: Joint) -> None:
    run = RunFolder.open(joint.run)
    candidates = load_candidates(run)
    candidates.labels[:] = 1 - candidates.labels
    save_candidates(run, candidates)
    sealed(joint)


def forged(joint: Joint) -> None:
    envelope = read_json(joint.statement("south"))
    envelope["payload"] = envelope["payload"].replace("A", "B", 1)
    write_json(joint.statement("south"), envelope)


def a_strangers_key(joint: Joint) -> None:
    private, _ = generate_key(joint.folder / "stranger")
    write_json(joint.statement("south"), sign_site_statement(opened(joint, "south"), load_private(private)))


def one_speaks_for_the_other(joint: Joint) -> None:
    write_json(joint.statement("south"), sign_site_statement(opened(joint, "south"), load_private(joint.key("north"))))


def half_the_epsilon(joint: Joint) -> None:
    says(joint, "south", epsilon=opened(joint, "south").epsilons[0] / 2)


def fewer_rounds(joint: Joint) -> None:
    says(joint, "south", rounds=[*range(5)])


def fewer_steps(joint: Joint) -> None:
    mechanisms = [dict(value) for value in opened(joint, "south").mechanisms]
    mechanisms[1]["steps"] -= 2
    says(joint, "south", mechanisms=mechanisms)


def more_noise_than_asked(joint: Joint) -> None:
    mechanisms = [dict(value) for value in opened(joint, "south").mechanisms]
    mechanisms[0]["noise_multiplier"] *= 4
    says(joint, "south", mechanisms=mechanisms)


def training_with(name: str, factor: float) -> Callable[[Joint], None]:
    def fault(joint: Joint) -> None:
        mechanisms = [dict(value) for value in opened(joint, "south").mechanisms]
        mechanisms[1][name] *= factor
        says(joint, "south", mechanisms=mechanisms)

    return fault


def a_little_more_noise(joint: Joint) -> None:
    """Of the moments, in the coordinator's count: another epsilon by less than is told apart, and other mechanisms."""

    def change(value: dict[str, Any]) -> None:
        south = next(site for site in value["sites"] if site["site"] == "south")
        south["mechanisms"][0]["noise_multiplier"] *= 1.0001

    edited_record(joint, change)


def more_rounds_than_counted(joint: Joint) -> None:
    says(joint, "south", rounds=[*range(7)])


def edited_record(joint: Joint, change: Callable[[dict[str, Any]], None]) -> None:
    """The coordinator's own count of the study, rewritten and sealed again."""
    record = joint.run / "train" / "federation.json"
    value = read_json(record)
    change(value)
    write_json(record, value)
    RunFolder.open(joint.run).complete("train", facts={"study": "joint"})
    sealed(joint)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (other_candidates, "north: it approved other images than these"),
        (swapped_labels, "south: it approved other images than these"),
        (forged, "signature was not made by this key|is signed by no key"),
        (a_strangers_key, "south.dsse.json is signed by no key that this study knows"),
        (one_speaks_for_the_other, "signed with the key of north and speaks for south"),
        (half_the_epsilon, "south: it states epsilon"),
        (fewer_rounds, "south: its ledger states fewer rounds than it answered: 5 missing"),
        (lambda joint: says(joint, "south", rounds=[0, 2, 3, 4, 5]), "south: its ledger states fewer rounds than it answered: 1 missing"),
        (fewer_steps, "south: its ledger booked other mechanisms than it was asked for"),
        (more_noise_than_asked, "south: its ledger booked other mechanisms than it was asked for"),
        (a_little_more_noise, "south: its ledger booked other mechanisms than it was asked for"),
        (training_with("noise_multiplier", 2), "south: its ledger booked other mechanisms than it was asked for"),
        (training_with("sampling_probability", 0.5), "south: its ledger booked other mechanisms than it was asked for"),
        (more_rounds_than_counted, "south: its ledger states rounds that were not counted for it: 6"),
        (lambda joint: says(joint, "south", decision="refused"), "south: it refused"),
        (lambda joint: says(joint, "south", required=["accounting", "mechanism", "membership"]), "did not require the check 'copying'"),
        (lambda joint: says(joint, "south", required=["accounting", "mechanism", "membership", "copying"]), "require the check 'content'"),
        (lambda joint: says(joint, "south", epsilon=opened(joint, "south").epsilons[0] * 0.98), "south: it states epsilon"),
        (lambda joint: edited_record(joint, lambda value: value["spending"].update(delta=1e-6)), "the study counts at delta 1e-06"),
        (lambda joint: says(joint, "south", attempt=3), "south: attempt 3 of 2 allowed"),
        (lambda joint: says(joint, "south", outcomes={"copying": "fail"}), "south: copying: fail"),
        (lambda joint: says(joint, "south", outcomes={"copying": "inconclusive"}), "south: copying: inconclusive"),
        (lambda joint: says(joint, "south", ledger_epsilon="inf"), "south: it states epsilon inf for its whole ledger"),
        (lambda joint: says(joint, "south", ledger_epsilon=1.0), "for its whole ledger, of which this study is a part"),
        (lambda joint: says(joint, "south", delta=1e-3), "south: it counts at delta 0.001"),
        (lambda joint: says(joint, "south", study="other"), "south: its statement is about another study"),
        (lambda joint: says(joint, "south", plan_sha256="0" * 64), "south: its statement is about another study or plan"),
        (lambda joint: says(joint, "south", unit="image"), "south: it protects the image"),
    ],
)
def test_no_release_without_every_sites_word_on_these_images(joint: Joint, fault: Callable[[Joint], None], words: str) -> None:
    fault(joint)
    with pytest.raises(DpsynthError, match=words):
        joint.release()
    assert not (joint.folder / "out").exists()


def test_a_study_that_requires_nothing_cannot_let_a_site_leave_out_what_no_policy_can(
    joint: Joint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpsynth.release.federated.required_checks", lambda _: ())
    says(joint, "south", required=["accounting", "mechanism", "membership"])
    with pytest.raises(GateRefused, match="south: it did not require the check 'copying'"):
        joint.release()


def test_a_site_that_was_charged_and_is_silent_stops_the_release(joint: Joint) -> None:
    with pytest.raises(GateRefused, match="south: no approval of this site was given"):
        joint.release(approvals=[joint.statement("north")])
    with pytest.raises(ArtifactError, match="second statement of north"):
        joint.release(approvals=[joint.statement("north"), joint.statement("north")])


@pytest.mark.parametrize(
    ("understated", "words"),
    [
        ({}, "south: no approval of this site was given"),
        ({"overlapping": 9.999}, "the epsilon of a patient of all sites"),
        ({"disjoint": 0.5}, "the largest epsilon of a site"),
    ],
)
def test_a_site_that_was_asked_and_never_answered_counts(joint: Joint, understated: dict[str, float], words: str) -> None:
    def silent_south(value: dict[str, Any]) -> None:
        next(site for site in value["sites"] if site["site"] == "south")["answered"] = []
        value["spending"].update(understated)

    edited_record(joint, silent_south)
    with pytest.raises(GateRefused, match=words):
        joint.release(approvals=[joint.statement("north")])


def question_of(joint: Joint) -> SitesQuestion:
    """What the gate is asked of the honest study."""
    run, statements = RunFolder.open(joint.run), {site: opened(joint, site) for site in SITES}
    counted = load_federated_run(run)
    return SitesQuestion(
        run=counted,
        guarantee=claimed_with(read_claim(run), counted, statements),
        required=("content",),
        statements=statements,
        images_sha256=images_digest(load_candidates(run)),
    )


def test_the_gate_takes_no_claim_above_the_studys_epsilon_none_that_accountants_differ_on_and_none_of_other_mechanisms(
    joint: Joint,
) -> None:
    question = question_of(joint)
    claim, epsilon = question.guarantee, question.guarantee.epsilon
    assert isinstance(decide_sites(question, configured_epsilon=epsilon), Allowed)
    for asked, limit, words in (
        (question, 0.99 * epsilon, "of the study"),
        (
            replace(question, guarantee=replace(claim, accounting=replace(claim.accounting, second_opinion=epsilon / 2))),
            epsilon,
            "they differ",
        ),
        (replace(question, guarantee=replace(claim, mechanisms=claim.mechanisms[:1])), epsilon, "not those that any site was asked for"),
    ):
        answer = decide_sites(asked, configured_epsilon=limit)
        assert isinstance(answer, Refused)
        assert any(words in reason for reason in answer.reasons), answer.reasons


def test_the_largest_epsilon_is_that_of_the_site_that_was_charged_most_though_it_never_answered(joint: Joint) -> None:
    question = question_of(joint)
    north, south = (site.model_dump() for site in question.run.sites)
    rounds = {"rounds": [0, 1, 2, 3], "answered": [0, 1, 2, 3], "mechanisms": north["mechanisms"][:1]}
    run = question.run.model_copy(update={"sites": tuple(map(SiteRecord.model_validate, ({**north, **rounds}, {**south, "answered": []})))})
    answer = decide_sites(replace(question, run=run), configured_epsilon=99)
    assert isinstance(answer, Refused)
    assert not any("largest epsilon of a site" in reason or "claimed epsilon" in reason for reason in answer.reasons), answer.reasons


def test_a_coordinator_that_counts_less_for_a_site_than_it_booked_is_found_out(joint: Joint) -> None:
    """The coordinator owns its run folder; the site's ledger does not."""

    def fewer(value: dict[str, Any]) -> None:
        south = next(site for site in value["sites"] if site["site"] == "south")
        south["rounds"], south["answered"] = [*range(5)], [*range(5)]

    edited_record(joint, fewer)
    with pytest.raises(GateRefused, match="south: its ledger states rounds that were not counted for it: 5"):
        joint.release()


def test_a_coordinator_that_leaves_a_query_of_the_moments_out_of_its_count_is_found_out(joint: Joint) -> None:
    def fewer(value: dict[str, Any]) -> None:
        south = next(site for site in value["sites"] if site["site"] == "south")
        south["rounds"], south["answered"] = [0, 2, 3, 4, 5], [0, 2, 3, 4, 5]

    edited_record(joint, fewer)
    with pytest.raises(GateRefused, match="south: its ledger states rounds that were not counted for it: 1"):
        joint.release()


def test_a_query_that_was_never_answered_may_be_missing_with_its_mechanism_and_not_without(joint: Joint) -> None:
    """The coordinator counts it all the same."""
    rounds = [0, 1, 3, 4, 5]
    edited_record(joint, lambda value: next(site for site in value["sites"] if site["site"] == "south").update({"answered": rounds}))
    release, sgd = opened(joint, "south").booked
    assert isinstance(release, MomentRelease)
    booked = merged([*(release.alone(query.name) for query in release.queries if query.name != "energies"), sgd])
    approvals = [joint.statement("north"), joint.statement("south")]
    says(joint, "south", rounds=rounds)
    with pytest.raises(GateRefused, match="south: its ledger booked other mechanisms than it was asked for"):
        joint.release(approvals=approvals)
    epsilon = epsilon_pld(booked, opened(joint, "south").delta)
    says(joint, "south", rounds=rounds, mechanisms=[to_json(mechanism) for mechanism in booked], epsilon=epsilon)
    assert joint.release(approvals=approvals, out="second").is_dir()


@pytest.mark.parametrize(
    ("name", "words"),
    [("disjoint", "the largest epsilon of a site, 0.5, is not"), ("overlapping", "the epsilon of a patient of all sites, 0.5, is not")],
)
def test_a_coordinator_that_understates_what_a_patient_spent_is_found_out(joint: Joint, name: str, words: str) -> None:
    edited_record(joint, lambda value: value["spending"].update({name: 0.5}))
    with pytest.raises(GateRefused, match=words):
        joint.release()


@pytest.mark.parametrize(
    "planted", [{"auc": 0.73}, {"patients": ["MRN-4711"]}, {"outcomes": {"membership": "AUC 0.73"}}, {"site": "North /data"}]
)
def test_the_statement_has_no_place_for_a_private_figure(joint: Joint, planted: dict[str, Any]) -> None:
    fields = {**opened(joint, "south").model_dump(mode="json"), **planted}
    with pytest.raises(ArtifactError, match=next(iter(planted))):
        site_statement(fields)


@pytest.mark.parametrize(
    "mechanism",
    [
        {"kind": "non_private", "reason": "MRN-4711"},
        {"kind": "poisson_dp_sgd", "noise_multiplier": 1, "clip_norm": 1, "sampling_probability": 0.1, "steps": 1, "declared_patients": 9,
         "true_patients": 7},
        {"kind": "moment_release", "noise_multiplier": 1, "queries": [{"name": "MRN 4711", "share": 1, "clip_norm": 1}]},
    ],
)  # fmt: skip
def test_nor_has_a_mechanism_in_it(joint: Joint, mechanism: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="mechanisms"):
        site_statement({**opened(joint, "south").model_dump(mode="json"), "mechanisms": [mechanism]})


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def flipped(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members[name] = members[name][:-30] + bytes([members[name][-30] ^ 1]) + members[name][-29:]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flipped(FILE), "changed since the coordinator signed it"),
        (flipped("moments.npz"), "changed since the coordinator signed it"),
        (flipped("header.dsse.json"), "No coordinator that the policy approves signed|header of the candidates is no JSON"),
        (lambda members: members.update(extra=b"x"), "found other files"),
        (lambda members: members.pop("moments.npz"), "found other files"),
    ],
)
def test_a_file_of_candidates_that_was_changed_is_not_checked(joint: Joint, change: Callable[[dict[str, bytes]], None], words: str) -> None:
    rewritten(joint.candidates, change)
    untouched(joint, DpsynthError, words)


def untouched(joint: Joint, error: type[DpsynthError], words: str) -> None:
    """The check is refused, no attempt is counted and no patient is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_checks, "read_cohort", lambda *_: pytest.fail("patients were read"))
        before = joint.guard("north").ledger.head()
        with pytest.raises(error, match=words):
            check_candidates(joint.guard("north"), joint.candidates, progress=silent)
        assert joint.guard("north").ledger.head() == before


def test_candidates_that_a_stranger_signed_are_not_checked(joint: Joint) -> None:
    private, _ = generate_key(joint.folder / "stranger")
    joint.candidates.unlink()
    pack(joint.run, out=joint.candidates, private=load_private(private))
    untouched(joint, SignatureError, "No coordinator that the policy approves signed")


def test_candidates_of_a_study_that_the_site_never_joined_are_not_checked(joint: Joint) -> None:
    record = joint.run / "train" / "federation.json"
    write_json(record, {**read_json(record), "study": "elsewhere"})
    RunFolder.open(joint.run).complete("train", facts={})
    sealed(joint)
    joint.candidates.unlink()
    pack(joint.run, out=joint.candidates, private=load_private(joint.coordinator_key))
    untouched(joint, GateRefused, "took no part in the study elsewhere")


def test_candidates_of_another_plan_are_not_checked(joint: Joint) -> None:
    record = joint.run / "train" / "federation.json"
    known = read_json(record)
    write_json(record, {**known, "plan": {**known["plan"], "learning_rate": 0.5}})
    RunFolder.open(joint.run).complete("train", facts={})
    sealed(joint)
    joint.candidates.unlink()
    pack(joint.run, out=joint.candidates, private=load_private(joint.coordinator_key))
    untouched(joint, GateRefused, "another plan or another coordinator")


def test_attempts_are_capped_over_a_study_whatever_the_candidates(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_checks, "run_checks", lambda *_, **__: ())
    check_candidates(joint.guard("north"), joint.candidates, progress=silent)
    with pytest.raises(BudgetExceeded, match="checked 2 times and the data owner allows 2"):
        check_candidates(joint.guard("north"), joint.candidates, progress=silent)
    with pytest.raises(GateRefused, match="the required check 'copying' has not run"):  # what the last attempt found counts, not the first
        joint.approve("north", "again.dsse.json")
    assert not (joint.folder / "again.dsse.json").exists()


def test_the_suite_is_given_the_sites_own_patients_by_its_coins_and_all_that_was_withheld(
    joint: Joint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Evidence, GateConfig]] = []

    def look(evidence: Evidence, gate: GateConfig, **_: Any) -> tuple[Verdict, ...]:
        seen.append((evidence, gate))
        return ()

    monkeypatch.setattr("federated.candidates.withheld", lambda _: 7)
    monkeypatch.setattr(site_checks, "run_checks", look)
    joint.candidates.unlink()
    pack(joint.run, out=joint.candidates, private=load_private(joint.coordinator_key))
    check_candidates(joint.guard("north"), joint.candidates, progress=silent)
    ((evidence, gate),) = seen
    (path,) = joint.policy("north").state.rglob("split.json")
    coins = read_json(path)
    split = split_patients(joint.guard("north").images, control_fraction=coins["control_fraction"], key=bytes.fromhex(coins["key"]))
    assert evidence.training.patient_ids == split.training.patient_ids
    assert evidence.control.patient_ids == split.control.patient_ids
    assert np.array_equal(evidence.in_pool, split.in_pool)
    assert 0 < evidence.in_pool.sum() < len(evidence.in_pool)
    assert np.array_equal(evidence.synthetic, to_unit_range(load_candidates(RunFolder.open(joint.run)).images))
    assert evidence.epsilon == pytest.approx(opened(joint, "north").epsilons[0])
    assert evidence.withheld == 7
    assert gate == joint.policy("north").gate


@pytest.mark.parametrize("site", SITES)
def test_what_other_runs_spent_is_in_the_sites_word_and_in_the_release(joint: Joint, site: str) -> None:
    study = opened(joint, site).epsilons[0]
    local = MomentRelease(noise_multiplier=2.0, queries=(GaussianQuery(name="x", share=1.0, clip_norm=1.0),))
    joint.guard(site).ledger.reserve([local], purpose="a local run", run_id="local")
    joint.statement(site).unlink()
    word = joint.approve(site, joint.statement(site).name)
    assert word.epsilons[0] == pytest.approx(study)
    assert word.epsilons[1] == pytest.approx(epsilon_pld([*word.booked, local], word.delta), rel=1e-3)
    assert word.epsilons[1] > 1.01 * study
    out, key = joint.release(), joint.coordinator_key.with_name("signing.pub")
    assert read_json(out / "guarantee.json")["ledger_epsilon"] == pytest.approx(word.epsilons[1])
    said = f"epsilon {round_up(word.epsilons[1], 2):.2f} at most"
    assert any(line.startswith("ledgers") and said in line for line in verified(out, key))
    assert said in (out / "README.md").read_text()
    assert f"{word.epsilons[1]:.4g}, the largest of the sites" in html.unescape((out / "report.html").read_text())
    claims(ledger_epsilon=study)(out)
    resigned(joint, out)
    assert any("the claim's ledger epsilon is" in problem for problem in verify(out, key))


def test_no_word_of_a_check_leaves_but_those_that_the_policy_names(joint: Joint) -> None:
    assert opened(joint, "north").outcomes == {}
    path = joint.folder / "north" / "policy.yaml"
    path.write_text(path.read_text() + "\npublic_checks: [content]\n")
    assert joint.approve("north", "again.dsse.json").outcomes == {"content": "pass"}


def test_a_site_requires_what_it_demands_and_what_the_study_does(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federated.site_checks.run_checks", played)
    path = joint.folder / "north" / "policy.yaml"
    demanded = path.read_text()
    path.write_text(demanded.replace(", content]", "]"))
    assert "content" not in joint.policy("north").gate.required
    check_candidates(joint.guard("north"), joint.candidates, progress=silent)
    assert "content" in joint.approve("north", "again.dsse.json").required
    path.write_text(demanded.replace(", content]", ", content, groups]"))
    with pytest.raises(ArtifactError, match="gate is not the one"):
        joint.approve("north", "more.dsse.json")


def test_a_check_that_cannot_begin_costs_the_site_no_attempt(joint: Joint) -> None:
    """The policy names an encoder that is not there; the path is the policy's own, and relative to it."""
    path = joint.folder / "north" / "policy.yaml"
    settings = yaml.safe_load(path.read_text())
    settings.setdefault("gate", {})["encoder"] = {"path": "missing.onnx", "sha256": "0" * 64}
    write_bytes(path, yaml.safe_dump(settings).encode(), private=True)
    before = joint.guard("north").ledger.summary()
    assert load_policy(path).gate.encoder.path == path.with_name("missing.onnx")
    with pytest.raises(ArtifactError, match="found no file"):
        check_candidates(joint.guard("north"), joint.candidates, progress=silent)
    assert joint.guard("north").ledger.summary() == before


def test_coins_that_were_not_noted_before_training_are_refused(joint: Joint) -> None:
    (path,) = joint.policy("north").state.rglob("split.json")
    write_json(path, {**read_json(path), "key": "00" * 32}, private=True)
    with pytest.raises(LedgerError, match="coins are not those that the ledger noted"):
        check_candidates(joint.guard("north"), joint.candidates, progress=silent)


def test_one_round_with_other_coins_is_enough_to_refuse(joint: Joint) -> None:
    ledger = joint.guard("north").ledger
    ledger.reserve(ledger.charges()[0].mechanisms[:0], purpose="x", run_id="joint/6/train-6-1", coins_sha256="0" * 64)
    with pytest.raises(LedgerError, match="coins are not those that the ledger noted"):
        check_candidates(joint.guard("north"), joint.candidates, progress=silent)


def test_a_round_of_which_no_proof_was_kept_cannot_pass(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard of another make, or a folder that was tidied up: the checks say so, and the gate does not allow it."""
    monkeypatch.setattr(site_checks, "run_checks", played)
    (joint.policy("north").state / "studies" / "joint" / "messages" / "train-5-1" / "proof.json").unlink()
    found = {
        v.check: (v.outcome.value, v.reason) for v in check_candidates(joint.guard("north"), joint.candidates, progress=silent).verdicts
    }
    assert found["accounting"][0] == found["mechanism"][0] == "inconclusive"
    assert "live_noise_scale" in found["accounting"][1]
    with pytest.raises(GateRefused, match="Nothing was signed: accounting: inconclusive"):
        joint.approve("north", "again.dsse.json")


def test_verdicts_that_were_edited_and_rounds_that_came_later_are_not_approved(joint: Joint) -> None:
    path = joint.policy("north").state / "studies" / "joint" / "check" / "verdicts.json"
    kept = path.read_bytes()
    value = read_json(path)
    value["verdicts"][2]["outcome"] = "pass"
    write_json(path, {**value, "attempt": 0}, private=True)
    with pytest.raises(ArtifactError, match="not those that the ledger noted"):
        joint.approve("north", "again.dsse.json")
    path.write_bytes(kept)
    guard = joint.guard("north")
    first = guard.ledger.charges()[0]
    guard.ledger.reserve(first.mechanisms[:0], purpose="x", run_id="joint/6/train-6-1", coins_sha256=first.coins_sha256)
    with pytest.raises(ArtifactError, match="The study went on after the check"):
        joint.approve("north", "again.dsse.json")


def test_a_refusal_is_signed_too_and_says_no_more(joint: Joint) -> None:
    out = joint.folder / "refusal.dsse.json"
    refuse(joint.guard("south"), joint.candidates, key_path=joint.key("south"), out=out, who="Dr B", why="image 3 is my patient")
    said = opened(joint, "south").model_dump()
    statement = open_site_statement(read_json(out), load_public(joint.key("south").with_name("signing.pub")))
    assert {name for name, value in statement.model_dump().items() if value != said[name]} == {"decision", "ledger_lines", "ledger_sha256"}
    with pytest.raises(GateRefused, match="south: it refused"):
        joint.release(approvals=[joint.statement("north"), out])


@pytest.fixture
def out(joint: Joint) -> Path:
    return joint.release()


def resigned(joint: Joint, out: Path) -> None:
    """The coordinator signs whatever lies in a bundle now."""
    private = load_private(joint.coordinator_key)
    manifest, statement = read_json(out / MANIFEST), verify_envelope(read_json(out / SIGNATURE), private.public_key())
    manifest["files"] = {name: {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size} for name in release_files(out)}
    write_json(out / MANIFEST, manifest)
    names = [MANIFEST, *manifest["files"]]
    statement["subject"] = [{"name": name, "digest": {"sha256": sha256_file(out / name)}} for name in names]
    statement["predicate"]["guarantee"] = read_json(out / "guarantee.json")
    speaking = {path.name.removesuffix(".dsse.json"): path for path in (out / "sites").glob("*.dsse.json")}
    statement["predicate"].pop("sites")
    if speaking:
        keys = {site: key_id(load_public(path.with_name(f"{site}.pub"))) for site, path in speaking.items()}
        statement["predicate"]["sites"] = keys
    write_json(out / SIGNATURE, sign_statement(statement, private))


def test_a_sites_statement_that_was_changed_after_the_release_is_named(joint: Joint, out: Path) -> None:
    """By the coordinator's signature, and where the coordinator itself changes it and signs again, by the site's."""
    key, name = joint.coordinator_key.with_name("signing.pub"), "sites/south.dsse.json"
    assert verify(out, key) == []
    kept = (out / name).read_bytes()
    envelope = read_json(out / name)
    envelope["payload"] = envelope["payload"].replace("A", "B", 1)
    write_json(out / name, envelope)
    assert verify(out, key) == [f"{name}: changed since it was signed"]
    resigned(joint, out)
    (problem,) = verify(out, key)
    assert problem.startswith("sites: The signature was not made by this key")
    (out / name).write_bytes(kept)
    resigned(joint, out)
    assert verify(out, key) == []


def test_images_that_no_site_approved_are_named_though_the_coordinator_signs_them(joint: Joint, out: Path) -> None:
    with zipfile.ZipFile(out / "synthetic.npz") as archive:
        assert "train_images.npy" in archive.namelist()
    rewritten(out / "synthetic.npz", flipped("train_images.npy"))
    resigned(joint, out)
    assert verify(out, joint.coordinator_key.with_name("signing.pub")) == [
        f"sites: {site}: it approved other images than these" for site in SITES
    ]


def npy(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values)
    return buffer.getvalue()


def other_pictures(out: Path) -> None:
    for path in (out / "images").iterdir():
        with Image.open(path) as picture:
            marks = PngImagePlugin.PngInfo()
            for name, text in picture.text.items():  # type: ignore[attr-defined]
                marks.add_itxt(name, text)
            Image.fromarray(np.asarray(picture)[::-1]).save(path, pnginfo=marks)


def more_images(out: Path) -> None:
    more = {"test_images.npy": npy(np.zeros((500, 12, 12), np.uint8)), "test_labels.npy": npy(np.zeros((500, 1), np.uint8))}
    rewritten(out / "synthetic.npz", lambda members: members.update(more))


def swapped_names(out: Path) -> None:
    text = (out / "labels.csv").read_text()
    (out / "labels.csv").write_text(text.replace("normal", "?").replace("lesion", "normal").replace("?", "lesion"))


def claims(**changes: Any) -> Callable[[Path], None]:
    def fault(out: Path) -> None:
        write_json(out / "guarantee.json", replace(Guarantee.from_json(read_json(out / "guarantee.json")), **changes).to_json())

    return fault


def smaller_record(out: Path) -> None:
    record = read_json(out / "federation.json")
    record["spending"]["overlapping"] = 0.5
    write_json(out / "federation.json", record)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (other_pictures, "images/synthetic-000000.png: it is not image 0 of synthetic.npz"),
        (more_images, "synthetic.npz: test_images is not what a release of these images has there"),
        (lambda out: (out / "more-images.npz").write_bytes(b"x"), "more-images.npz: no release has such a file"),
        (lambda out: (out / "sites" / "west.pub").write_bytes(b"x"), "sites/west.pub: no release has such a file"),
        (lambda out: shutil.copy(out / "images" / "synthetic-000000.png", out / "images" / "synthetic-000060.png"), "does not list it"),
        (swapped_names, "labels.csv: it is not the table of the images"),
        (lambda out: (out / "images" / "synthetic-000003.png").unlink(), "synthetic-000003.png: missing"),
        (lambda out: (out / "report.html").unlink(), "report.html: missing"),
        (claims(max_images_per_patient=1), "sites: the claim's max images per patient is 1, and by the sites' statements 8"),
        (claims(data_name="other"), "sites: the claim's data name is other"),
        (claims(declared_patients=1), "sites: the claim's declared patients is 1"),
        (claims(unprotected=()), "sites: the claim does not name as unprotected: a patient of several sites is protected less"),
        (smaller_record, "sites: the epsilon of a patient of all sites, 0.5, is not"),
    ],
)
def test_what_no_site_approved_is_named_though_the_coordinator_signs_it(
    joint: Joint, out: Path, fault: Callable[[Path], None], words: str
) -> None:
    fault(out)
    resigned(joint, out)
    keys = {site: joint.key(site).with_name("signing.pub") for site in SITES}
    assert any(words in problem for problem in verify(out, joint.coordinator_key.with_name("signing.pub"), keys))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decision": "refused"}, "sites: south: it refused"),
        ({"required": ["accounting", "mechanism", "membership", "copying"]}, "sites: south: it did not require the check 'content'"),
    ],
)
def test_a_word_that_the_gate_would_not_take_is_not_taken_in_a_bundle(joint: Joint, out: Path, changes: dict[str, Any], words: str) -> None:
    says(joint, "south", **changes)
    shutil.copy(joint.statement("south"), out / "sites" / "south.dsse.json")
    resigned(joint, out)
    assert verify(out, joint.coordinator_key.with_name("signing.pub")) == [words]


def test_one_sites_word_cannot_stand_for_anothers_in_a_bundle(joint: Joint, out: Path) -> None:
    for suffix in ("dsse.json", "pub"):
        shutil.copy(out / "sites" / f"north.{suffix}", out / "sites" / f"south.{suffix}")
    resigned(joint, out)
    assert verify(out, joint.coordinator_key.with_name("signing.pub")) == ["sites: south.dsse.json speaks for north."]


def test_a_bundle_without_its_sites_is_found_by_whoever_names_one(joint: Joint, out: Path) -> None:
    shutil.rmtree(out / "sites")
    (out / "federation.json").unlink()
    resigned(joint, out)
    key, north = joint.coordinator_key.with_name("signing.pub"), joint.key("north").with_name("signing.pub")
    assert verify(out, key) == []
    assert verify(out, key, {"north": north}) == ["sites: this release has none, so none can be north"]
    assert "--site-key" in (out / "README.md").read_text()


def test_a_site_that_was_left_out_of_the_bundle_is_missed(joint: Joint, out: Path) -> None:
    record = read_json(out / "federation.json")
    record["sites"] = record["sites"][:1]
    write_json(out / "federation.json", record)
    resigned(joint, out)
    problems = verify(out, joint.coordinator_key.with_name("signing.pub"))
    assert "sites: south: it speaks for a study in which it was not charged" in problems


def without_south(value: dict[str, Any]) -> None:
    """Out of the coordinator's count, with what it was charged; what the rest claims is made to fit."""
    value["sites"] = [site for site in value["sites"] if site["site"] != "south"]
    value["spending"]["overlapping"] = value["spending"]["disjoint"]


def test_a_refusing_site_cannot_be_taken_out_of_the_study_unseen(joint: Joint) -> None:
    """Its name is in the plan to which the other sites' statements are bound, so a plan without it is not the one that they approved."""
    key = joint.coordinator_key.with_name("signing.pub")
    assert not any("is named in the study" in line for line in verified(joint.release(out="whole"), key))
    edited_record(joint, without_south)
    out = joint.release(approvals=[joint.statement("north")])
    assert verify(out, key) == []
    assert any("south is named in the study" in line for line in verified(out, key))
    assert "Named in the study, without a word here: south." in (out / "report.html").read_text()
    assert "south: named in the study" in (out / "README.md").read_text()

    def unnamed(value: dict[str, Any]) -> None:
        without_south(value)
        value["plan"]["sites"] = ["north"]

    edited_record(joint, unnamed)
    with pytest.raises(GateRefused, match="north: its statement is about another study or plan"):
        joint.release(approvals=[joint.statement("north")], out="again")


def test_a_record_of_a_site_that_the_plan_does_not_name_is_none(joint: Joint) -> None:
    edited_record(joint, lambda value: value["plan"].update(sites=["north"]))
    with pytest.raises(ArtifactError, match="record of a federated study"):
        joint.release()


def test_another_key_beside_the_statement_is_named(joint: Joint, out: Path) -> None:
    shutil.copy(joint.key("north").with_name("signing.pub"), out / "sites" / "south.pub")
    resigned(joint, out)
    (problem,) = verify(out, joint.coordinator_key.with_name("signing.pub"))
    assert problem.startswith("sites: ")


def test_each_sites_ledger_is_anchored_in_the_bundle(joint: Joint, out: Path) -> None:
    anchors = ledger_anchors(out)
    for site in SITES:
        ledger = joint.guard(site).ledger
        assert sum(not ledger.problems_of(ledger.path, anchor=anchor) for anchor in anchors) == 1


def test_an_approval_needs_a_flag_to_accept(joint: Joint) -> None:
    with pytest.raises(DpsynthError, match="only a flag can be accepted"):
        approve(
            joint.guard("north"), joint.candidates, key_path=joint.key("north"), out=joint.folder / "x.json", reviews={"copying": "A: B"}
        )


def test_whoever_has_a_sites_key_from_the_site_finds_out_a_coordinator_that_made_up_sites(joint: Joint) -> None:
    """A bundle in which all fits, but for who signed."""
    private, public = generate_key(joint.folder / "made-up")
    write_json(joint.statement("south"), sign_site_statement(opened(joint, "south"), load_private(private)))
    study = joint.folder / "study.yaml"
    study.write_text(study.read_text().replace("south: south/keys/signing.pub", f"south: {public}"))
    out, key = joint.release(), joint.coordinator_key.with_name("signing.pub")
    genuine = {site: joint.key(site).with_name("signing.pub") for site in SITES}
    assert verify(out, key) == []
    assert verify(out, key, {"north": genuine["north"]}) == []
    assert verify(out, key, genuine) == ["sites: south: its statement is not signed by the key that you have of it"]
    assert verify(out, key, {"west": genuine["north"]}) == ["sites: this release has no site west; it has north, south"]
