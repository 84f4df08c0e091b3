"""The policy of a release as rows for people: what was asked of the images, beside what this program asks by itself. Public constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpsynth.checks.family import needed
from dpsynth.config import GateConfig

_NONE = "none"


def policy_rows(gate: GateConfig) -> list[dict[str, Any]]:
    """A row {"setting", "value", "default", "changed"} for each setting of the gate. Of an encoder the hash is told, not the path."""
    values, defaults = _flat(gate), _flat(GateConfig())
    return [
        {
            "setting": name,
            "value": values.get(name, _NONE),
            "default": defaults.get(name, _NONE),
            "changed": values.get(name) != defaults.get(name),
        }
        for name in dict.fromkeys([*defaults, *values])
    ]


def _flat(gate: GateConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in {**gate.model_dump(mode="json"), "required": needed(gate.required)}.items():
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= {key: _text(part) for key, part in parts.items() if part is not None and key != "encoder.path"}
    return found


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or _NONE
    return f"{value:g}" if isinstance(value, float) else str(value)
