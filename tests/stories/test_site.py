"""The hospital's story: it writes its rules, opens its ledger, lets its guard listen, says no, is killed in a round, and goes on;
and when the study is over it checks what came of it, approves it, and it is released."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cases import numbers_of
from federation_cases import POLICY, config, told_body, train_body
from joint_release_cases import SITES, Joint
from typer.testing import CliRunner

from dpsynth.errors import GateRefused
from dpsynth.privacy.ledger import Ledger
from dpsynth.signing import generate_key, load_private
from federated.cli import app
from federated.coordinator_cli import app as coordinator_app
from federated.federation import Federation, plan_of
from federated.messages import FIRST_TRAINING, Code, decode_reply, encode_request
from federated.rounds import SUMS, Model
from federated.serve import ask


@contextmanager
def guard(policy: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "federated.cli", "serve", str(policy)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening: ")
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def ended(policy: Path) -> list[dict[str, str]]:
    """What the doctor finds where the guard should not start."""
    result = CliRunner().invoke(app, ["doctor", str(policy), "--format", "json"])
    assert result.exit_code == GateRefused.exit_code
    return list(json.loads(result.stdout))


def test_a_hospital_takes_part_refuses_is_killed_and_goes_on(tmp_path: Path) -> None:
    private_path, _ = generate_key(tmp_path / "coordinator")
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY.replace("NAME", "a").replace("SEED", "1").replace("largest_steps_per_round: 4", "largest_steps_per_round: 500"))
    path.write_text(path.read_text().replace("largest_steps: 20", "largest_steps: 500"))
    path.chmod(0o600)
    run("init", path)
    diagnoses = json.loads(run("doctor", path, "--format", "json"))
    assert {item["question"]: item["state"] for item in diagnoses}["data"] == "ok"

    settings = Federation(study="study", sites=("a",), quorum=1, rounds=1, steps_per_round=120, config=config())
    plan, private = plan_of(settings), load_private(private_path)
    fields = {"study": "study", "site": "a", "plan": plan}
    model = Model.of(config())
    moments = [
        encode_request({**fields, "kind": "moments", "round": n, "message_id": f"moments-{n}"}, told_body(model, n), private=private)
        for n in range(FIRST_TRAINING)
    ]
    train = encode_request({**fields, "kind": "train", "round": 4, "message_id": "train-4"}, train_body(model), private=private)
    greedy = {**fields, "plan": plan.model_copy(update={"noise_multiplier": 0.3}), "study": "greedy"}
    too_much = encode_request({**greedy, "kind": "moments", "round": 0, "message_id": "x"}, {}, private=private)

    with guard(path) as process:
        for query in moments:
            reply, arrays = decode_reply(ask(tmp_path / "guard.sock", query, seconds=60), largest_bytes=1 << 30)
            assert reply.outcome == "ok"
            assert np.isfinite(arrays[SUMS]).all()
        assert decode_reply(ask(tmp_path / "guard.sock", too_much, seconds=60), largest_bytes=1 << 20)[0].code is Code.NOISE
        asking = subprocess.Popen(
            [sys.executable, "-c", "import sys, pathlib; from federated.serve import ask; "
             "ask(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_bytes(), seconds=100)",
             str(tmp_path / "guard.sock"), str(written(tmp_path / "train.frame", train))],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(lambda: len(Ledger.load(tmp_path / "ledger.jsonl").charges()) == FIRST_TRAINING + 1)
        until(lambda: any(tmp_path.rglob("checkpoint.safetensors")))
        process.send_signal(signal.SIGKILL)
        assert asking.wait(timeout=60) != 0, "the answer must not have come before the kill"
    assert [charge.settled for charge in Ledger.load(tmp_path / "ledger.jsonl").charges()] == [True] * FIRST_TRAINING + [False]

    with guard(path) as process:
        answer = ask(tmp_path / "guard.sock", train, seconds=100)
        assert decode_reply(answer, largest_bytes=1 << 30)[0].outcome == "ok"
        assert ask(tmp_path / "guard.sock", train, seconds=60) == answer
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    summary = json.loads(run("ledger", path, "--format", "json"))
    assert [charge["purpose"] for charge in summary["charges"]] == [f"federation study, round {n}" for n in range(FIRST_TRAINING + 1)]
    assert 9 < summary["spent"] <= 10
    assert not Ledger.problems_of(tmp_path / "ledger.jsonl")

    path.write_text(path.read_text().replace("num_patients: 120", "num_patients: 119"))  # one withdraws
    assert {item["question"]: item["state"] for item in ended(path)}["ledger and data"] == "error"
    run("data-changed", path, "--because", "Dr B: one withdrew")
    assert "changed   the data; Dr B: one withdrew" in run("ledger", path)
    diagnoses = json.loads(run("doctor", path, "--format", "json"))
    assert {item["question"]: item["state"] for item in diagnoses}["data"] == "ok"
    assert len(Ledger.load(tmp_path / "ledger.jsonl").charges()) == FIRST_TRAINING + 1


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def until(condition: object) -> None:
    end = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_hospitals_check_what_they_trained_approve_it_and_it_is_released_and_verified_without_them(
    joint: Joint, without_torch: Callable[[str], subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hospitals trained in one process. One checks with all that there is; the other's word is there. No figure leaves."""
    monkeypatch.setattr("dpsynth.checks.suite.train_arms", not_today)  # utility is not required here, and takes half of the time
    policy, out = joint.folder / "north" / "policy.yaml", joint.folder / "out"
    said = run("check", policy, joint.candidates)
    assert "Nothing stands in the way of an approval." in said
    page = joint.policy("north").state / "studies" / "joint" / "check" / "report.html"
    assert f"Report, which must not leave: {page}" in said
    review = page.with_name("review.html")
    assert f"A sample to look at: {review}. It is for the site alone and must not leave." in said
    assert {path.stat().st_mode & 0o777 for path in (page, review)} == {0o600}
    assert review.read_text().count("<img") == joint.policy("north").gate.content.person_sees
    refusal, approval = joint.folder / "refusal.dsse.json", joint.folder / "approval.dsse.json"
    plain = joint.folder / "approval.json"
    shown = run("approve", policy, joint.candidates, "--out", plain)
    key = joint.key("north").rename(joint.folder / "officer.key")  # on another machine, which has neither policy nor data
    signed = run("sign", plain, "--key", key, "--out", approval)
    assert signed.splitlines()[:-1] == shown.splitlines()[:-1], "the officer reads what the site decided"
    assert "north, study joint: approved" in signed
    because = ["--because", "Dr B: image 3 is my patient"]
    said = run("refuse", policy, joint.candidates, "--key", key, "--out", refusal, *because)
    assert "Warning: these images were approved before" in said
    assert "; Dr B: image 3 is my patient\n" in run("ledger", policy)
    again = ["approve", policy, joint.candidates, "--key", key, "--out", joint.folder / "again.dsse.json"]
    never = CliRunner().invoke(app, [*map(str, again)])
    assert isinstance(never.exception, GateRefused)
    assert "these images were refused by a person" in str(never.exception)
    (joint.folder / "coordinator").mkdir()
    for name in ("signing.key", "signing.pub"):
        shutil.copy(joint.folder / "keys" / name, joint.folder / "coordinator" / name)
    release = ["release", joint.folder / "study.yaml", joint.run, out, "--folder", joint.folder, "--approval", joint.statement("south")]
    refused = CliRunner().invoke(coordinator_app, [*map(str, release), "--approval", str(refusal)])
    assert isinstance(refused.exception, GateRefused)
    assert "north: it refused" in str(refused.exception)
    assert CliRunner().invoke(coordinator_app, [*map(str, release), "--approval", str(approval)]).exit_code == 0

    verified = without_torch(
        "sys.modules['federated'] = sys.modules['flwr'] = None\n"
        f"sys.argv = ['dpsynth', 'verify', {str(out)!r}, '--key', {str(joint.coordinator_key.with_name('signing.pub'))!r}]\n"
        "from dpsynth.cli import main\nmain()"
    )
    assert verified.returncode == 0, verified.stderr
    *established, word = verified.stdout.splitlines()
    assert word == "true"
    for site in SITES:
        assert any(line.startswith(f"site       {site} approved") and "as the release names it" in line for line in established)
    report, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for site in SITES:
        assert f"<strong>{site}</strong>" in report
        assert f"{site}: epsilon" in card
    released_texts_hold_no_figure_of(joint, out)


