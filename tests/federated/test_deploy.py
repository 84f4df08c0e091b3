"""The examples in docs/deploy: every command exists with these options, what it names is mounted, and each party owns what it writes."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
import typer.main
import yaml
from typer.core import TyperGroup

import dpsynth.cli
from dpsynth.cli import INTERRUPTED
from dpsynth.errors import DpsynthError, RefusedError, UsageError
from federated import cli, coordinator, coordinator_cli, launch, relay
from federated.certs import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY
from federated.policy import SitePolicy, load_policy

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
APPS = {"dpsynth": dpsynth.cli.app, "dpsynth-site": cli.app, "dpsynth-federation": coordinator_cli.app}
UNITS = sorted(path.name for path in DEPLOY.glob("*.service"))
COMPOSE = (DEPLOY / "compose.yaml").read_text()
POLICY = Path("/etc/dpsynth/policy.yaml")
WRITTEN = {"out", "home", "run_path", "run", "folder"}  # names of what a verb writes to, whatever it reads there besides


def unit(name: str, section: str = "Service") -> dict[str, str]:
    """A section of a unit; a setting that stands twice is an error."""
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / name)
    return dict(parser[section])


def services() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(COMPOSE)["services"])


def dockerfile() -> str:
    return str(yaml.safe_load(COMPOSE)["x-image"]["build"]["dockerfile_inline"]).replace("\\\n", " ")


def mounts(service: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """By its place in the container: what is mounted there, and whether it can be written."""
    found = [volume.split(":") for volume in service["volumes"]]
    return {place: (source, mode != ["ro"]) for source, place, *mode in found}


def mounted(service: Mapping[str, Any], path: Path) -> tuple[str, bool] | None:
    return next((value for place, value in mounts(service).items() if path.is_relative_to(place)), None)


def parse(words: list[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the command line makes of these words. Raises TyperException when it would refuse them."""
    program, verb, *arguments = words
    group = typer.main.get_command(APPS[Path(program).name])
    assert isinstance(group, TyperGroup)
    with patch.dict(os.environ, environment or {}):
        return dict(group.commands[verb].make_context(verb, arguments).params)


def unit_commands() -> list[tuple[str, str, list[str]]]:
    """Unit, user and words: of what it starts, and of what its head says to do before."""
    found = []
    for name in UNITS:
        found.append((name, unit(name)["User"], shlex.split(unit(name)["ExecStart"])))
        for user, line in re.findall(r"^#   runuser -u (\S+) -- (.*)", (DEPLOY / name).read_text(), flags=re.MULTILINE):
            found.append((name, user, shlex.split(line)))
    return found


def container_commands() -> list[tuple[str, list[str]]]:
    """Service and words: of what it starts, and of `docker compose run` and `exec` at the head."""
    found = [(name, list(service["command"])) for name, service in services().items()]
    for line in re.findall(r"^#   docker compose (?:run|exec) (.*)", COMPOSE, flags=re.MULTILINE):
        words = shlex.split(re.split(r" {2,}| > ", line)[0])
        while words[0].startswith("-"):
            words.pop(0)
        found.append((words[0], words[1:]))
    return found


def example_policy(folder: Path) -> SitePolicy:
    """The policy of docs/site.md, as if it lay at its place."""
    block = re.search(r"```yaml\n(site:.*?)```", (ROOT / "docs" / "site.md").read_text(), flags=re.DOTALL)
    assert block is not None
    path = folder / "policy.yaml"
    path.write_text(block[1])
    path.chmod(0o644)
    policy = load_policy(path)
    return policy.model_copy(update={"coordinators": tuple(POLICY.parent / key.relative_to(folder) for key in policy.coordinators)})


def settings(text: str, name: str) -> list[str]:
    return re.findall(rf"^\s*{name} ([^;]*);", text, flags=re.MULTILINE)


def test_the_programs_are_those_that_are_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(APPS) <= set(scripts)
    assert len(UNITS) == 4
    said = {words[1] for *_, words in unit_commands()}
    assert said == {"init", "doctor", "serve", "node-key", "node", "init-ca", "server-cert", "up", "run"}
    said = {words[1] for _, words in container_commands() if words[0] != "cat"}
    asked = {"serve", "init", "doctor", "ledger", "check", "approve", "refuse", "key", "node", "node-key", "up", "init-ca", "server-cert"}
    assert said - {"--help"} == asked | {"approve-site", "run", "status", "generate", "candidates", "release"}


@pytest.mark.parametrize(
    ("name", "user", "words"), unit_commands(), ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value
)
def test_every_command_of_a_unit_parses_and_runs_as_its_user(name: str, user: str, words: list[str]) -> None:
    assert user == unit(name)["User"]
    assert all(value is not None for value in parse(words).values())
    with pytest.raises(typer.TyperException):
        parse([*words, "--no-such-option"])


