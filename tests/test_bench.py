"""bench: batch sizes, what the originals are run as, and bounds."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from reports import Page
from rich.cells import cell_len
from test_bounds import errors
from test_cli import onnxmerge, pair, tiny
from test_junit import check_junit

from onnxmerge.errors import ModelError
from onnxmerge.ir.light import read_light
from onnxmerge.methods.pack.packing import unshared_graph
from onnxmerge.runtime.session import open_session, random_feeds, run

__all__ = ["pair"]  # a fixture
WAYS = ("merged", "separate", "separate_default", "unshared")


def with_batch(source: Path, target: Path, batch: int) -> Path:
    """The model with its batch size fixed."""
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, target)
    return target


@pytest.fixture
def packed(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    assert onnxmerge("pack", *pair, "-o", tmp_path / "packed.onnx")[0] == 0
    return tmp_path / "packed.onnx"


def against(*models: Path) -> list[object]:
    return [part for model in models for part in ("--against", model)] + ["--threads", 1]


def test_each_batch_size_is_measured_in_every_way(tmp_path: Path, packed: Path, pair: tuple[Path, Path]) -> None:
    page = tmp_path / "bench.html"
    code, stdout, stderr = onnxmerge(
        "bench", packed, *against(*pair), "--batch", "32, 1,8,1", "--json", "--report", page
    )
    assert code == 0, stderr
    (candidate,) = json.loads(stdout)["candidates"]
    assert [found["batch"] for found in candidate["batches"]] == [1, 8, 32]
    for found in candidate["batches"]:
        for way in WAYS:
            timing = found[way]
            assert 0 < timing["p50"] <= timing["p90"] <= timing["p99"]
            # a mean lies anywhere above a part of the median
            assert 0 < timing["throughput"] <= 2.5 * 1e3 * found["batch"] / timing["p50"]
        assert found["speedup"] == pytest.approx(found["separate"]["p50"] / found["merged"]["p50"])
        assert found["of_ideal"] == pytest.approx(found["speedup"] / 2)
    first = candidate["batches"][0]
    assert candidate["latency_ms"] == {way: first[way]["p50"] for way in WAYS[:3]} | {"speedup": first["speedup"]}
    assert sum(candidate["nodes"]["cpu"].values()) >= 8
    rows = [row for row in Page(page.read_text()).rows if row[1:2] and row[1].startswith(("merged", "originals,"))]
    assert [row[0] for row in rows if row[1] == "merged"] == ["1", "8", "32"]
    assert len(rows) == 9  # the spin-stopped originals are called just that


def test_the_table_fits_80_columns(packed: Path, pair: tuple[Path, Path]) -> None:
    code, stdout, _ = onnxmerge("bench", packed, *against(*pair), "--batch", "1,4")
    assert code == 0 and "…" not in stdout and max(map(cell_len, stdout.splitlines())) <= 80
    assert stdout.count("originals, one graph") == 2 and "packed was timed: " in stdout


def test_models_alone_and_one_original_have_no_graph_to_compare_with(pair: tuple[Path, Path]) -> None:
    code, stdout, stderr = onnxmerge("bench", *pair, "--batch", "1,2", "--json", "--threads", 1)
    assert code == 0, stderr
    for candidate in json.loads(stdout)["candidates"]:
        assert [found["batch"] for found in candidate["batches"]] == [1, 2]
        assert all(found[way] is None for found in candidate["batches"] for way in WAYS[1:])
    code, stdout, stderr = onnxmerge("bench", pair[0], *against(pair[1]), "--json")
    (found,) = json.loads(stdout)["candidates"][0]["batches"]
    assert code == 0 and found["unshared"] is None and found["of_ideal"] == found["speedup"]


def test_originals_in_one_graph_share_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Even two copies of one model: all nodes, all weights and all inputs stand twice."""
    models = {"a": read_light(pair[0]), "b": read_light(pair[0])}
    alone = read_light(pair[0])
    graph, inputs = unshared_graph(models)
    assert inputs == {"a": {"x": "a/x"}, "b": {"x": "b/x"}}
    assert len(list(graph.graph)) == 2 * len(list(alone.graph))
    assert len(graph.graph.initializers) == 2 * len(alone.graph.initializers)
    oir.save(graph, tmp_path / "unshared.onnx")
    session = open_session(tmp_path / "unshared.onnx")
    feeds = random_feeds(session, batch=3)
    assert not np.array_equal(feeds["a/x"], feeds["b/x"])
    found = run(session, feeds)
    for task in "ab":
        expected = run(open_session(pair[0]), {"x": feeds[f"{task}/x"]})["logits"]
        np.testing.assert_allclose(found[f"{task}/logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [ModelError("other operator sets"), OSError(28, "No space left on device")])
def test_originals_that_go_into_no_graph_are_a_note(
    pair: tuple[Path, Path], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("onnxmerge.methods.timing.oir.save", refuse)
    code, stdout, stderr = onnxmerge("bench", pair[0], *against(*pair), "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    (found,) = report["candidates"][0]["batches"]
    assert found["unshared"] is None and found["speedup"] > 0
    assert any(f"could not be put into one graph to compare with: {error}" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "8"], "its batch size is fixed at 4, so it cannot be timed at 8"),
        (["--batch", "4,1"], "its batch size is fixed at 4, so it cannot be timed at 1"),
        (["--batch", "0"], "no list of batch sizes"),
        (["--batch", "1;2"], "no list of batch sizes"),
        (["--batch", "many"], "no list of batch sizes"),
        (["--min-speedup", 1], "none was named with --against"),
        (["--junit", "junit.xml"], "none was given"),
        (["--providers", "cuda"], "'cuda'"),
        (["--providers", "tensorrt"], "'tensorrt'"),
    ],
)
def test_what_cannot_be_timed_is_exit_2(
    tmp_path: Path, pair: tuple[Path, Path], options: list[object], said: str
) -> None:
    four = with_batch(pair[0], tmp_path / "four.onnx", 4)
    code, stdout, stderr = onnxmerge("bench", pair[1], four, *options)
    assert code == 2 and said in stderr and len(errors(stderr)) == 1 and not stdout


def test_a_fixed_batch_is_the_default(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    four = with_batch(pair[0], tmp_path / "four.onnx", 4)
    code, stdout, stderr = onnxmerge("bench", pair[1], *against(four, pair[0]), "--json")
    assert code == 0, stderr
    assert [found["batch"] for found in json.loads(stdout)["candidates"][0]["batches"]] == [4]
    code, _, stderr = onnxmerge("bench", four, *against(with_batch(pair[1], tmp_path / "two.onnx", 2)))
    assert code == 2 and "four.onnx: its batch size is fixed at 4, so it cannot be timed at 2" in stderr


def test_a_batch_that_only_the_run_refuses_is_exit_2(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    model = onnx.load(pair[0])
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 54]), "shape"))
    flatten.CopyFrom(onnx.helper.make_node("Reshape", [flatten.input[0], "shape"], list(flatten.output)))
    onnx.save(model, tmp_path / "one.onnx")
    assert onnxmerge("bench", tmp_path / "one.onnx", "--threads", 1)[0] == 0
    code, _, stderr = onnxmerge("bench", tmp_path / "one.onnx", "--batch", "1,8", "--threads", 1)
    assert code == 2 and "one.onnx: does not run with a batch of 8: " in stderr and len(errors(stderr)) == 1


def test_every_broken_bound_is_told(tmp_path: Path, packed: Path, pair: tuple[Path, Path]) -> None:
    file = tmp_path / "junit.xml"
    options = ("--batch", "1,2", "--min-speedup", 1000, "--max-bytes", "1kB", "--json", "--junit", file)
    code, stdout, stderr = onnxmerge("bench", packed, tiny(tmp_path / "c.onnx", 3), *against(*pair), *options)
    assert code == 1
    told = [f"{model}, batch {n}: the speed-up" for model in ("packed.onnx", "c.onnx") for n in (1, 2)]
    expected = [*told[:2], "packed.onnx: takes", *told[2:], "c.onnx: takes"]
    assert len(errors(stderr)) == len(expected)
    assert all(text in line for text, line in zip(expected, errors(stderr), strict=True))
    assert [check["passed"] for check in json.loads(stdout)["checks"]] == [False] * 6
    cases = check_junit(file.read_text())
    assert all(case.find("failure") is not None for case in cases) and float(cases[0].get("time")) > 1
