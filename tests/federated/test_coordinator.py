"""The coordinator's arithmetic against oracles, and its course of rounds with made-up sites: crashes, silence, quorum."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federation_cases import Handler, Hospital, World, initial, study

from dpsynth.errors import ArtifactError, ConfigError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.mechanism import MomentRelease, PoissonDpSgd, merged
from dpsynth.train import pretrain
from federated.combine import (
    averaged,
    combined_weights,
    largest_update,
    odd_sites,
    update_norm,
)
from federated.coordinator import EMA, QuorumLost, require_quorum_online
from federated.federation import load_federation
from federated.messages import Code, Refused, decode_request, encode_refusal
from federated.outcome import charged, spending
from federated.progress_view import describe, progress_of
from federated.public_stage import public_weights
from federated.rounds import NET
from federated.simulate import run_study
from federated.site import charges_of

ALL = list(range(6))  # four queries of the moments, two rounds of training


@pytest.mark.parametrize("growth", [0.5, 1.0, 1.05, 1.3, 3.0, 30.0])
@pytest.mark.parametrize("steps", [1, 5, 60])
def test_no_adam_step_is_longer_than_the_bound(growth: float, steps: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.01, betas=(0.9, 0.99))
    for step in range(steps):
        weight.grad = torch.full((4,), float(growth**step), dtype=torch.float64)
        optimizer.step()
    norm = float(weight.detach().norm())
    assert norm <= largest_update(learning_rate=0.01, steps=steps, num_weights=4)
    if growth == 1:
        assert norm > largest_update(learning_rate=0.01, steps=steps, num_weights=4) / 3, "the bound is of no use"


def test_weights_are_averaged_as_declared_and_oddness_is_relative() -> None:
    updates = {site: {"w": np.full(3, value, dtype=np.float32)} for site, value in (("a", 1.0), ("b", 4.0))}
    np.testing.assert_allclose(combined_weights(updates, {"a": 1.0, "b": 1.0})["w"], 2.5)
    np.testing.assert_allclose(combined_weights(updates, {"a": 2.0, "b": 1.0})["w"], 2.0)
    assert update_norm({"w": np.zeros(3)}, updates["b"]) == pytest.approx(4 * 3**0.5)
    assert odd_sites({"a": 1.0, "b": 1.1, "c": 900.0}) == ("c",)
    assert odd_sites({"a": 1.0, "b": 1.1, "c": 0.01}) == ("c",)
    assert odd_sites({"a": 1.0, "b": 900.0}) == ()


def test_the_average_over_rounds_is_that_over_their_steps() -> None:
    """Weights that stay put within a round: the average of one round of 5 steps is that of 5 rounds of one step with a fixed decay."""
    old, new = {"w": np.zeros(1)}, {"w": np.ones(1)}
    whole = averaged(old, new, steps_done=10_000, steps=5, decay=0.9)
    single = old
    for _ in range(5):
        single = averaged(single, new, steps_done=10_000, steps=1, decay=0.9)
    np.testing.assert_allclose(whole["w"], single["w"], rtol=1e-6)


def test_merging_changes_no_epsilon() -> None:
    def sgd(steps: int) -> PoissonDpSgd:
        return PoissonDpSgd(noise_multiplier=1.0, clip_norm=1.0, sampling_probability=0.05, steps=steps, declared_patients=100)

    assert merged([sgd(10), sgd(20), sgd(10)]) == (sgd(40),)
    apart = [*[PoissonDpSgd(**{**sgd(1).__dict__, "declared_patients": number}) for number in range(1, 41)]]
    assert epsilon_pld([sgd(40)], 1e-5, interval=1e-3) == pytest.approx(epsilon_pld(apart, 1e-5, interval=1e-3), rel=2e-3)


def test_a_coordinator_that_was_killed_asks_the_same_bytes_again(empty: World, tmp_path: Path) -> None:
    sites = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    study(empty, sites, tmp_path / "whole").run(initial(empty))
    killed = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}

    class Killed(Exception):
        pass

    def dies(raw: bytes) -> bytes:
        killed["c"](raw)
        if len(killed["c"].frames) == 3:  # the first round of training was asked, and b has answered it
            raise Killed
        return encode_refusal(Code.FAILED)

    with pytest.raises(Killed):
        study(empty, {**killed, "c": dies}, tmp_path / "killed").run(initial(empty))
    first = study(empty, killed, tmp_path / "killed")
    state = first.run(initial(empty))
    assert state.round == 5
    assert killed["a"].frames[5] == killed["a"].frames[6], "the round whose answers were lost"
    assert len({bytes(frame) for frame in killed["a"].frames}) == 7
    assert first.asked == {"a": ALL, "b": ALL, "c": [0, 4, 5]}, "whoever did not answer the first query is asked no other"
    again = study(empty, killed, tmp_path / "killed").run(initial(empty))
    assert len(killed["a"].frames) == 8, "a finished study asks nothing"
    np.testing.assert_array_equal(again.arrays[NET + "out.2.conv.weight"], state.arrays[NET + "out.2.conv.weight"])


def test_a_round_is_counted_before_its_question_leaves(empty: World, tmp_path: Path) -> None:
    """A coordinator that dies while it waits knows afterwards what may have been released."""
    sites: dict[str, Handler] = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    honest, counted, waited = sites["a"], [], []

    def looking(raw: bytes) -> bytes:
        shown = progress_of(tmp_path / "study")
        waited.append((shown["waits_for"]["round"], shown["waits_for"]["sites"]))
        counted.append(shown["sites"]["a"]["rounds_that_may_be_released"])
        assert "answers are waited for until" in describe(shown)[1]
        return honest(raw)

    study(empty, {**sites, "a": looking}, tmp_path / "study").run(initial(empty))
    assert counted == [[], *(ALL[: number + 1] for number in ALL)]
    assert waited == [(number, ["a", "b", "c"]) for number in (None, *ALL)]
    assert progress_of(tmp_path / "study")["waits_for"] is None


def test_a_silent_site_is_asked_again_and_the_round_goes_on_with_the_quorum(empty: World, tmp_path: Path) -> None:
    sites = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    asked: list[bytes | float] = []

    def silent(raw: bytes) -> bytes:
        asked.append(raw)
        return encode_refusal(Code.UNREACHABLE)

    coordinator = study(empty, {**sites, "c": silent}, tmp_path / "study", quorum=3, retries=2, retry_pause_seconds=7.0)
    coordinator.pause = lambda seconds: asked.append(seconds)
    with pytest.raises(QuorumLost, match="c: unreachable: the guard of the site does not answer"):
        coordinator.run(initial(empty))
    frame = asked[0]
    assert asked == [frame, 7.0, frame, 7.0, frame]
    asked.clear()
    coordinator = study(empty, {**sites, "c": silent}, tmp_path / "study", quorum=2)
    coordinator.run(initial(empty))
    assert coordinator.asked["c"] == [0, 4, 5], "it may have answered, for all that anyone knows; without counts its sums are of no use"
    spent, (moments, sgd) = spending(coordinator), charged(coordinator)["a"]
    assert spent.disjoint == pytest.approx(max(spent.by_site.values()))
    assert spent.by_site["c"] == pytest.approx(epsilon_pld([moments.alone("means"), sgd], spent.delta))
    assert spent.overlapping > 1.5 * spent.disjoint


def test_a_site_that_leaves_is_not_counted_for_the_rounds_that_it_refused(empty: World, tmp_path: Path) -> None:
    sites: dict[str, Handler] = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    honest = sites["c"]

    def closed_in_round_4(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
        return encode_refusal(Code.HOURS, request_sha256=signed.digest) if signed.request.round == 4 else honest(raw)

    coordinator = study(empty, {**sites, "c": closed_in_round_4}, tmp_path / "study")
    coordinator.run(initial(empty))
    last = progress_of(tmp_path / "study")["sites"]["c"]
    assert (last["last"]["outcome"], last["last_refusal"]["round"]) == ("ok", 4)
    assert last["last_refusal"]["reason"].startswith("hours: ")
    assert coordinator.asked == {"a": ALL, "b": ALL, "c": [0, 1, 2, 3, 5]}
    assert spending(coordinator).by_site["c"] < spending(coordinator).by_site["a"]


def test_a_round_that_somebody_refused_in_a_sites_name_is_counted_as_soon_as_the_site_states_it(
    new_world: Callable[..., World], tmp_path: Path
) -> None:
    """Answers are not signed: whoever carries them hands on the question and gives another answer."""
    world = new_world("a", "b", "c")
    guards: dict[str, Handler] = {name: site.guard.handle for name, site in world.sites.items()}
    honest = guards["c"]

    def carrier(raw: bytes) -> bytes:
        request = decode_request(raw, coordinators=(world.private.public_key(),), largest_bytes=len(raw)).request
        answer = honest(raw)
        return encode_refusal(Code.HOURS) if request.kind == "train" and request.round == 4 else answer

    coordinator = study(world, {**guards, "c": carrier}, tmp_path / "study")
    coordinator.run(initial(world))
    assert [number for number, _ in charges_of(world.sites["c"].guard.ledger, "study")] == ALL
    assert coordinator.asked["c"] == ALL
    assert coordinator.answered["c"] == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("code", [Code.LOST, Code.ORDER, Code.MESSAGE_REUSED])
def test_a_refusal_after_which_the_round_may_be_booked_leaves_it_counted(empty: World, tmp_path: Path, code: Code) -> None:
    """A site that lost a round it had charged refuses the next try by its order: the charge is there all the same."""
    sites: dict[str, Handler] = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    honest = sites["c"]

    def refuses_round_4(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
        return encode_refusal(code, request_sha256=signed.digest) if signed.request.round == 4 else honest(raw)

    coordinator = study(empty, {**sites, "c": refuses_round_4}, tmp_path / "study")
    coordinator.run(initial(empty))
    assert coordinator.asked["c"] == ALL
    assert coordinator.answered == {"a": ALL, "b": ALL, "c": [0, 1, 2, 3, 5]}


def test_a_round_that_may_be_booked_stays_counted_whatever_is_said_of_it_later(empty: World, tmp_path: Path) -> None:
    """No answer to the first question, and a refusal of the second: the first may have been booked."""
    sites: dict[str, Handler] = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    honest, asked = sites["c"], []

    def first_silent(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
        if signed.request.round != 4:
            return honest(raw)
        asked.append(raw)
        return encode_refusal(Code.UNREACHABLE if len(asked) == 1 else Code.HOURS, request_sha256=signed.digest)

    coordinator = study(empty, {**sites, "c": first_silent}, tmp_path / "study", quorum=3, retries=1)
    with pytest.raises(QuorumLost, match="hours"):
        coordinator.run(initial(empty))
    assert len(asked) == 2
    assert coordinator.asked["c"] == ALL[:-1]


@pytest.mark.parametrize(
    ("codes", "quorum", "status"),
    [
        ((Code.HOURS, Code.FAILED), 3, 1),
        ((Code.NOISE, Code.UNREACHABLE), 2, 1),
        ((Code.NOISE, Code.HOURS), 3, 3),
        ((Code.BUDGET, Code.STUDY_BUDGET), 2, 3),
    ],
)
def test_whoever_waits_for_sites_is_told_when_that_is_in_vain(
    empty: World, tmp_path: Path, codes: tuple[Code, Code], quorum: int, status: int
) -> None:
    """By the exit status, on which a service is started again or not."""

    def refuses(code: Code) -> Handler:
        def answer(raw: bytes) -> bytes:
            signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
            return encode_refusal(code, request_sha256=signed.digest)

        return answer

    honest, asked = Hospital(empty, 0), []

    def slow(raw: bytes) -> bytes:
        asked.append(raw)
        return encode_refusal(Code.UNREACHABLE) if len(asked) == 1 else honest(raw)

    handlers = {"a": slow, **{site: refuses(code) for site, code in zip("bc", codes, strict=True)}}
    with pytest.raises(QuorumLost) as found:
        study(empty, handlers, tmp_path / "study", quorum=quorum).run(initial(empty))
    assert found.value.exit_code == status
    assert "a:" not in str(found.value)


def test_a_refusal_of_another_question_uncounts_nothing(empty: World, tmp_path: Path) -> None:
    sites: dict[str, Handler] = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    honest = sites["c"]

    def old_refusal(raw: bytes) -> bytes:
        signed = decode_request(raw, coordinators=(empty.private.public_key(),), largest_bytes=len(raw))
        return encode_refusal(Code.HOURS, request_sha256="1" * 64) if signed.request.round == 4 else honest(raw)

    coordinator = study(empty, {**sites, "c": old_refusal}, tmp_path / "study")
    coordinator.run(initial(empty))
    assert coordinator.asked["c"] == ALL
    assert "the answer is to another question" in (tmp_path / "study" / "events.jsonl").read_text()


def test_a_study_whose_count_is_lost_does_not_go_on(empty: World, tmp_path: Path) -> None:
    sites = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    study(empty, sites, tmp_path / "study", rounds=0).run(initial(empty))
    (tmp_path / "study" / "sites.json").unlink()
    with pytest.raises(ArtifactError, match=r"sites\.json is missing"):
        study(empty, sites, tmp_path / "study").run(initial(empty))


@pytest.fixture
def pretrainings(empty: World, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each pre-training. The second accountant, which takes seconds, is the first one."""
    done: list[object] = []
    monkeypatch.setattr("federated.simulate.public_weights", lambda config, **_: done.append(config) or initial(empty)())
    monkeypatch.setattr("federated.outcome.prv_epsilon", epsilon_pld)
    return done


