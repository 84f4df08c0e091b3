"""The guard's bookkeeping: every possibly released round is charged once, whatever is killed, repeated or lost on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_cases import DELTA, EPSILON, Site, World, new_site, told_body

import federated.site as module
from dpsynth.checks.accounting import ALWAYS, REQUIRED
from dpsynth.config import DataConfig
from dpsynth.data.fingerprint import change_data
from dpsynth.data.split import split_patients
from dpsynth.errors import BudgetExceeded, ConfigError, LedgerError, SelfCheckFailed
from dpsynth.model import moment_release
from dpsynth.model.moment_release import QUERIES, Told, raw_counts, told_by
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.calibrate import mu_of
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease, PoissonDpSgd, from_json, merged
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.signing import load_private
from dpsynth.train.loop import fit
from dpsynth.train.monitor import MomentMonitor, Monitor
from dpsynth.train.run import noised_moments, standard_moments
from dpsynth.train.selfcheck import Finding
from federated import rounds
from federated.journal import preparation
from federated.messages import Code, Plan, decode_reply, decode_request
from federated.policy import config_of, load_policy, open_site_ledger
from federated.proofs import proofs_of
from federated.rounds import NET, SUMS, sgd_of, told_arrays
from federated.site import charges_of


def booked(site: Site) -> list[tuple[str, bool]]:
    return [(charge.run_id, charge.settled) for charge in site.guard.ledger.charges()]


def reserve_lines(site: Site) -> list[dict[str, object]]:
    return [entry for entry in map(json.loads, site.policy.ledger.read_text().splitlines()) if entry["type"] == "reserve"]


def ledger_files(site: Site) -> tuple[Path, Path]:
    return site.policy.ledger, site.policy.ledger.with_name("ledger.jsonl.head")


def reopened(site: Site) -> None:
    """Its ledger again from the start, by the policy as it is now."""
    for path in (*ledger_files(site), site.policy.state / "ledger.json"):
        path.unlink(missing_ok=True)
    open_site_ledger(load_policy(site.folder / "policy.yaml"), max_gate_attempts=3, progress=silent)
    site.restart()


def cut_off(*_: object, **__: object) -> None:
    raise OSError("cut off")


def test_a_repeated_message_gets_the_same_bytes_and_no_second_charge(world: World) -> None:
    site = world.sites["a"]
    moments, train = world.request(), world.request("train", 4)
    first = [site.guard.handle(moments), site.guard.handle(train)]
    assert [decode_reply(raw, largest_bytes=1 << 30)[0].outcome for raw in first] == ["ok", "ok"]
    site.restart()
    assert [site.guard.handle(moments), site.guard.handle(train)] == first
    assert booked(site) == [("study/0/moments-0", True), ("study/4/train-4", True)]
    assert not list(site.policy.state.rglob("key")), "the secret of a finished round must not outlive it"


def test_a_refusal_is_repeated_too(world: World) -> None:
    site = world.sites["a"]
    site.write_policy(hours=[{"days": ["mon"], "start": "20:00", "end": "06:00"}])
    site.restart(clock=lambda: datetime(2026, 11, 24, 12, 0))  # a Tuesday
    refused = site.guard.handle(world.request())
    assert decode_reply(refused, largest_bytes=1 << 20)[0].code is Code.HOURS
    site.restart(clock=lambda: datetime(2026, 11, 24, 5, 59))  # still Monday's night
    assert site.guard.handle(world.request()) == refused
    assert world.ask(message_id="again").outcome == "ok"


def test_training_is_that_of_one_site_with_what_the_ledger_holds(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same key, patients and start through the single-site functions give the same numbers, bit by bit."""
    monkeypatch.setattr("federated.journal.fresh_key", lambda: b"k" * 32)
    site, reference = world.sites["a"], world.model.reference
    settings = config_of(site.policy, world.plan)
    split = split_patients(site.guard.images, control_fraction=0.2, key=b"k" * 32)
    whole, expected = world.model.release(world.plan), {}
    monitor = MomentMonitor(mechanism=whole)
    monkeypatch.setattr(monitor, "record", lambda name, _, noised: expected.update({name: noised}))
    alone = noised_moments(settings, split, reference, monitor, NoiseStream(key=b"k" * 32))

    told, groups = Told(), np.arange(2)
    for number, query in enumerate(QUERIES):
        message = world.request("moments", number, arrays=told_arrays(told))
        _, arrays = decode_reply(site.guard.handle(message), largest_bytes=1 << 30)
        np.testing.assert_array_equal(arrays[SUMS], expected[query])
        told = told_by(query, arrays[SUMS], told, groups, reference, whole.noise_stddev)
    for name, array in alone.to_arrays().items():
        np.testing.assert_array_equal(told.moments(reference).to_arrays()[name], array)

    _, weights = decode_reply(site.guard.handle(world.request("train", 4)), largest_bytes=1 << 30)
    release, sgd = merged(mechanism for charge in site.guard.ledger.charges() for mechanism in charge.mechanisms)
    assert isinstance(release, MomentRelease)
    assert isinstance(sgd, PoissonDpSgd)
    assert release.noise_multiplier == pytest.approx(world.plan.moments_noise_multiplier)
    assert (sgd.noise_multiplier, sgd.clip_norm, sgd.steps) == (world.plan.noise_multiplier, 0.05, 2)
    assert sgd.declared_patients == 100, "the batch is divided by the site's own public number"
    denoiser = world.model.denoiser()
    denoiser.transplant(standard_moments(settings, world.model.reference))
    fit(
        denoiser, split.training, sgd, settings.diffusion, stream=NoiseStream(key=b"k" * 32),
        checkpoint=tmp_path / "checkpoint.safetensors", binding="x", callback=lambda step: None,
    )  # fmt: skip
    for name, parameter in denoiser.net.named_parameters():
        np.testing.assert_array_equal(weights[NET + name], parameter.detach().numpy())
        assert not np.array_equal(weights[NET + name], world.bodies["train"][NET + name])