def not_today(*_: object, **__: object) -> None:
    raise RuntimeError("no classifier is trained")


def released_texts_hold_no_figure_of(joint: Joint, out: Path) -> None:
    secrets, numbers = [str(joint.folder)], []
    for site in SITES:
        checks = joint.policy(site).state / "studies" / "joint" / "check"
        for verdict in json.loads((checks / "verdicts.json").read_text())["verdicts"]:
            secrets += [verdict["reason"]] if verdict["reason"] != "because" else []
            if verdict["check"] not in ("accounting", "content"):
                numbers += numbers_of(verdict)
        secrets += [json.loads((checks.parent / "split.json").read_text())["key"], joint.guard(site).ledger.genesis["digest_salt"]]
    statements = [base64.b64decode(json.loads(path.read_text())["payload"]).decode() for path in (out / "sites").glob("*.json")]
    assert len(statements) == 2
    files = [path.read_text() for path in out.rglob("*") if path.suffix in {".json", ".html", ".md", ".csv", ".txt"}]
    for text in (*files, *statements):
        for secret in secrets:
            assert secret not in text, secret
        plain = re.sub(r' d="[^"]*"', "", text)  # the coordinates of curves hold any four digits sooner or later
        for number in (number for number in numbers if len(number) > 5):
            assert not re.search(r"(?<![\d.])" + re.escape(number), plain), number
