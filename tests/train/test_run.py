"""The verb train as a whole: what was booked is what was done, and a run that was killed while closing is closed once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy import stats

import dpsynth.train.run as module
from dpsynth.artifacts import RunFolder
from dpsynth.config import Config, DiffusionConfig, parse_config
from dpsynth.data.fingerprint import change_data, open_ledger
from dpsynth.errors import ArtifactError, BudgetExceeded, ClaimRefused, ConfigError, DataError, LedgerError, SelfCheckFailed
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import COUNT_WEIGHT
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.train import selfcheck

CONFIG = """\
data: {declared_patients: 200, phantom: {num_patients: 240, max_images: 2}}
privacy: {epsilon: 10}
votes: {share: 0.05}
pretrain: {num_phantoms: 150, steps: 2, cache: CACHE}
diffusion: {steps: 3, sampling_probability: 0.05, draws: 1, channels: [8, 16]}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return parse_config(CONFIG.replace("CACHE", str(tmp_path_factory.mktemp("cache"))), base=Path("/"))


@pytest.fixture
def ledger(config: Config, tmp_path: Path) -> Ledger:
    return open_ledger(config, path=tmp_path / "ledger.jsonl", epsilon=10.0, delta=None, max_gate_attempts=1, progress=silent)


@pytest.fixture
def train(config: Config, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    monkeypatch.setattr(module, "fresh_key", lambda: b"k" * 32)

    def run(name: str = "run", **changes: object) -> object:
        settings = config.model_copy(update=changes)
        return module.train(settings, run_path=tmp_path / name, ledger_path=ledger.path, progress=silent)

    return run


def test_the_released_moments_hold_the_noise_that_the_ledger_charges(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train twice with one key, once without the noise of the means: the difference must have the size that the ledger's own bytes say."""
    seen = []
    for name, plain in (("pooled_means", lambda sums, counts, *_: sums / counts[:, None]), ("consistent_counts", lambda noised, _: noised)):
        monkeypatch.setattr(f"dpsynth.model.moment_release.{name}", plain)  # so that the sums can be read off the means
    monkeypatch.setattr(module, "public_reference", lambda *a, _make=module.public_reference, **k: seen.append(_make(*a, **k)) or seen[-1])
    train("noised", method="moments")
    (line,) = [entry for entry in map(json.loads, ledger.path.read_text().splitlines()) if entry["type"] == "reserve"]
    (booked,) = line["mechanisms"]
    (query,) = [query for query in booked["queries"] if query["name"] == "means"]
    stddev = query["clip_norm"] * booked["noise_multiplier"] / math.sqrt(query["share"])

    real = NoiseStream.normal

    def silenced(self: NoiseStream, purpose: str, step: int, size: int) -> np.ndarray:
        return real(self, purpose, step, size) * (0 if "means" in purpose else 1)

    monkeypatch.setattr(NoiseStream, "normal", silenced)
    monkeypatch.setattr(Ledger, "require_affordable", lambda *_: None)
    monkeypatch.setattr(Ledger, "reserve", lambda self, *_, run_id, **__: _again(self, run_id))
    monkeypatch.setattr(module, "_require_live", lambda *_: None)  # which would notice
    train("exact", method="moments")
    sums = []
    for name in ("noised", "exact"):
        arrays = load_file(tmp_path / name / "train" / "weights.safetensors")
        counts, mean = arrays["moments.counts"].numpy(), arrays["moments.mean"].numpy()
        shaped = seen[0].principal.shaped(mean - seen[0].centre)
        sums.append(np.concatenate([counts[:, None] * COUNT_WEIGHT * seen[0].clip_low, shaped * counts[:, None]], axis=1))
    noise = (sums[0] - sums[1]) / stddev
    energy = float(np.sum(noise**2))
    p = 2 * min(stats.chi2.cdf(energy, noise.size), stats.chi2.sf(energy, noise.size))
    assert p > 1e-6, f"{np.sqrt(energy / noise.size):.3f} of the booked standard deviation"
    assert 2 * min(stats.chi2.cdf(energy / 2, noise.size), stats.chi2.sf(energy / 2, noise.size)) < 1e-6, "no power"


def _again(ledger: Ledger, run_id: str) -> str:
    """Stands in for a reservation that the budget would refuse: hands out the one that was made."""
    del run_id
    return ledger.charges()[0].reservation


def test_a_run_on_changed_data_is_charged_on_top_and_one_that_began_before_does_not_go_on(
    train: Callable[..., object], config: Config, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = config.privacy.model_copy(update={"epsilon": 3.0})
    with monkeypatch.context() as patch:
        patch.setattr(module, "noised_moments", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train("before", method="moments", privacy=private)
    data = config.data.model_copy(update={"phantom": config.data.phantom.model_copy(update={"num_patients": 239})})
    with pytest.raises(LedgerError, match="other data"):
        train("after", method="moments", privacy=private, data=data)
    change_data(data, ledger, who="Dr B", why="withdrew", progress=silent)
    train("after", method="moments", privacy=private, data=data)
    change_data(config.data, ledger, who="Dr B", why="came back", progress=silent)
    with pytest.raises(LedgerError, match="before the data changed"):
        train("before", method="moments", privacy=private)
    assert [charge.settled for charge in ledger.charges()] == [False, True]
    assert ledger.spent() > 4.0


def test_data_that_change_while_they_are_read_are_not_trained_on(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.private_images

    def read(*given: Any) -> Any:
        images = real(*given)
        ledger.change_data("others", who="Dr B", why="withdrew")
        return images

    monkeypatch.setattr(module, "private_images", read)
    with pytest.raises(LedgerError, match="changed after they were read"):
        train(method="moments")
    assert (ledger.charges(), (tmp_path / "run").exists()) == ((), False)


def test_dp_sgd_is_given_what_the_ledger_holds(train: Callable[..., object], ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def keep(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            given[name] = kwargs.get("mechanism", args[2] if len(args) > 2 else None)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(module, "fit", keep("sgd", module.fit))
    monkeypatch.setattr(module, "release_moments", keep("moments", module.release_moments))
    guarantee = train()
    booked = ledger.charges()[0].mechanisms
    assert (given["moments"], given["sgd"]) == booked
    assert guarantee.mechanisms == booked  # type: ignore[attr-defined]


class Killed(Exception):
    pass


def killed_before_training(train: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was charged and killed when DP-SGD would begin."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train()


def test_no_random_number_of_a_run_is_used_twice(train: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    used, real = [], NoiseStream._bytes

    def keep(self: NoiseStream, purpose: str, step: int, count: int) -> bytes:
        if self._key == b"k" * 32:
            used.append((purpose, step))
        return real(self, purpose, step, count)

    monkeypatch.setattr(NoiseStream, "_bytes", keep)
    train()
    assert {purpose for purpose, _ in used} == {
        "split",
        "moments/means",
        "moments/second_moments",
        "moments/scales",
        "moments/energies",
        "batch",
        "rows",
        "gradient",
        "canaries",
        "votes",
    }
    assert len(set(used)) == len(used)


def test_private_images_reach_training_only_from_the_training_side_and_the_constants_not_at_all(
    train: Callable[..., object], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def keep(name: str, function: Callable[..., object], position: int) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            seen[name] = args[position]
            return function(*args, **kwargs)

        return call

    for name, position in (("public_reference", 0), ("pretrained_weights", 1), ("release_moments", 0), ("fit", 1), ("release_votes", 2)):
        monkeypatch.setattr(module, name, keep(name, getattr(module, name), position))
    train()
    public = module.public_images(config, progress=silent)
    assert np.array_equal(seen["public_reference"], public)
    assert np.array_equal(seen["pretrained_weights"], public)
    split = json.loads((tmp_path / "run" / "train" / "site" / "split.json").read_text())
    assert list(seen["fit"].patient_ids) == split["training"]  # type: ignore[attr-defined]
    for name in ("release_moments", "release_votes"):
        assert np.array_equal(seen[name], seen["fit"].images), name  # type: ignore[attr-defined]
    assert set(split["training"]).isdisjoint(split["control"])


def test_all_images_of_a_patient_are_released_as_that_patient_s(train: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """If each image were a patient of its own, the noise would hide one image and the booked epsilon would be wrong."""
    seen: dict[str, tuple[object, ...]] = {}

    def keep(name: str, wanted: slice) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **rest: seen.update({name: args[wanted]}) or real(*args, **rest))

    for name, wanted in (("release_moments", slice(0, 3)), ("release_votes", slice(2, 5)), ("fit", slice(1, 2))):
        keep(name, wanted)
    train()
    (training,) = seen["fit"]
    assert len(training.images) > training.num_patients, "some patients must have several images for this to be a test"  # type: ignore[attr-defined]
    for name in ("release_moments", "release_votes"):
        for given, own in zip(seen[name], (training.images, training.labels, training.patients), strict=True):  # type: ignore[attr-defined]
            np.testing.assert_array_equal(given, own, err_msg=name)


def test_how_strong_detail_is_drawn_follows_from_the_generator_alone(train: Callable[..., object], config: Config, tmp_path: Path) -> None:
    """Whoever holds what was released counts the same gains, so nothing of a patient is in them."""
    train()
    generator = Generator.load(tmp_path / "run" / "train")
    counted = replace(generator, gains=None).with_released_detail(config.generate, progress=silent)
    assert generator.gains is not None
    np.testing.assert_array_equal(generator.gains, counted.gains)


def test_the_key_stays_the_same_over_a_crash_and_is_nowhere_afterwards(
    train: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, keys = [], []
    monkeypatch.setattr(module, "fresh_key", lambda: made.append(bytes([len(made) + 1]) * 32) or made[-1])
    real = module.fit

    def fit(*args: object, stream: NoiseStream, **rest: object) -> object:
        keys.append(stream._key)
        if len(keys) == 1:
            raise Killed
        return real(*args, stream=stream, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit", fit)
    with pytest.raises(Killed):
        train()
    train()
    assert keys == [made[0], made[0]]
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert made[0] not in content, path.name
            assert made[0].hex().encode() not in content, path.name


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"data": {"unit": "image"}}, "unit of the data owner"),
        ({"privacy": {"delta": 1e-5}, "ledger_delta": 1e-6}, "the ledger's"),
        ({"data": {"declared_patients": 200}, "patients": 11_000}, "too large for this data set"),
    ],
)
def test_what_does_not_fit_the_data_owner_s_terms_is_refused(
    change: dict[str, object], word: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(
        config,
        path=tmp_path / "l",
        epsilon=10.0,
        delta=change.pop("ledger_delta", None),
        max_gate_attempts=1,
        progress=silent,  # type: ignore[arg-type]
    )
    if (patients := change.pop("patients", None)) is not None:
        monkeypatch.setattr("dpsynth.data.cohort.ImageSet.num_patients", patients)
    values = config.model_dump(mode="json")
    settings = Config.model_validate({**values, **{name: {**values[name], **part} for name, part in change.items()}})  # type: ignore[dict-item]
    with pytest.raises((LedgerError, ConfigError), match=word):
        module.train(settings, run_path=tmp_path / "run", ledger_path=ledger.path, progress=silent)
    assert ledger.charges() == ()
    assert not (tmp_path / "run").exists()


def test_the_claim_counts_earlier_runs(config: Config, tmp_path: Path) -> None:
    ledger = open_ledger(config, path=tmp_path / "l", epsilon=30.0, delta=None, max_gate_attempts=1, progress=silent)
    settings = config.model_copy(update={"method": "moments"})
    first, second = (module.train(settings, run_path=tmp_path / n, ledger_path=ledger.path, progress=silent) for n in ("a", "b"))
    assert first.ledger_epsilon == pytest.approx(first.epsilon)
    assert second.ledger_epsilon > 1.2 * second.epsilon


def test_a_copied_run_cannot_train_on_other_settings_under_the_same_charge(
    train: Callable[..., object], config: Config, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings that share their noise and differ by a few patients would cancel it."""
    killed_before_training(train, monkeypatch)
    other = config.model_copy(update={"data": config.data.model_copy(update={"control_fraction": 0.25})})
    folder = RunFolder.create(tmp_path / "other", config_text=module.dump_config(other))
    shutil.copytree(tmp_path / "run" / "train", folder.path / "train")
    with pytest.raises(LedgerError, match="settings differ"):
        module.train(other, run_path=folder.path, ledger_path=ledger.path, progress=silent)


def test_a_fault_while_training_keeps_the_charge_says_so_and_destroys_the_key(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = NoiseStream.normal
    monkeypatch.setattr(
        NoiseStream, "normal", lambda self, purpose, *rest: real(self, purpose, *rest) * (0.5 if "second" in purpose else 1)
    )
    with pytest.raises(SelfCheckFailed, match=r"the charge stays.*moments_noise: second_moments"):
        train()
    assert len(ledger.charges()) == 1
    assert not (tmp_path / "run" / "train" / "site" / "key").exists()


def test_private_images_cannot_be_named_as_public(config: Config, ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "xrays" / "inner").mkdir(parents=True)
    for private, public in (("xrays", "xrays"), ("xrays", "."), ("xrays", "xrays/inner")):
        data = config.data.model_copy(update={"format": "raster", "path": tmp_path / private})
        pretrain = config.pretrain.model_copy(update={"source": "raster", "path": tmp_path / public, "classes": ("a",)})
        with pytest.raises(ConfigError, match="place of the private"):
            module.train(
                config.model_copy(update={"data": data, "pretrain": pretrain}),
                run_path=tmp_path / "r",
                ledger_path=ledger.path,
                progress=silent,
            )


def test_private_images_among_the_public_ones_stop_the_run_before_it_is_charged(
    train: Callable[..., object], config: Config, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = module.prepare(module.read_cohort(config.data), config.data, progress=silent).images
    monkeypatch.setattr(module, "public_images", lambda *_, **__: private[:150])
    with pytest.raises(DataError, match="150 of the public images"):
        train()
    assert ledger.charges() == ()


def test_a_private_image_among_the_public_ones_is_refused() -> None:
    rng = np.random.default_rng(0)
    public, private = rng.uniform(-1, 1, (2, 5, 1, 8, 8)).astype(np.float32)
    module.require_disjoint(public, private)
    public[3] = private[1]
    with pytest.raises(DataError, match="1 of the public images"):
        module.require_disjoint(public, private)


@pytest.mark.parametrize("moment", ["before the settlement", "after the settlement", "between the secrets", "before the record"])
def test_a_run_killed_while_closing_is_closed_once(
    moment: str, train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real_settle, real_unlink = Ledger.settle, Path.unlink

        def settle(self: Ledger, reservation: str, **rest: object) -> None:
            if moment == "after the settlement":
                real_settle(self, reservation, **rest)  # type: ignore[arg-type]
            raise Killed

        def unlink(self: Path, **rest: bool) -> None:
            if self.name == "checkpoint.safetensors":
                raise Killed
            real_unlink(self, **rest)

        def complete(*_: object, **__: object) -> None:
            raise Killed

        if "settlement" in moment:
            patch.setattr(Ledger, "settle", settle)
        elif "secrets" in moment:
            patch.setattr(Path, "unlink", unlink)
        else:
            patch.setattr(RunFolder, "complete", complete)
        with pytest.raises(Killed):
            train()
    weights = (tmp_path / "run" / "train" / "weights.safetensors").read_bytes()
    train()
    (charge,) = ledger.charges()
    assert charge.settled
    assert (tmp_path / "run" / "train" / "weights.safetensors").read_bytes() == weights
    site = {path.name for path in (tmp_path / "run" / "train" / "site").iterdir()}
    assert not site & {"key", "checkpoint.safetensors"}
    before = ledger.path.read_bytes()
    assert train() == train()
    assert ledger.path.read_bytes() == before


def test_a_second_training_in_the_same_folder_is_told_and_charges_nothing(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_training(train, monkeypatch)
    before = ledger.path.read_bytes()
    with RunFolder.open(tmp_path / "run").alone("train/site"), pytest.raises(ArtifactError, match="Another process"):
        train()
    assert ledger.path.read_bytes() == before
    train()


def test_an_engine_that_fails_at_the_start_is_never_shown_a_patient(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = selfcheck.Finding(ok=False, detail="broken", statistic=1, threshold=0)
    monkeypatch.setattr(selfcheck, "self_check", lambda *_, **__: {"contribution_bounded": failed})
    monkeypatch.setattr(module, "release_moments", lambda *_, **__: pytest.fail("the patients were touched"))
    with pytest.raises(SelfCheckFailed, match=r"nothing was charged.*contribution_bounded: broken"):
        train()
    assert ledger.charges() == ()
    assert not (tmp_path / "run").exists()


def test_what_leaves_without_being_counted_is_listed(train: Callable[..., object]) -> None:
    """Every item of docs/guarantee.md's last section, by a word of it."""
    listed = " ".join(train(method="moments").unprotected)
    for word in ("patients", "classes", "image size", "intensity range", "pre-training", "schedule", "outcome word", "gate allowed",
                 "how often", "lines of the ledger", "digest", "officer"):  # fmt: skip
        assert word in listed


def test_a_refused_budget_costs_no_pretraining(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("first", method="moments")
    monkeypatch.setattr(module, "pretrained_weights", lambda *_, **__: pytest.fail("the answer was known before"))
    with pytest.raises(BudgetExceeded):
        train("second")
    assert not (tmp_path / "second").exists()
    assert len(ledger.charges()) == 1


def test_a_budget_spent_by_another_run_meanwhile_leaves_no_run_behind(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("first", method="moments")
    monkeypatch.setattr(Ledger, "require_affordable", lambda *_: None)
    with pytest.raises(BudgetExceeded):
        train("second", method="moments")
    assert not (tmp_path / "second").exists()
    assert len(ledger.charges()) == 1


def test_a_charged_run_whose_key_is_gone_is_not_charged_again(
    train: Callable[..., object], ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_training(train, monkeypatch)
    (tmp_path / "run" / "train" / "site" / "key").unlink()
    with pytest.raises(ArtifactError, match="key is gone"):
        train()
    assert len(ledger.charges()) == 1


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"data": {"control_fraction": 1e-9}}, DataError, "too small"),
        ({"privacy": {"epsilon": 0.001}}, ClaimRefused, "nothing was charged"),
        ({"data": {"intensity_range": [-900, -800]}}, DataError, "intensity_range"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_is_charged(
    change: dict[str, dict[str, object]],
    error: type[Exception],
    word: str,
    config: Config,
    ledger: Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "fresh_key", lambda: b"k" * 32)
    values = config.model_dump(mode="json")
    settings = Config.model_validate({**values, **{name: {**values[name], **part} for name, part in change.items()}})
    with pytest.raises(error, match=word):
        module.train(settings, run_path=tmp_path / "run", ledger_path=ledger.path, progress=silent)
    assert ledger.charges() == ()
    assert not (tmp_path / "run").exists()


def test_without_dp_sgd_no_training_touches_the_images(train: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing DP-SGD mechanism means no training, never training without privacy."""
    for name in ("fit", "fit_non_private"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("trained"))
    diffusion = DiffusionConfig(channels=(8, 16), trainable="none")
    train(diffusion=diffusion)
