"""From a run to `dpsynth detect`: the detector sees no patient, travels signed, and answers in one line what it cannot judge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from test_bundle_and_verify import package

import dpsynth.generate as drawing
import dpsynth.train.detector as training
from dpsynth import cli
from dpsynth.artifacts import RunFolder, read_json
from dpsynth.config import Config, parse_config
from dpsynth.data.candidates import Candidates, to_8_bit
from dpsynth.detector.evaluation import LEFT_OUT, OWN, doubts, own_quality, unfit
from dpsynth.detector.model import FILE, Detector
from dpsynth.errors import ArtifactError, DataError, SignatureError
from dpsynth.model.generator import Generator
from dpsynth.model.moment_release import release_moments
from dpsynth.model.moments import public_reference
from dpsynth.progress import silent
from dpsynth.release.bundle import write_release
from dpsynth.release.decision import no_detector_of
from dpsynth.release.detect import detect
from dpsynth.release.verify import verify
from dpsynth.signing import generate_key, load_private
from dpsynth.train.public import public_images

SETTINGS = """\
method: moments
data: {spatial_shape: [12, 12]}
moments: {low_frequencies: 4}
pretrain: {num_phantoms: 160}
generate: {count: 40}
release: {detector: true}
"""


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(SETTINGS, base=Path())


@pytest.fixture(scope="module")
def generator(config: Config) -> Generator:
    """A finished generator; whose moments it holds does not matter here."""
    images = public_images(config, progress=silent)
    moments = release_moments(
        images,
        np.arange(len(images)) % 2,
        np.arange(len(images)),
        num_classes=2,
        mechanism=None,
        reference=public_reference(images, low_frequencies=4),
        stream=None,
    )
    return Generator.of(config, moments=moments, denoiser=None, count_stddev=1.0)


@pytest.fixture(scope="module")
def detector(config: Config, generator: Generator) -> Detector:
    drawn = drawing.draw(generator, config.generate, progress=silent)
    return training.train_detector(config, generator, drawn.images, progress=silent)


@pytest.fixture
def out(detector: Detector, generator: Generator, config: Config, tmp_path: Path) -> Path:
    drawn = drawing.draw(generator, config.generate, progress=silent)
    candidates = Candidates(images=drawn.images, labels=drawn.labels, seeds=drawn.seeds)
    generate_key(tmp_path / "keys")
    release = replace(package(formats=("png",)), candidates=candidates, detector=detector)
    return write_release(release, out=tmp_path / "out", private=load_private(tmp_path / "keys" / "signing.key"), progress=silent)


def test_it_is_trained_without_private_images_and_deterministic(
    config: Config, generator: Generator, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reads the private cohort is cut off; the candidates are judged afterwards and change neither weights nor calibration."""

    def private(*_: object, **__: object) -> None:
        raise AssertionError("the private images were read")

    monkeypatch.setattr("dpsynth.data.source.read_cohort", private)
    monkeypatch.setattr("dpsynth.train.public.read_cohort", private)
    others = drawing.draw(generator, config.generate.model_copy(update={"seed": 3}), progress=silent).images
    again = training.train_detector(config, generator, others, progress=silent)
    for name in ("centre", "scale", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(detector, name))
    assert again.calibration == detector.calibration
    assert again.evaluation["images of this release, not trained on"] != detector.evaluation["images of this release, not trained on"]


def test_images_of_the_generator_are_recognised_and_public_ones_are_not(config: Config, generator: Generator, detector: Detector) -> None:
    fresh = drawing.draw(generator, config.generate.model_copy(update={"seed": 9}), progress=silent).images
    others = public_images(config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"seed": 9})}), progress=silent)
    assert detector.probability(fresh).mean() > 0.8
    assert detector.probability(to_8_bit(others)).mean() < 0.2
    assert detector.evaluation["images of this release, not trained on"]["mean probability"] > 0.8


def figures_of(**own: float) -> dict[str, object]:
    """An evaluation whose own figures are those of a good detector but for what is given."""
    good = {"share of a known kind": 1.0, "mean probability": 0.9, "share above one half": 0.95, "share recognised": 0.95, "log_loss": 0.3}
    return {OWN: {**good, **own}}


def test_a_detector_that_does_worse_than_guessing_on_the_drawn_images_is_unfit() -> None:
    assert unfit(figures_of()) == ""
    assert "only 79% of the drawn images" in unfit(figures_of(**{"share of a known kind": 0.79}))
    worthless = unfit(figures_of(**{"share recognised": 0.3, "log_loss": 1.03}))
    assert "30% recognised, log loss 1.03, where guessing has 50% and 0.69" in worthless
    assert "worse than guessing" in unfit(figures_of(log_loss=0.70))
    assert "worse than guessing" in unfit(figures_of(**{"share recognised": 0.49}))
    assert unfit({}) == ""


