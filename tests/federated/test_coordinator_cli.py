"""What a coordinator or a hospital's IT gets wrong in `dpsynth-federation`: one line that names the next step, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from joint_release_cases import SITES, Joint

from dpsynth.artifacts import held, write_json
from dpsynth.signing import generate_key
from federated import coordinator_cli
from federated.certs import SERVER_CERTIFICATE, SERVER_KEY, fingerprint, make_ca, make_node_key, make_server_certificate
from federated.launch import Coordination, Flower
from federated.study_folder import OUTCOME

PROGRAMS = ("flwr", "flower-superlink", "flower-superexec", "flower-supernode")
# Plays `flwr supernode`: keys are registered once, and unregistered for good, as the SuperLink has it.
FLWR = """#!{python}
import json, pathlib, sys
ASKED, state = "Using SuperLink: fed (127.0.0.1:8000)\\n\\n", pathlib.Path({state!r})
known = json.loads(state.read_text()) if state.is_file() else {{}}
words = sys.argv[1:]
if {absent!r}:
    print(json.dumps({{"success": False, "error-message": ASKED + "Connection to the SuperLink is unavailable."}}))
    sys.exit(1)
if words[1] == "list":
    print(json.dumps({{"success": True, "nodes": [{{"node-id": str(n), "status": "online"}} for n in known.values() if n > 0]}}))
elif words[1] == "unregister":
    state.write_text(json.dumps({{key: -n if str(n) == words[2] else n for key, n in known.items()}}))
    print(json.dumps({{"success": True}}))
elif (key := pathlib.Path(words[2]).read_text()) in known:
    print(json.dumps({{"success": False, "error-message": ASKED + "[code: 23] Public key already in use."}}))
    sys.exit(1)
else:
    state.write_text(json.dumps({{**known, key: len(known) + 1}}))
    print(json.dumps({{"success": True, "node-id": str(len(known) + 1)}}))
"""
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in an empty folder: exit code, output, and the one line of an error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpsynth-federation", *arguments])
        with pytest.raises(SystemExit) as ending:
            coordinator_cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "Internal error" not in captured.err
        assert len(captured.err.splitlines()) <= 1, captured.err
        return int(ending.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Flower's programs, played."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        write_flwr(folder / name, absent=False)
    monkeypatch.setenv("DPSYNTH_FLOWER", str(folder))
    return folder


def write_flwr(path: Path, *, absent: bool) -> None:
    path.write_text(FLWR.format(python=sys.executable, state=str(path.parent / "state.json"), absent=absent))
    path.chmod(0o755)


@pytest.fixture
def fed(tmp_path: Path) -> Path:
    """The coordinator's folder as `up` left it, and a node's key."""
    make_ca(tmp_path / "fed", days=2)
    make_server_certificate(tmp_path / "fed", hosts=["localhost", "127.0.0.1"], days=2)
    (tmp_path / "fed" / "home").mkdir()
    (tmp_path / "fed" / "home" / "config.toml").write_text("")
    make_node_key(tmp_path / "node")
    (tmp_path / "rubbish").write_text("rubbish")
    return tmp_path / "fed"


NODE = {"superlink": "localhost:1", "ca": "fed/ca.crt", "key": "node/node.key", "guard": "g.sock", "home": "home"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init-ca", "new", "--days", "-5"], "--days: expected 1 to"),
        (["init-ca", "new", "--days", "1000000"], "--days: expected 1 to"),
        (["init-ca", "fed"], "exists already"),
        *(
            (["server-cert", "new", "--host", host], "--host: expected a name or an address")
            for host in ("", "a b", "a:80", "https://a", "-a", "1.2.3")
        ),
        (["server-cert", "new", "--host", "a"], "init-ca"),
        (["server-cert", "fed", "--host", "a"], "Add --renew"),
        (["up", "new"], "Run: dpsynth-federation init-ca new"),
        (["up", "fed", "--port", "99999"], "--port"),
        (["fingerprint", "fed/ca.key"], "secret key"),
        (["fingerprint", "rubbish"], "Name ca.crt, signing.pub or node.pub"),
        (["approve-site", "fed", "North", "node/node.pub"], "as in the site's policy, found 'North'"),
        (["approve-site", "fed", "north", "none.pub"], "none.pub: No such file"),
        (["approve-site", "fed", "north", "fed/ca.crt"], "Name the node.pub"),
        (["approve-site", "fed", "north", "node/node.key"], "Name the node.pub"),
    ],
)
def test_wrong_usage_is_one_line(call: Call, fed: Path, programs: Path, arguments: list[str], words: str) -> None:
    code, _, said = call(*arguments)
    assert code == 2
    assert words in said
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"superlink": "nonsense"}, "expected HOST:PORT"),
        ({"superlink": "https://a:80"}, "expected HOST:PORT"),
        ({"superlink": "a:99999"}, "expected HOST:PORT"),
        ({"ca": "none.crt"}, "none.crt: No such file"),
        ({"ca": "rubbish"}, "Name the ca.crt"),
        ({"key": "none.key"}, "none.key: No such file"),
        ({"key": "node/node.pub"}, "Name the node.key"),
        ({"key": "fed/ca.key"}, "Name the node.key"),
        ({"flower": "home"}, "found no flwr"),
    ],
)
def test_a_node_is_not_started_with_what_flower_cannot_use(
    call: Call, fed: Path, programs: Path, changes: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it was started"))
    code, _, said = call("node", *(f"--{name}={value}" for name, value in {**NODE, **changes}.items()))
    assert (code, words in said) == (2, True), said


def test_a_node_with_another_ca_is_not_started_and_one_whose_coordinator_is_away_is(
    call: Call, fed: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(os, "execve", lambda path, *_: started.append(path))
    code, _, said = call("node", *(f"--{name}={value}" for name, value in NODE.items()))
    assert (code, len(started)) == (0, 1)
    assert "localhost:1 does not answer yet (Connection refused)" in said
    make_ca(Path("other"), days=2)
    with tls_server(fed) as port:
        code, _, said = call(
            "node", *(f"--{name}={value}" for name, value in {**NODE, "superlink": f"localhost:{port}", "ca": "other/ca.crt"}.items())
        )
        assert (code, len(started)) == (2, 1)
        assert f"The certificate of localhost:{port} does not fit other/ca.crt" in said
        code, _, said = call("node", *(f"--{name}={value}" for name, value in {**NODE, "superlink": f"localhost:{port}"}.items()))
        assert (code, len(started), said) == (0, 2, "")


@contextmanager
def tls_server(fed: Path) -> Iterator[int]:
    """Shakes hands at a port of its own, as often as it is asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(fed / SERVER_CERTIFICATE, fed / SERVER_KEY)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with suppress(OSError):
                context.wrap_socket(connection, server_side=True).close()

    threading.Thread(target=answer, daemon=True).start()
    with listener:
        yield int(listener.getsockname()[1])


