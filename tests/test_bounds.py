"""Bounds of `validate` and `bench`: what they ask, and that what breaks them is told."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper
from test_cli import onnxmerge, pair, samples, tiny

from onnxmerge.cli.options import tolerance
from onnxmerge.errors import UsageError
from onnxmerge.methods.bounds import Bounds
from onnxmerge.methods.tolerance import Gap, Tolerance

__all__ = ["pair", "samples"]  # fixtures

FLOATS = arrays.arrays(np.float32, (3, 4), elements=st.floats(-4, 4, width=32) | st.sampled_from([np.nan, np.inf]))


# --- gaps -------------------------------------------------------------------------------------------------------------


@given(FLOATS, FLOATS, st.sampled_from([None, 0.0, 0.5]), st.sampled_from([None, 0.0, 0.25]))
def test_a_gap_counts_what_is_not_close(merged: np.ndarray, original: np.ndarray, atol: float, rtol: float) -> None:
    gap = Gap(Tolerance(atol, rtol))
    gap.update(merged[:2], original[:2])
    gap.update(merged[2:], original[2:])
    with np.errstate(invalid="ignore"):
        close = np.isclose(merged.astype(np.float64), original.astype(np.float64), atol=atol or 0, rtol=rtol or 0)
    assert gap.compared == 12
    assert gap.violations == int((~close).sum())
    within = gap.largest <= (atol or 0) if rtol is None else gap.largest_share <= rtol if atol is None else None
    if within is not None:
        assert within == (gap.violations == 0)
    # a quotient may round to 1 where the difference is just too large
    assert gap.violations == 0 or gap.largest_excess >= 1
    assert gap.violations or gap.largest_excess <= 1


def test_what_is_no_number_is_never_close() -> None:
    gap = Gap(Tolerance(1e9, 1e9))
    one = np.ones(1, np.float32)
    gap.update(one * np.nan, one)
    gap.update(one * np.inf, one)
    assert gap.violations == 2 and gap.largest == np.inf
    gap = Gap(Tolerance(0.0))
    gap.update(-one * np.inf, -one * np.inf)
    gap.update(np.array([3]), np.array([3]))
    gap.update(np.array([True]), np.array([True]))
    assert gap.violations == 0 and gap.largest == 0


# --- options ----------------------------------------------------------------------------------------------------------


def test_tolerances_of_all_and_of_one() -> None:
    assert tolerance([], "--atol") == (None, {})
    assert tolerance(["1e-3"], "--atol") == (0.001, {})
    assert tolerance(["a/x=y=2", "1e-3", "b/z=0"], "--atol") == (0.001, {"a/x=y": 2.0, "b/z": 0.0})
    bounds = Bounds(atol=1.0, rtol=None, output_atol={"a/y": 2.0}, output_rtol={"b/y": 0.1})
    assert bounds.tolerances(["a/y", "b/y"]) == {"a/y": Tolerance(2.0, None), "b/y": Tolerance(1.0, 0.1)}
    assert Bounds(output_rtol={"b/y": 0.1}).tolerances(["a/y", "b/y"]) == {"b/y": Tolerance(None, 0.1)}
    assert not Bounds() and Bounds(output_rtol={"b/y": 0.1}) and Bounds(max_drop=0.0)


@pytest.mark.parametrize("values", [["x"], ["-1"], ["nan"], ["inf"], ["a/y="], ["1", "2"], ["a/y=1", "a/y=2"]])
def test_bad_tolerances_are_refused(values: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--rtol "):
        tolerance(values, "--rtol")


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("800kB", 800_000), ("1.5 MB", 1_500_000), ("2GB", 2 * 10**9)])
def test_sizes_have_units(tmp_path: Path, pair: tuple[Path, Path], samples: Path, text: str, size: int) -> None:
    _, stdout, _ = onnxmerge("bench", pair[0], "--max-bytes", text, "--json", "--threads", 1)
    assert json.loads(stdout)["checks"][0]["limit"] == size


@pytest.mark.parametrize("text", ["0", "-1", "1kb", "1e3", "0.1", "MB", "1 TB"])
@pytest.mark.parametrize("command", ["zip", "validate", "bench"])
def test_bad_sizes_are_refused(command: str, text: str) -> None:
    code, _, stderr = onnxmerge(command, "a.onnx", "--max-bytes", text, "--against", "a.onnx", "--data", "d.npz")
    assert code == 2 and "Traceback" not in stderr


# --- validate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> tuple[object, ...]:
    """A merged model that computes a exactly, held against a and another network than the b that it holds."""
    assert onnxmerge("pack", *pair, "-o", tmp_path / "merged.onnx")[0] == 0
    other = tiny(tmp_path / "other.onnx", 3)
    return (tmp_path / "merged.onnx", "--against", pair[0], "--against", f"b={other}", "--data", samples)


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("onnxmerge: error: ")]


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        (["--atol", "1e-5"], ["b/logits"]),
        (["--atol", "1e-5", "--atol", "b/logits=1000"], []),
        (["--atol", "a/logits=1e-5"], []),
        (["--atol", "b/logits=1e-5"], ["b/logits"]),
        (["--atol", "1000", "--rtol", "b/logits=0"], []),
        (["--atol", "b/logits=0", "--rtol", "1e-3"], ["b/logits"]),
        (["--max-drop", "0.1"], ["task b"]),
        (["--min-agreement", "0.99"], ["task b"]),
        (["--min-agreement", "0"], []),
        (["--max-bytes", "1kB"], ["takes"]),
        (["--max-bytes", "1MB"], []),
        (["--atol", "1e-5", "--max-drop", "0.1", "--max-bytes", "1kB"], ["b/logits", "task b", "takes"]),
    ],
)
def test_every_broken_bound_is_told(half: tuple[object, ...], options: list[str], broken: list[str]) -> None:
    code, stdout, stderr = onnxmerge("validate", *half, *options, "--json", "--threads", 1)
    assert code == (1 if broken else 0), stderr
    told = errors(stderr)
    assert len(told) == len(broken) and all(name in line for name, line in zip(broken, told, strict=True))
    assert all("merged.onnx" in line for line in told)
    report = json.loads(stdout)
    assert [c["told"] for c in report["checks"] if c["passed"] is False] == [
        line.removeprefix("onnxmerge: error: ") for line in told
    ]
    assert report["chosen"] == (None if broken else "merged")
    assert set(report["candidates"][0]["nodes"]) == {"cpu"}


def test_the_table_comes_before_the_verdict(half: tuple[object, ...]) -> None:
    code, stdout, _ = onnxmerge("validate", *half, "--max-drop", 0.1, "--threads", 1)
    assert code == 1 and "1 of 2 bounds is broken" in stdout and "agr%" in stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--atol", "c/logits=1"], "--atol c/logits: there is no such output; there are a/logits, b/logits"),
        (["--atol", "1", "--rtol", "logits=1"], "--rtol logits: there is no such output"),
        (["--atol", "many"], "'many' is no number"),
        (["--junit", "j.xml"], "none was given"),
        (["--providers", "cuda"], "'cuda'"),
        (["--providers", "tensorrt,cpu", "--atol", "1"], "'tensorrt'"),
    ],
)
def test_bounds_that_do_not_fit_are_exit_2(half: tuple[object, ...], options: list[str], said: str) -> None:
    code, stdout, stderr = onnxmerge("validate", *half, *options)
    assert code == 2 and said in stderr and len(errors(stderr)) == 1 and not stdout


def edited(source: Path, target: Path, *nodes: onnx.NodeProto) -> Path:
    """The model in `source` with more nodes between its head, renamed to `before`, and its output."""
    model = onnx.load(source)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(nodes)
    onnx.save(model, target)
    return target


def test_agreement_is_asked_of_classifiers(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    boxes = edited(pair[1], tmp_path / "boxes.onnx", helper.make_node("Sigmoid", ["before"], ["logits"]))
    assert onnxmerge("pack", pair[0], boxes, "-o", tmp_path / "m.onnx")[0] == 0
    against = ["--against", pair[0], "--against", boxes, "--data", samples, "--min-agreement", 0.9, "--threads", 1]
    code, stdout, stderr = onnxmerge("validate", tmp_path / "m.onnx", *against, "--json")
    assert code == 0, stderr
    assert [(c["of"], c["passed"]) for c in json.loads(stdout)["checks"]] == [("a", True), ("boxes", None)]
    assert onnxmerge("pack", boxes, boxes, "-o", tmp_path / "n.onnx")[0] == 0
    against[:4] = ["--against", boxes]
    code, _, stderr = onnxmerge("validate", tmp_path / "n.onnx", *against)
    assert code == 2 and "no task names classes" in stderr


def test_no_number_keeps_no_bound(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    """0 / 0 in the merged model must not slip through a comparison with NaN."""
    smooth = edited(pair[0], tmp_path / "task.onnx", helper.make_node("Sigmoid", ["before"], ["logits"]))
    nodes = [helper.make_node("Sub", ["before", "before"], ["zero"]), helper.make_node("Div", ["zero", "zero"], ["no"])]
    (tmp_path / "bad").mkdir()
    bad = edited(pair[0], tmp_path / "bad/task.onnx", *nodes, helper.make_node("Sigmoid", ["no"], ["logits"]))
    assert onnxmerge("pack", bad, bad, "-o", tmp_path / "m.onnx", "--no-check")[0] == 0
    arguments = ("--against", smooth, "--data", samples, "--atol", 1e3, "--rtol", 1e3, "--max-drop", 0.5)
    code, stdout, stderr = onnxmerge("validate", tmp_path / "m.onnx", *arguments, "--json")
    assert code == 1 and len(errors(stderr)) == 2, stderr
    assert [c["passed"] for c in json.loads(stdout)["checks"]] == [False, False]
