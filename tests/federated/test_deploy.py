"""The examples in docs/deploy: commands exist with these options, parties have users of their own, and what the pages demand is set."""

from __future__ import annotations

import configparser
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
import yaml
from typer.core import TyperGroup

from federated import cli, coordinator_cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
APPS = {"dpsynth-site": cli.app, "dpsynth-federation": coordinator_cli.app}
UNITS = sorted(path.name for path in DEPLOY.glob("*.service"))


def unit(name: str) -> dict[str, str]:
    """The section Service of a unit; a setting that stands twice is an error."""
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / name)
    return dict(parser["Service"])


def services() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"])


def parse(words: list[str]) -> dict[str, Any]:
    """What the command line makes of these words. Raises TyperException when it would refuse them."""
    program, verb, *arguments = words
    group = typer.main.get_command(APPS[Path(program).name])
    assert isinstance(group, TyperGroup)
    return dict(group.commands[verb].make_context(verb, arguments).params)


def commands() -> dict[str, list[str]]:
    found = {name: shlex.split(unit(name)["ExecStart"]) for name in UNITS}
    for name, service in services().items():
        found[name] = [*service["command"], *(["--flower", "/opt/flower/bin"] if "environment" in service else [])]
    return found


def test_the_programs_are_those_that_are_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(APPS) <= set(scripts)
    assert {Path(words[0]).name for words in commands().values()} == set(APPS)
    assert len(UNITS) == 4


@pytest.mark.parametrize("name", [*UNITS, "guard", "node", "coordinator"])
def test_every_command_takes_the_options_that_it_is_given(name: str) -> None:
    words = commands()[name]
    assert all(value is not None for value in parse(words).values())
    with pytest.raises(typer.TyperException):
        parse([*words, "--no-such-option"])


def test_parties_have_users_of_their_own_and_only_the_socket_in_common() -> None:
    guard, node, up = unit("dpsynth-guard.service"), unit("dpsynth-node.service"), unit("dpsynth-coordinator.service")
    assert len({guard["User"], node["User"], up["User"], "root"}) == 4
    assert node["SupplementaryGroups"] == guard["Group"], "or the node cannot reach the socket"
    assert "Group" not in node
    assert guard["ReadWritePaths"] in node["InaccessiblePaths"].split()
    assert str(Path(commands()["dpsynth-guard.service"][2]).parent) in node["InaccessiblePaths"].split()
    socket = f"/run/{guard['RuntimeDirectory']}/guard.sock"
    assert parse(commands()["dpsynth-node.service"])["guard"] == Path(socket)
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


def test_containers_have_users_of_their_own_and_only_the_socket_in_common() -> None:
    parties = services()
    users = {name: service["user"].split(":") for name, service in parties.items()}
    assert len({user for user, _ in users.values()}) == len(users)
    assert all(int(user) > 0 for user, _ in users.values())
    assert users["guard"][1] == users["node"][1]
    assert parties["guard"]["network_mode"] == "none"
    mounted = {name: {volume.split(":")[0] for volume in service["volumes"]} for name, service in parties.items()}
    assert mounted["guard"] & mounted["node"] == {"socket"}
    assert not mounted["coordinator"] & (mounted["guard"] | mounted["node"])
    for service in parties.values():
        assert "umask 0077" in service["entrypoint"][2]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True


def test_both_pages_name_the_examples() -> None:
    for page in ("site", "coordinator"):
        assert "](deploy/" in (ROOT / "docs" / f"{page}.md").read_text()
