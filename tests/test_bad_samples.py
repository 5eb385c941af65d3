"""Bad samples end `fuse` and `align` in one sentence and exit code 2, before anything is written."""

import numpy as np
import onnx
import pytest
from graphs import dense
from typer.testing import CliRunner

from onnxmerge.cli.app import app
from onnxmerge.data import InputSpec, load_dataset
from onnxmerge.errors import UsageError

SAMPLES, HELD_OUT = 120, 20
SPEC = InputSpec("x", (None, 6), np.dtype(np.float32))


def with_one(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    changed = array.astype(np.promote_types(array.dtype, np.float32))
    changed[place] = value
    return changed


def arrays(**changed: np.ndarray | None) -> dict[str, np.ndarray]:
    """Sound samples with labels, some arrays replaced, or left out where None."""
    generator = np.random.default_rng(0)
    sound = {
        "x": generator.standard_normal((SAMPLES, 6)).astype(np.float32),
        "labels": np.arange(SAMPLES) % 4,
        "test_x": generator.standard_normal((HELD_OUT, 6)).astype(np.float32),
        "test_labels": np.arange(HELD_OUT) % 4,
    }
    return {name: array for name, array in (sound | changed).items() if array is not None}


SOUND = arrays()
ALONE = {"test_x": None, "labels": None, "test_labels": None}
BAD = {
    "NaN": (
        {"x": with_one(SOUND["x"], (17, 2), np.nan)},
        "array 'x' holds NaN or infinity as float32 in sample 17",
    ),
    "infinity": (
        {"x": with_one(SOUND["x"], (0, 0), -np.inf)},
        "array 'x' holds NaN or infinity as float32 in sample 0",
    ),
    "too large for the input": (
        {"x": SOUND["x"].astype(np.float64) * 1e300},
        "array 'x' holds NaN or infinity as float32 in sample 0",
    ),
    "NaN held out": (
        {"test_x": with_one(SOUND["test_x"], (3, 5), np.nan)},
        "array 'test_x' holds NaN or infinity as float32 in sample 3",
    ),
    "NaN without test samples": (
        ALONE | {"x": np.full((SAMPLES, 6), np.nan)},
        "array 'x' holds NaN or infinity as float32 in sample ",
    ),
    "NaN in labels": (
        {"labels": with_one(SOUND["labels"], (5,), np.nan)},
        "array 'labels' holds NaN or infinity as float32 in sample 5",
    ),
    "NaN in held-out labels": (
        {"test_labels": with_one(SOUND["test_labels"], (5,), np.nan)},
        "array 'test_labels' holds NaN or infinity as float32 in sample 5",
    ),
    "the same over and over": (
        {"x": np.ones((SAMPLES, 6), np.float32)},
        f"every layer gives the same values for all {SAMPLES} samples of ",
    ),
    "nothing but zeros": (
        {name: np.zeros_like(SOUND[name]) for name in ("x", "test_x")},
        f"every layer gives the same values for all {SAMPLES} samples of ",
    ),
    "one sample": (ALONE | {"x": SOUND["x"][:1]}, "holds 1 sample, but at least 2 are needed"),
    "one sample to calibrate with": (
        {"x": SOUND["x"][:1], "labels": SOUND["labels"][:1]},
        "comparing layers takes at least 2 samples, not 1",
    ),
}


@pytest.fixture
def run(tmp_path):
    """`run(command, arrays)` is its exit code and what it said, and what it left behind."""
    for seed, name in enumerate("ab"):
        onnx.save(dense(seed=seed).proto(), tmp_path / f"{name}.onnx")
    models = [str(tmp_path / f"{name}.onnx") for name in "ab"]

    def outcome(command: str, data: dict[str, np.ndarray]):
        np.savez(tmp_path / "data.npz", **data)
        out = tmp_path / "out"
        more = ["-o", str(out), "--threads", "1"] if command == "fuse" else []
        result = CliRunner().invoke(app, [command, *models, "--data", str(tmp_path / "data.npz"), "-q", *more])
        left = sorted(file.name for file in out.iterdir()) if out.exists() else []
        return result.exit_code, result.stderr, left

    return outcome


@pytest.mark.parametrize("command", ["fuse", "align"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_samples(kind, command, run):
    changed, expected = BAD[kind]
    code, said, left = run(command, arrays(**changed))
    assert code == 2, said
    assert said.startswith("onnxmerge: error: ") and said.count("\n") == 1
    assert expected in said
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fuse", "align"])
@pytest.mark.parametrize("count", [2, SAMPLES])
def test_sound_samples(count, command, run):
    """What the bad ones are made from is not refused; two samples that differ are enough."""
    code, said, _ = run(command, arrays(x=SOUND["x"][:count], labels=SOUND["labels"][:count]))
    assert (code, said) == (0, "")


@pytest.mark.parametrize("bad", [0, 511, 512, 1023])
def test_every_held_out_sample_is_looked_at_when_data_are_opened(bad, tmp_path):
    wide = InputSpec("x", (None, 1000), SPEC.dtype)  # several of these are read at once, but not all
    held_out = with_one(np.zeros((1024, 1000), np.float32), (bad, 999), np.nan)
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 1000), np.float32), test_x=held_out)
    with pytest.raises(UsageError, match=f"array 'test_x' holds NaN or infinity as float32 in sample {bad}$"):
        load_dataset(tmp_path / "data.npz", [wide])


def test_integers_are_not_looked_through(tmp_path, monkeypatch):
    card = tmp_path / "card.yaml"
    card.write_text("file: data.npz\nscale: 1/255\n")
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 6), np.uint8), test_x=np.zeros((5, 6), np.uint8))
    monkeypatch.setattr("onnxmerge.data.dataset.Split.batches", lambda *_: pytest.fail("samples were read"))
    assert len(load_dataset(card, [SPEC]).held_out) == 5
