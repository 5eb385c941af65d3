"""Sessions, latency and memory, measured in onnxruntime on small graphs and on real networks where they are at hand."""

import builtins
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.runtime import memory as memory_module
from onnxmerge.runtime.latency import Latency, latency, measure_latency
from onnxmerge.runtime.memory import measure_memory
from onnxmerge.runtime.session import FREE_DIM, node_providers, open_session, prepare_run, random_feeds, run

ort = pytest.importorskip("onnxruntime")
MODELS = Path(__file__).parents[1] / "../shared/models"
gpu = pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="no CUDA provider")
linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="memory is read from /proc")


def graph_bytes(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def tensor(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def dense(rows=4, columns=3, seed=0):
    """x [N, rows] times a random matrix, then ReLU; also the product before it."""
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"], name="product"), helper.make_node("Relu", ["z"], ["y"])]
    outputs = [tensor("y", ["N", columns]), tensor("z", ["N", columns])]
    return graph_bytes(nodes, [tensor("x", ["N", rows])], outputs, [numpy_helper.from_array(weight, "w")]), weight


def real(name):
    path = MODELS / name
    if not path.is_file():
        pytest.skip(f"{name} is not at hand")
    return path


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_run_gives_outputs_by_name_and_ignores_other_feeds():
    model, weight = dense()
    session = open_session(model, threads=1)
    feeds = {"x": np.ones((2, 4), np.float32), "of another task": np.zeros(1)}
    both = run(session, feeds)
    assert list(both) == ["y", "z"]
    np.testing.assert_allclose(both["z"], feeds["x"] @ weight, rtol=1e-5)
    np.testing.assert_array_equal(both["y"], np.maximum(both["z"], 0))
    assert list(run(session, feeds, ["z"])) == ["z"]


def test_a_path_and_its_bytes_open_alike(tmp_path):
    model, _ = dense()
    path = tmp_path / "dense.onnx"
    path.write_bytes(model)
    feeds = {"x": np.ones((1, 4), np.float32)}
    expected = run(open_session(model), feeds)["y"]
    np.testing.assert_array_equal(run(open_session(path), feeds)["y"], expected)
    np.testing.assert_array_equal(run(open_session(str(path), spinning=False, threads=2), feeds)["y"], expected)


def test_session_options_reach_onnxruntime():
    model, _ = dense()
    options = open_session(model, threads=3, spinning=False).get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    with pytest.raises(RuntimeError):  # not set at all
        open_session(model).get_session_options().get_session_config_entry("session.force_spinning_stop")


def test_unknown_provider():
    with pytest.raises(UsageError, match="unknown provider 'xpu': choose from cpu, cuda, tensorrt"):
        open_session(dense()[0], providers=["xpu"])


def test_no_provider():
    with pytest.raises(UsageError, match="no provider"):
        open_session(dense()[0], providers=[])


def test_provider_that_was_not_built_in(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=r"'cuda' is not in the installed onnxruntime .*onnxmerge\[gpu\]"):
        open_session(dense()[0], providers=["cuda"])


def test_silent_fallback_is_refused(monkeypatch):
    """onnxruntime lists CUDA but then runs on the CPU, as it does when a CUDA library is missing."""
    model, _ = dense()
    on_cpu = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("libcudnn.so.9 was not found"))
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **kwargs: on_cpu)
    with pytest.raises(UsageError, match=r"'cuda' did not start .* CPUExecutionProvider instead"):
        open_session(model, providers=["cuda", "cpu"])


def test_preloading_keeps_stdout_clean(monkeypatch, capsys):
    test_silent_fallback_is_refused(monkeypatch)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "libcudnn" in captured.err


