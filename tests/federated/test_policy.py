"""The policy: what is unknown, contradictory or open to others is refused; hours run past midnight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime

import pytest
from federation_cases import Site, World

from dpsynth.errors import ArtifactError, ConfigError
from dpsynth.progress import silent
from dpsynth.signing import key_id
from federated import cli
from federated.doctor import examine
from federated.policy import OpeningHours, load_policy, problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"smalest_noise": 1.0}, "smalest_noise: unknown setting"),
        ({"data": {"format": "phantom", "nmae": "x"}}, "data.nmae: unknown setting"),
        ({"study_epsilon": 13.0}, "study_epsilon is larger than epsilon"),
        ({"coordinators": []}, "coordinators"),
        ({"sampling_probability": [0.2, 0.1]}, "the smallest must not be above the largest"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"apps": ["abc"]}, "apps"),
        ({"hours": [{"start": "25:00"}]}, "hours"),
        ({"gate": {"required": ["fairness"]}}, "gate.required: fairness compares the values of data.attributes"),
        ({"gate": {"required": ["white_box"]}}, "gate.required: white_box looks at weights"),
        ({"public_checks": ["copyin"]}, r"public_checks\.0: .*'copying'.*\(found 'copyin'\)"),
        ({"public_checks": ["white_box"]}, "public_checks: white_box looks at weights"),
    ],
)
def test_a_wrong_policy_is_refused_by_the_name_of_its_key(world: World, changes: dict[str, object], words: str) -> None:
    site = world.sites["a"]
    site.write_policy(**changes)
    with pytest.raises(ConfigError, match=words):
        load_policy(site.folder / "policy.yaml")


def test_a_policy_whose_encoder_is_missing_does_not_listen(world: World) -> None:
    """Before a round is charged: no candidates could ever be approved by it."""
    site = world.sites["a"]
    site.write_policy(gate={"encoder": {"path": "nowhere.onnx", "sha256": "a" * 64}})
    path = site.folder / "policy.yaml"
    (found,) = [item for item in examine(path, progress=silent) if item.question == "gate"]
    assert (found.state, str(site.folder / "nowhere.onnx") in found.answer) == ("error", True)
    with pytest.raises(ArtifactError, match=r"gate\.encoder\.path .*nowhere\.onnx"):
        cli.serve(path)


def readable_data(site: Site) -> None:
    (site.folder / "xrays").mkdir(mode=0o755)
    site.write_policy(data={"format": "raster", "path": "xrays", "classes": ["normal", "lesion"], "declared_patients": 100})


@pytest.mark.parametrize(
    ("damage", "question", "state", "words"),
    [
        (lambda site: (site.folder / "coordinator" / "signing.pub").unlink(), "coordinator", "error", "signing.pub"),
        (lambda site: site.policy.ledger.chmod(0o620), "ledger is private", "error", "can change the ledger"),
        (lambda site: site.policy.ledger.chmod(0o640), "ledger is private", "warning", "can read the ledger"),
        (readable_data, "data is private", "warning", "can read the data"),
        (lambda site: (site.policy.ledger.unlink(), shutil.rmtree(site.policy.state)), "ledger and data", "error", "dpsynth-site init"),
        (lambda site: site.policy.ledger.unlink(), "ledger and data", "error", "would forget"),
        (lambda site: site.write_policy(gate={"required": ["content"]}), "patients", "warning", "about 20 control patients; below 60"),
        (lambda site: site.write_policy(socket="run/guard.sock"), "socket", "warning", "is not there now"),
        (lambda site: site.write_policy(reply_grid_seconds=0), "time of answers", "warning", "set reply_grid_seconds"),
    ],
)
def test_the_doctor_says_what_to_mend(world: World, damage: Callable[[Site], object], question: str, state: str, words: str) -> None:
    site = world.sites["a"]
    site.write_policy(reply_grid_seconds=5)

    def found() -> set[tuple[str, str]]:
        return {(item.state, item.question) for item in examine(site.folder / "policy.yaml", progress=silent) if words in item.answer}

    before = found()
    damage(site)
    assert found() - before == {(state, question)}


def test_the_doctor_names_the_key_that_may_ask(world: World) -> None:
    (found,) = [item for item in examine(world.sites["a"].folder / "policy.yaml", progress=silent) if item.question == "coordinator"]
    assert key_id(world.private.public_key())[:16] in found.answer


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_policy_that_others_can_write_is_refused(world: World, mode: int) -> None:
    path = world.sites["a"].folder / "policy.yaml"
    path.chmod(mode)
    with pytest.raises(ConfigError, match="can be written by others"):
        load_policy(path)


@pytest.mark.parametrize(
    ("now", "open_"),
    [
        ("2026-11-27 05:00", False),  # Friday, and Thursday's night, which is none of its own
        ("2026-11-27 19:59", False),
        ("2026-11-27 20:00", True),
        ("2026-11-28 05:59", True),  # Friday's night
        ("2026-11-28 06:00", False),
        ("2026-11-28 20:00", False),  # Saturday
        ("2026-11-26 23:00", False),  # Thursday
    ],
)
def test_hours_past_midnight_belong_to_the_day_they_began_on(now: str, open_: bool) -> None:
    span = OpeningHours(days=("fri",), start="20:00", end="06:00")
    assert span.holds(datetime.fromisoformat(now)) is open_


EXACT = {
    "largest_draws": lambda plan: (plan.draws, plan.draws - 1),
    "largest_learning_rate": lambda plan: (plan.learning_rate, plan.learning_rate * (1 - 1e-9)),
    "largest_low_frequencies": lambda plan: (plan.low_frequencies, plan.low_frequencies - 1),
    "largest_num_phantoms": lambda plan: (plan.num_phantoms, plan.num_phantoms - 1),
    "smallest_noise_multiplier": lambda plan: (plan.noise_multiplier, plan.noise_multiplier * (1 + 1e-9)),
    "smallest_moments_noise_multiplier": lambda plan: (plan.moments_noise_multiplier, plan.moments_noise_multiplier * (1 + 1e-9)),
    "largest_clip_norm": lambda plan: (plan.clip_norm, plan.clip_norm * (1 - 1e-9)),
    "largest_steps_per_round": lambda plan: (plan.steps_per_round, plan.steps_per_round - 1),
    "largest_rounds": lambda plan: (plan.rounds, plan.rounds - 1),
    "largest_steps": lambda plan: (plan.rounds * plan.steps_per_round, plan.rounds * plan.steps_per_round - 1),
    "sampling_probability": lambda plan: ((plan.sampling_probability,) * 2, (0.0, plan.sampling_probability * (1 - 1e-9))),
}


@pytest.mark.parametrize("limit", EXACT)
def test_a_limit_of_the_policy_holds_at_its_exact_value_with_no_help_from_another(world: World, limit: str) -> None:
    exact = {name: values(world.plan)[0] for name, values in EXACT.items()}
    policy = world.sites["a"].policy.model_copy(update=exact)
    assert problem(policy, world.plan) is None
    assert problem(policy.model_copy(update={limit: EXACT[limit](world.plan)[1]}), world.plan) is not None


def test_a_whole_day_ends_at_midnight() -> None:
    span = OpeningHours(days=("sun",))
    assert span.holds(datetime.fromisoformat("2026-11-29 23:59:59.9"))
    assert not span.holds(datetime.fromisoformat("2026-11-30 00:00"))