def test_a_site_is_approved_once_and_its_new_key_takes_the_place_of_the_old(call: Call, fed: Path, programs: Path) -> None:
    for folder in ("second", "third"):
        make_node_key(Path(folder))
    first = call("approve-site", "fed", "north", "node/node.pub")
    assert first[0] == 0
    assert f"north: node 1. Compare its key with the site by telephone: {fingerprint(Path('node/node.pub'))}" in first[1]
    assert call("approve-site", "fed", "north", "node/node.pub") == first, "the same again is no error"
    code, _, said = call("approve-site", "fed", "south", "node/node.pub")
    assert (code, "This key is that of north" in said) == (2, True)
    assert "--instead-of north" in said
    assert call("approve-site", "fed", "south", "second/node.pub")[0] == 0
    code, out, _ = call("approve-site", "fed", "north", "third/node.pub")
    assert code == 0
    assert f"no longer let in: {fingerprint(Path('node/node.pub'))}" in out
    assert json.loads((programs / "state.json").read_text())[Path("node/node.pub").read_text()] < 0, "the old node is still let in"
    coordination = Coordination(fed, Flower(programs))
    assert coordination.nodes() == {"north": 3, "south": 2}
    assert sorted(coordination.online()) == ["north", "south"]
    code, _, said = call("approve-site", "fed", "north", "node/node.pub")
    assert (code, "Ask north for a new key" in said) == (1, True)
    write_flwr(programs / "flwr", absent=True)
    code, _, said = call("approve-site", "fed", "west", "node/node.pub")
    assert (code, said) == (1, "dpsynth-federation: No SuperLink answers. Run: dpsynth-federation up fed\n")


def test_a_key_that_was_given_to_the_wrong_site_is_taken_from_it_and_none_is_burnt(call: Call, fed: Path, programs: Path) -> None:
    """The SuperLink takes no key twice, so two sites exchange what they have."""
    make_node_key(Path("second"))
    assert call("approve-site", "fed", "nroth", "node/node.pub")[0] == 0
    code, _, said = call("approve-site", "fed", "north", "node/node.pub", "--instead-of", "south")
    assert (code, "south does not have this key" in said) == (2, True)
    code, out, _ = call("approve-site", "fed", "north", "node/node.pub", "--instead-of", "nroth")
    assert (code, f"north: node 1. Compare its key with the site by telephone: {fingerprint(Path('node/node.pub'))}" in out) == (0, True)
    coordination = Coordination(fed, Flower(programs))
    assert coordination.nodes() == {"north": 1}
    assert call("approve-site", "fed", "south", "second/node.pub")[0] == 0
    known = (programs / "state.json").read_text()
    coordination.command("supernode", "unregister", "2", "fed")
    code, _, said = call("approve-site", "fed", "north", "second/node.pub", "--instead-of", "south")
    assert (code, "lets this key in no more. Ask north for a new one" in said) == (1, True)
    assert coordination.nodes() == {"north": 1, "south": 2}
    (programs / "state.json").write_text(known)
    code, out, _ = call("approve-site", "fed", "north", "second/node.pub", "--instead-of", "south")
    assert (code, "south now has the key that north had, if any" in out) == (0, True)
    assert coordination.nodes() == {"north": 2, "south": 1}
    assert sorted(coordination.online()) == ["north", "south"], "no key was taken from the SuperLink"