def test_what_can_be_wrong_is_said_before_anybody_is_asked_and_before_what_takes_long(
    empty: World, tmp_path: Path, pretrainings: list[object]
) -> None:
    sites = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}

    def refused(error: type[Exception], words: str, *, run: str = "run", **changes: object) -> None:
        with pytest.raises(error, match=words):
            run_study(study(empty, {**sites}, tmp_path / "study", **changes), run_path=tmp_path / run, ready=lambda: absent(["a"]))

    def absent(online: list[str]) -> None:
        require_quorum_online(empty.federation, online)

    refused(QuorumLost, "Not connected: b, c; 2 of 3 sites are needed")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("ten years of work")
    refused(ArtifactError, "Name another --run", run="used")
    silent = dict.fromkeys("abc", lambda _: encode_refusal(Code.UNREACHABLE))
    with pytest.raises(QuorumLost, match="unreachable"):
        run_study(study(empty, silent, tmp_path / "study"), run_path=tmp_path / "run")
    other = study(empty, {**sites}, tmp_path / "study")
    other.plan = empty.changed(learning_rate=0.002)
    with pytest.raises(ArtifactError, match=r"learning_rate was 0\.001, is 0\.002"):
        run_study(other, run_path=tmp_path / "run", ready=lambda: pytest.fail("it is too late"))
    other = study(empty, {**sites}, tmp_path / "study")
    other.private = Ed25519PrivateKey.generate()
    with pytest.raises(ArtifactError, match="began with another signing key"):
        run_study(other, run_path=tmp_path / "run")
    assert not pretrainings
    assert not any(site.frames for site in sites.values())


