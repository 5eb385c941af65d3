"""The memory that models take once loaded and run, measured by a fresh process about itself.

`python -m onnxmerge.runtime.memory` is that process: a JSON request on stdin, a JSON answer as the last line of stdout.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from onnxmerge.errors import ModelError, OnnxMergeError, UsageError
from onnxmerge.runtime.heap import return_memory
from onnxmerge.runtime.session import open_session, prepare_run

_STATUS, _SMAPS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/smaps_rollup"), Path("/proc/self/clear_refs")
_PATIENCE = 10.0
"""Seconds that nvidia-smi may take."""
_RUNS = 3  # onnxruntime plans its arena in the first run of a shape and uses the plan from the second on


@dataclass(frozen=True)
class Memory:
    """Host memory in MB (1e6 bytes) beyond that of a process in which onnxruntime has only run one small node."""

    unique_mb: float
    """Unique set size (pages of this process alone) with all sessions open and run, what malloc keeps free returned."""
    peak_mb: float
    """The highest resident set size on the way there: reading the files, optimising the graphs, running them."""
    device_mb: float | None
    """What the GPU holds more than before, whoever else uses it; None on the CPU, or where nvidia-smi does not tell."""


def measure_memory(
    models: Sequence[str | Path],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
) -> Memory | None:
    """Open all `models` in one fresh process, run each on its `feeds`, and tell what they take together.

    Args:
        models: files; one for a merged model, all originals for the separate baseline.
        feeds: inputs of each model.
        providers: short names, see `open_session`.
        threads: threads inside one operator; None leaves the choice to onnxruntime.

    Returns:
        The figures, or None where the system has no `/proc/self/smaps_rollup` (not Linux).

    Raises:
        UsageError: not one set of inputs for each model; and as `open_session` does.
        ModelError: a model cannot be opened or run, or the process is killed by it (out of memory).
    """
    if len(models) != len(feeds):
        raise UsageError(f"{len(models)} models and {len(feeds)} sets of inputs: one for each is needed")
    if not _SMAPS.is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "feeds.npz"
        np.savez(arrays, *(array for inputs in feeds for array in inputs.values()))
        request = {
            "models": [str(model) for model in models],
            "inputs": [list(inputs) for inputs in feeds],
            "arrays": str(arrays),
            "providers": list(providers),
            "threads": threads,
        }
        process = subprocess.run(
            [sys.executable, "-m", "onnxmerge.runtime.memory"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
        )
    if process.returncode != 0:
        names = ", ".join(str(model) for model in models)
        last = (process.stderr.strip().splitlines() or ["no message; was it out of memory?"])[-1]
        raise ModelError(f"{names}: the process that measures memory ended with code {process.returncode}: {last}")
    answer = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise (UsageError if answer["error"] == UsageError.__name__ else ModelError)(answer["message"])
    return Memory(**answer)


def _answer(request: dict) -> dict:
    """What the child process finds out: the fields of `Memory`, or the error that stopped it."""
    try:
        return asdict(_measure(request))
    except OnnxMergeError as error:
        return {"error": type(error).__name__, "message": str(error)}


def _measure(request: dict) -> Memory:
    with np.load(request["arrays"]) as archive:
        arrays = iter([archive[key] for key in archive.files])
    feeds = [{name: next(arrays) for name in names} for names in request["inputs"]]
    options = {"providers": request["providers"], "threads": request["threads"], "spinning": False}

    # The runtime's own pages (operator schemas, code) are 3 to 10 MB, fewer when another process has them mapped too.
    prepare_run(open_session(_one_node(), **options), {"x": np.zeros(1, np.float32)})()

    _settle()
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # forget the peak of the imports
    unique, resident = _unique(), _kilobytes(_STATUS, "VmRSS")
    on_device = _on_device(request["providers"])
    runs = [prepare_run(open_session(m, **options), f) for m, f in zip(request["models"], feeds, strict=True)]
    for run_once in runs * _RUNS:
        run_once()
    _settle()
    device = _on_device(request["providers"])
    return Memory(
        unique_mb=(_unique() - unique) * 1024 / 1e6,
        peak_mb=(_kilobytes(_STATUS, "VmHWM") - resident) * 1024 / 1e6,
        device_mb=None if device is None or on_device is None else device - on_device,
    )


def _on_device(providers: Sequence[str]) -> float | None:
    """MB that the GPU holds, of all processes together; None on the CPU, or where nvidia-smi does not tell."""
    if providers[0] == "cpu":
        return None
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE)
        return float(told.stdout.splitlines()[0]) * 2**20 / 1e6  # it tells MiB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one_node", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def _settle() -> None:
    """Give back what is free: Python's garbage, then the pages that malloc keeps (glibc only)."""
    gc.collect()
    return_memory()


def _unique() -> int:
    return _kilobytes(_SMAPS, "Private_Clean") + _kilobytes(_SMAPS, "Private_Dirty")


def _kilobytes(file: Path, field: str) -> int:
    """A field such as `VmRSS:    1234 kB` of a file under /proc, in units of 1024 bytes."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OnnxMergeError(f"{file} has no field {field}")


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