def test_a_second_server_side_in_one_folder_is_refused_and_starts_nothing(call: Call, fed: Path, programs: Path) -> None:
    with held(fed, busy=""):
        code, _, said = call("up", "fed")
    assert (code, said) == (2, "dpsynth-federation: Another `up` runs in fed. Stop it first, or go on with it.\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, _, said = call("up", "fed", "--port", str(other.getsockname()[1]))
    assert (code, "Address already in use" in said) == (2, True)
    assert not list(fed.glob("*.log"))


KILLED = """
import os, signal, sys
from pathlib import Path
from federated.launch import Processes
processes = Processes(Path(sys.argv[1]))
processes.start("program", ["sleep", "60"], dict(os.environ))
print(processes.running["program"].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_programs_end_with_the_process_that_was_killed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    stat, end = Path("/proc", done.stdout.strip(), "stat"), time.monotonic() + 5
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # whoever is to reap it may not
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.05)


def test_candidates_and_release_are_made_in_the_folder_that_ran_the_study(call: Call, joint: Joint) -> None:
    os.chdir(joint.folder)
    words = [("candidates", "run", "--out", "new.zip"), ("release", "study.yaml", "run", "out", *approvals())]
    for name in ("fed", "other"):
        shutil.copytree("keys", Path(name, "coordinator"))
    shutil.copytree("studies/joint", "fed/studies/joint")
    for arguments in words:
        code, _, said = call(*arguments, "--folder", "other")
        assert (code, "other did not run the study joint of run. Name the --folder that `run` was given." in said) == (2, True)
    shutil.move("fed/coordinator", "kept")
    generate_key(Path("fed/coordinator"))
    for arguments in words:
        code, _, said = call(*arguments, "--folder", "fed")
        assert (code, "ran under another key" in said) == (2, True)
    assert not Path("new.zip").exists()
    assert not Path("out").exists()
    shutil.rmtree("fed/coordinator")
    shutil.move("kept", "fed/coordinator")
    assert call("candidates", "run", "--out", "new.zip", "--folder", "fed")[0] == 0


def approvals() -> list[str]:
    return [word for site in SITES for word in ("--approval", f"{site}.dsse.json")]


def test_run_names_what_is_missing_and_says_of_a_finished_study_what_comes_next(call: Call, joint: Joint, programs: Path) -> None:
    os.chdir(joint.folder)
    arguments = ("run", "study.yaml", "--folder", "fed", "--run", "run")
    shutil.copytree("keys", "fed/coordinator")
    code, _, said = call(*(word if word != "fed" else "nofed" for word in arguments))
    assert (code, "Expected the folder of `dpsynth-federation init-ca` at nofed" in said) == (2, True)
    code, _, said = call(*arguments)
    assert (code, "north is not approved. Run: dpsynth-federation approve-site fed north KEY" in said) == (2, True)
    Path("fed/nodes.json").write_text('{"north": {"node": 1, "key": "a"}, "south": {"node": 2, "key": "b"}}')
    Path("fed/home").mkdir()
    Path("fed/home/config.toml").write_text("")
    code, _, said = call(*arguments[:-1], "new")
    assert (code, "Not connected: north, south; 2 of 2 sites are needed" in said) == (1, True), said
    shutil.rmtree("fed/studies")
    shutil.copytree("studies/joint", "fed/studies/joint")
    write_json(Path("fed/studies/joint") / OUTCOME, {"run": str(Path("run").resolve())})
    with held(Path("fed/studies/joint"), busy=""):
        code, _, said = call(*arguments)
    assert (code, "Another `run` of joint is under way" in said) == (2, True)
    code, out, _ = call(*arguments)
    assert code == 0
    assert "joint is finished: run." in out
    assert "Next: dpsynth-federation candidates run --folder fed --out FILE" in out
    code, out, _ = call("status", "fed", "joint")
    assert (code, "finished" in out) == (0, True)
    assert f"Next: dpsynth-federation candidates {Path('run').resolve()} --folder fed --out FILE" in out
    code, _, said = call("status", "fed", "jiont")
    assert (code, "found joint in fed/studies" in said) == (2, True)


def test_a_demonstration_that_is_stopped_does_not_promise_to_go_on(
    call: Call, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("federated.demonstration.Demonstration.write", stopped)
    code, _, said = call("demo", "demo")
    assert (code, said) == (130, "dpsynth-federation: Stopped. A demonstration is not resumed: remove demo, or name another folder.\n")


def test_flower_is_started_with_a_home_of_its_own(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may have none, or one that it cannot write."""
    monkeypatch.delenv("HOME", raising=False)
    assert Flower(programs).environment(tmp_path)["HOME"] == str(tmp_path)
