"""Several processes that train one model, as torchrun starts them: each has its share of every batch.

All run the same program and so have the same weights; only the gradients are exchanged.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from onnxmerge.calibration.devices import chosen_device
from onnxmerge.calibration.settings import Device
from onnxmerge.errors import UsageError


@contextlib.contextmanager
def joined(device: Device | None = None) -> Iterator[int]:
    """Join the other processes of a torchrun for as long as this lasts; the number of this one, from 0.

    They exchange through NCCL what is on GPUs, through Gloo what is not; `device`: see `Training.device`.

    Raises:
        UsageError: the others cannot be reached, or there is no GPU for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    own = chosen_device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    with _others_needed():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    try:
        yield rank()
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors: Sequence[Tensor]) -> None:
    """Set every float tensor to its mean over all processes; they end with the very same bits everywhere.

    DistributedDataParallel does this behind one backward pass of a step; ours has one for each stream of tasks.
    """
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    with _others_needed():
        dist.all_reduce(flat)
    flat /= count()
    parts = flat.split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def first_of(value: float) -> float:
    """What the first process has."""
    if count() == 1:
        return value
    found = torch.tensor([value], dtype=torch.float64)
    with _others_needed():
        dist.broadcast(found, 0)
    return float(found)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if count() > 1:
        with _others_needed():
            dist.barrier()


@contextlib.contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UsageError("another process of this run has ended or cannot be reached, so this one ends too") from error
