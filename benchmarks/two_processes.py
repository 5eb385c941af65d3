"""Two processes on one machine against one: the curve of the held-out loss, and the time of a step.

python benchmarks/two_processes.py [--steps 60] [--batch 64] [--rounds 3]

`onnxmerge calibrate` trains what zip makes of the two networks that ship with the package (all hidden layers shared),
in float32, with one thread in each process. One process and two, under torchrun with gloo, take turns, with the same
batch in all. Seconds of a step are the median over a run, from its log for TensorBoard.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import markdown
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import onnxmerge

DEMO = Path(onnxmerge.__file__).parent / "demo"
TASKS = ("digits", "fashion")


def calibrated(merged: Path, folder: Path, processes: int, steps: int, batch: int) -> tuple[list[float], float]:
    """The held-out losses, and the median seconds of a step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    given = [part for task in TASKS for part in ("--teacher", DEMO / f"{task}.onnx")]
    given += [part for task in TASKS for part in ("--data", f"{task}={DEMO / f'{task}.yaml'}")]
    given += ["--steps", steps, "--batch", batch, "--threads", 1, "--precision", "float32"]
    given += ["--tensorboard", folder / "log"]
    command = [sys.executable, *launcher, "-m", "onnxmerge", "calibrate", merged, *given, "-o", folder / "out"]
    subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    report = json.loads((folder / "out/report.json").read_text())
    events = EventAccumulator(str(folder / "log/calibrate"), size_guidance={"scalars": 0}).Reload()
    speeds = [event.value for event in events.Scalars("samples per second")]
    samples = len(TASKS) * batch
    return [loss for _, loss in report["candidates"][1]["losses"]], samples / statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = {task: DEMO / f"{task}.yaml" for task in TASKS}
        settings = onnxmerge.ZipSettings(share="5", max_drop=None, steps=0, measure=False, threads=1)
        onnxmerge.zip_models([DEMO / f"{task}.onnx" for task in TASKS], data, folder / "zipped", settings=settings)
        rows, differences = [], []
        for number in range(options.rounds):
            found = [
                calibrated(
                    folder / "zipped/merged.onnx", folder / f"{number}{count}", count, options.steps, options.batch
                )
                for count in (1, 2)
            ]
            (one, alone), (two, shared) = found
            differences.append(max(abs(a - b) / a for a, b in zip(one, two, strict=True)))
            rows.append(
                [
                    number + 1,
                    f"{1e3 * alone:.1f}",
                    f"{1e3 * shared:.1f}",
                    f"{alone / shared:.2f}",
                    f"{differences[-1]:.1e}",
                ]
            )
    print(markdown.table(["round", "one process, ms", "two, ms", "speed-up", "difference of the loss"], rows))


if __name__ == "__main__":
    main()
