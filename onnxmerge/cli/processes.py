"""Under torchrun every process runs the whole command; the first one alone writes and prints."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxmerge.errors import UsageError
from onnxmerge.scratch import scratch


def one_of_many(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command that trains: processes but the first write to a folder of their own, which is thrown away.

    With `--resume` that is a copy, so that all find the same candidates finished. A GPU that is asked for and absent is
    told before anything is read; so is float16 on CPUs, for torch at times aborts there when the processes end.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        device = kwargs["device"]
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            if device == "cuda":
                from onnxmerge.calibration.devices import chosen_device

                chosen_device(device)
            command(*args, **kwargs)
            return
        from onnxmerge.calibration.devices import chosen_device
        from onnxmerge.calibration.ranks import joined, wait_for_all

        if kwargs.get("precision") == "float16" and chosen_device(device).type == "cpu":
            raise UsageError("--precision float16: several processes need GPUs for it; on CPUs take bfloat16")
        with joined(device) as rank, contextlib.ExitStack() as stack:
            output: Path | None = kwargs.get("output")
            if rank and output is not None:
                own = stack.enter_context(scratch()) / "out"
                if kwargs["resume"] and output.is_dir():
                    shutil.copytree(output, own)
                kwargs |= {name: None for name in ("report", "tensorboard") if name in kwargs}
                kwargs |= {"output": own, "quiet": True}
                nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            wait_for_all()
            command(*args, **kwargs)

    return wrapped