def test_provider_that_fails_at_the_start(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", fails)
    with pytest.raises(UsageError, match="the provider 'cuda' could not start: CUDA failure 35"):
        open_session(dense()[0], providers=["cuda"])


def test_no_onnxruntime(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"onnxmerge\[cpu\].*onnxmerge\[gpu\]"):
        open_session(b"")


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert "ONNXRuntimeError" not in text
    return text


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.onnx: no such file"):
        open_session(tmp_path / "nothing.onnx")


def test_file_that_is_no_model(tmp_path):
    path = tmp_path / "letter.onnx"
    path.write_bytes(b"Dear reader, this is no graph.")
    with pytest.raises(ModelError) as error:
        open_session(path)
    assert one_line(error).startswith(f"{path}: onnxruntime refuses it: ")


def test_truncated_model(tmp_path):
    path = tmp_path / "half.onnx"
    model, _ = dense(64, 64)
    path.write_bytes(model[: len(model) // 2])
    with pytest.raises(ModelError, match=r"half\.onnx"):
        open_session(path)


def test_unknown_operator_is_named():
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"], name="odd")]
    with pytest.raises(ModelError, match=r"Frobnicate") as error:
        open_session(graph_bytes(nodes, [tensor("x", [1])], [tensor("y", [1])]))
    assert one_line(error).startswith("the model: ")


def test_model_without_an_opset():
    with pytest.raises(ModelError, match=r"super_resolution\.onnx: onnxruntime refuses it: Missing opset") as error:
        open_session(real("super_resolution.onnx"))
    assert ".cc:" not in one_line(error)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "no data for the input 'x'"),
        ({"image": np.zeros((1, 4), np.float32)}, "no data for the input 'x'; there is data for image"),
        ({"x": np.zeros((1, 4))}, "the input 'x' takes float32, the data are float64"),
        ({"x": np.zeros((1, 5), np.float32)}, "x .*Got: 5 Expected: 4"),
        ({"x": np.zeros(4, np.float32)}, "rank for input: x"),
    ],
)
def test_feeds_that_do_not_fit(feeds, message):
    with pytest.raises(UsageError, match=message) as error:
        run(open_session(dense()[0]), feeds)
    one_line(error)


def test_a_node_that_fails_is_named(capfd):
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"], name="square")]
    session = open_session(graph_bytes(nodes, [tensor("x", ["N", "M"])], [tensor("y", ["N", "K"])]))
    with pytest.raises(ModelError, match="'square'") as error:
        run(session, {"x": np.zeros((2, 3), np.float32)})
    one_line(error)
    assert capfd.readouterr().err == ""


def test_node_providers_counts_what_ran():
    feeds = {"x": np.ones((1, 4), np.float32)}
    assert node_providers(dense()[0], feeds, threads=1) == {"cpu": {"MatMul": 1, "Relu": 1}}


def test_node_providers_leaves_no_profile_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    node_providers(dense()[0], {"x": np.ones((1, 4), np.float32)})
    assert list(tmp_path.iterdir()) == []


# --- made-up inputs ---------------------------------------------------------------------------------------------------


def two_inputs():
    nodes = [
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "m"], ["y"]),
    ]
    inputs = [tensor("x", ["N", "T", 8]), tensor("mask", ["N", "T", 1], TensorProto.INT64)]
    return open_session(graph_bytes(nodes, inputs, [tensor("y", ["N", "T", 8])]))


def test_random_feeds_fit_and_repeat():
    session = two_inputs()
    feeds = random_feeds(session, batch=3, seed=5)
    assert feeds["x"].shape == (3, FREE_DIM, 8)
    assert feeds["x"].dtype == np.float32
    assert abs(float(feeds["x"].std()) - 1) < 0.2
    assert feeds["mask"].dtype == np.int64
    assert set(np.unique(feeds["mask"])) == {0, 1}
    assert run(session, feeds)["y"].shape == (3, FREE_DIM, 8)
    again, other = random_feeds(session, batch=3, seed=5), random_feeds(session, batch=3, seed=6)
    assert all(feeds[name].tobytes() == again[name].tobytes() for name in feeds)
    assert feeds["x"].tobytes() != other["x"].tobytes()


def test_random_feeds_take_sizes_by_axis_name():
    assert random_feeds(two_inputs(), batch=2, free_dims={"T": 5})["mask"].shape == (2, 5, 1)


