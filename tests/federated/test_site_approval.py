"""A site's word on candidates: given for the images that were checked, by the ledger that stands, and never after it refused them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cases import verdict
from joint_release_cases import Joint, played

import federated.site_approval as site_approval
import federated.site_checks as site_checks
from dpsynth.artifacts import RunFolder, write_bytes
from dpsynth.checks.kept import Keep, UnfinishedCheck
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import DataConfig
from dpsynth.data.candidates import Candidates, load_candidates, save_candidates
from dpsynth.data.cohort import Cohort
from dpsynth.data.fingerprint import change_data
from dpsynth.data.images_digest import images_digest
from dpsynth.data.source import read_cohort
from dpsynth.errors import (
    ArtifactError,
    BudgetExceeded,
    ConfigError,
    DataError,
    DpsynthError,
    GateRefused,
    LedgerError,
    SignatureError,
    StorageError,
    UsageError,
)
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.progress import silent
from dpsynth.release.statement import SiteStatement, open_site_statement
from dpsynth.signing import generate_key, load_private, load_public, sign_statement, verify_envelope
from federated.candidates import pack
from federated.officer import describe, sign
from federated.site import charges_of
from federated.site_approval import approve, refuse
from federated.site_checks import check_candidates

WHO, WHY = "Dr B", "image 3 is my patient"
HEADER = "header.dsse.json"
MOMENTS = "moments.npz"


@pytest.fixture(autouse=True)
def in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_checks, "run_checks", played)


def ledger(joint: Joint) -> Ledger:
    return Ledger.load(joint.policy("north").ledger)


def checked(joint: Joint) -> None:
    check_candidates(joint.guard("north"), joint.candidates, progress=silent)


def refused(joint: Joint, out: str = "refusal.dsse.json") -> None:
    refuse(joint.guard("north"), joint.candidates, key_path=joint.key("north"), out=joint.folder / out, who=WHO, why=WHY)


def packed(joint: Joint, change: Callable[[Candidates], object]) -> None:
    """The coordinator sends candidates that differ."""
    run = RunFolder.open(joint.run)
    candidates = load_candidates(run)
    change(candidates)
    save_candidates(run, candidates)
    run.complete("generate", needs=("train",), facts=json.loads((joint.run / "generate" / "stage.json").read_text())["facts"])
    joint.candidates.unlink()
    pack(joint.run, out=joint.candidates, private=load_private(joint.coordinator_key))


def one_pixel(candidates: Candidates) -> None:
    candidates.images[3, 0, 5, 5] ^= 1


def other_seeds(candidates: Candidates) -> None:
    candidates.seeds[:] += 1


def headed(joint: Joint, *, key: Path | None = None, moments: bytes | None = None, **changes: Any) -> None:
    """The same candidates under a header with other values, or beside other moments, signed by the coordinator or with another key."""
    with zipfile.ZipFile(joint.candidates) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    statement = verify_envelope(json.loads(members[HEADER]), load_public(joint.coordinator_key.with_name("signing.pub")))
    statement["predicate"].update(changes)
    if moments is not None:
        members[MOMENTS] = moments
        statement["subject"][1]["digest"]["sha256"] = hashlib.sha256(moments).hexdigest()
    members[HEADER] = json.dumps(sign_statement(statement, load_private(key or joint.coordinator_key))).encode()
    with zipfile.ZipFile(joint.candidates, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def with_policy(joint: Joint, **changes: Any) -> None:
    path = joint.folder / "north" / "policy.yaml"
    write_bytes(path, yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}).encode(), private=True)


def finding(monkeypatch: pytest.MonkeyPatch, **outcomes: Outcome) -> None:
    """The next checks come to these outcomes."""

    def run_checks(*arguments: Any, **options: Any) -> tuple[Verdict, ...]:
        found = played(*arguments, **options)
        return tuple(verdict(v.check, outcomes[v.check]) if v.check in outcomes else v for v in found)

    monkeypatch.setattr(site_checks, "run_checks", run_checks)


def dies(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


def nothing(_: Joint) -> None:
    """Happens in between."""


def new_file(joint: Joint) -> None:
    """The same images with other seeds."""
    packed(joint, other_seeds)
    checked(joint)


@pytest.mark.parametrize("then", [nothing, checked, new_file])
def test_images_that_the_site_refused_are_never_approved_again(joint: Joint, then: Callable[[Joint], None]) -> None:
    """An approval of them is there already; what was handed over stands, and no other follows."""
    refused(joint)
    then(joint)
    with pytest.raises(GateRefused, match=rf"^Nothing was signed: these images were refused by a person \({WHO}: {WHY}\)") as error:
        joint.approve("north", "again.dsse.json")
    assert "\n" not in str(error.value)
    assert not (joint.folder / "again.dsse.json").exists()


def test_a_refusal_speaks_of_these_images_and_of_this_site_alone(joint: Joint) -> None:
    refused(joint)
    assert joint.approve("south", "again.dsse.json").decision == "approved"
    packed(joint, one_pixel)
    checked(joint)
    assert joint.approve("north", "again.north.json").decision == "approved"


def test_each_decision_is_in_the_ledger_with_its_words_and_what_is_signed_holds_no_digest_of_them(
    joint: Joint, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding(monkeypatch, copying=Outcome.FLAG)
    checked(joint)
    reviews, before = {"copying": f"{WHO}: looked at all"}, ledger(joint).head()
    word = approve(
        joint.guard("north"), joint.candidates, key_path=joint.key("north"), out=joint.folder / "again.dsse.json", reviews=reviews
    )
    assert ledger(joint).refusal(word.images_sha256) == "", "an approval is none"
    refused(joint)
    approved, no = ledger(joint).decisions()[-2:]
    assert (approved["decision"], approved["words"]) == ("released", reviews)
    assert (no["decision"], no["words"]) == ("refused", {WHO: WHY})
    digest = images_digest(load_candidates(RunFolder.open(joint.run)))
    assert {said["candidates_sha256"] for said in (approved, no)} == {word.images_sha256} == {digest}
    assert (word.ledger_lines, word.ledger_sha256) == before
    assert len({said["salt"] for said in (approved, no)}) == 2, "later statements hold a digest over the words: it must not tell them"
    assert all(len(bytes.fromhex(said["salt"])) >= 16 for said in (approved, no))


@pytest.mark.parametrize("act", [lambda joint: joint.approve("north", "refusal.dsse.json"), refused], ids=["approve", "refuse"])
def test_a_word_is_noted_before_it_can_be_handed_over_and_not_when_nothing_was_signed(
    joint: Joint, monkeypatch: pytest.MonkeyPatch, act: Callable[[Joint], object]
) -> None:
    known, out = len(ledger(joint).decisions()), joint.folder / "refusal.dsse.json"
    out.write_text("something else")
    with pytest.raises(ArtifactError):
        act(joint)
    assert len(ledger(joint).decisions()) == known
    out.unlink()
    monkeypatch.setattr(site_approval, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        act(joint)
    assert len(ledger(joint).decisions()) == known + 1


def test_candidates_that_were_not_checked_are_not_approved_in_the_place_of_others(joint: Joint) -> None:
    packed(joint, one_pixel)
    with pytest.raises(GateRefused, match="Nothing was signed: the candidates are not those that were checked"):
        joint.approve("north", "again.dsse.json")


def other_coordinator(joint: Joint) -> None:
    """The policy approves two; the study is of the first."""
    private, public = generate_key(joint.folder / "second")
    with_policy(joint, coordinators=["../keys/signing.pub", str(public)])
    headed(joint, key=private)


@pytest.mark.parametrize(
    ("sent", "error", "words"),
    [
        (lambda joint: headed(joint, images_sha256="0" * 64), SignatureError, "are not those that its header names"),
        (other_coordinator, GateRefused, "of another plan or another coordinator than the study joint"),
    ],
)
def test_candidates_under_another_name_or_of_another_coordinator_are_neither_checked_nor_approved(
    joint: Joint, sent: Callable[[Joint], None], error: type[DpsynthError], words: str
) -> None:
    sent(joint)
    before = ledger(joint).head()
    for act in (checked, lambda joint: joint.approve("north", "again.dsse.json")):
        with pytest.raises(error, match=words):
            act(joint)
    assert ledger(joint).head() == before


def test_an_accepted_flag_accepts_nothing_else(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    finding(monkeypatch, copying=Outcome.FLAG, membership=Outcome.FAIL)
    checked(joint)
    out = joint.folder / "again.dsse.json"
    with pytest.raises(GateRefused, match="Nothing was signed: membership: fail"):
        approve(joint.guard("north"), joint.candidates, key_path=joint.key("north"), out=out, reviews={"copying": f"{WHO}: looked"})
    assert not out.exists()


def died(joint: Joint) -> None:
    """A check that was killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_checks, "run_checks", dies)
        with pytest.raises(KeyboardInterrupt):
            checked(joint)


