"""An encoder of the policy's own: read from ONNX, by its hash, and used in place of the bundled one."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_cases import evidence_of, image_set

from dpsynth.checks import suite
from dpsynth.checks.encoders import Encoder, bundled, encoder_of
from dpsynth.checks.evidence import compute_features
from dpsynth.checks.features import encode
from dpsynth.checks.fidelity import fidelity
from dpsynth.checks.verdict import Outcome
from dpsynth.config import DataConfig, EncoderConfig, GateConfig, PhantomConfig, load_config
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.errors import ArtifactError, ConfigError, UsageError
from dpsynth.policy_needs import missing, require_present
from dpsynth.progress import silent

PICTURES = np.random.default_rng(0).uniform(-1, 1, (20, 1, 32, 32)).astype(np.float32)


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def tensor_info(name: bytes, shape: tuple[int | bytes, ...]) -> bytes:
    sizes = b"".join(field(1, field(1, size) if isinstance(size, int) else field(2, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, sizes)))


def network(nodes: list[bytes], *, side: int, output: tuple[int | bytes, ...], inputs: int = 1, weights: bytes = b"") -> bytes:
    """An ONNX file with a graph of these nodes from "x" to "y"."""
    graph = b"".join(field(1, node) for node in nodes) + field(2, b"net") + weights
    graph += b"".join(field(11, tensor_info(name, (b"n", 3, side, side))) for name in (b"x", b"z")[:inputs])
    graph += field(12, tensor_info(b"y", output))
    return field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13))


def node(kind: bytes, source: bytes, target: bytes) -> bytes:
    return field(1, source) + field(2, target) + field(4, kind)


def squares(side: int = 32) -> bytes:
    """Features of three channels: each pixel squared, as maps."""
    return network([field(1, b"x") + field(1, b"x") + field(2, b"y") + field(4, b"Mul")], side=side, output=(b"n", 3, side, side))


def config_of(folder: Path, content: bytes, **changes: Any) -> EncoderConfig:
    path = folder / f"{hashlib.sha256(content).hexdigest()[:8]}.onnx"
    path.write_bytes(content)
    return EncoderConfig(**{"path": path, "sha256": hashlib.sha256(content).hexdigest(), "side": 32, **changes})


def test_features_are_those_of_the_network_on_scaled_pictures(tmp_path: Path) -> None:
    mean, stddev = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    encoder = encoder_of(config_of(tmp_path, squares(), mean=mean, stddev=stddev))
    found = encode(PICTURES, task="", progress=silent, encoder=encoder)
    scaled = ((PICTURES.astype(np.float64) + 1) / 2 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(stddev, (1, 3, 1, 1))
    expected = (scaled**2).mean(axis=(2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    config = config_of(tmp_path, squares())
    assert config.sha256[:12] in encoder.name
    assert config.path.stem not in encoder.name.replace(config.sha256[:12], ""), "the name leaves with the limitation of a check"
    assert encode(PICTURES, task="", progress=silent).shape == (20, 1280)


def test_the_suite_compares_by_the_encoder_of_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, used = config_of(tmp_path, squares()), []

    def compute(*_: object, encoder: Encoder, **__: object) -> None:
        used.append(encoder)
        raise InterruptedError

    monkeypatch.setattr(suite, "compute_features", compute)
    for gate in (GateConfig(encoder=config), GateConfig()):
        with pytest.raises(InterruptedError):
            suite.run_checks(None, gate, seed=0, progress=silent)
    assert used == [encoder_of(config), bundled()]


@pytest.mark.parametrize("blind", [True, False], ids=["mean of each channel", "bundled"])
def test_images_out_of_focus_are_put_before_every_encoder(blind: bool, tmp_path: Path) -> None:
    """A policy can declare a network that sees no more than how bright a picture is; it must not decide what looks real."""
    mean = network([node(b"GlobalAveragePool", b"x", b"y")], side=32, output=(b"n", 3, 1, 1))
    encoder = encoder_of(config_of(tmp_path, mean)) if blind else bundled()
    phantom = PhantomConfig(num_patients=360, max_images=1, seed=1)
    data = DataConfig(phantom=phantom, spatial_shape=(32, 32))
    drawn, labels = prepare(read_cohort(data), data, progress=silent).images, np.arange(120) % 2
    evidence = evidence_of(image_set(drawn[:120], labels), image_set(drawn[120:240], labels, prefix="c"), drawn[240:], labels)
    features = compute_features(evidence, encoder=encoder, progress=silent)
    verdict = fidelity(features, GateConfig(), rng=np.random.default_rng(0))
    assert verdict.outcome is (Outcome.INCONCLUSIVE if blind else Outcome.PASS), verdict.reason
    parts = [value for name, value in verdict.figures.items() if "out of focus" in name]
    assert (min(parts) >= 0.5) is blind, parts


def test_another_file_than_declared_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, squares())
    encoder_of(config)
    with pytest.raises(ArtifactError, match="SHA-256 000000000000"):
        encoder_of(config.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(ArtifactError, match="found no file"):
        encoder_of(config.model_copy(update={"path": tmp_path / "missing.onnx"}))


def test_weights_in_a_file_that_no_hash_covers_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write beside the declared file could else change what the checks see."""
    (tmp_path / "weights.bin").write_bytes(np.float32(2).tobytes())
    monkeypatch.chdir(tmp_path)
    outside = field(1, 1) + field(2, 1) + field(8, b"w") + field(13, field(1, b"location") + field(2, b"weights.bin")) + field(14, 1)
    twice = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(4, b"Mul")
    content = network([twice], side=32, output=(b"n", 3, 32, 32), weights=field(5, outside))
    with pytest.raises(ArtifactError, match="in one file"):
        encoder_of(config_of(tmp_path, content))


NO_ENCODERS = pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK no network", "cannot be read"),
        (network([node(b"Identity", b"x", b"y")], side=32, output=(b"n", 3, 32, 32), inputs=2), "one input"),
        (squares(side=48), "take pictures of 3x32x32"),
        (network([node(b"Shape", b"x", b"y")], side=32, output=(4,)), "cannot be read|rows of features"),
        (network([node(b"Log", b"x", b"y")], side=32, output=(b"n", 3, 32, 32)), "finite rows"),
    ],
)


@NO_ENCODERS
def test_a_file_that_is_no_encoder_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        encode(PICTURES[:4], task="", progress=silent, encoder=encoder_of(config_of(tmp_path, content)))


@NO_ENCODERS
def test_what_is_no_encoder_is_known_before_the_checks(tmp_path: Path, content: bytes, words: str) -> None:
    gate = GateConfig(encoder=config_of(tmp_path, content))
    with pytest.raises(ArtifactError, match=words) as caught:
        require_present(gate)
    assert str(gate.encoder.path) in missing(gate) == str(caught.value)
    assert missing(GateConfig(encoder=config_of(tmp_path, squares()))) == missing(GateConfig()) == ""


def test_without_onnx_runtime_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'dpsynth\[encoder\]'"):
        encoder_of(config_of(tmp_path, squares(), side=33))


def test_the_policy_names_it_relative_to_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"gate: {{encoder: {{path: net.onnx, sha256: {'a' * 64}}}}}")
    encoder = load_config(tmp_path / "config.yaml").gate.encoder
    assert encoder is not None
    assert encoder.path == tmp_path / "net.onnx"
    (tmp_path / "config.yaml").write_text("gate: {encoder: {path: net.onnx, sha256: abc}}")
    with pytest.raises(ConfigError, match=r"gate\.encoder\.sha256"):
        load_config(tmp_path / "config.yaml")
    assert encoder_of(None) is bundled()