def test_a_round_cut_off_after_its_charge_goes_on_and_is_charged_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site, message = world.sites["a"], world.request("train", 4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_round", lambda *_, **__: (_ for _ in ()).throw(OSError("/secret/path: patient 4711")))
        reply = site.guard.handle(message)
    assert decode_reply(reply, largest_bytes=1 << 20)[0].code is Code.FAILED
    assert b"4711" not in reply
    assert b"secret" not in reply
    assert booked(site) == [("study/4/train-4", False)]
    key = next(site.policy.state.rglob("key")).read_bytes()
    seen = []
    monkeypatch.setattr(module, "train_round", lambda *args, stream, _real=module.train_round, **rest: seen.append(stream) or _real(*args, stream=stream, **rest))  # fmt: skip  # noqa: E501
    site.restart()
    assert decode_reply(site.guard.handle(message), largest_bytes=1 << 30)[0].outcome == "ok"
    assert seen[0]._key == key, "noise of a round is drawn from one key, or two answers could be averaged"
    assert booked(site) == [("study/4/train-4", True)]
    assert len(reserve_lines(site)) == 1


def test_an_answer_that_was_kept_before_the_settlement_is_given_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site, message = world.sites["a"], world.request()
    with monkeypatch.context() as patch:
        patch.setattr(module.Ledger, "settle", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        assert decode_reply(site.guard.handle(message), largest_bytes=1 << 20)[0].code is Code.FAILED
    assert booked(site) == [("study/0/moments-0", False)]
    kept = next(site.policy.state.rglob("reply")).read_bytes()
    site.restart()
    assert site.guard.handle(message) == kept
    assert booked(site) == [("study/0/moments-0", True)]


@pytest.mark.parametrize("lost", ["key", "reply", "study.json", "studies"])
def test_what_cannot_go_on_stays_charged_and_is_refused(world: World, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    site, message = world.sites["a"], world.request("train", 4)
    if lost == "key":
        monkeypatch.setattr(module, "train_round", lambda *_, **__: (_ for _ in ()).throw(OSError))
    site.guard.handle(message)
    for path in list(site.policy.state.rglob(lost)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert world.tell(message).code is Code.LOST
    assert [run_id for run_id, _ in booked(site)] == ["study/4/train-4"]


def test_asking_again_for_an_answer_that_is_gone_does_not_make_it_one_that_never_left(world: World) -> None:
    """Else a refusal would stand in its place, and the checks would ask for no proof of the round."""
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    shutil.rmtree(site.guard.journal.folder / "studies" / "study" / "messages" / "moments-0")
    assert world.ask().code is Code.LOST
    assert world.ask().code is Code.LOST
    study, *_ = site.guard.journal.known("study") or pytest.fail("the study is known")
    ((number, charge),) = charges_of(site.guard.ledger, "study")
    assert not proofs_of(study, [(number, charge)], largest_bytes=1 << 30).selfcheck, "what left is not proved"


def test_rounds_go_forward_only_and_may_leave_gaps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_round", lambda *_, **__: {})
    assert world.ask("train", 4).outcome == "ok"
    assert world.ask("train", 4, message_id="other").code is Code.ORDER
    assert world.ask("moments", 0).code is Code.ORDER
    assert world.ask("train", 5).outcome == "ok"
    assert world.ask("train", 6).code is Code.STEPS
    assert len(reserve_lines(world.sites["a"])) == 2


def test_a_round_that_is_open_is_not_asked_again_by_another_name_nor_passed_by_an_earlier_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train_round", cut_off)
    assert world.ask("train", 5).code is Code.FAILED
    assert world.ask("train", 5, message_id="other").code is Code.ORDER
    assert world.ask("train", 4).code is Code.ORDER
    assert booked(world.sites["a"]) == [("study/5/train-5", False)]


def test_a_round_that_was_overtaken_loses_its_key_and_keeps_its_charge(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_round", lambda *_, **__: (_ for _ in ()).throw(OSError))
        world.ask("train", 4)
    assert world.ask("train", 5).outcome == "ok"
    assert world.ask("train", 4).code is Code.LOST
    assert [run_id for run_id, _ in booked(world.sites["a"])] == ["study/4/train-4", "study/5/train-5"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"smallest_noise_multiplier": 100.0}, Code.NOISE), ({"hours": [{"start": "20:00", "end": "06:00"}]}, Code.HOURS)],
)
def test_a_policy_that_became_stricter_binds_a_study_that_began(world: World, changes: dict[str, Any], code: Code) -> None:
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    site.write_policy(**changes)
    site.restart(clock=lambda: datetime(2026, 11, 24, 12, 0))
    assert world.ask("moments", 1).code is code
    assert world.ask("train", 4).code is code
    assert booked(site) == [("study/0/moments-0", True)]


def a_local_run_leaves(world: World, *queries: str) -> None:
    """Budget for a tenth more than these queries of a study that was charged as it is now."""
    site, release = world.sites["a"], world.model.release(world.plan)
    left = sum(release.query_noise_multiplier(query) ** -2 for query in queries) * 1.1
    mu = (mu_of(EPSILON, DELTA) ** 2 - mu_of(site.guard.ledger.spent(), DELTA) ** 2 - left) ** 0.5
    local = MomentRelease(noise_multiplier=1 / mu, queries=(GaussianQuery(name="x", share=1.0, clip_norm=1.0),))
    site.guard.ledger.reserve([local], purpose="a local run", run_id="local")


def test_local_runs_and_studies_share_one_budget(world: World) -> None:
    """What is left would do for the next round, and not for the rest of the study."""
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    a_local_run_leaves(world, QUERIES[1])
    assert world.ask("moments", 1).code is Code.BUDGET
    site.guard.ledger.require_affordable([world.model.release(world.plan).alone(QUERIES[1])])
    assert len(reserve_lines(site)) == 2


@pytest.mark.parametrize("code", [Code.STUDY_BUDGET, Code.BUDGET])
def test_a_study_that_could_not_end_is_charged_nothing(world: World, caplog: pytest.LogCaptureFixture, code: Code) -> None:
    """The first rounds would be affordable."""
    site = world.sites["a"]
    if code is Code.BUDGET:
        a_local_run_leaves(world, QUERIES[0])
    else:
        site.write_policy(study_epsilon=whole(world) * 0.999)
        site.restart()
    before = site.guard.ledger.charges()
    assert [world.ask(kind).code for kind in ("join", "moments")] == [code] * 2
    assert site.guard.ledger.charges() == before
    assert {Code.BUDGET: "is spent and this run would bring it to", Code.STUDY_BUDGET: "study_epsilon is"}[code] in caplog.text


def test_all_rounds_of_training_that_are_left_are_asked_for_whatever_was_left_out_before(world: World) -> None:
    """Each costs the same, so the bound lies between one of them and both."""
    site, sgd = world.sites["a"], sgd_of(world.plan, steps=world.plan.steps_per_round, declared_patients=100)
    one, both = (epsilon_pld([sgd] * count, DELTA) for count in (1, 2))
    site.write_policy(study_epsilon=(one + both) / 2)
    site.restart()
    assert world.ask("train", 4).code is Code.STUDY_BUDGET
    assert world.ask("train", 5).outcome == "ok"


def another_ledger(site: Site) -> None:
    """Of the same data, sound, and with nothing spent."""
    for path in ledger_files(site):
        path.unlink()
    elsewhere = load_policy(site.folder / "policy.yaml").model_copy(update={"state": site.folder / "elsewhere"})
    open_site_ledger(elsewhere, max_gate_attempts=3, progress=silent)


def keep_ledger(site: Site) -> None:
    """The copy that `older_ledger` puts back."""
    for index, path in enumerate(ledger_files(site)):
        shutil.copy(path, site.folder / f"copy{index}")


def older_ledger(site: Site) -> None:
    """A sound copy from before the last charge."""
    for index, path in enumerate(ledger_files(site)):
        shutil.copy(site.folder / f"copy{index}", path)


def forked_ledger(site: Site) -> None:
    """An older copy that a local run has made as long as the true one."""
    lines = len(site.policy.ledger.read_text().splitlines())
    older_ledger(site)
    while len(site.policy.ledger.read_text().splitlines()) < lines:
        Ledger.load(site.policy.ledger).record_verdicts("local", "0" * 64)


@pytest.mark.parametrize("replace_ledger", [another_ledger, older_ledger, forked_ledger])
@pytest.mark.parametrize("running", [True, False])
def test_a_ledger_that_forgets_what_was_spent_is_not_served(
    world: World, replace_ledger: Callable[[Site], None], *, running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    keep_ledger(site)
    assert world.ask("moments", 1).outcome == "ok"
    replace_ledger(site)
    before = site.policy.ledger.read_bytes()
    if running:
        assert world.ask("moments", 2).code is Code.FAILED
        assert "is not the ledger that this guard knows, or an older copy" in caplog.text
    with pytest.raises(LedgerError, match="is not the ledger that this guard knows, or an older copy"):
        site.restart()
    assert site.policy.ledger.read_bytes() == before


def test_a_study_whose_patients_changed_ends_and_the_next_one_adds_to_its_charges(world: World) -> None:
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    site.write_policy(
        data={**site.policy.data.model_dump(mode="json", exclude_unset=True), "phantom": {"num_patients": 119, "max_images": 2}}
    )
    change_data(load_policy(site.folder / "policy.yaml").data, site.guard.ledger, who="Dr B", why="withdrew", progress=silent)
    assert world.ask("moments", 1).code is Code.FAILED, "the guard still holds the images of before"
    site.restart()
    assert world.ask("moments", 1).code is Code.LOST
    assert len(reserve_lines(site)) == 1
    assert world.ask(study="second", plan=world.changed(rounds=0, trainable="none", noise_multiplier=None)).outcome == "ok"
    assert len(reserve_lines(site)) == 2
    assert site.guard.ledger.spent() > epsilon_pld(site.guard.ledger.charges()[0].mechanisms, DELTA) * 1.1


def test_a_ledger_that_is_replaced_while_a_round_is_booked_lets_no_answer_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site, real = world.sites["a"], module.Ledger.reserve
    assert world.ask().outcome == "ok"
    keep_ledger(site)
    assert world.ask("moments", 1).outcome == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(module.Ledger, "reserve", lambda *given, **options: older_ledger(site) or real(*given, **options))
        patch.setattr(module, "moments_round", lambda *_, **__: pytest.fail("patients were used"))
        assert world.ask("moments", 2).code is Code.FAILED
    with pytest.raises(LedgerError, match="or an older copy"):
        site.restart()


def test_a_round_that_goes_on_after_a_kill_is_noted_before_its_answer_leaves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    keep_ledger(site)
    with monkeypatch.context() as patch:
        patch.setattr(module.Guard, "note_ledger", cut_off)
        assert world.ask("moments", 1).code is Code.FAILED
    site.restart()
    assert world.ask("moments", 1).outcome == "ok"
    older_ledger(site)
    with pytest.raises(LedgerError, match="or an older copy"):
        site.restart()


def test_lines_of_local_runs_are_noted_when_the_guard_sees_them(world: World) -> None:
    site = world.sites["a"]
    keep_ledger(site)
    a_local_run_leaves(world)
    site.restart()
    older_ledger(site)
    with pytest.raises(LedgerError, match="or an older copy"):
        site.restart()


def test_the_ledger_is_not_noted_in_another_users_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root who runs the doctor would leave a file that the guard cannot read."""
    site = world.sites["a"]
    before = (site.policy.state / "ledger.json").read_bytes()
    a_local_run_leaves(world)
    monkeypatch.setattr("federated.journal.os.geteuid", lambda: os.getuid() + 1)
    site.restart()
    assert (site.policy.state / "ledger.json").read_bytes() == before


def test_data_that_change_while_they_are_read_are_not_trained_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site, real = world.sites["a"], module.private_images

    def read(*given: Any) -> Any:
        images = real(*given)
        site.guard.ledger.change_data("others", who="Dr B", why="withdrew")
        return images

    monkeypatch.setattr(module, "private_images", read)
    assert world.ask().code is Code.FAILED
    assert booked(site) == []


def test_all_settings_of_the_data_are_those_of_the_study_but_what_its_own_digests_cover(world: World) -> None:
    """The ledger's digest covers the images wherever they lie, procedural ones and exclusions too; the coins cover their fraction."""
    free = {"path", "name", "phantom", "exclusions", "control_fraction"}
    assert set(preparation(world.sites["a"].policy.data)) == set(DataConfig.model_fields) - free


def test_a_study_goes_on_with_images_prepared_as_they_were_when_it_began(world: World) -> None:
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    site.write_policy(data={**site.policy.data.model_dump(mode="json", exclude_unset=True), "max_images_per_patient": 1})
    site.restart()
    assert world.ask("moments", 1).code is Code.FAILED
    assert len(reserve_lines(site)) == 1


def test_a_lost_ledger_is_not_opened_anew(world: World) -> None:
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    for path in ledger_files(site):
        path.unlink()
    for again in (site.restart, lambda: open_site_ledger(site.policy, max_gate_attempts=3, progress=silent)):
        with pytest.raises(LedgerError, match="fresh or an older one would forget"):
            again()
    assert not site.policy.ledger.exists()


def test_join_costs_nothing_and_reads_no_patient(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "private_images", lambda *_: pytest.fail("patients were read"))
    reply = world.ask("join")
    assert reply.facts is not None
    assert (reply.facts.declared_patients, reply.facts.ledger_epsilon, reply.facts.charged) == (100, 0.0, ())
    assert not booked(world.sites["a"])


def test_an_answer_says_what_its_own_round_cost_and_a_repeated_join_what_the_ledger_holds_by_then(world: World) -> None:
    release = world.model.release(world.plan)
    queries = [release.alone(query) for query in QUERIES[:2]]
    join = world.request("join")
    world.tell(join)
    for number in range(2):
        booked_now = merged(queries[: number + 1])
        for reply in (world.ask("moments", number), world.tell(join)):
            assert reply.facts is not None
            assert [from_json(charged) for charged in reply.facts.charged] == list(booked_now)
            assert reply.facts.ledger_epsilon == pytest.approx(epsilon_pld(booked_now, 1e-5))


def test_no_answer_tells_how_many_patients_there_are(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hospitals that differ in their true number alone: all but the noised arrays is the same."""
    private = load_private(tmp_path / "keys" / "signing.key")
    assert private.sign(b"") == world.private.sign(b"")
    other = new_site(tmp_path / "b", name="a", seed=0, public_key=(tmp_path / "keys" / "signing.pub").read_bytes())
    other.write_policy(data={**json.loads(other.policy.data.model_dump_json(exclude={"phantom"})), "phantom": {"num_patients": 90}})
    reopened(other)
    assert other.guard.images.num_patients != world.sites["a"].guard.images.num_patients
    for message in (world.request("join"), world.request(), world.request("train", 4), world.request("train", 4, message_id="x")):
        replies = [decode_reply(site.guard.handle(message), largest_bytes=1 << 30)[0] for site in (world.sites["a"], other)]
        first, second = (reply.model_dump(exclude={"body_sha256"}) for reply in replies)
        assert first == second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 13.0}, "epsilon: the policy says 13, the ledger's first line 12"),
        ({"delta": 1e-6}, "delta: the policy says 1e-06, the ledger's first line 1e-05"),
    ],
)
def test_a_guard_with_another_ledger_does_not_start(world: World, changes: dict[str, float], words: str) -> None:
    site = world.sites["a"]
    site.write_policy(**changes)
    with pytest.raises(ConfigError, match=words):
        site.restart()


def test_a_delta_that_is_too_large_for_the_patients_trains_nothing_though_the_ledger_has_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = world.sites["a"]
    site.write_policy(delta=1e-2)
    monkeypatch.setattr("dpsynth.data.fingerprint.resolve_delta", lambda delta, _: delta)  # as another program would open it
    reopened(site)
    assert world.ask().code is Code.FAILED
    assert booked(site) == []


def test_other_data_than_those_of_the_ledger_are_not_trained_on(world: World) -> None:
    site = world.sites["a"]
    data = site.policy.data.model_dump(mode="json", exclude_defaults=True)
    site.write_policy(data={**data, "phantom": {**data["phantom"], "seed": 1}})
    site.restart()
    assert world.ask().code is Code.FAILED
    assert booked(site) == []


def test_a_site_without_a_class_is_trained_with_the_others(new_world: Callable[..., World]) -> None:
    world = new_world("a")
    site = world.sites["a"]
    images = site.guard.images
    only = np.flatnonzero(np.bincount(images.patients, weights=images.labels) == 0)
    site.guard.__dict__["_read"] = (1, images.subset(only))
    reply, arrays = decode_reply(site.guard.handle(world.request()), largest_bytes=1 << 30)
    assert reply.outcome == "ok"
    counts = raw_counts(arrays[SUMS], world.model.reference)
    assert counts[1] < 0.3 * counts[0]
    assert world.ask("train", 4).outcome == "ok"


def test_a_round_does_not_go_on_when_the_labels_of_the_data_changed_meanwhile(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the first attempt would be used for other sums; the difference would show the patient that changed."""
    site, message = world.sites["a"], world.request()
    with monkeypatch.context() as patch:
        patch.setattr(module, "moments_round", lambda *_, **__: (_ for _ in ()).throw(OSError()))
        assert world.tell(message).code is Code.FAILED
    with monkeypatch.context() as patch:
        patch.setattr(module, "conditions_digest", lambda *_, **__: "of other labels")
        site.restart()
        assert world.tell(message).code is Code.FAILED
        (path,) = site.policy.state.rglob("split.json")
        before = path.read_bytes()
        path.write_text(before.decode().replace('"cells": ""', '"cells": "of other labels"'))
        assert world.tell(message).code is Code.LOST, "the charge itself says for what it was booked"
    assert booked(site) == [("study/0/moments-0", True)]


def test_a_study_does_not_go_on_with_attributes_other_than_those_it_began_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No check could compare its images with the patients as they were trained on, so no further round is paid until the table is back."""
    site = world.sites["a"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "conditions_digest", lambda *_, **__: "of a table that is corrected before anybody pays")
        patch.setattr(module.Ledger, "reserve", lambda *_, **__: (_ for _ in ()).throw(BudgetExceeded("spent meanwhile")))
        assert world.ask().code is Code.BUDGET
    site.restart()
    assert world.ask(message_id="again").outcome == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(module, "conditions_digest", lambda *_, **__: "of another table")
        for lost in ("nothing", "messages"):
            for path in site.policy.state.rglob(lost):
                shutil.rmtree(path)
            site.restart()
            assert world.ask("train", 4).code is Code.FAILED
        assert booked(site) == [("study/0/again", True)]
    site.restart()
    assert world.ask("train", 4).outcome == "ok"


BAD = Finding(ok=False, detail="planted", statistic=0.0, threshold=1.0)


@pytest.mark.parametrize(("kind", "number", "monitor"), [("moments", 0, MomentMonitor), ("train", 4, Monitor)])
def test_what_the_monitor_saw_of_a_round_stops_its_answer_and_not_its_charge(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str, number: int, monitor: type
) -> None:
    monkeypatch.setattr(monitor, "findings", lambda *_: {"noise": BAD})
    raw = world.sites["a"].guard.handle(world.request(kind, number))
    reply, arrays = decode_reply(raw, largest_bytes=1 << 30)
    assert reply.code is Code.LOST, "asking again can change nothing"
    assert not arrays
    assert booked(world.sites["a"]) == [(f"study/{number}/{kind}-{number}", True)]


def test_a_net_on_which_the_bound_is_not_proved_is_refused_before_the_charge(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def unproved(*_: object) -> None:
        raise SelfCheckFailed("planted")

    with monkeypatch.context() as patch:
        patch.setattr("federated.rounds.prove_bound", unproved)
        rounds.require_bound.cache_clear()
        assert [world.ask("train", 4).code for _ in range(2)] == [Code.FAILED] * 2
    assert booked(world.sites["a"]) == []
    assert world.ask("train", 4).outcome == "ok", "nothing was charged, so the same question is good once the cause is mended"


def test_the_coins_are_in_the_ledger_with_the_first_charge_and_cannot_be_drawn_again(world: World) -> None:
    """Who is trained on is noted before anybody is; a guard that lost the coins takes no further round with new ones."""
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    (path,) = site.policy.state.rglob("split.json")
    record = json.loads(path.read_text())
    coins = hashlib.sha256(bytes.fromhex(record["key"]) + f"\0{record['control_fraction']}".encode()).hexdigest()
    (line,) = reserve_lines(site)
    assert line["coins_sha256"] == coins
    assert world.ask("train", 4).outcome == "ok"
    assert {line["coins_sha256"] for line in reserve_lines(site)} == {coins}
    path.unlink()
    assert world.ask("train", 5).code is Code.LOST
    assert len(reserve_lines(site)) == 2


def test_coins_are_those_of_every_round_and_not_only_of_the_last(world: World) -> None:
    site = world.sites["a"]
    assert world.ask().outcome == "ok"
    ((_, charge),) = charges_of(site.guard.ledger, "study")
    cheap = [replace(mechanism, noise_multiplier=100.0) for mechanism in charge.mechanisms]
    for number, coins in ((1, "0" * 64), (2, charge.coins_sha256)):
        site.guard.ledger.reserve(cheap, purpose="planted", run_id=f"study/{number}/planted", coins_sha256=coins)
    assert world.ask("moments", 3).code is Code.LOST
    assert len(reserve_lines(site)) == 3


def test_a_policy_that_moves_the_control_fraction_does_not_move_the_patients_of_a_study_that_began(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, seen = world.sites["a"], []
    monkeypatch.setattr(module, "train_round", lambda denoiser, model, split, **_: seen.append(split.control.patient_ids) or {})
    world.ask("train", 4)
    site.write_policy(data={**site.policy.data.model_dump(mode="json", exclude_defaults=True), "control_fraction": 0.4})
    site.restart()
    world.ask("train", 5)
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_what_the_engine_proved_of_each_round_is_kept_for_the_checks(world: World) -> None:
    site = world.sites["a"]
    world.ask()
    world.ask("train", 4)
    folder = site.policy.state / "studies" / "study" / "messages"
    moments, train = (json.loads((folder / name / "proof.json").read_text()) for name in ("moments-0", "train-4"))
    assert set(moments["findings"]) == set(ALWAYS)
    assert set(REQUIRED) <= set(train["findings"])
    assert all(found["ok"] for found in (*moments["findings"].values(), *train["findings"].values()))
    assert set(train["audits"]) == {"before training", "during training"}
    assert train["audits"]["during training"]["mechanism"]["steps"] == 2


def test_nobody_else_can_read_what_a_guard_keeps_and_no_secret_outlives_its_round(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site, real = world.sites["a"], module.train_round

    def files() -> set[str]:
        assert site.policy.state.stat().st_mode & 0o777 == 0o700
        kept = [path for path in site.policy.state.rglob("*") if path.is_file()]
        assert {path.name: path.stat().st_mode & 0o777 for path in kept} == {path.name: 0o600 for path in kept}
        return {path.name for path in kept}

    mask = os.umask(0o022)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, "train_round", lambda *args, **rest: cut_off(real(*args, **rest)))
            assert world.ask("train", 4).code is Code.FAILED
        always = {"lock", "ledger.lock", "ledger.json", "study.json", "split.json", "request", "proof.json"}
        assert files() == {*always, "key", "checkpoint.safetensors"}
        assert world.ask("train", 4).outcome == "ok"
        assert files() == {*always, "reply"}
    finally:
        os.umask(mask)


def test_every_round_has_a_key_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one key the noise of two rounds would be one noise, and their difference none."""
    keys: list[bytes] = []
    monkeypatch.setattr(module, "train_round", lambda *_, stream, **__: keys.append(stream._key) or {})
    monkeypatch.setattr(module, "moments_round", lambda *_, stream, **__: keys.append(stream._key) or {})
    for kind, number in (("moments", 0), ("moments", 1), ("train", 4), ("train", 5)):
        assert world.ask(kind, number).outcome == "ok"
    world.sites["a"].restart()
    assert world.ask(study="second", plan=world.changed(rounds=0, trainable="none", noise_multiplier=None)).outcome == "ok"
    assert len(keys) == len(set(keys)) == 5


def test_a_query_is_answered_once_whatever_its_message_is_called(world: World) -> None:
    assert world.ask().outcome == "ok"
    assert world.ask(message_id="again").code is Code.ORDER
    assert world.ask("moments", 1).outcome == "ok"
    assert world.ask("moments", 1, message_id="again-1").code is Code.ORDER
    assert len(reserve_lines(world.sites["a"])) == 2


def whole(world: World) -> float:
    """Epsilon of all that the plan has."""
    release, steps = world.model.release(world.plan), world.plan.rounds * world.plan.steps_per_round
    return epsilon_pld([release, sgd_of(world.plan, steps=steps, declared_patients=100)], DELTA)


def test_a_study_may_spend_all_that_its_plan_has(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site = world.sites["a"]
    site.write_policy(study_epsilon=whole(world) * 1.001)
    site.restart()
    monkeypatch.setattr(module, "train_round", lambda *_, **__: {})
    rounds = [*(("moments", number) for number in range(4)), ("train", 4), ("train", 5)]
    assert [world.ask(kind, number).code for kind, number in rounds] == [None] * 6
    assert site.guard.ledger.spent() == pytest.approx(whole(world), rel=1e-6)


@pytest.mark.parametrize(("trained", "code"), [(lambda *_, **__: {}, None), (cut_off, Code.FAILED)])
def test_rounds_of_training_that_are_equal_or_were_cut_off_count_too(
    world: World, monkeypatch: pytest.MonkeyPatch, trained: Callable[..., Any], code: Code | None
) -> None:
    site = world.sites["a"]
    one, two = (epsilon_pld([sgd_of(world.plan, steps=2 * rounds, declared_patients=100)], DELTA) for rounds in (1, 2))
    monkeypatch.setattr(module, "train_round", trained)
    assert world.ask("train", 4).code == code
    site.write_policy(study_epsilon=(one + two) / 2)
    site.restart()
    assert world.ask("train", 5).code is Code.STUDY_BUDGET


def test_a_question_that_comes_between_check_and_charge_of_another_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else both would find a round that nobody has asked for."""
    second = threading.Thread(target=lambda: world.ask("train", 4, message_id="again"))

    def between(*given: Any) -> float:
        if second.ident is None:
            second.start()
            second.join(timeout=3)
        return epsilon_pld(*given)

    monkeypatch.setattr(module, "epsilon_pld", between)
    monkeypatch.setattr(module, "train_round", lambda *_, **__: {})
    assert world.ask("train", 4).outcome == "ok"
    second.join()
    assert booked(world.sites["a"]) == [("study/4/train-4", True)]


def test_memory_of_a_round_does_not_tell_how_many_patients_there_are(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator says how wide the rows of a query are; for all rows at once one hospital would have room and another none."""
    seen: list[int] = []
    real = moment_release.rows_of
    monkeypatch.setattr(
        moment_release, "rows_of", lambda query, images, *rest: seen.append(len(images.labels)) or real(query, images, *rest)
    )
    monkeypatch.setattr("dpsynth.model.noised_sums._AT_ONCE", 16)
    for number in range(4):
        assert world.ask("moments", number).outcome == "ok"
    assert max(seen) == 16
    assert sum(seen) > 4 * 60


def test_a_round_goes_on_only_with_the_request_that_it_was_charged_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another question its noise would be used twice; the ledger knows which one it was, whatever the guard's other files say."""
    site = world.sites["a"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "moments_round", lambda *_, **__: (_ for _ in ()).throw(OSError()))
        assert world.ask("moments", 1).code is Code.FAILED
    other = {**told_body(world.model, 1), "told.mean": np.zeros_like(told_body(world.model, 1)["told.mean"])}
    raw = world.request("moments", 1, arrays=other)
    digest = decode_request(raw, coordinators=(world.private.public_key(),), largest_bytes=len(raw)).digest
    (kept,) = site.policy.state.rglob("request")
    kept.write_text(digest)
    assert world.tell(raw).code is Code.LOST


OTHER = {
    "sites": ("a", "b"),
    "classes": ("normal", "other"),
    "attributes": (("sex", ("F", "M")),),
    "spatial_shape": (12, 13),
    "channels": 3,
    "low_frequencies": 5,
    "net_channels": (8, 16),
    "trainable": "small",
    "draws": 2,
    "learning_rate": 0.002,
    "anatomies": ("brain",),
    "num_phantoms": 61,
    "public_seed": 77,
    "moments_noise_multiplier": 99.0,
    "noise_multiplier": 99.0,
    "clip_norm": 0.5,
    "sampling_probability": 0.11,
    "steps_per_round": 1,
    "rounds": 3,
    "app_sha256": "1" * 64,
}


def test_nothing_in_a_plan_can_change_once_a_round_was_charged(world: World) -> None:
    assert world.ask().outcome == "ok"
    codes = {name: world.ask("moments", 1, plan=world.changed(**{name: value})).code for name, value in OTHER.items()}
    assert codes == dict.fromkeys(Plan.model_fields, Code.PLAN_CHANGED)