def test_a_finished_study_is_read_again_and_asks_nobody(empty: World, tmp_path: Path, pretrainings: list[object]) -> None:
    sites = {name: Hospital(empty, seed) for seed, name in enumerate("abc")}
    first = run_study(study(empty, {**sites}, tmp_path / "study"), run_path=tmp_path / "run")
    asked = len(sites["a"].frames)
    with pytest.raises(ArtifactError, match=f"finished in {tmp_path / 'run'}. Name that"):
        run_study(study(empty, {**sites}, tmp_path / "study"), run_path=tmp_path / "another")
    assert describe(progress_of(tmp_path / "study"))[1].endswith(f"Next: dpsynth generate {tmp_path / 'run'}")
    for run in ("run", "another"):
        again = run_study(
            study(empty, {**sites}, tmp_path / "study"), run_path=tmp_path / run, ready=lambda: pytest.fail("nobody is asked")
        )
        assert again == first
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert [len(pretrainings), len(sites["a"].frames)] == [1, asked]
    assert describe(progress_of(tmp_path / "study"))[1].endswith(f"Next: dpsynth generate {tmp_path / 'another'}")
    other = study(empty, {**sites}, tmp_path / "second", study="second")
    with pytest.raises(ArtifactError, match="holds another run"):
        run_study(other, run_path=tmp_path / "another")