def test_an_image_of_no_known_kind_is_not_recognised() -> None:
    own = own_quality(np.array([0.9, 0.9, 0.2, 0.9]), np.array([True, False, True, True]))
    assert (own["share above one half"], own["share recognised"], own["share of a known kind"]) == (0.75, 0.5, 0.75)
    assert own["log_loss"] == pytest.approx(-(3 * np.log(0.9) + np.log(0.2)) / 4, abs=1e-4)


def test_a_detector_that_is_sure_and_wrong_about_another_generator_is_doubted() -> None:
    rows = {"net": {"log_loss": 6.9}, "moments": {"log_loss": 0.7}}
    assert "net: 6.90; guessing has 0.69" in doubts({LEFT_OUT: rows})
    assert "moments" not in doubts({LEFT_OUT: rows})
    assert doubts({LEFT_OUT: {"net": {"log_loss": 1.3}}}) == doubts({}) == ""


def test_public_images_of_another_kind_make_it_unfit(config: Config, generator: Generator, detector: Detector) -> None:
    """A hospital of chests beside public brains: whatever told real from synthetic there would call this hospital's patients synthetic."""
    brains = parse_config(SETTINGS.replace("num_phantoms: 160", "num_phantoms: 160, anatomies: [brain]"), base=Path())
    chests = parse_config(SETTINGS.replace("num_phantoms: 160", "num_phantoms: 160, anatomies: [chest]"), base=Path())
    patients = to_8_bit(public_images(chests, progress=silent))[:100]
    assert "another kind" in unfit(training.train_detector(brains, generator, patients, progress=silent).evaluation)
    of_known_kind = training.train_detector(chests, generator, patients, progress=silent)  # real ones, so it must not recognise them
    assert "worse than guessing" in unfit(of_known_kind.evaluation)
    assert unfit(detector.evaluation) == ""