def test_random_feeds_refuse_strings():
    nodes = [helper.make_node("Identity", ["words"], ["y"])]
    inputs, outputs = [tensor("words", ["N"], TensorProto.STRING)], [tensor("y", ["N"], TensorProto.STRING)]
    with pytest.raises(UsageError, match="'words'"):
        random_feeds(open_session(graph_bytes(nodes, inputs, outputs)))


@pytest.mark.parametrize("name", ["resnet8_cifar10.onnx", "mnist-net_256x2.onnx", "ultraface_slim_320.onnx"])
def test_random_feeds_run_on_real_networks(name):
    session = open_session(real(name), threads=1)
    values = run(session, random_feeds(session)).values()
    assert all(np.isfinite(value).all() for value in values)


# --- latency ----------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_shuffled_and_repeatable():
    def order(seed):
        calls = []
        variants = {name: lambda name=name: calls.append(name) for name in "abc"}
        times = measure_latency(variants, warmup=2, runs=20, seed=seed)
        assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20, "c": 20}
        return calls[6:]

    calls = order(0)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert calls == order(0) != order(1)


def test_milliseconds_are_milliseconds():
    (values,) = measure_latency({"nap": lambda: time.sleep(0.005)}, warmup=0, runs=3).values()
    assert all(5 <= value < 500 for value in values)


def test_rounds_go_on_for_min_seconds():
    times = measure_latency({"nap": lambda: time.sleep(0.002)}, warmup=0, runs=1, min_seconds=0.05)
    assert len(times["nap"]) > 1
    assert sum(times["nap"]) >= 40


def check_latency(result, *others):
    medians = {name: getattr(result, name) for name in ("merged", "separate", "separate_default")}
    assert set(result.times) == {*medians, *others}
    for name, median in medians.items():
        assert 0 < min(result.times[name]) <= median <= max(result.times[name])
    assert result.speedup == result.separate / result.merged
    low, high = result.speedup_range
    assert 0 < low <= high


def test_latency_of_merged_and_originals():
    a, b = dense(seed=1)[0], dense(seed=2)[0]
    feeds = {"x": np.ones((1, 4), np.float32)}
    check_latency(latency(a, [a, b], feeds, [feeds, feeds], threads=1, runs=5, min_seconds=0))
    both = latency(a, [a, b], feeds, [feeds, feeds], unshared=(b, feeds), threads=1, runs=5, min_seconds=0)
    check_latency(both, "unshared")
    assert len(both.times["unshared"]) == len(both.times["merged"])


def test_inputs_that_do_not_fit_are_told_before_anything_is_timed():
    model, wrong = dense()[0], {"x": np.ones((1, 5), np.float32)}
    with pytest.raises(UsageError, match="invalid dimensions") as error:
        latency(model, [model], wrong, [wrong], threads=1, runs=5, min_seconds=0)
    one_line(error)


def test_latency_of_real_networks():
    models = [real("resnet8_cifar10.onnx"), real("resnet8_cifar100.onnx")]
    feeds = random_feeds(open_session(models[0]))
    check_latency(latency(models[0], models, feeds, [feeds, feeds], threads=1, runs=5, min_seconds=0))


def test_a_speedup_that_wavers_or_comes_from_waking_threads_is_not_reliable():
    figures = {"merged": 1.0, "separate_default": 2.0, "times": {}}
    assert Latency(separate=2.0, speedup_range=(1.9, 2.1), **figures).reliable
    assert not Latency(separate=2.0, speedup_range=(1.1, 2.1), **figures).reliable
    assert not Latency(separate=8.0, speedup_range=(7.9, 8.1), **figures).reliable


@pytest.mark.parametrize(("originals", "sets", "runs"), [(0, 0, 5), (2, 1, 5), (1, 1, 4)])
def test_latency_needs_originals_inputs_and_runs(originals, sets, runs):
    model, feeds = dense()[0], {"x": np.ones((1, 4), np.float32)}
    with pytest.raises(UsageError):
        latency(model, [model] * originals, feeds, [feeds] * sets, runs=runs, min_seconds=0)