def test_what_was_pretrained_is_kept_until_its_settings_change(empty: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], pretrain._train
    monkeypatch.setattr(pretrain, "_train", lambda *given, **named: trained.append(1) or train(*given, **named))
    config = empty.federation.config
    longer = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"steps": 3})})
    made = [public_weights(settings, kept=tmp_path / "kept") for settings in (config, config, longer)]
    assert len(trained) == 2
    for name, array in made[0].items():
        np.testing.assert_array_equal(array, made[1][name])


def test_both_bounds_over_sites_are_those_of_their_mechanisms(empty: World, tmp_path: Path) -> None:
    coordinator = study(empty, {name: Hospital(empty, seed) for seed, name in enumerate("abc")}, tmp_path / "study")
    coordinator.run(initial(empty))
    plan, spent = empty.plan, spending(coordinator)
    release = MomentRelease(
        noise_multiplier=plan.moments_noise_multiplier / 3**0.5,  # three Gaussians of one noise are one of a smaller
        queries=_queries(empty),
    )
    sgd = PoissonDpSgd(noise_multiplier=plan.noise_multiplier, clip_norm=1, sampling_probability=0.1, steps=12, declared_patients=1)
    assert spent.overlapping == pytest.approx(epsilon_pld([release, sgd], spent.delta), rel=1e-3)
    assert spent.disjoint <= 10


