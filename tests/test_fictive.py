"""Fictive neurons: networks of unequal widths in weights mode, judged by onnxruntime."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, assert_same_outputs, chain, dense, execute, feeds_for, relative_error, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact_passes import NETS
from test_law import random_nets
from test_weights_mode import channels_last, depthwise, error, flattening, permuted, tasks_of

import onnxmerge
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, is_float
from onnxmerge.methods.extract import extract_task
from onnxmerge.methods.zip.alignment import find_sharable
from onnxmerge.methods.zip.choices import Mode, Rule
from onnxmerge.methods.zip.fictive import find_sharable_of_any_width, sized_for, with_fictive
from onnxmerge.methods.zip.settings import ZipSettings
from onnxmerge.methods.zip.weights.plan import predicted_bytes
from onnxmerge.methods.zip.weights.settings import WeightSharing
from onnxmerge.methods.zip.weights.share import share_weights
from onnxmerge.methods.zip.zip import plan_zip
from onnxmerge.passes.add_fictive import AddFictive
from onnxmerge.passes.pad_inputs import AddFictiveInputs, Padding, PadInputs


def curved(seed: int = 0) -> Net:
    """Nonlinearities that make something of zero, norms and slopes of each channel."""
    net = Net(seed)
    x = net.op("Sigmoid", net.norm(net.conv(net.input(["N", 3, 8, 8]), 6)))
    x = net.op("Exp", net.norm(net.conv(x, 8), "InstanceNormalization"))
    x = net.op("PRelu", net.conv(x, 5), net.normal(5, 1, 1))
    x = net.op("Softplus", net.gemm(net.flatten(x, 5 * 64), 7))
    net.output(net.op("Softmax", net.gemm(x, 4), axis=-1))
    return net


BUILDS = [dense, chain, residual, depthwise, flattening, channels_last, curved]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BUILDS), st.lists(st.integers(0, 19), min_size=6, max_size=6), st.integers(0, 9))
def test_fictive_neurons_change_nothing(build, more, seed):
    model = build(seed=seed).model()
    spaces = [space for space in find_spaces(model).permutable() if not space.blocks]
    widths = {space.name: space.size + extra for space, extra in zip(spaces, more, strict=False)}
    padded = AddFictive(widths)(model).model
    assert_same_outputs(model, padded, feeds_for(model), tolerance=1e-4)
    sizes = {space.name: space.size for space in find_spaces(padded).permutable()}
    assert {name: sizes[name] for name in widths} == widths
    for ours, theirs in zip(find_layers(model), find_layers(padded), strict=True):
        assert np.count_nonzero(get_array(theirs.weight)) == np.count_nonzero(get_array(ours.weight))


@pytest.mark.parametrize("name", NETS)
def test_fictive_neurons_in_networks_of_all_kinds(name):
    model = NETS[name]().model()
    spaces = [space for space in find_spaces(model).permutable() if not space.blocks]
    widths = {space.name: 2 * space.size for space in spaces}
    if name == "grouped":  # there are no fictive groups
        with pytest.raises(ModelError, match="groups"):
            AddFictive(widths)(model)
        return
    padded = AddFictive(widths)(model).model
    assert_same_outputs(model, padded, feeds_for(model), tolerance=1e-4)
    assert {space.name: space.size for space in find_spaces(padded).permutable()}.items() >= widths.items()


@pytest.mark.slow
def test_fictive_neurons_in_random_graphs():
    """One space gets more channels. What cannot be done is refused, and much can."""
    done = []

    @settings(max_examples=60, deadline=None)
    @given(random_nets(), st.integers(1, 9))
    def holds(net, more):
        model = net.model()
        spaces = [space for space in find_spaces(model).permutable() if not space.blocks]
        try:
            padded = AddFictive({space.name: space.size + more for space in spaces[-1:]})(model).model
        except ModelError:
            return
        assert_same_outputs(model, padded, feeds_for(model), tolerance=1e-4)
        done.append(net)

    holds()
    assert len(done) >= 8, len(done)


def test_a_channel_of_zeros_that_may_become_infinite_is_refused():
    net = Net()
    x = net.op("Log", net.op("Abs", net.gemm(net.input(["N", 5]), 6)))
    net.output(net.gemm(x, 3))
    model = net.model()
    (space,) = find_spaces(model).permutable()
    with pytest.raises(ModelError, match="Log"):
        AddFictive({space.name: 8})(model)


# --- merging ----------------------------------------------------------------------------------------------------------


def wider(model: oir.Model, seed: int) -> oir.Model:
    """The same function with a few fictive neurons, in another order."""
    random = np.random.default_rng(seed)
    spaces = [space for space in find_spaces(model).permutable() if not space.blocks]
    return permuted(AddFictive({s.name: s.size + int(random.integers(0, 5)) for s in spaces})(model).model, seed)


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("build", [dense, chain, residual, depthwise, flattening, channels_last])
def test_a_network_and_a_wider_one_of_the_same_function_share_everything_for_free(build, rule, tmp_path):
    model = build().model()
    tasks = tasks_of([wider(model, 1), model, wider(model, 2)], tmp_path)
    assert not find_sharable(tasks).cuts or len(find_sharable(tasks).cuts) < 3
    sharable = find_sharable_of_any_width(tasks)
    assert sharable.fictive and len(sharable.cuts) == len(find_sharable([tasks[0]] * 2).cuts)
    for k in range(1, len(sharable.cuts) + 1):
        wide, common = sized_for(tasks, sharable, k)
        merged = share_weights(common, {}, wide, k, WeightSharing(rule=rule, samples=300, threads=1)).model
        assert max(error(merged, task) for task in tasks) < 2e-3
        floats = [get_array(value) for value in merged.graph.initializers.values() if is_float(value)]
        assert sum(array.nbytes for array in floats) <= predicted_bytes(wide, common, k)


def test_what_a_task_keeps_for_itself_stays_as_small_as_it_was(tmp_path):
    models = [dense(sizes=sizes).model() for sizes in ((6, 12, 30, 4), (6, 9, 8, 4))]
    tasks = tasks_of(models, tmp_path)
    wide, _ = sized_for(tasks, find_sharable_of_any_width(tasks), 1)
    assert [dims(find_layers(task.model)[0].weight) for task in wide] == [(12, 6), (12, 6)]
    assert dims(find_layers(wide[1].model)[2].weight) == dims(find_layers(tasks[1].model)[2].weight)


def test_networks_that_cannot_get_more_neurons_are_left_alone(tmp_path):
    def build(width: int) -> oir.Model:
        net = Net(width)
        x = net.matmul(net.relu(net.matmul(net.input(["N", 5, 6]), 7)), width)
        normed = net.op("LayerNormalization", x, net.uniform(width), net.normal(width), axis=-1, channels=width)
        net.output(net.matmul(net.relu(normed), 3))
        return net.model()

    tasks = tasks_of([build(8), build(9)], tmp_path)
    assert all(one is other for one, other in zip(with_fictive(tasks), tasks, strict=True))
    sharable = find_sharable_of_any_width(tasks)
    assert len(sharable.cuts) == 1 and not sharable.fictive and "has shape" in sharable.limit


def test_a_whole_run_of_unequal_networks(tmp_path):
    """Every candidate goes on from the last, which has fewer fictive neurons; a task comes back out."""
    builds = {"a": residual(0, width=6), "b": residual(1, width=9)}
    random = np.random.default_rng(0)
    data = {}
    for name, net in builds.items():
        save(net.model(), tmp_path / f"{name}.onnx")
        x = random.standard_normal((300, 3, 10, 10)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x)
        data[name] = tmp_path / f"{name}.npz"
    quick = ZipSettings(mode=Mode.WEIGHTS, samples=200, steps=3, retrain=2, measure=False, threads=1)
    result = onnxmerge.zip_models([tmp_path / "a.onnx", tmp_path / "b.onnx"], data, tmp_path / "out", settings=quick)
    assert [candidate.name for candidate in result.candidates] == ["k00", "k01", "k02", "k03"]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    originals = sum(sum(get_array(v).size for v in net.model().graph.initializers.values()) for net in builds.values())
    assert plan["originals"]["parameters"] <= originals
    for candidate, planned in zip(result.candidates, plan["candidates"], strict=True):
        assert candidate.parameters == planned["predicted"]["parameters"]
    sizes = [candidate.parameters for candidate in result.candidates]
    assert sizes[3] < sizes[0] == plan["originals"]["parameters"]
    errors = [max(score.relative_error or 0 for score in c.tasks.values()) for c in result.candidates]
    assert errors[0] < 1e-5 and errors[-1] < 1.0
    merged = load(str(result.candidates[-1].path))
    feeds = {"x": random.standard_normal((8, 3, 10, 10)).astype(np.float32)}
    wanted = execute(merged, feeds)
    extract_task(Path(str(result.candidates[-1].path)), "b", tmp_path / "alone.onnx")
    for name, array in execute(load(tmp_path / "alone.onnx"), feeds).items():
        assert relative_error(wanted[f"b/{name}"], array) < 1e-3


# --- inputs -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BUILDS), st.integers(1, 9), st.integers(0, 9))
def test_fictive_inputs_change_nothing(build, zeros, seed):
    model = build(seed=seed).model()
    padding = Padding(1, zeros)
    wide = AddFictiveInputs("x", padding)(model).model
    assert dims(wide.graph.inputs[0])[1] == dims(model.graph.inputs[0])[1] + zeros
    feeds = feeds_for(model)
    for name, wanted in execute(model, feeds).items():
        noise = padding.pad(feeds["x"])
        noise[:, -zeros:] = 7  # whatever they hold
        assert relative_error(wanted, execute(wide, {"x": padding.pad(feeds["x"])})[name]) < 1e-4
        assert relative_error(wanted, execute(wide, {"x": noise})[name]) < 1e-4
    own = PadInputs({"x": padding})(wide.clone()).model
    assert_same_outputs(model, own, feeds, tolerance=1e-4)
    assert dims(own.graph.inputs[0]) == dims(model.graph.inputs[0])


def gray(seed: int) -> Net:
    net = Net(seed)
    x = net.relu(net.norm(net.conv(net.input(["N", 1, 10, 10], "gray"), 7)))
    for out in (9, 8):
        x = net.relu(net.norm(net.conv(x, out)))
    net.head(x, 4)
    return net


def tabular(seed: int) -> Net:
    net = Net(seed)
    x = net.relu(net.gemm(net.input(["N", 9], "row"), 12))
    net.output(net.gemm(net.relu(net.gemm(x, 11)), 3))
    return net


@pytest.mark.parametrize(("ours", "theirs"), [(chain, gray), (gray, chain), (dense, tabular)])
def test_a_whole_run_of_networks_with_other_inputs(ours, theirs, tmp_path):
    """Each task keeps its own input in the merged model, and comes back out with it."""
    random = np.random.default_rng(0)
    models, data, feeds = {"a": ours(0).model(), "b": theirs(1).model()}, {}, {}
    for name, model in models.items():
        save(model, tmp_path / f"{name}.onnx")
        (source,) = model.graph.inputs
        x = random.standard_normal((300, *(size or 1 for size in dims(source)[1:]))).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", **{str(source.name): x})
        data[name], feeds[name] = tmp_path / f"{name}.npz", {str(source.name): x[:8]}
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    quick = ZipSettings(mode=Mode.WEIGHTS, samples=200, steps=3, retrain=2, measure=False, threads=1)
    result = onnxmerge.zip_models(paths, data, tmp_path / "out", settings=quick)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())["candidates"]
    assert len(plan) > 2
    for candidate, planned in zip(result.candidates, plan, strict=True):
        assert candidate.parameters == planned["predicted"]["parameters"]
        merged = load(str(candidate.path))
        both = {f"{task}/{name}": x for task, own in feeds.items() for name, x in own.items()}
        assert {value.name: dims(value)[1:] for value in merged.graph.inputs} == {
            name: array.shape[1:] for name, array in both.items()
        }
        together = execute(merged, both)
        for task, own in feeds.items():
            alone = tmp_path / f"{candidate.name}-{task}.onnx"
            extract_task(Path(str(candidate.path)), task, alone)
            original = execute(models[task], own)
            for name, array in execute(load(alone), own).items():
                assert relative_error(together[f"{task}/{name}"], array) < 1e-3
                assert candidate.share or relative_error(original[name], array) < 1e-4
    errors = [max(score.relative_error or 0 for score in c.tasks.values()) for c in result.candidates]
    assert errors[0] < 1e-5 < errors[1] and errors[-1] < 1.2
    against = dict(zip("ab", paths, strict=True))
    scored, _ = onnxmerge.validate_model(tmp_path / "out" / "k01.onnx", against, data, threads=1)
    for task, score in scored.candidates[0].tasks.items():
        assert score.relative_error == pytest.approx(result.candidates[1].tasks[task].relative_error, rel=1e-3)


def test_inputs_that_zeros_cannot_make_equal_are_refused(tmp_path):
    def image(size: int) -> oir.Model:
        net = Net()
        net.head(net.relu(net.conv(net.input(["N", 3, size, size]), 4)))
        return net.model()

    for name, model in {"a": image(8), "b": image(9), "c": dense().model()}.items():
        save(model, tmp_path / f"{name}.onnx")
    for other, reason in (("b", "differ in more than one number of channels"), ("c", "must read the same inputs")):
        with pytest.raises(UsageError, match=reason):
            plan_zip([tmp_path / "a.onnx", tmp_path / f"{other}.onnx"], mode=Mode.WEIGHTS)
    with pytest.raises(UsageError, match="must read the same inputs"):
        plan_zip([tmp_path / "a.onnx", tmp_path / "b.onnx"])
