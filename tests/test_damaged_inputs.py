"""500 damaged files of every kind through four commands: at worst one sentence that names the file, and no hang."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import damaged_runs
import numpy as np
import onnx
import pytest
from damage import flipped, overwritten, truncated
from test_bad_input import NETWORKS
from test_cli import DEMO, onnxmerge

Request = list[object]
Harm = Callable[[bytes, np.random.Generator], bytes]


def zeroed(whole: bytes, generator: np.random.Generator) -> bytes:
    """A stretch is zero, as after a machine went down."""
    start, end = sorted(int(place) for place in generator.integers(len(whole) + 1, size=2))
    return whole[:start] + bytes(end - start) + whole[end:]


def spliced(whole: bytes, generator: np.random.Generator) -> bytes:
    """A stretch is missing, or stands there twice."""
    first, second = (int(place) for place in generator.integers(len(whole), size=2))
    return whole[:first] + whole[second:]


HARMS: tuple[Harm, ...] = (truncated, flipped, overwritten, zeroed, spliced)


def damaged(source: Path, folder: Path, count: int, seed: int) -> Iterator[Path]:
    generator, whole = np.random.default_rng(seed), source.read_bytes()
    for number in range(count):
        harm = HARMS[number % len(HARMS)]
        path = folder / f"{source.stem}-{number:03}-{harm.__name__}{source.suffix}"
        path.write_bytes(harm(whole, generator))
        yield path


def check(requests: Mapping[Path, Request], folder: Path) -> list[int]:
    """Run the command for each file; the exit codes."""
    file = folder / "requests.txt"
    file.write_text("".join(json.dumps([str(part) for part in request]) + "\n" for request in requests.values()))
    ended = subprocess.run(
        [sys.executable, damaged_runs.__file__, file], capture_output=True, text=True, timeout=580, check=False
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"{lines[-1]} ended the process ({ended.returncode})"
    answers = [line for line in lines if "code" in line]
    wrong = []
    for path, answer in zip(requests, answers, strict=True):
        said = answer["said"]
        sound = answer["code"] in (0, 1) and "error" not in said
        named = path.name in said or (path.suffix == ".yaml" and names_what_stands_in(path, said))
        one_sentence = said.startswith("onnxmerge: error: ") and said.count("\n") == 1 and named
        if answer["fault"] or "Traceback" in said or not (sound or (answer["code"] in (2, 3) and one_sentence)):
            wrong.append(answer)
    assert not wrong, f"{len(wrong)} of {len(answers)}, first: " + json.dumps(wrong, indent=1)
    return [answer["code"] for answer in answers]


def names_what_stands_in(card: Path, said: str) -> bool:
    """A card may well be one, of files that are not there."""
    return said.removeprefix("onnxmerge: error: ").split(": ")[0] in card.read_text(errors="replace")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where damaged files lie; outputs go beside it."""
    made = tmp_path / "damaged"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound networks: the demo's, those of every kind of operator, and some of the zoo."""
    from zoo.exporting import export

    folder = tmp_path_factory.mktemp("networks")
    found = {"demo": DEMO / "digits.onnx"}
    for name, make in NETWORKS.items():
        found[name] = folder / f"{name}.onnx"
        onnx.save(make().proto(infer=False), found[name])
    for name in ("lenet", "lstm", "mobilenet_v3", "bert"):
        found[name] = folder / f"{name}.onnx"
        export(name, "legacy", 17, found[name])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("command", "count"), [("inspect", 10), ("pack", 10), ("zip", 8), ("validate", 20)])
def test_damaged_networks(command: str, count: int, networks: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    requests: dict[Path, Request] = {}
    out = tmp_path / "out.onnx"
    if command == "validate":  # noise suits networks that read floats, and batches of any size
        networks = {name: networks[name] for name in ("demo", "chain", "residual", "lenet", "mobilenet_v3")}
    for seed, (name, sound) in enumerate(networks.items()):
        other = networks["residual" if name == "chain" else "chain"]
        packed = tmp_path / f"{name}-packed.onnx"
        if command == "validate":
            assert onnxmerge("pack", sound, other, "-o", packed, "-q")[0] == 0
        how = ["--against", f"{other.stem}={other}", "--data", "noise", "--threads", 1]
        for number, path in enumerate(damaged(packed if command == "validate" else sound, folder, count, seed)):
            requests[path] = {
                "inspect": ["inspect", path],
                "pack": ["pack", path, other, "-o", out, "-q", "--overwrite", "--threads", 1],
                "zip": ["zip", path, sound, "--dry-run"],
                "validate": ["validate", path, "--against", f"{sound.stem}={sound}", *how],
            }[command]
            if command == "validate" and number % 2:  # the original instead
                path.write_bytes(HARMS[number % len(HARMS)](sound.read_bytes(), np.random.default_rng(number)))
                requests[path] = ["validate", packed, "--against", f"{sound.stem}={path}", *how]
    codes = check(requests, tmp_path)
    assert len(codes) == count * len(networks) and 3 in codes
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))} <= {"out.onnx"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's digits in the ways that data come, few of them, and what validates a network with them."""
    folder = tmp_path_factory.mktemp("digits")
    with np.load(DEMO / "digits.npz") as archive:
        arrays = {name: archive[name][:40] for name in archive.files}
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    (folder / "card.yaml").write_text(
        f"file: {folder / 'stored.npz'}\nscale: 1/255\nmean: [0.1307]\nstd: [0.3081]\nlayout: NCHW\n"
    )
    (folder / "recipe.yaml").write_text(
        "steps:\n"
        f"- pack:\n    models: [{DEMO / 'digits.onnx'}, {DEMO / 'fashion.onnx'}]\n    output: packed.onnx\n"
        f"- validate:\n    merged: packed.onnx\n    against: [{DEMO / 'digits.onnx'}]\n"
        "    data: {digits: stored.npz}\n    max-drop: 0.01\n"
    )
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("stored.npz", 40), ("packed.npz", 40), ("card.yaml", 30)])
def test_damaged_data(name: str, count: int, digits: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    network, packed = DEMO / "digits.onnx", tmp_path / "both.onnx"
    assert onnxmerge("pack", network, DEMO / "fashion.onnx", "-o", packed, "--no-check", "-q")[0] == 0
    requests: dict[Path, Request] = {
        path: ["validate", packed, "--against", network, "--data", path, "--samples", 8, "--threads", 1]
        for path in damaged(digits[name], folder, count, 0)
    }
    codes = check(requests, tmp_path)
    assert len(codes) == count and 2 in codes


@pytest.mark.slow
def test_damaged_recipes(digits: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    requests: dict[Path, Request] = {
        path: ["run", path, "--dry-run"] for path in damaged(digits["recipe.yaml"], folder, 30, 0)
    }
    codes = check(requests, tmp_path)
    assert len(codes) == 30 and set(codes) == {0, 2}