@pytest.mark.parametrize(
    ("name", "words"), container_commands(), ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value
)
def test_every_command_of_a_container_parses_and_names_what_is_mounted(name: str, words: list[str]) -> None:
    service = services()[name]
    paths = [Path(word.partition("=")[2] or word) for word in words if "/" in word]
    assert [path for path in paths if mounted(service, path) is None] == []
    if words[0] == "cat" or words[1] == "--help":
        return
    written = [value for key, value in parse(words, service.get("environment")).items() if key in WRITTEN and value is not None]
    assert [path for path in written if not (mounted(service, path) or ("", False))[1]] == []


def test_the_policy_of_the_page_fits_containers_and_units(tmp_path: Path) -> None:
    policy = example_policy(tmp_path)
    guard, node = unit("dpsynth-guard.service"), unit("dpsynth-node.service")
    assert policy.data.path is not None
    for name in ("guard", "officer"):
        service = services()[name]
        for path in (POLICY, policy.data.path, *policy.coordinators):
            assert mounts(service)[str(path)][1] is False, path
        for path in (policy.ledger, policy.state):
            assert mounted(service, path) == ("ledger", True), path
    assert mounted(services()["guard"], policy.socket) == mounted(services()["node"], policy.socket) == ("socket", True)
    assert all(path.is_relative_to(guard["ReadWritePaths"]) for path in (policy.ledger, policy.state))
    assert guard["ReadOnlyPaths"] == str(policy.data.path)
    assert policy.socket == Path(f"/run/{guard['RuntimeDirectory']}/guard.sock")
    head = (DEPLOY / "dpsynth-guard.service").read_text()
    assert all(str(path) in head for path in (POLICY, *policy.coordinators))
    hidden = node["InaccessiblePaths"].split()
    assert {str(policy.data.path), guard["ReadWritePaths"], str(POLICY.parent)} == set(hidden)
    for words in (unit("dpsynth-node.service")["ExecStart"].split(), services()["node"]["command"]):
        assert parse(words, services()["node"]["environment"])["guard"] == policy.socket


def test_parties_have_users_of_their_own_and_only_the_socket_in_common() -> None:
    guard, node, up = unit("dpsynth-guard.service"), unit("dpsynth-node.service"), unit("dpsynth-coordinator.service")
    assert len({guard["User"], node["User"], up["User"], "root"}) == 4
    assert node["SupplementaryGroups"] == guard["Group"], "or the node cannot reach the socket"
    assert "Group" not in node
    assert guard["RuntimeDirectoryMode"] == "0750"
    assert guard["PrivateNetwork"] == "yes"


@pytest.mark.parametrize("name", UNITS)
def test_units_restart_end_whole_groups_and_hide_what_they_write(name: str) -> None:
    service = unit(name)
    demanded = re.search(r"systemd, for guard and node: (.*)", (ROOT / "docs" / "site.md").read_text())
    assert demanded is not None
    wanted = dict(item.split("=") for item in re.findall(r"`(\w+=[\w-]+)`", demanded[1]))
    assert set(wanted) == {"Restart", "RestartSec", "KillMode", "UMask"}
    if name.startswith("dpsynth-study"):
        del wanted["RestartSec"]  # it waits for others
    assert {key: service.get(key) for key in wanted} == wanted
    assert service["NoNewPrivileges"] == "yes"


@pytest.mark.parametrize("name", UNITS)
def test_what_nobody_but_a_person_can_mend_is_not_tried_for_ever(name: str) -> None:
    """Codes of errors.py: 2 and 3 need a person, 1 may pass. Flower ends with 1 for everything, and a node waits for its approval."""
    classes = [DpsynthError]
    for kind in classes:
        classes += kind.__subclasses__()
    assert {kind.exit_code for kind in classes} - {INTERRUPTED} == {1, UsageError.exit_code, RefusedError.exit_code}
    for passing in (launch.FlowerFailed, relay.CarrierLost, coordinator.QuorumLost):
        assert passing.exit_code == 1
    stopping = {int(code) for code in unit(name)["RestartPreventExitStatus"].split()}
    assert stopping == ({UsageError.exit_code} if "node" in name else {UsageError.exit_code, RefusedError.exit_code})
    waits_for_others = "node" in name or "study" in name
    limit, span = (int(unit(name, "Unit").get(key, 0)) for key in ("StartLimitBurst", "StartLimitIntervalSec"))
    assert waits_for_others or 0 < limit * int(unit(name)["RestartSec"]) < span, "or the limit is never reached"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_knows_every_setting_of_the_units(tmp_path: Path) -> None:
    for name in UNITS:
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (DEPLOY / name).read_text(), flags=re.MULTILINE)
        (tmp_path / name.replace("@", "@chest-2026")).write_text(text)
    for path in sorted(tmp_path.iterdir()):
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_node_may_call_the_coordinator_alone_and_not_take_the_machine() -> None:
    node, service, rules = unit("dpsynth-node.service"), services()["node"], (DEPLOY / "dpsynth-node.nft").read_text()
    assert node["IPAddressDeny"] == "any"
    localhost, address = node["IPAddressAllow"].split()
    assert localhost == "localhost"
    host = parse(service["command"], service["environment"])["superlink"].rpartition(":")[0]
    assert service["extra_hosts"] == [f"{host}:{address}"]
    assert re.findall(r"skuid (\S+)", rules) == [node["User"]] * 3
    assert f"{{ 127.0.0.0/8, {address} }} accept" in rules
    network = yaml.safe_load(COMPOSE)["networks"][service["networks"][0]]["ipam"]["config"][0]["subnet"]
    assert f"-s {network} ! -d {address} -j DROP" in COMPOSE
    assert {"MemoryMax", "TasksMax", "CPUQuota"} <= set(node)
    assert {"mem_limit", "pids_limit", "cpus"} <= set(service)


