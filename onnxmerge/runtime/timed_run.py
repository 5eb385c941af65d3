"""A model made ready for timing: on a GPU as a CUDA graph where it can be one.

A CUDA graph launches all kernels of a run at once, so what is timed is the GPU's work and not the host's between
kernels. onnxruntime makes one of models without control flow whose computing nodes are all on the GPU, with shapes and
addresses that stay (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxmerge.errors import OnnxMergeError
from onnxmerge.runtime.session import open_session, prepare_run, run


@dataclass(frozen=True)
class TimedRun:
    """What runs a model once when it is called.

    Attributes:
        once: runs it.
        cuda_graph: whether it is a CUDA graph; None on the CPU.
    """

    once: Callable[[], None]
    cuda_graph: bool | None

    def __call__(self) -> None:
        """Run the model once."""
        self.once()


def timed_run(
    model: str | Path | bytes,
    feeds: Mapping[str, np.ndarray],
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    spinning: bool = True,
) -> TimedRun:
    """Open `model` and make it ready to be run on `feeds`.

    Arguments and errors are those of `open_session` and `prepare_run`. That a model can be no CUDA graph is no error.
    """
    session = open_session(model, providers=providers, threads=threads, spinning=spinning)
    if providers[0] == "cpu":
        return TimedRun(prepare_run(session, feeds), None)
    with contextlib.suppress(OnnxMergeError):  # a model that cannot be one
        outputs = run(session, feeds)
        captured = open_session(model, providers=providers, threads=threads, spinning=spinning, cuda_graph=True)
        return TimedRun(prepare_run(captured, feeds, outputs), True)
    return TimedRun(prepare_run(session, feeds), False)
