"""Stacking the tasks' streams: one graph whose outputs are the originals', each shared weight held and used once."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime
import pytest
from graphs import Net, chain, dense, execute, feeds_for, relative_error, residual
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.reach import remove_unneeded
from onnxmerge.ir.save import save
from onnxmerge.ir.weights import get_array, is_float, set_array
from onnxmerge.passes.ensure_biases import EnsureBiases
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm
from onnxmerge.passes.stack_tasks import StackTasks, read_streams
from onnxmerge.passes.take_stream import TakeStream
from onnxmerge.passes.weight_parts import Part, cut_up, put_together
from onnxmerge.runtime.memory import measure_memory

TASKS = ("a", "b", "c")


def networks(build, count: int = 2, share: tuple[str, ...] = ("Conv", "Gemm", "MatMul"), **given) -> dict:
    """Networks of one graph. Their layers' weights are equal where the operator is in `share`; all else differs."""
    made = {task: build(seed=number, **given).model() for number, task in enumerate(TASKS[:count])}
    for model in made.values():
        FoldBatchNorm()(model)
        EnsureBiases()(model)
    first = made["a"]
    for model in list(made.values())[1:]:
        for ours, theirs in zip(find_layers(first), find_layers(model), strict=True):
            if ours.op in share:
                set_array(theirs.weight, get_array(ours.weight))
    return made


def passes_through(models: Mapping[str, oir.Model]) -> dict[str, oir.Model]:
    """Tails that hand on what arrives."""
    ends = {task: [value.name or "" for value in model.graph.outputs] for task, model in models.items()}
    return {task: cut_out(model, ends[task], ends[task]) for task, model in models.items()}


def stack(models: Mapping[str, oir.Model], parts: Mapping[str, Part] | None = None) -> oir.Model:
    """The whole networks as stems."""
    (first, stem), *others = models.items()
    return StackTasks(first, dict(others), passes_through(models), parts)(stem).model


def assert_gives_the_originals(merged: oir.Model, models: Mapping[str, oir.Model], batch: int = 3) -> None:
    feeds = feeds_for(next(iter(models.values())), batch)
    outputs = list(execute(merged, feeds).values())
    wanted = [array for model in models.values() for array in execute(model, feeds).values()]
    assert len(outputs) == len(wanted)
    for ours, theirs in zip(outputs, wanted, strict=True):
        assert relative_error(theirs, ours) < 1e-5