def test_the_world_reaches_the_fleet_api_alone() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    up = parse(unit("dpsynth-coordinator.service")["ExecStart"].split())
    assert up["host"] == "127.0.0.1"
    assert settings(text, "proxy_pass") == [f"https://127.0.0.1:{up['port']}/v1/fleet/"], (
        "with a path, or what was sent is passed on unread"
    )
    assert re.findall(r"location (\S+) \{", text) == ["/v1/fleet/", "/"]
    assert services()["coordinator"]["ports"] == [f"127.0.0.1:{up['port']}:{up['port']}"]
    folder = up["folder"]
    assert settings(text, "ssl_certificate") == [str(folder / SERVER_CERTIFICATE)]
    assert settings(text, "ssl_certificate_key") == [str(folder / SERVER_KEY)]
    assert settings(text, "proxy_ssl_trusted_certificate") == [str(folder / CA_CERTIFICATE)]
    (host,), (listen,) = settings(text, "server_name"), settings(text, "listen")
    assert settings(text, "proxy_ssl_name")[0].split()[0] == host
    dialled = [parse(words)["superlink"] for _, _, words in unit_commands() if "node" in words]
    dialled += [parse(services()["node"]["command"], services()["node"]["environment"])["superlink"]]
    assert dialled == [f"{host}:{listen.split()[0]}"] * 2
    named = [parse(words)["host"] for *_, words in (*unit_commands(), *container_commands()) if "server-cert" in words]
    assert named == [[host]] * 2


def test_containers_have_users_of_their_own_and_only_the_socket_in_common() -> None:
    parties = {name: service for name, service in services().items() if name != "officer"}
    users = {name: service["user"].split(":") for name, service in parties.items()}
    assert len({user for user, _ in users.values()}) == len(users)
    assert all(int(user) > 0 for user, _ in users.values())
    assert users["guard"][1] == users["node"][1]
    sources = {name: {source for source, _ in mounts(service).values()} for name, service in parties.items()}
    assert sources["guard"] & sources["node"] == {"socket"}
    assert not sources["coordinator"] & (sources["guard"] | sources["node"])
    assert not any("officer" in source for found in sources.values() for source in found), "a key that signs is not where anything serves"
    for name, service in services().items():
        assert "umask 0077" in service["entrypoint"][2]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service.get("network_mode") == ("none" if name in ("guard", "officer") else None)
        assert ("restart" in service) == (name != "officer")


def test_the_image_knows_its_users_and_they_own_what_they_write() -> None:
    """A library that asks for the name of a user without an entry ends the program, and a fresh volume is root's where no folder was."""
    text = dockerfile()
    groups = set(re.findall(r"groupadd --gid (\d+)", text))
    users = {found[0]: found[1:] for found in re.findall(r"useradd --uid (\d+) --gid (\d+) .*?--home-dir (\S+) ", text)}
    owners = {place: (user, group, mode) for user, group, mode, place in re.findall(r"install -d -o (\d+) -g (\d+) -m (\d+) (\S+)", text)}
    named = set(yaml.safe_load(COMPOSE)["volumes"])
    for name, service in services().items():
        user, group = service["user"].split(":")
        assert users[user] == (group, service["tmpfs"][0]), "a home that can be written"
        assert group in groups
        for place, (source, _) in mounts(service).items():
            if source in named:
                owner = services()["guard"]["user"].split(":")[0] if source == "socket" else user
                assert owners[place] == (owner, group, "0750" if source == "socket" else "0700"), (name, place)
    (uid, gid), place = services()["coordinator"]["user"].split(":"), "coordinator"
    assert f"install -d -o {uid} -g {gid} -m 0700 {place} " in COMPOSE
    assert mounts(services()["coordinator"])[f"/var/lib/dpsynth-{place}"] == (f"./{place}", True)


def test_what_goes_into_the_image_is_named_and_enough() -> None:
    """Images of patients lie beside compose.yaml, below the root of the repository."""
    copied = [word for line in re.findall(r"^COPY (.*)", dockerfile(), flags=re.MULTILINE) for word in line.split()[:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert set(copied) == {"pyproject.toml", "constraints.txt", project["project"]["readme"], *packages}
    assert all((ROOT / word).exists() for word in copied)


def test_both_pages_name_the_examples() -> None:
    for page in ("site", "coordinator"):
        assert "](deploy/" in (ROOT / "docs" / f"{page}.md").read_text()
    told = (DEPLOY / "dpsynth-coordinator.service").read_text() + (ROOT / "docs" / "site.md").read_text() + COMPOSE
    assert all(path.name in told for path in DEPLOY.iterdir() if path.suffix not in (".yaml", ".service"))