@pytest.fixture
def trained(generator: Generator, tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run", config_text=SETTINGS)
    run.reset("train")
    generator.save(run.folder("train"))
    run.complete("train", needs=(), facts={})
    return run


def test_an_unfit_detector_is_not_written_and_generate_release_and_detect_say_so(
    trained: RunFolder,
    config: Config,
    detector: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = replace(detector, evaluation={**detector.evaluation, **figures_of(**{"share recognised": 0.3, "log_loss": 1.03})})
    monkeypatch.setattr(drawing, "train_detector", lambda *_, **__: bad)
    warning = drawing.generate(trained.path, progress=silent).warnings[0]
    assert "no detector was made" in warning
    assert "30% recognised, log loss 1.03" in warning
    assert not (trained.folder("generate") / FILE).exists()
    reason = no_detector_of(trained, config)
    assert reason in warning
    generate_key(tmp_path / "keys")
    release = replace(package(formats=("png",)), no_detector=reason)
    out = write_release(release, out=tmp_path / "out", private=load_private(tmp_path / "keys" / "signing.key"), progress=silent)
    assert verify(out, tmp_path / "keys" / "signing.pub") == []
    with pytest.raises(ArtifactError, match=r"asked for and none could be made: .*30% recognised"):
        detect(out, [out / "synthetic.npz"], public_key=None)
    monkeypatch.setattr("dpsynth.release.run.release", lambda *_, **__: out)
    monkeypatch.setattr(sys, "argv", ["dpsynth", "release", "run", "out", "--key", str(tmp_path / "keys" / "signing.key")])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"Warning: the release holds no detector, though release.detector asks for one: {reason}." in capsys.readouterr().out


def test_a_doubtful_detector_is_written_with_a_warning_that_detect_repeats(trained: RunFolder, detector: Detector, out: Path) -> None:
    """After moments alone the only generator left out is a sibling, about which the detector is sure and wrong."""
    (warning,) = drawing.generate(trained.path, progress=silent).warnings
    assert "sure and wrong" in warning
    assert (trained.folder("generate") / FILE).is_file()
    lines = detect(out, [out / "images"], public_key=None).lines()
    own = detector.evaluation[OWN]
    assert f"On the release's own images, which it was not trained on: {own['share recognised']:.0%} recognised" in lines[1] + lines[2]
    assert any(line == f"Warning: {warning}." for line in lines)


def test_a_release_without_the_setting_holds_no_detector(tmp_path: Path) -> None:
    """Whether one was asked for is not known of such a folder, so the message is true in both cases."""
    generate_key(tmp_path / "keys")
    out = write_release(
        package(formats=("png",)), out=tmp_path / "o", private=load_private(tmp_path / "keys" / "signing.key"), progress=silent
    )
    assert not (out / FILE).exists()
    assert "dpsynth detect" not in (out / "README.md").read_text()
    with pytest.raises(ArtifactError, match=r"did not ask for one \(`release\.detector`\), or none could be made"):
        detect(out, [out / "synthetic.npz"], public_key=None)


def test_detect_reads_pictures_folders_and_archives(out: Path, detector: Detector, tmp_path: Path) -> None:
    key = tmp_path / "keys" / "signing.pub"
    assert verify(out, key) == []
    assert "dpsynth detect" in (out / "README.md").read_text()
    found = detect(out, [out / "images", out / "synthetic.npz"], public_key=key)
    assert len(found.names) == 80
    assert found.probabilities[:40] == found.probabilities[40:]
    assert found.names[40] == "synthetic.npz[0]"
    assert found.signed
    pixels = np.asarray(Pillow.open(out / "images" / "synthetic-000003.png"))[None, None]
    assert found.probabilities[3] == pytest.approx(float(detector.probability(pixels)[0]), abs=1e-5)
    assert "no image of a patient was used" in " ".join(found.lines())
    (tmp_path / "strange").mkdir()
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (12, 6))  # four times as far as the reach; noise lies near its edge
    Pillow.fromarray(stripes).save(tmp_path / "strange" / "stripes.png")
    strange = detect(out, [tmp_path / "strange"], public_key=key)
    assert strange.probabilities == (None,)
    assert "1 are unlike all images" in " ".join(strange.lines())
    assert "signature was not examined" in " ".join(detect(out, [out / "images"], public_key=None).lines())


def test_another_detector_is_refused_with_the_key_and_found_by_verify(out: Path, tmp_path: Path) -> None:
    changed = read_json(out / FILE)
    changed["bias"] += 5
    (out / FILE).write_text(json.dumps(changed))
    assert verify(out, tmp_path / "keys" / "signing.pub") == [f"{FILE}: changed since it was signed"]
    with pytest.raises(SignatureError, match="as it was signed"):
        detect(out, [out / "images"], public_key=tmp_path / "keys" / "signing.pub")
    generate_key(tmp_path / "others")
    with pytest.raises(SignatureError):
        detect(out, [out / "images"], public_key=tmp_path / "others" / "signing.pub")


@pytest.mark.parametrize("figures", [{OWN: {}}, {OWN: [1]}, {LEFT_OUT: {"net": {}}}, {LEFT_OUT: [1]}])
def test_figures_that_cannot_be_read_are_named(out: Path, figures: dict[str, object]) -> None:
    changed = read_json(out / FILE)
    changed["evaluation"] = figures
    (out / FILE).write_text(json.dumps(changed))
    with pytest.raises(ArtifactError, match=r"figures in detector\.json cannot be read"):
        detect(out, [out / "images"], public_key=None)


def spoil(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be judged, with a word of the reason."""
    Pillow.fromarray(np.zeros((14, 12), dtype=np.uint8)).save(folder / "large.png")
    Pillow.fromarray(np.full((12, 12), 4000, dtype=np.uint16)).save(folder / "deep.png")
    (folder / "torn.png").write_bytes(b"\x89PNG")
    (folder / "empty").mkdir()
    np.savez(folder / "other.npz", images=np.zeros((2, 12, 12)))
    np.savez(folder / "pickle.npz", train_images=np.array([{}], dtype=object))
    np.savez(folder / "nan.npz", train_images=np.full((2, 12, 12), np.nan))
    names = {"large.png": "12 x 12", "deep.png": "0 to 255", "torn.png": "PNG or JPEG", "empty": "none", "other.npz": "none with images"}
    names |= {"pickle.npz": "unreadable", "nan.npz": "0 to 255", "missing.png": "found none"}
    return {name: (folder / name, word) for name, word in names.items()}


def test_what_cannot_be_judged_is_said_in_one_line(out: Path, tmp_path: Path) -> None:
    for path, word in spoil(tmp_path).values():
        with pytest.raises(DataError, match=word) as caught:
            detect(out, [path], public_key=None)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_detect_runs_without_torch(out: Path, without_torch: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    code = f"from dpsynth.cli import main; sys.argv = ['dpsynth', 'detect', {str(out)!r}, {str(out / 'images')!r}]; main()"
    ran = without_torch(code)
    assert ran.returncode == 0, ran.stderr
    assert "synthetic-000000.png" in ran.stdout
    assert "of 40 are rather synthetic" in ran.stdout


def test_generate_writes_it_into_the_run(trained: RunFolder, config: Config, detector: Detector) -> None:
    drawing.generate(trained.path, progress=silent)
    written = Detector.from_json(read_json(trained.folder("generate") / FILE))
    np.testing.assert_allclose(written.weights, detector.weights, rtol=1e-6, atol=1e-9)
    assert FILE in trained.require("generate").files
    assert no_detector_of(trained, config) == ""