def _queries(world: World) -> tuple[object, ...]:
    from dpsynth.model.moment_release import moment_queries

    return moment_queries(world.model.reference)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("quorum: 4", "quorum is larger"),
        ("quorum: 2\nweights: {a: 1}", "declared for all sites"),
        ("quorum: 2\nrouns: 3", "rouns: unknown setting"),
        ("quorum: 2\nleft_out: [d]", "left_out names d, which is none of the sites: a, b, c"),
        ("quorum: 2\nconfig: {method: moments}", "config.method must be diffusion"),
        ("quorum: 2\nconfig: {votes: {share: 0.1}}", "without votes"),
    ],
)
def test_a_wrong_federation_is_refused_by_the_name_of_its_key(tmp_path: Path, changes: str, words: str) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(f"study: s\nsites: [a, b, c]\n{changes}\n" + ("" if "config" in changes else "config: {diffusion: {trainable: all}}\n"))
    with pytest.raises(ConfigError, match=words):
        load_federation(path)


def test_the_ema_is_released_under_its_own_name(empty: World, tmp_path: Path) -> None:
    state = study(empty, {name: Hospital(empty, seed) for seed, name in enumerate("abc")}, tmp_path / "study").run(initial(empty))
    names = {name for name in state.arrays if name.startswith(EMA)}
    assert names == {EMA + name for name in empty.model.expected_weights(trainable=True)}


def test_refusals_carry_their_code() -> None:
    assert str(Refused(Code.BUDGET)) == "budget: the budget of the site's data does not cover it"
