"""The federation on Flower itself: every party a process, TLS, registered nodes; then what strangers and a hostile app try.

DPSYNTH_FLOWER=flower/bin pytest -m slow tests/attacks/test_deployed_federation.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flower_cases import DEPLOYED, PROGRAMS

from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import silent
from dpsynth.release.verify import verify
from dpsynth.signing import load_private
from federated.certs import CA_CERTIFICATE, make_ca, make_node_key
from federated.coordinator import quiet
from federated.demonstration import SITES, Demonstration, demonstrate, free_port, wait_for
from federated.federation import load_federation, plan_of
from federated.launch import APP, APP_FILES, Flower, Processes
from federated.messages import FIRST_TRAINING, Code, decode_reply, encode_request
from federated.relay import Relay

pytestmark = DEPLOYED
SITE = "north"

TAKE = """
import sys
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
client = RuntimeHttpClient.from_server_address(
    server_address=sys.argv[1], insecure=False, root_certificates=open(sys.argv[2], "rb").read(),
    interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
)
try:
    print("TOKEN", client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"])).token)
except Exception as error:
    print("REFUSED", error)
"""

# The coordinator's own code in place of the site's ledger, and a message that asks for a tenth of the noise.
SHADOW = "class Ledger:\n    def reserve(self, *a, **k):\n        return 'nothing was spent'\n"
HOSTILE = """
import base64, json, struct
from dpsynth.privacy import Ledger  # its own

def hostile(frame):
    length = struct.unpack_from(">4sI", frame)[1]
    envelope = json.loads(frame[8 : 8 + length])
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["plan"]["moments_noise_multiplier"] /= 10
    envelope["payload"] = base64.b64encode(json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()).decode()
    head = json.dumps(envelope).encode()
    return struct.pack(">4sI", b"DPSF", len(head)) + head + frame[8 + length :]
"""


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demonstration]:
    """The coordinator, and one hospital with guard and node."""
    folder = tmp_path_factory.mktemp("f", numbered=True)
    parties = Demonstration(folder=folder, flower=Flower(PROGRAMS), processes=Processes(folder), port=free_port())
    parties.write(progress=silent)
    try:
        parties.coordination.up(parties.processes, host="127.0.0.1", port=parties.port)
        parties.start_guard(SITE)
        parties.coordination.approve(SITE, folder / SITE / "node" / "node.pub")
        parties.start_node(SITE)
        wait_for(lambda: parties.coordination.online() == [SITE], 200, parties.processes)
        wait_for(lambda: (folder / SITE / "guard.sock").exists(), 200, parties.processes)
        yield parties
    finally:
        parties.processes.close()


def moments_request(parties: Demonstration) -> bytes:
    home = parties.folder / "coordinator"
    plan = plan_of(load_federation(home / "study.yaml"))
    fields = {"kind": "moments", "study": "attacked", "site": SITE, "message_id": "moments-0", "round": 0, "plan": plan}
    return encode_request(fields, {}, private=load_private(home / "coordinator" / "signing.key"))


def carried(parties: Demonstration, app: Path | None) -> Code | None:
    """What becomes of an honest request, carried by the honest app or by another one."""
    relay_path, coordination = parties.folder / "coordinator" / "relay.sock", parties.coordination

    def start() -> None:
        if app is None:
            coordination.start_app(relay_path)
        else:
            coordination.command("run", str(app), "fed", "-c", f"relay={json.dumps(str(relay_path))}")

    relay = Relay(path=relay_path, nodes=coordination.nodes(), start=start)
    try:
        reply = relay({SITE: moments_request(parties)}, deadline_seconds=120)[SITE]
    finally:
        relay.close()
    return decode_reply(reply, largest_bytes=1 << 30)[0].code


def test_an_app_with_its_own_ledger_and_less_noise_is_refused_and_an_honest_one_then_works(parties: Demonstration, tmp_path: Path) -> None:
    app = tmp_path / "hostile"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    (app / "dpsynth").mkdir()
    (app / "dpsynth" / "__init__.py").write_text("")
    (app / "dpsynth" / "privacy.py").write_text(SHADOW)
    client = (app / "client_app.py").read_text()
    (app / "client_app.py").write_text(
        client.replace("app = ClientApp()", "app = ClientApp()\n" + HOSTILE).replace("ask(guard, frame)", "ask(guard, hostile(frame))")
    )
    ledger = parties.folder / SITE / "ledger.jsonl"
    assert carried(parties, app) is Code.COORDINATOR
    assert not Ledger.load(ledger).charges()
    assert carried(parties, None) is None
    assert [charge.run_id for charge in Ledger.load(ledger).charges()] == ["attacked/0/moments-0"]
    assert carried(parties, None) is None, "the same message again gets the same answer"
    assert len(Ledger.load(ledger).charges()) == 1


def test_a_stranger_with_the_public_ca_gets_no_task(parties: Demonstration) -> None:
    ca = parties.folder / "coordinator" / CA_CERTIFICATE
    done = subprocess.run(
        [str(PROGRAMS / "python"), "-c", TAKE, f"127.0.0.1:{parties.port}", str(ca)],
        capture_output=True, text=True, timeout=120, check=False, env=parties.flower.environment(parties.folder / "stranger"),
    )  # fmt: skip
    assert done.stdout.startswith("REFUSED"), done.stdout + done.stderr
    assert "401" in done.stdout


@pytest.mark.parametrize("stranger", ["unregistered", "another CA"])
def test_a_node_that_is_not_registered_or_trusts_another_ca_does_not_come_in(parties: Demonstration, tmp_path: Path, stranger: str) -> None:
    key, _ = make_node_key(tmp_path / "node")
    ca = make_ca(tmp_path / "ca", days=2) if stranger == "another CA" else None
    name = stranger.replace(" ", "-")
    parties.start_node(name, key=key if ca is None else parties.folder / SITE / "node" / "node.key", ca=ca)
    process = parties.processes.running.pop(f"node-{name}")
    assert process.wait(timeout=120) != 0
    assert parties.coordination.online() == [SITE]


def test_the_bundle_that_travels_holds_the_carrier_and_nothing_else(parties: Demonstration, tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for name in APP_FILES:
        shutil.copy(APP / name, app)
    subprocess.run(
        [str(PROGRAMS / "flwr"), "build", "--app", str(app)], cwd=app, check=True, capture_output=True, timeout=120,
        env=parties.flower.environment(parties.folder / "builder"),
    )  # fmt: skip
    (bundle,) = app.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        assert {name for name in archive.namelist() if not name.startswith(".")} == set(APP_FILES)


def test_three_hospitals_train_together_by_one_command(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("d", numbered=True) / "x"
    guarantee = demonstrate(folder, PROGRAMS, report=quiet, note=lambda _: None, progress=silent)
    assert 9 < guarantee.epsilon <= 9.9
    facts = json.loads((folder / "run" / "train" / "federation.json").read_text())
    assert [site["site"] for site in facts["sites"]] == list(SITES)
    assert facts["spending"]["overlapping"] > facts["spending"]["disjoint"] == pytest.approx(guarantee.epsilon)
    for site in SITES:
        charges = Ledger.load(folder / site / "ledger.jsonl").charges()
        assert [charge.settled for charge in charges] == [True] * (FIRST_TRAINING + 3)
    assert verify(folder / "release", folder / "coordinator" / "coordinator" / "signing.pub") == []
    page = (folder / "release" / "report.html").read_text()
    assert all(f"<strong>{site}</strong>" in page for site in SITES)