def ops(model: oir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# --- whole layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("build", [dense, chain, residual])
@pytest.mark.parametrize("share", [(), ("Conv", "Gemm", "MatMul")])
def test_outputs_are_those_of_the_originals(build, count, share):
    models = networks(build, count, share)
    merged = stack(models)
    for batch in (1, 3):
        assert_gives_the_originals(merged, models, batch)
    assert ("Concat" in ops(merged)) == bool(share)


def test_each_shared_weight_is_held_and_used_once():
    models = networks(residual)
    merged = stack(models)
    layers = find_layers(models["a"])
    for layer in layers:
        (use,) = merged.graph.initializers[f"shared/{layer.name}"].uses()
        assert use.node.op_type == layer.op
    biases = sum(layer.out_channels for layer in layers)
    assert parameter_count(merged) == parameter_count(models["a"]) + biases


def test_what_comes_before_the_first_difference_is_computed_once():
    models = networks(chain)
    first = [find_layers(model)[0] for model in models.values()]
    set_array(first[1].bias, get_array(first[0].bias))
    found = ops(stack(models))
    assert found[:2] == ["Conv", "Relu"]  # without a Concat, since both networks see the same
    assert found.count("Conv") == len(find_layers(models["a"])) - 1
    assert found.count("Concat") == found.count("Conv") + 1 - 2  # nothing to stack for the first two convolutions


def test_equal_networks_are_one():
    models = networks(residual)
    for ours, theirs in zip(find_layers(models["a"]), find_layers(models["b"]), strict=True):
        set_array(theirs.bias, get_array(ours.bias))
    merged = stack(models)
    assert "Concat" not in ops(merged) and "Split" not in ops(merged)
    assert parameter_count(merged) == parameter_count(models["a"])
    assert_gives_the_originals(merged, models)


def test_streams_stay_stacked_through_what_does_not_mix_the_batch():
    def build(seed: int) -> Net:
        net = Net(seed)
        x = net.conv(net.input(["N", 3, 12, 12]), 8)
        for _ in range(2):
            branch = net.op("MaxPool", net.relu(x), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
            x = net.op("Add", net.conv(branch, 8), x)
        net.head(net.op("HardSwish", x))
        return net

    models = networks(build)
    for ours, theirs in list(zip(find_layers(models["a"]), find_layers(models["b"]), strict=True))[1:]:
        set_array(theirs.bias, get_array(ours.bias))
    found = ops(merged := stack(models))
    assert found.count("Concat") == 2  # behind the first bias, in the branch and in the skip
    assert found.count("Split") == 1  # at the outputs
    assert found.count("Relu") == found.count("MaxPool") == 3  # for each task only in front of the first Concat
    assert_gives_the_originals(merged, models)


def depthwise(seed: int = 0, width: int = 8) -> Net:
    net = Net(seed)
    x = net.relu(net.conv(net.input(["N", 3, 12, 12]), width))
    for out in (3 * width // 2, width):
        x = net.relu(net.conv(x, net.channels[x], group=net.channels[x]))
        x = net.relu(net.conv(x, out, kernel=1))
    net.head(x)
    return net


def test_depthwise_convolutions_are_the_tasks_own():
    models = networks(depthwise)
    for task, model in models.items():
        for layer in find_layers(model):
            if layer.groups > 1:
                set_array(layer.weight, get_array(layer.weight) * (1 + TASKS.index(task)))
    merged = stack(models)
    assert_gives_the_originals(merged, models)
    assert ops(merged).count("Conv") == 3 + 2 * 2


def attention(seed: int = 0) -> Net:
    """Norm, heads by reshape, products of streams, and a Gather over the batch's own axis left alone."""
    net = Net(seed)
    x = net.matmul(net.input(["N", 6, 8]), 8)
    for _ in range(2):
        normed = net.op("LayerNormalization", x, net.uniform(8), net.normal(8), axis=-1, channels=8)
        q, k, v = (
            net.op("Transpose", net.reshape(net.matmul(normed, 8), 0, 6, 2, 4), perm=[0, 2, 1, 3]) for _ in range(3)
        )
        scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        mixed = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        x = net.op("Add", net.matmul(net.reshape(mixed, 0, 6, 8, channels=8), 8), x, channels=8)
    net.output(net.matmul(x, 3))
    return net


def mixes_the_batch(seed: int = 0) -> Net:
    """A mean over the batch, and an operand that is spread over it."""
    net = Net(seed)
    x = net.gemm(net.input(["N", 6]), 8)
    mean = net.op("ReduceMean", x, net.ints(0), keepdims=1, channels=8)
    x = net.op("Sub", net.gemm(x, 8), net.gemm(mean, 8))
    net.output(net.gemm(net.op("Softmax", x, axis=0), 4))
    return net


@pytest.mark.parametrize("build", [attention, mixes_the_batch])
def test_what_mixes_the_batch_is_not_stacked(build):
    models = networks(build, count=3)
    assert_gives_the_originals(stack(models), models)


def turned(seed: int = 0) -> Net:
    """Rows that become columns, and an array with an entry for each of them."""
    net = Net(seed)
    x = net.gemm(net.input([5, 6]), 8)
    x = net.op("Gemm", x, net.normal(5, 8), net.normal(8), transA=1, channels=8)
    x = net.op("Add", net.gemm(x, 8), net.normal(8, 8))
    net.output(net.gemm(net.relu(x), 4))
    return net


@pytest.mark.parametrize("build", [mixes_the_batch, turned])
def test_what_mixes_the_batch_is_taken_apart(build):
    """All arrays are equal but those of the first layer: what follows would stay stacked if it could."""
    models = networks(build, count=3)
    first = next(iter(models["a"].graph)).outputs[0]
    for name, value in models["a"].graph.initializers.items():
        if not any(node is first.producer() for node, _ in value.uses()):
            for other in models.values():
                set_array(other.graph.initializers[name], get_array(value))
    merged = stack(models)
    feeds = {"x": np.random.default_rng(0).random((5 if build is turned else 3, 6), np.float32)}
    found = iter(execute(merged, feeds).values())
    for model in models.values():
        for wanted in execute(model, feeds).values():
            assert relative_error(wanted, next(found)) < 1e-5


@settings(max_examples=60)
@given(st.data())
def test_any_choice_of_equal_arrays(data):
    build = data.draw(st.sampled_from([dense, chain, residual, depthwise, attention, mixes_the_batch]))
    models = networks(build, data.draw(st.integers(2, 3)), share=())
    first, *others = models.values()
    for name, value in first.graph.initializers.items():
        if is_float(value) and data.draw(st.booleans(), name):
            for other in others:
                set_array(other.graph.initializers[name], get_array(value))
    merged = stack(models)
    assert_gives_the_originals(merged, models)
    once = sum(get_array(v).size for v in first.graph.initializers.values() if is_float(v))
    assert parameter_count(merged) <= len(models) * once


def test_a_network_with_a_subgraph_is_refused():
    net = dense()
    model = net.model()
    body = oir.Graph([], [], nodes=[], name="body")
    node = next(iter(model.graph))
    node.attributes["body"] = oir.AttrGraph("body", body)
    with pytest.raises(ModelError, match="has a sub-graph"):
        stack({"a": model, "b": model.clone()})


# --- partly shared layers ---------------------------------------------------------------------------------------------


def partly(models: Mapping[str, oir.Model], masks: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Part]:
    """Make the connections between shared neurons equal, in place."""
    parts = {name: Part(*mask) for name, mask in masks.items()}
    first = find_layers(models["a"])
    for model in list(models.values())[1:]:
        for ours, theirs in zip(first, find_layers(model), strict=True):
            if ours.name in parts:
                pieces = cut_up(theirs, get_array(theirs.weight), parts[ours.name])
                pieces[""] = cut_up(ours, get_array(ours.weight), parts[ours.name])[""]
                set_array(theirs.weight, put_together(theirs, pieces, parts[ours.name]))
    return parts


@settings(max_examples=25)
@given(st.data())
def test_any_part_of_any_layer(data):
    build = data.draw(st.sampled_from([dense, chain, residual, attention]))
    models = networks(build, data.draw(st.integers(2, 3)), share=())
    masks, common = {}, 0
    for layer in find_layers(models["a"]):
        axis = 1 if layer.op == "Conv" or layer.transposed else 0
        sizes = layer.weight_shape[axis], layer.weight_shape[1 - axis]
        mask = [np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes]
        if data.draw(st.booleans()) and all(own.any() for own in mask) and not all(own.all() for own in mask):
            masks[layer.name] = tuple(mask)
            common += mask[0].sum() * mask[1].sum() * int(np.prod(layer.weight_shape[2:]))
    parts = partly(models, masks)
    merged = stack(models, parts)
    assert_gives_the_originals(merged, models)
    same = sum(get_array(v).size for name, v in models["a"].graph.initializers.items() if _equal(models, name))
    saved = (len(models) - 1) * (common + same)
    assert parameter_count(merged) == sum(map(parameter_count, models.values())) - saved
    restored = {task: model.clone() for task, model in models.items()}
    for model in restored.values():
        for value in model.graph.initializers.values():
            if is_float(value):
                set_array(value, np.zeros_like(get_array(value)))
    read_streams(merged, restored, parts)
    for task, model in models.items():
        for name, value in model.graph.initializers.items():
            np.testing.assert_array_equal(get_array(restored[task].graph.initializers[name]), get_array(value))


def _equal(models: Mapping[str, oir.Model], name: str) -> bool:
    first, *others = (model.graph.initializers[name] for model in models.values())
    return is_float(first) and all(np.array_equal(get_array(first), get_array(other)) for other in others)


# --- one task back out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["a", "b"])
def test_one_task_taken_out_computes_nothing_of_the_other(task):
    models = networks(residual)
    merged = stack(models)
    wanted = execute(models[task], feeds := feeds_for(models[task], 3))
    TakeStream(task)(merged)
    own = [value for value in merged.graph.outputs if value.name.startswith(f"{task}/")]
    merged.graph.outputs.clear()
    merged.graph.outputs.extend(own)
    remove_unneeded(merged)
    for ours, theirs in zip(execute(merged, feeds).values(), wanted.values(), strict=True):
        assert relative_error(theirs, ours) < 1e-5
    assert parameter_count(merged) == parameter_count(models[task])
    assert ops(merged).count("Conv") == ops(models[task]).count("Conv")
    assert not {"Concat", "Split"} & set(ops(merged))


# --- what onnxruntime makes of it -------------------------------------------------------------------------------------


def stored_floats(proto: onnx.ModelProto) -> int:
    """Bytes of a model's floating-point initializers."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in proto.graph.initializer if t.data_type in kinds)


def optimised(model: oir.Model, level: str, file: Path) -> onnx.ModelProto:
    """What onnxruntime makes of a model on loading it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(file)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(oir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(file)


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("build, width", [(dense, {}), (residual, {"width": 32}), (depthwise, {"width": 32})])
def test_onnxruntime_copies_no_shared_weight(build, width, level, tmp_path: Path):
    """Widths are multiples of what its own layout of convolutions pads channels to."""
    models = networks(build, **width)
    merged = stack(models)
    loaded = stored_floats(optimised(merged, level, tmp_path / "merged.onnx"))
    separate = sum(stored_floats(optimised(model, level, tmp_path / "one.onnx")) for model in models.values())
    assert loaded <= 1.02 * stored_floats(oir.to_proto(merged))
    assert loaded < 0.7 * separate


def test_the_count_of_bytes_sees_a_copy(tmp_path: Path):
    """A weight that is transposed at run time is stored once, and twice after loading."""
    net = Net()
    x = net.input(["N", 6])
    weight = net.normal(6, 6)
    net.output(net.op("MatMul", net.op("MatMul", x, weight), net.op("Transpose", weight, perm=[1, 0])))
    proto = net.proto()
    model = oir.from_proto(proto)
    assert stored_floats(optimised(model, "ORT_ENABLE_ALL", tmp_path / "o.onnx")) == 2 * stored_floats(proto)


@pytest.mark.slow
def test_memory_of_a_fresh_process_is_that_of_one_network(tmp_path: Path):
    """Two layers of 2048 x 2048, of two networks: 33.6 MB each."""
    models = networks(dense, sizes=(16, 2048, 2048, 2048, 4))
    paths = {name: tmp_path / f"{name}.onnx" for name in ("a", "b", "merged")}
    for task, model in models.items():
        save(model, paths[task])
    save(stack(models), paths["merged"])
    feeds = feeds_for(models["a"], 1)
    together = measure_memory([paths["merged"]], [feeds], threads=1)
    separate = measure_memory([paths["a"], paths["b"]], [feeds, feeds], threads=1)
    if together is None or separate is None:
        pytest.skip("memory is measured on Linux only")
    print(f"merged {together.unique_mb:.1f} MB, separate {separate.unique_mb:.1f} MB")
    assert together.unique_mb < 0.6 * separate.unique_mb
