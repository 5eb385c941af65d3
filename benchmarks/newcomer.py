"""From `git clone` to a merged model of one's own, following the README: what each step takes.

    python benchmarks/newcomer.py

Clones this repository into an empty folder, runs the README's `make demo` there, and then inspects, plans, zips,
validates and times two networks that are not the package's: cnn_mnist and cnn_fashion_mnist, with 10 000 images
of each task. What pip downloads depends on the connection and on pip's cache.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import markdown
from datasets import SHARED, digits

REPOSITORY = Path(__file__).parents[1]
TASKS = {"cnn_mnist": "mnist", "cnn_fashion_mnist": "fashion_mnist"}


def steps() -> list[str]:
    """The command lines; the models and their samples lie beside the clone."""
    models = " ".join(f"../{task}.onnx" for task in TASKS)
    data = " ".join(f"--data {task}=../{task}.npz" for task in TASKS)
    against = " ".join(f"--against {task}=../{task}.onnx" for task in TASKS)
    command = ".venv/bin/onnxmerge"
    return [
        f"git clone -q {shlex.quote(str(REPOSITORY))} .",
        "make demo",
        f"{command} inspect ../{next(iter(TASKS))}.onnx --check",
        f"{command} zip {models} --dry-run",
        f"{command} zip {models} {data} -o zipped",
        f"{command} validate zipped/merged.onnx {against} {data} --max-drop 0.02",
        f"{command} inspect zipped/merged.onnx",
    ]


def main() -> None:
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "onnxmerge")
        folder.mkdir()
        for task, images in TASKS.items():
            (folder.parent / f"{task}.onnx").write_bytes((SHARED / "models" / f"{task}.onnx").read_bytes())
            (folder.parent / f"{task}.npz").symlink_to(digits(images))
        begun = time.perf_counter()
        for line in steps():
            started = time.perf_counter()
            done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{line}: exit {done.returncode}\n{done.stdout}{done.stderr}")
            shown = line.replace(str(REPOSITORY), "REPOSITORY")
            rows.append([f"`{shown}`", f"{time.perf_counter() - started:.0f}", f"{time.perf_counter() - begun:.0f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown.table(["step", "seconds", "since the beginning"], rows))


if __name__ == "__main__":
    main()
