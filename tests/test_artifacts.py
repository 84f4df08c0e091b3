"""Run folders and signatures: an unfinished, changed or foreign file is named, and a write is whole or not there."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dpsynth.artifacts import RunFolder, read_json, write_bytes, write_json
from dpsynth.errors import ArtifactError, SignatureError, StorageError
from dpsynth.signing import (
    PAYLOAD_TYPE,
    STATEMENT_TYPE,
    generate_key,
    key_id,
    load_private,
    load_public,
    pre_authentication_encoding,
    sign_statement,
    verify_envelope,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two finished stages, the second made from the first."""
    run = RunFolder.create(tmp_path / "run", config_text="method: moments\n")
    write_bytes(run.folder("train") / "weights", b"w")
    run.complete("train")
    write_bytes(run.folder("generate") / "images", b"i")
    run.complete("generate", needs=("train",), facts={"count": 1})
    return run


def test_a_finished_stage_is_what_it_says(run: RunFolder) -> None:
    record = run.require("generate")
    assert record.facts == {"count": 1}
    assert set(record.files) == {"images"}
    assert RunFolder.open(run.path) == run


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run.path / "train" / "weights").write_bytes(b"x"), "train/weights was changed"),
        (lambda run: (run.path / "train" / "weights").unlink(), "train/weights is missing"),
        (lambda run: (run.path / "generate" / "more").write_bytes(b"x"), "generate/more was added"),
        (lambda run: (run.path / "generate" / "stage.json").unlink(), "has not finished"),
        (lambda run: run.complete("train", facts={"other": 1}), "'train' was run again"),
        (lambda run: (run.path / "generate" / "stage.json").write_text("{"), "valid JSON"),
    ],
)
def test_what_is_wrong_with_a_stage_is_named(run: RunFolder, spoil, words: str) -> None:
    spoil(run)
    with pytest.raises(ArtifactError, match=words):
        run.require("generate")


def test_doing_a_stage_again_removes_what_was_made_from_it(run: RunFolder) -> None:
    run.reset("train")
    assert not (run.path / "train").exists()
    assert not (run.path / "generate").exists()


def test_a_changed_configuration_is_refused(run: RunFolder) -> None:
    (run.path / "config.yaml").write_text("method: diffusion\n")
    with pytest.raises(ArtifactError, match="changed after the run began"):
        RunFolder.open(run.path)


def test_a_run_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path, value: object, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpsynth.artifacts.write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.create(tmp_path / "run", config_text="a: 1\n")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert RunFolder.create(tmp_path / "run", config_text="a: 1\n").config_text == "a: 1\n"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old", private=True)
    assert path.stat().st_mode & 0o777 == 0o600

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"Could not write file: No space left.*Free some space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_is_stable_and_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": [1.5, None], "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()


STATEMENT = {"_type": STATEMENT_TYPE, "subject": [{"name": "a"}], "predicate": {"epsilon": 3}}


def test_a_signature_holds_for_its_key_and_bytes_only() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    envelope = sign_statement(STATEMENT, key)
    assert verify_envelope(envelope, key.public_key()) == STATEMENT
    with pytest.raises(SignatureError, match="not made by this key"):
        verify_envelope(envelope, other.public_key())
    forged = {**STATEMENT, "predicate": {"epsilon": 1}}
    payload = base64.b64encode(json.dumps(forged).encode()).decode()
    with pytest.raises(SignatureError, match="not made by this key"):
        verify_envelope({**envelope, "payload": payload}, key.public_key())


@pytest.mark.parametrize(
    "change",
    [
        {"payloadType": "text/plain"},
        {"extra": 1},
        {"payload": "@@"},
        {"signatures": [{}]},
        {"signatures": "none"},
    ],
)
def test_a_malformed_envelope_is_refused(change: dict[str, object]) -> None:
    key = Ed25519PrivateKey.generate()
    with pytest.raises(SignatureError, match="DSSE envelope"):
        verify_envelope({**sign_statement(STATEMENT, key), **change}, key.public_key())
    with pytest.raises(SignatureError):
        verify_envelope([], key.public_key())


def test_a_signed_statement_of_another_type_or_with_a_key_twice_is_refused() -> None:
    key = Ed25519PrivateKey.generate()
    with pytest.raises(SignatureError, match="in-toto"):
        verify_envelope(sign_statement({"_type": "x"}, key), key.public_key())
    payload = b'{"_type": "%s", "epsilon": 3, "epsilon": 1}' % STATEMENT_TYPE.encode()
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    with pytest.raises(SignatureError, match="repeats a key"):
        verify_envelope(envelope, key.public_key())


def test_the_encoding_is_that_of_the_specification() -> None:
    """The example of the DSSE protocol, version 1."""
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_keys_are_made_once_and_for_their_owner(tmp_path: Path) -> None:
    private, public = generate_key(tmp_path)
    assert private.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ArtifactError, match="exists already"):
        generate_key(tmp_path)
    for loader, path in ((load_private, public), (load_public, private), (load_public, tmp_path / "none")):
        with pytest.raises(SignatureError):
            loader(path)


def test_two_processes_cannot_work_in_one_stage(run: RunFolder) -> None:
    """flock belongs to the open file, so a second open in the same process is a second worker."""
    with run.alone("train/site"), pytest.raises(ArtifactError, match="Another process"), run.alone("train/site"):
        pass
    with run.alone("train/site") as folder:
        assert folder.is_dir()
