"""How much longer `onnxmerge --help` takes than `python -c pass`: medians of interleaved runs.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "onnxmerge --help": [str(Path(sys.executable).with_name("onnxmerge")), "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(21):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.3f} s")
    print(f"difference: {medians['onnxmerge --help'] - medians['python -c pass']:.3f} s")


if __name__ == "__main__":
    main()
