"""Runs of the command line in forks of one process that has imported everything: many, without a cold start each.

Their measurements of time and memory are cut short.

As a program it reads one JSON request a line, and answers each with one line.
"""

import contextlib
import ctypes
import functools
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 120
"""Seconds after which a run counts as hung."""
MODULES = (
    "onnxmerge.cli.app",
    "onnxmerge.methods.calibrating",
    "onnxmerge.methods.fuse.fuse",
    "onnxmerge.methods.pack.pack",
    "onnxmerge.methods.validate",
    "onnxmerge.methods.zip.zip",
    "onnxmerge.report.page",
    "onnxmerge.report.plots",
)


@dataclass(frozen=True)
class Ran:
    """How a run ended; `code` is -9 where it was killed, -14 where it hung."""

    code: int
    seconds: float
    said: str


class Warm:
    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def start(self, *arguments: object, kill_after: float | None = None, powerless: bool = False) -> None:
        """Begin a run, which `end` waits for; `powerless`: without root's rights over files."""
        assert self._process.stdin is not None
        request = {"arguments": [str(a) for a in arguments], "kill_after": kill_after, "powerless": powerless}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def end(self) -> Ran:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return Ran(**json.loads(line))

    def run(self, *arguments: object, kill_after: float | None = None, powerless: bool = False) -> Ran:
        self.start(*arguments, kill_after=kill_after, powerless=powerless)
        return self.end()


@contextlib.contextmanager
def warm() -> Iterator[Warm]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with process:
        yield Warm(process)
        assert process.stdin is not None
        process.stdin.close()


def _child(arguments: list[str], powerless: bool, said: int) -> None:
    os.dup2(said, 1)
    os.dup2(said, 2)
    if powerless:
        header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
        assert ctypes.CDLL(None).capset(header, none) == 0
    signal.alarm(LIMIT)  # ends the process
    from onnxmerge.cli.app import app

    code = 0
    try:
        app(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prepare() -> None:
    """Import what torch imports late, and cut the measurements short."""
    import torch

    import onnxmerge.methods.measure as measure
    from onnxmerge.report.schema import MemoryRecord

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    measure.latency = functools.partial(measure.latency, runs=5, min_seconds=0.0)  # type: ignore[assignment]
    measure.Bench.memory = lambda *_: MemoryRecord(merged=None, separate=None)  # type: ignore[method-assign]


def _serve() -> None:
    for module in MODULES:
        __import__(module)
    _prepare()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as said:
            begun = time.monotonic()
            process = os.fork()
            if process == 0:
                try:
                    _child(request["arguments"], request["powerless"], said.fileno())
                finally:
                    os._exit(70)
            if request["kill_after"] is not None:
                time.sleep(request["kill_after"])
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            seconds = time.monotonic() - begun
            said.seek(0)
            answer = {
                "code": os.waitstatus_to_exitcode(status),
                "seconds": seconds,
                "said": said.read().decode(errors="replace"),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
