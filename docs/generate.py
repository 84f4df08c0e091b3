"""Writes docs/cli.md and docs/config.md from the code. Run `python docs/generate.py` after a change; a test compares."""

from __future__ import annotations

import typing
from pathlib import Path

import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperCommand, TyperGroup, TyperOption

from dpsynth.cli import app
from dpsynth.config import Config

DOCS = Path(__file__).resolve().parent


def cli_page() -> str:
    """Every verb with its help, in Markdown."""
    root = typer.main.get_command(app)
    if not isinstance(root, TyperGroup):
        raise TypeError(f"Expected a group of verbs, found {type(root).__name__}.")
    parts = [
        "# Command line",
        "",
        "Made from the code by `python docs/generate.py`.",
        "",
        "Exit codes: 0 done, 1 broke, 2 wrong usage, configuration or input, 3 refused by the budget, a check or the gate, 130 stopped by",
        "Ctrl-C: what was reserved stays charged, and the same command resumes. So have `dpsynth-site` and `dpsynth-federation`.",
        "",
    ]
    for path, command in _commands("dpsynth", root):
        parts += [f"## {path}", "", (command.help or "").strip(), ""]
        parts += [f"- {line}" for line in _parameters(command)] + [""]
    return "\n".join(parts).rstrip() + "\n"


def _commands(prefix: str, group: TyperGroup) -> list[tuple[str, TyperCommand]]:
    found: list[tuple[str, TyperCommand]] = []
    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        found += _commands(path, command) if isinstance(command, TyperGroup) else [(path, command)]
    return found


def _parameters(command: TyperCommand) -> list[str]:
    lines = []
    for parameter in command.params:
        text = getattr(parameter, "help", None) or ""
        if isinstance(parameter, TyperOption):
            default = "" if parameter.default in (None, ...) else f" (default {parameter.default})"
            lines.append(f"`{', '.join(parameter.opts)} {parameter.metavar or 'VALUE'}`: {text}{default}")
        else:
            lines.append(f"`{parameter.metavar or parameter.name}`: {text}".rstrip(": "))
    return lines


def config_page() -> str:
    """Every setting with type, default and meaning, in Markdown."""
    parts = [
        "# Configuration",
        "",
        "Made from the code by `python docs/generate.py`. One YAML file; every setting has a default; unknown settings are refused.",
        "All values are public constants: choose them without looking at the private images.",
        "",
    ]
    parts += _section("", Config)
    return "\n".join(parts).rstrip() + "\n"


def _section(prefix: str, model: type[BaseModel]) -> list[str]:
    rows, nested = [], []
    for name, field in model.model_fields.items():
        path, inner = f"{prefix}.{name}" if prefix else name, _model_in(field.annotation)
        named = typing.get_origin(field.annotation) is dict
        nested += [] if inner is None else _section(f"{path}.NAME" if named else path, inner)
        if inner is None or inner is not field.annotation:  # one that may be left out has a line of its own
            rows.append(f"| `{path}` | {_default(field.default)} | {field.description or ''} |")
    heading = [f"## {prefix or 'The run'}", "", (model.__doc__ or "").strip().splitlines()[0], ""]
    return [*heading, "| setting | default | meaning |", "|---|---|---|", *rows, "", *nested]


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The settings that an annotation holds, alone or as one of several types."""
    found = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


def _default(value: object) -> str:
    if value is None:
        return "none"
    if value is PydanticUndefined:
        return "must be given"
    value = getattr(value, "value", value)
    if isinstance(value, tuple):
        return f"`[{', '.join(str(item) for item in typing.cast('tuple[object, ...]', value))}]`"
    return f"`{value}`"


def main() -> None:
    """Write both pages."""
    (DOCS / "cli.md").write_text(cli_page(), encoding="utf-8")
    (DOCS / "config.md").write_text(config_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
