"""Where training computes, and how precisely."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from onnxmerge.calibration.settings import Device, Training
from onnxmerge.errors import UsageError


def chosen_device(wanted: Device | None) -> torch.device:
    """Where a run computes (see `Training.device`); of the processes of a torchrun each has a GPU of its own.

    Raises:
        UsageError: it is to be a GPU, and this process has none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted is None and not count):
        return torch.device("cpu")
    if not count:
        raise UsageError("--device cuda: torch finds no GPU")
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= count:
        raise UsageError(f"there are more processes than GPUs ({count}); start as many as these, or add --device cpu")
    return torch.device("cuda", own)


@contextlib.contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads (None: as many as before) while this lasts.

    GPUs convolve float32 numbers as such, not cut to 10 bits, and add in a fixed order.

    Raises:
        UsageError: the memory of the GPU is too small.
    """
    before, cudnn = torch.get_num_threads(), torch.backends.cudnn
    try:
        torch.set_num_threads(threads or before)
        with cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise UsageError(
            "the GPU has too little memory to train on; smaller batches need less, or add --device cpu"
        ) from error
    finally:
        torch.set_num_threads(before)


def mixed(settings: Training, device: torch.device) -> torch.autocast:
    """The precision in which a run computes on `device`, for as long as this lasts."""
    half = torch.float16 if settings.precision == "float16" else torch.bfloat16
    native = settings.precision is None and has_bfloat16(device)
    return torch.autocast(device.type, half, enabled=native or settings.precision in ("bfloat16", "float16"))


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 numbers in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return bool(probe and probe())


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; a GPU fetches it while the CPU goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