# --- memory -----------------------------------------------------------------------------------------------------------


def heavy(path, seed):
    """A file with one 50 MB matrix and its inputs; noise, so that no page is shared or compressed away."""
    path.write_bytes(dense(5000, 2500, seed)[0])
    return path, {"x": np.ones((1, 5000), np.float32)}


@linux
def test_memory_counts_the_weights_of_every_model(tmp_path):
    (first, feeds), (second, _) = heavy(tmp_path / "a.onnx", 0), heavy(tmp_path / "b.onnx", 1)
    one = measure_memory([first], [feeds], threads=1)
    two = measure_memory([first, second], [feeds, feeds], threads=1)
    assert 50 <= one.unique_mb < 100
    assert 100 <= two.unique_mb < 200
    assert one.peak_mb >= one.unique_mb - 1
    assert two.peak_mb >= two.unique_mb - 1


@linux
def test_memory_is_that_of_the_model_not_of_the_runtime(tmp_path):
    path = tmp_path / "small.onnx"
    path.write_bytes(dense()[0])
    assert abs(measure_memory([path], [{"x": np.ones((1, 4), np.float32)}], threads=1).unique_mb) < 2


@linux
def test_memory_of_real_networks_adds_up():
    models = [real("candy_nc8_256.onnx"), real("udnie_nc8_256.onnx")]
    feeds = random_feeds(open_session(models[0]))
    one = measure_memory(models[:1], [feeds], threads=1).unique_mb
    two = measure_memory(models, [feeds, feeds], threads=1).unique_mb
    assert 1.7 * one < two < 2.3 * one


@linux
def test_memory_takes_inputs_of_any_name(tmp_path):
    """`file` is also the name of a numpy.savez parameter, and slashes are common in exported names."""
    nodes = [helper.make_node("Add", ["file", "a/b:0"], ["y"])]
    path = tmp_path / "names.onnx"
    path.write_bytes(graph_bytes(nodes, [tensor("file", [2]), tensor("a/b:0", [2])], [tensor("y", [2])]))
    feeds = {"file": np.ones(2, np.float32), "a/b:0": np.ones(2, np.float32)}
    assert measure_memory([path], [feeds]).unique_mb < 5


@linux
def test_errors_of_the_measuring_process_come_back(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.onnx: no such file"):
        measure_memory([tmp_path / "nothing.onnx"], [{}])
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"bad\.onnx: onnxruntime refuses it"):
        measure_memory([bad], [{}])
    with pytest.raises(UsageError, match="one for each"):
        measure_memory([bad], [])


@linux
def test_a_measuring_process_that_dies_is_an_error(tmp_path, monkeypatch):
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\nkill -9 $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    with pytest.raises(ModelError, match=r"big\.onnx: .* out of memory"):
        measure_memory(["big.onnx"], [{}])


def test_memory_is_none_where_it_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_module, "_SMAPS", tmp_path / "absent")
    assert measure_memory(["any.onnx"], [{}]) is None


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu
def test_cuda_computes_the_same():
    path = real("resnet20_cifar10.onnx")
    session = open_session(path, providers=["cuda"])
    feeds = random_feeds(session, batch=4)
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    expected = run(open_session(path), feeds)["output"]
    np.testing.assert_allclose(run(session, feeds)["output"], expected, rtol=1e-3, atol=1e-3)
    prepare_run(session, feeds)()
    assert node_providers(path, feeds, providers=["cuda"])["cuda"]["Conv"] > 0


@pytest.mark.gpu
@gpu
def test_cuda_latency():
    models = [real("resnet8_cifar10.onnx"), real("resnet8_cifar100.onnx")]
    feeds = random_feeds(open_session(models[0]))
    found = latency(models[0], models, feeds, [feeds, feeds], providers=["cuda"], runs=20, min_seconds=0)
    check_latency(found)
    assert found.cuda_graphs
    assert (measure_memory(models, [feeds, feeds], providers=["cuda"]).device_mb or 0) > 0
