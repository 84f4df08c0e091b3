"""Where a killed run goes on: weights, average, optimiser and monitor after a step, in one safetensors file with a digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dpsynth.artifacts import write_bytes
from dpsynth.errors import ArtifactError
from dpsynth.model.ema import Ema
from dpsynth.train.monitor import Monitor

FILE = "checkpoint.safetensors"


def save_checkpoint(
    path: Path, *, step: int, net: nn.Module, ema: Ema, optimizer: torch.optim.Adam, monitor: Monitor, binding: str
) -> None:
    """Write atomically what `load_checkpoint` needs. `binding` ties it to its reservation."""
    tensors = {f"net.{name}": tensor.detach().contiguous() for name, tensor in net.named_parameters()}
    tensors |= {f"ema.{name}": tensor.contiguous() for name, tensor in ema.average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": torch.as_tensor(value).contiguous() for name, value in state.items()}
    facts = {"step": step, "ema_steps": ema.steps, "monitor": monitor.to_json(), "binding": binding}
    write_bytes(path, save({name: tensor.clone() for name, tensor in tensors.items()}, {"facts": json.dumps(facts)}), private=True)


def load_checkpoint(path: Path, *, net: nn.Module, ema: Ema, optimizer: torch.optim.Adam, binding: str) -> tuple[int, Monitor]:
    """Restore in place; returns the number of finished steps and the monitor: (0, new) when there is no checkpoint."""
    if not path.is_file():
        return 0, Monitor()
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        tensors = load_file(path)
        if facts["binding"] != binding:
            raise ArtifactError("The checkpoint belongs to another reservation. Remove the run folder and train again.")
        _restore(tensors, facts, net=net, ema=ema, optimizer=optimizer)
        return int(facts["step"]), Monitor.from_json(facts["monitor"])
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise ArtifactError(f"The checkpoint cannot be read ({type(error).__name__}). Remove the run folder and train again.") from error


def _restore(tensors: dict[str, Tensor], facts: dict[str, Any], *, net: nn.Module, ema: Ema, optimizer: torch.optim.Adam) -> None:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(tensors[f"net.{name}"])
    averages = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    ema.restore(averages, steps=int(facts["ema_steps"]))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, index, field = name.split(".", 2)
            state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
