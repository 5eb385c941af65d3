"""A run under way on disk: everything that is needed to go on as if it had never stopped.

A checkpoint is one safetensors file. Its tensors are `trained/NAME`, what is trained as it is now; `best/NAME`, as it
was when judged best; `optimiser/NUMBER/KEY`, the optimiser's state of each parameter. Its metadata hold one JSON text,
`run`: the step, the held-out losses so far, the settings of the optimiser and its schedule at that step, the scale of
the loss, and the fingerprint of the run. The order of the samples and all other randomness follow from the seed and the
step.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from onnxmerge.files import whole_file

_CLOCK = ("last_epoch", "_step_count", "_last_lr")
"""What a schedule counts; the rest of it follows from the settings."""


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], run: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        UsageError: the disk is full or the folder cannot be written.
    """
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(stored, temporary, {"run": json.dumps(run)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_checkpoint(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts of a checkpoint; None where there is none, it is damaged, or another run's."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError), safe_open(path, "pt") as file:
        run = json.loads(file.metadata()["run"])
        if run["fingerprint"] == fingerprint:
            return {name: file.get_tensor(name) for name in file.keys()}, run  # noqa: SIM118 (it is no dict)
    return None


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of every parameter."""
    return {
        f"{number}/{key}": value
        for number, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def optimiser_facts(optimiser: torch.optim.Optimizer, schedule: LRScheduler) -> dict[str, Any]:
    """The settings of the optimiser as they are now, and how far its schedule has come; plain JSON."""
    clock = {name: value for name, value in schedule.state_dict().items() if name in _CLOCK}
    return {"groups": optimiser.state_dict()["param_groups"], "schedule": clock}


def restore_optimiser(
    optimiser: torch.optim.Optimizer, schedule: LRScheduler, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Undo `optimiser_tensors` and `optimiser_facts`."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split("/", 1)
        like = parameters[int(number)]
        if key != "step":  # which stays on the CPU; the rest in the parameter's memory order and place, as it was
            tensor = torch.empty_like(like, requires_grad=False).copy_(tensor)
        state.setdefault(int(number), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": facts["groups"]})
    schedule.load_state_dict(dict(facts["schedule"]))