def test_a_check_that_dies_costs_an_attempt_and_the_word_states_it(joint: Joint) -> None:
    """What was found before it still stands."""
    died(joint)
    assert joint.approve("north", "again.dsse.json").attempt == 2


def test_a_check_that_died_goes_on_under_its_own_attempt_with_what_it_had(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site allows two attempts; the first one was over before."""
    made: list[int] = []

    def run_checks(*arguments: Any, keep: Keep, **options: Any) -> tuple[Verdict, ...]:
        keep("long", lambda: {"rows": np.array(made.append(1) or 1)})
        return dies() if len(made) == 1 and not notes else played(*arguments, **options)

    notes: list[str] = []
    monkeypatch.setattr(site_checks, "run_checks", run_checks)
    with pytest.raises(KeyboardInterrupt):
        checked(joint)
    check_candidates(joint.guard("north"), joint.candidates, progress=silent, note=notes.append)
    assert (notes, made) == (["Attempt 2 of 2, goes on from an unfinished check."], [1])
    with pytest.raises(BudgetExceeded, match="checked 2 times"):
        checked(joint)


def test_a_new_attempt_computes_all_of_it_anew(tmp_path: Path) -> None:
    """Else images could be approved by what others were found to be."""
    ledger = Ledger.open_new(
        tmp_path / "ledger.jsonl", data_name="x", unit=PrivacyUnit.PATIENT, epsilon=10.0, delta=1e-5, max_gate_attempts=2,
        data_digest="x", digest_salt="00",
    )  # fmt: skip
    ledger.reserve(
        [MomentRelease(noise_multiplier=20.0, queries=(GaussianQuery(name="x", share=1.0, clip_norm=1.0),))], purpose="x", run_id="x"
    )
    check = UnfinishedCheck(tmp_path / "check")
    for attempt, images in enumerate((3, 4), start=1):
        assert check.booked(ledger, "x", {"images": images}) == attempt
        for _ in range(2):
            assert check("features", lambda images=images: {"rows": np.array([images])})["rows"] == [images]


@pytest.mark.parametrize(
    "change",
    [
        lambda joint: packed(joint, one_pixel),
        lambda joint: with_policy(joint, gate={"family_error": 0.01}),
        lambda joint: headed(joint, withheld=500),
        lambda joint: headed(joint, delta=1e-7),
    ],
)
def test_a_check_of_anything_else_is_another_attempt(joint: Joint, change: Callable[[Joint], None]) -> None:
    died(joint)
    change(joint)
    with pytest.raises(BudgetExceeded, match="checked 2 times"):
        checked(joint)


def changed_data(joint: Joint) -> dict[str, Any]:
    return dict(yaml.safe_load((joint.folder / "north" / "policy.yaml").read_text())["data"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate", {"required": ["content"], "largest_membership_auc": 0.95}),
        ("gate", {"required": ["content"], "largest_membership_auc": 0.9, "smallest_precision": 0.01}),
        ("gate", {"required": ["content"], "largest_membership_auc": 0.9, "content": {"contrast": [0.02, 0.01]}}),
        ("data", {"declared_patients": 9000}),
    ],
)
def test_a_policy_that_became_another_since_the_check_allows_nothing(joint: Joint, name: str, value: dict[str, Any]) -> None:
    with_policy(joint, **{name: value if name == "gate" else {**changed_data(joint), **value}})
    with pytest.raises(ArtifactError, match=f"{name} is not the one that the checks ran under"):
        joint.approve("north", "again.dsse.json")


@pytest.mark.parametrize("value", [{"intensity_range": [0, 4096]}, {"max_images_per_patient": 1}])
def test_candidates_are_compared_with_images_prepared_as_they_were_trained_on(joint: Joint, value: dict[str, Any]) -> None:
    attempts = ledger(joint).summary()["gate_attempts"]
    with_policy(joint, data={**changed_data(joint), **value})
    with pytest.raises(ConfigError, match=f"{next(iter(value))} is not what it was when the study began"):
        checked(joint)
    assert ledger(joint).summary()["gate_attempts"] == attempts


def test_other_patients_are_not_checked_though_nobody_noted_that_they_changed(joint: Joint) -> None:
    attempts = ledger(joint).summary()["gate_attempts"]
    with_policy(joint, data={**changed_data(joint), "phantom": {**changed_data(joint)["phantom"], "num_patients": 200}})
    with pytest.raises(LedgerError, match="for other data"):
        checked(joint)
    assert ledger(joint).summary()["gate_attempts"] == attempts


def test_attributes_that_were_edited_after_training_are_not_checked(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's digest of the data covers labels and no attributes; what each round was booked for covers both."""
    attempts = ledger(joint).summary()["gate_attempts"]

    def edited(data: DataConfig) -> Cohort:
        cohort = read_cohort(data)
        first = cohort.records[0]
        other = {**first.attributes, "sex": "M" if first.attributes["sex"] == "F" else "F"}
        return replace(cohort, records=(replace(first, attributes=other), *cohort.records[1:]))

    monkeypatch.setattr("federated.site_checks.read_cohort", edited)
    with pytest.raises(DataError, match=r"attributes of the patients \(sex\) are not those with which joint began"):
        checked(joint)
    assert ledger(joint).summary()["gate_attempts"] == attempts


def test_other_moments_beside_images_that_were_checked_are_not_approved(joint: Joint) -> None:
    """Single images are screened against them."""
    with zipfile.ZipFile(joint.candidates) as archive, np.load(io.BytesIO(archive.read(MOMENTS))) as found:
        arrays = {**found, "variance": 4 * found["variance"]}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    headed(joint, moments=buffer.getvalue())
    with pytest.raises(ArtifactError, match="signed these images again, with other numbers"):
        joint.approve("north", "again.dsse.json")


@pytest.mark.parametrize("changes", [{"withheld": 500}, {"delta": 1e-7}, {"required": ["utility"]}])
def test_other_numbers_beside_images_that_were_checked_are_not_approved(joint: Joint, changes: dict[str, Any]) -> None:
    headed(joint, **changes)
    with pytest.raises(ArtifactError, match="signed these images again, with other numbers"):
        joint.approve("north", "again.dsse.json")


def test_a_check_that_died_does_not_go_on_when_the_patients_changed(joint: Joint) -> None:
    """Else those who came would be looked at, with no attempt booked, and those who withdrew as well."""
    died(joint)
    with_policy(joint, data={**changed_data(joint), "phantom": {**changed_data(joint)["phantom"], "num_patients": 200}})
    change_data(joint.policy("north").data, ledger(joint), who=WHO, why="withdrew", progress=silent)
    with pytest.raises(LedgerError, match="before the data changed"):
        checked(joint)


def test_two_checks_at_once_are_one_too_many(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has computed of its images would be taken for the other's."""

    def meanwhile(*arguments: Any, **options: Any) -> tuple[Verdict, ...]:
        with pytest.raises(ArtifactError, match="being checked already"):
            checked(joint)
        return played(*arguments, **options)

    monkeypatch.setattr(site_checks, "run_checks", meanwhile)
    checked(joint)


@pytest.mark.parametrize(
    ("act", "after"),
    [
        (lambda joint: joint.approve("north", "again.dsse.json"), "question_of"),
        (lambda joint: joint.approve("north", "again.dsse.json"), "load_private"),
        (refused, "load_private"),
    ],
)
def test_what_is_noted_between_question_and_decision_stops_the_decision(
    joint: Joint, monkeypatch: pytest.MonkeyPatch, act: Callable[[Joint], None], after: str
) -> None:
    """A refusal, or a charge that the statement's epsilon would not hold."""
    local = MomentRelease(noise_multiplier=20.0, queries=(GaussianQuery(name="x", share=1.0, clip_norm=1.0),))
    real = getattr(site_approval, after)

    def slow(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        ledger(joint).reserve([local], purpose="a local run", run_id="local")
        return found

    monkeypatch.setattr(site_approval, after, slow)
    before = ledger(joint).decisions()
    with pytest.raises(LedgerError, match="noted in the ledger meanwhile"):
        act(joint)
    assert ledger(joint).decisions() == before


@pytest.mark.parametrize(
    "act", [lambda joint, out: joint.approve("north", out), lambda joint, out: refused(joint, out)], ids=["approve", "refuse"]
)
def test_a_decision_whose_statement_cannot_be_written_is_not_noted(joint: Joint, act: Callable[[Joint, str], object]) -> None:
    """Else it would stand in the ledger for good, and once more with each try."""
    (joint.folder / "file").write_text("no folder")
    before = ledger(joint).decisions()
    with pytest.raises(StorageError):
        act(joint, "file/north.json")
    assert ledger(joint).decisions() == before


def test_images_can_be_refused_that_nobody_checked(joint: Joint) -> None:
    """A no for reasons of law costs no attempt, and can be said when nothing can be checked any more."""
    shutil.rmtree(joint.policy("north").state / "studies" / "joint" / "check")
    attempts = ledger(joint).gate_attempts(charges_of(ledger(joint), "joint")[0][1].run_id)
    packed(joint, one_pixel)
    refused(joint)
    said = open_site_statement(
        json.loads((joint.folder / "refusal.dsse.json").read_text()), load_public(joint.key("north").with_name("signing.pub"))
    )
    assert (said.decision, said.attempt, said.outcomes) == ("refused", attempts, {})
    with pytest.raises(ArtifactError, match="have not been checked"):
        joint.approve("north", "again.dsse.json")


def test_the_coordinators_key_signs_no_approval(joint: Joint) -> None:
    with pytest.raises(UsageError, match="key of a coordinator"):
        approve(joint.guard("north"), joint.candidates, key_path=joint.coordinator_key, out=joint.folder / "x", reviews={})


def test_a_refusal_beside_an_approval_stops_the_release(joint: Joint) -> None:
    refused(joint)
    with pytest.raises(GateRefused, match="north refused these images"):
        joint.release(approvals=[joint.statement("north"), joint.statement("south"), joint.folder / "refusal.dsse.json"])
    assert not (joint.folder / "out").exists()


@pytest.mark.parametrize("act", [approve, partial(refuse, who=WHO, why=WHY)], ids=["approve", "refuse"])
def test_the_officer_signs_elsewhere_what_the_site_decided_without_the_key(joint: Joint, act: Callable[..., SiteStatement]) -> None:
    """The key is never on the guard's machine; what comes out is what one step would have made."""
    key, plain, out = joint.key("north").rename(joint.folder / "officer.key"), joint.folder / "north.json", joint.folder / "north.signed"
    reviews = {} if isinstance(act, partial) else {"reviews": {}}
    word = act(joint.guard("north"), joint.candidates, key_path=None, out=plain, **reviews)
    assert ledger(joint).decisions()[-1]["decision"] == {"approved": "released", "refused": "refused"}[word.decision]
    with pytest.raises(DpsynthError):
        joint.release(approvals=[plain, joint.statement("south")])
    shutil.rmtree(joint.folder / "north" / "state")
    assert sign(plain, key_path=key, out=out) == word
    assert open_site_statement(json.loads(out.read_text()), load_private(key).public_key()) == word
    if word.decision == "approved":
        assert joint.release(approvals=[out, joint.statement("south")]).is_dir()
    else:
        with pytest.raises(GateRefused, match="refused"):
            joint.release(approvals=[out, joint.statement("south")])


def test_what_the_officer_signs_is_all_printed_before(joint: Joint) -> None:
    word = joint.approve("north", "again.dsse.json")
    text = "\n".join(describe(word))
    shown = [
        word.site,
        word.study,
        word.decision,
        word.images_sha256,
        word.plan_sha256,
        word.ledger_sha256,
        f"attempt    {word.attempt} of",
    ]
    assert [
        part for part in (*shown, f"{word.epsilons[0]:.4g} of this study", f"{word.epsilons[1]:.4g} of all runs") if part not in text
    ] == []


@pytest.mark.parametrize("content", ["{", "[]", '{"site": "north"}', None])
def test_the_officer_signs_nothing_but_a_statement(joint: Joint, content: str | None) -> None:
    path = joint.folder / "north.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError):
        sign(path, key_path=joint.key("north"), out=joint.folder / "signed")
    assert not (joint.folder / "signed").exists()


@pytest.mark.parametrize("act", [checked, lambda joint: joint.approve("north", "again.dsse.json"), refused])
def test_an_older_ledger_that_forgets_what_was_looked_at_and_decided_is_known_as_such(joint: Joint, act: Callable[[Joint], None]) -> None:
    path = joint.policy("north").ledger
    files = {name: name.read_bytes() for name in (path, path.with_name(path.name + ".head"))}
    act(joint)
    for name, content in files.items():
        name.write_bytes(content)
    with pytest.raises(LedgerError, match="or an older copy"):
        checked(joint)


def test_a_study_at_a_smaller_delta_is_held_to_its_limit_and_states_its_whole_ledger_there(joint: Joint) -> None:
    """At the policy's delta the study keeps to the limit, at its own it does not."""
    delta, limit = joint.policy("north").delta / 10, joint.policy("north").study_epsilon
    local = MomentRelease(noise_multiplier=2.0, queries=(GaussianQuery(name="x", share=1.0, clip_norm=1.0),))
    assert ledger(joint).spent() < limit
    headed(joint, delta=delta)
    checked(joint)
    with pytest.raises(GateRefused, match=rf"Nothing was signed: epsilon .* is above the {limit:g} of"):
        joint.approve("north", "again.dsse.json")
    with_policy(joint, study_epsilon=joint.policy("north").epsilon)
    ledger(joint).reserve([local], purpose="a local run", run_id="local")
    word = joint.approve("north", "again.dsse.json")
    assert word.epsilons == pytest.approx([epsilon_pld(word.booked, delta), epsilon_pld([*word.booked, local], delta)], rel=1e-3)
    assert word.epsilons[1] > 1.01 * max(word.epsilons[0], ledger(joint).spent())


def test_a_study_whose_patients_changed_is_checked_no_more_and_what_was_checked_can_be_approved(joint: Joint) -> None:
    data = changed_data(joint)
    with_policy(joint, data={**data, "phantom": {**data["phantom"], "num_patients": data["phantom"]["num_patients"] - 1}})
    change_data(joint.policy("north").data, ledger(joint), who=WHO, why="withdrew", progress=silent)
    with pytest.raises(LedgerError, match="before the data changed"):
        checked(joint)
    assert joint.approve("north", "again.dsse.json").decision == "approved"


def test_what_was_found_is_for_its_owner_only(joint: Joint) -> None:
    shutil.rmtree(joint.policy("north").state / "studies" / "joint" / "check")
    checked(joint)
    found = [*(joint.policy("north").state / "studies" / "joint" / "check").rglob("*")]
    assert {path.name for path in found} == {"content.json", "report.html", "review.html", "verdicts.json"}
    assert {path.stat().st_mode & 0o777 for path in found} == {0o600}
