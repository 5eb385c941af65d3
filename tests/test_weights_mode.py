"""zip in weights mode, judged by onnxruntime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, chain, dense, execute, relative_error, residual

import onnxmerge
from onnxmerge.errors import UsageError
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.weights import get_array, is_float, set_array
from onnxmerge.methods.extract import extract_task
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task, load_networks, task_outputs, with_data
from onnxmerge.methods.zip.alignment import Sharable, align, find_sharable
from onnxmerge.methods.zip.choices import Pairing, Rule
from onnxmerge.methods.zip.weights.plan import Share, find_extent, predicted_bytes
from onnxmerge.methods.zip.weights.settings import WeightSharing
from onnxmerge.methods.zip.weights.share import Merged, share_weights
from onnxmerge.passes.permute import Permute
from onnxmerge.passes.refit import weights_and_bias
from onnxmerge.passes.shared_weights import differences, energies
from onnxmerge.runtime.statistics import Regression

DEMO = Path(onnxmerge.__file__).parent / "demo"


def depthwise(seed: int = 0) -> Net:
    """Pointwise and depthwise convolutions in turn."""
    net = Net(seed)
    x = net.relu(net.conv(net.input(["N", 3, 10, 10]), 8))
    for out in (12, 8):
        x = net.relu(net.conv(x, net.channels[x], group=net.channels[x]))
        x = net.relu(net.conv(x, out, kernel=1))
    net.head(x)
    return net


def flattening(seed: int = 0, last: bool = False) -> Net:
    """Dense layers that read each channel at several places, side by side or, with channels last, far apart."""
    net = Net(seed)
    x = net.relu(net.conv(net.input(["N", 3, 6, 6]), 6, strides=[2, 2]))
    x = net.op("Transpose", x, perm=[0, 2, 3, 1]) if last else x
    x = net.relu(net.gemm(net.flatten(x, 54), 8))
    net.output(net.gemm(net.relu(net.gemm(x, 7, transposed=False)), 4))
    return net


def channels_last(seed: int = 0) -> Net:
    return flattening(seed, last=True)


def tokens(seed: int = 0) -> Net:
    """Dense layers over tokens, with a norm and a skip."""
    net = Net(seed)
    x = net.matmul(net.input(["N", 5, 6]), 8)
    for _ in range(2):
        normed = net.op("LayerNormalization", x, net.uniform(8), net.normal(8), axis=-1, channels=8)
        x = net.op("Add", net.matmul(net.relu(net.matmul(normed, 12)), 8), x, channels=8)
    net.output(net.matmul(net.relu(x), 3))
    return net


def permuted(model: oir.Model, seed: int) -> oir.Model:
    """The same function with every channel space in another order."""
    random = np.random.default_rng(seed)
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    return Permute({name: random.permutation(space.size) for name, space in spaces.items()}, spaces)(model).model


def tasks_of(models: Sequence[oir.Model], folder: Path, samples: int = 300) -> list[Task]:
    """Each network with samples of its own: the further on, the larger and the further from zero."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.onnx" for name in "abc"[: len(models)]]
    for model, path in zip(models, paths, strict=True):
        save(model, path)
    networks = load_networks(paths)
    for number, network in enumerate(networks):
        shape = [size if isinstance(size, int) else samples for size in network.model.graph.inputs[0].shape]
        x = (1 + number) * np.random.default_rng(number).standard_normal(shape) + number
        np.savez(folder / f"{network.name}.npz", x=x.astype(np.float32))
    return with_data(networks, {network.name: folder / f"{network.name}.npz" for network in networks}, seed=0)


def merge(tasks: Sequence[Task], share: Share | None = None, **given: object) -> tuple[oir.Model, Sharable, Share]:
    """Merge with a plan, or share all there is."""
    sharable = find_sharable(tasks)
    share = len(sharable.cuts) if share is None else share
    options = {"samples": 300, "threads": 1} | given
    aligned = {}
    if options.get("pairing") == Pairing.CORRELATION:
        aligned = {task.name: align(sharable, task, tasks, samples=300, seed=0, threads=1) for task in tasks[1:]}
    merged = share_weights(sharable, aligned, tasks, share, WeightSharing(**options)).model  # type: ignore[arg-type]
    return merged, sharable, share


def samples_of(task: Task, count: int = 64) -> np.ndarray:
    return next(task.data.held_out.batches(count)).inputs["x"]


def error(merged: oir.Model, task: Task) -> float:
    """How far the task's outputs are from its original's on its own held-out samples."""
    feeds = {"x": samples_of(task)}
    found = execute(merged, feeds)
    wanted = execute(task.model, feeds)
    return max(relative_error(array, found[f"{task.name}/{name}"]) for name, array in wanted.items())


BUILDS = [dense, chain, residual, depthwise, flattening, channels_last, tokens]


@pytest.mark.parametrize("build", BUILDS)
def test_sharing_nothing_changes_nothing(build, tmp_path):
    tasks = tasks_of([build(seed=seed).model() for seed in range(2)], tmp_path)
    merged, sharable, _ = merge(tasks, 0)
    assert max(error(merged, task) for task in tasks) < 1e-5
    assert parameter_count(merged) == sum(parameter_count(task.model) for task in tasks)
    zeros, *_ = merge(tasks, {space.name: 0 for space in sharable.spaces})
    assert max(error(zeros, task) for task in tasks) < 1e-5


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("pairing", list(Pairing))
@pytest.mark.parametrize("build", BUILDS)
def test_permuted_copies_share_everything_for_free(build, pairing, rule, tmp_path):
    model = build().model()
    tasks = tasks_of([model, permuted(model.clone(), 1), permuted(model.clone(), 2)], tmp_path)
    merged, sharable, share = merge(tasks, rule=rule, pairing=pairing)
    assert max(error(merged, task) for task in tasks) < 1e-3
    extent = find_extent(sharable, share)
    names = {value.name for value in merged.graph.initializers.values()}
    assert extent.parts and all(f"shared/{name}" in names for name in extent.parts)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("who", [0, 1])
def test_permuting_a_network_first_changes_nothing(build, who, tmp_path):
    """The law: how a network's channels are ordered says nothing."""
    models = [build(seed=seed).model() for seed in range(2)]
    plain, *_ = merge(tasks_of(models, tmp_path / "plain"))
    models[who] = permuted(models[who].clone(), 5)
    tasks = tasks_of(models, tmp_path / "permuted")
    moved, *_ = merge(tasks)
    for task in tasks:
        feeds = {"x": samples_of(task)}
        ours, theirs = execute(plain, feeds), execute(moved, feeds)
        assert max(relative_error(ours[name], theirs[name]) for name in ours) < 1e-2
        assert error(moved, task) > 1e-2  # the networks do differ


@pytest.mark.parametrize("build", BUILDS)
def test_predicted_bytes_are_those_of_the_merged_model(build, tmp_path):
    tasks = tasks_of([build(seed=seed).model() for seed in range(3)], tmp_path)
    sharable = find_sharable(tasks)
    random = np.random.default_rng(0)
    plans: list[Share] = list(range(len(sharable.cuts) + 1))
    plans += [{space.name: int(random.integers(space.size + 1)) for space in sharable.spaces} for _ in range(2)]
    for share in plans:
        merged, *_ = merge(tasks, share, rule=Rule.MTZ)
        floats = [get_array(value) for value in merged.graph.initializers.values() if is_float(value)]
        assert sum(array.nbytes for array in floats) == predicted_bytes(tasks, sharable, share)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rule", list(Rule))
def test_the_fewer_neurons_are_shared_the_better(build, rule, tmp_path):
    tasks = tasks_of([build(seed=seed).model() for seed in range(2)], tmp_path)
    sharable = find_sharable(tasks)
    errors = []
    for share in (0.2, 1.0):
        counts = {space.name: round(share * space.size) for space in sharable.spaces}
        merged, *_ = merge(tasks, counts, rule=rule)
        errors.append(sum(error(merged, task) for task in tasks))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("pairing", [Pairing.GREEDY, Pairing.ASSIGNMENT])
@pytest.mark.parametrize("rule", list(Rule))
def test_the_neurons_that_are_alike_are_shared(rule, pairing, tmp_path):
    """The second network has half of the first one's neurons, and others of its own: sharing half costs nothing."""
    models = [dense(seed=seed).model() for seed in range(2)]
    ours, theirs = (find_layers(model)[0] for model in models)
    alike = np.random.default_rng(0).permutation(12)[:6]
    array = np.array(get_array(theirs.weight))
    array[alike[::-1]] = get_array(ours.weight)[alike]
    set_array(theirs.weight, array)
    tasks = tasks_of(models, tmp_path)
    name = find_sharable(tasks).spaces[0].name
    merged, *_ = merge(tasks, {name: 6}, rule=rule, pairing=pairing)
    assert max(error(merged, task) for task in tasks) < 1e-4
    merged, *_ = merge(tasks, {name: 7}, rule=rule, pairing=pairing)
    assert max(error(merged, task) for task in tasks) > 1e-2


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("build", [dense, residual])
def test_a_task_that_counts_alone_keeps_its_weights(build, rule, tmp_path):
    """MTZ's alpha near 1: what is shared is the first network's, and near 0 the second's."""
    tasks = tasks_of([build(seed=seed).model() for seed in range(2)], tmp_path)
    found = [
        [error(merge(tasks, rule=rule, weights=weights)[0], task) for task in tasks]
        for weights in ((1.0, 1e-7), (1.0, 1.0), (1e-7, 1.0))
    ]
    assert max(found[0][0], found[2][1]) < 1e-2
    assert found[0][0] < found[1][0] < found[2][0] and found[2][1] < found[1][1] < found[0][1]
    merged, sharable, share = merge(tasks, rule=rule, weights=(1.0, 1e-7))
    for name in find_extent(sharable, share).parts:
        ours = get_array(tasks[0].model.graph.initializers[name])
        assert relative_error(ours, get_array(merged.graph.initializers[f"shared/{name}"])) < 1e-2


def test_least_squares_repairs_what_the_published_rule_leaves(tmp_path):
    tasks = tasks_of([residual(seed=seed).model() for seed in range(2)], tmp_path)
    published = {"rule": Rule.MTZ, "pairing": Pairing.GREEDY}
    found = [sum(error(merge(tasks, **given)[0], task) for task in tasks) for given in ({}, published)]
    assert found[0] < 0.7 * found[1]


def test_depthwise_convolutions_and_biases_are_shared_when_asked(tmp_path):
    tasks = tasks_of([depthwise(seed=seed).model() for seed in range(2)], tmp_path)
    layers = find_layers(tasks[0].model)
    own = [layer for layer in layers if layer.groups > 1]
    merged, *_ = merge(tasks)
    assert all(f"a/stem/{layer.name}" in merged.graph.initializers for layer in own)
    more, *_ = merge(tasks, depthwise=True, biases=True)
    names = set(more.graph.initializers)
    assert all(f"shared/{layer.name}" in names for layer in own)
    assert not any(name.startswith(("a/stem/", "b/stem/")) for name in names)
    assert not {"Concat", "Split"} & {node.op_type for node in more.graph}  # no difference
    assert parameter_count(more) < parameter_count(merged)


@pytest.mark.parametrize("rule", list(Rule))
def test_absent_connections_stay_absent(rule, tmp_path):
    models = [dense(seed=seed).model() for seed in range(2)]
    random = np.random.default_rng(0)
    for model, share in zip(models, (0.5, 0.7), strict=True):
        for layer in find_layers(model):
            array = np.array(get_array(layer.weight))
            array[random.random(array.shape) < share] = 0
            set_array(layer.weight, array)
    tasks = tasks_of(models, tmp_path)
    merged, sharable, share = merge(tasks, rule=rule)
    for name in find_extent(sharable, share).parts:
        zeros = [float((get_array(task.model.graph.initializers[name]) == 0).mean()) for task in tasks]
        found = float((get_array(merged.graph.initializers[f"shared/{name}"]) == 0).mean())
        assert 0.2 < found <= max(zeros)
    heads = [find_layers(task.model)[-1].weight for task in tasks]
    for task, head in zip(tasks, heads, strict=True):
        found = get_array(merged.graph.initializers[f"{task.name}/{head.name}"])
        assert ((found == 0) == (get_array(head) == 0)).all()


def test_one_task_comes_back_out(tmp_path):
    tasks = tasks_of([residual(seed=seed).model() for seed in range(2)], tmp_path)
    merged, *_ = merge(tasks)
    save(merged, tmp_path / "merged.onnx")
    wanted = execute(merged, feeds := {"x": samples_of(tasks[1])})
    alone = extract_task(tmp_path / "merged.onnx", "b", tmp_path / "alone.onnx")
    for name, array in execute(load(tmp_path / "alone.onnx"), feeds).items():
        np.testing.assert_allclose(array, wanted[f"b/{name}"], rtol=1e-4, atol=1e-4)
    assert [value.name for value in alone.graph.outputs] == tasks[1].outputs


def test_a_light_retraining_after_each_layer_goes_on_into_the_next(tmp_path):
    from onnxmerge.calibration.settings import Settings
    from onnxmerge.methods.calibrating import calibrate_merged

    tasks = tasks_of([chain(seed=seed).model() for seed in range(2)], tmp_path)
    sharable = find_sharable(tasks)
    counts = {space.name: space.size - 2 for space in sharable.spaces}
    seen: list[str] = []
    losses: list[float] = []
    changed: dict[str, np.ndarray] = {}

    def after(merged: oir.Model, layer: str) -> None:
        seen.append(layer)
        for name, array in changed.items():  # what was trained before is in this model
            if name in merged.graph.initializers:
                np.testing.assert_array_equal(get_array(merged.graph.initializers[name]), array)
        quick = Settings(steps=10, batch=32, rate=3e-3, threads=1, evaluations=2, precision="float32")
        losses.extend(loss for _, loss in calibrate_merged(merged, tasks, task_outputs(tasks), quick, Silent()).losses)
        tails = ("a/", "b/")
        changed.update(
            {
                name: np.array(get_array(value))
                for name, value in merged.graph.initializers.items()
                if is_float(value) and name.startswith(tails) and "/stem/" not in name
            }
        )

    sharing = WeightSharing(rule=Rule.MTZ, samples=300, threads=1)
    retrained = share_weights(sharable, {}, tasks, counts, sharing, after=after).model
    assert seen == list(find_extent(sharable, counts).parts)
    without = share_weights(sharable, {}, tasks, counts, sharing).model
    errors = [sum(error(merged, task) for task in tasks) for merged in (retrained, without)]
    assert errors[0] < errors[1]
    assert parameter_count(retrained) == parameter_count(without)


def test_what_is_retrained_is_what_later_layers_see(tmp_path):
    """Once the first layer makes nothing but zeros, the third has no inputs to weigh by: its weights are the mean."""
    tasks = tasks_of([dense(seed=seed, sizes=(6, 12, 10, 9, 4)).model() for seed in range(2)], tmp_path)
    sharable = find_sharable(tasks)
    names = [layer.name for layer in find_layers(tasks[0].model)]

    def after(merged: oir.Model, layer: str) -> None:
        if layer == names[1]:
            for name, value in merged.graph.initializers.items():
                if name == f"shared/{names[0]}" or ("/stem/" in name and get_array(value).size in (12, 10)):
                    set_array(value, np.zeros_like(get_array(value)))

    sharing = WeightSharing(rule=Rule.MTZ, pairing=Pairing.CORRELATION, samples=300, threads=1)
    merged = share_weights(sharable, {}, tasks, 3, sharing, after=after).model
    mean = np.mean([get_array(find_layers(task.model)[2].weight) for task in tasks], axis=0)
    np.testing.assert_allclose(get_array(merged.graph.initializers[f"shared/{names[2]}"]), mean, atol=1e-5)


def test_torch_computes_what_onnxruntime_does(tmp_path):
    import torch

    from onnxmerge.calibration.module import GraphModule

    tasks = tasks_of([residual(seed=seed).model() for seed in range(2)], tmp_path)
    sharable = find_sharable(tasks)
    merged, *_ = merge(tasks, {space.name: space.size - 2 for space in sharable.spaces})
    x = samples_of(tasks[0])
    with torch.no_grad():
        found = GraphModule(merged)({"x": torch.from_numpy(x)})
    for name, wanted in execute(merged, {"x": x}).items():
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_two_runs_give_the_same_bytes(tmp_path):
    tasks = tasks_of([chain(seed=seed).model() for seed in range(2)], tmp_path)
    for run in "12":
        save(merge(tasks)[0], tmp_path / f"merged{run}.onnx")
    assert (tmp_path / "merged1.onnx").read_bytes() == (tmp_path / "merged2.onnx").read_bytes()


def test_a_plan_that_does_not_fit_is_refused(tmp_path):
    tasks = tasks_of([dense(seed=seed).model() for seed in range(2)], tmp_path)
    sharable = find_sharable(tasks)
    with pytest.raises(UsageError, match="'nowhere'"):
        find_extent(sharable, {"nowhere": 1})
    name, size = sharable.spaces[0].name, sharable.spaces[0].size
    with pytest.raises(UsageError, match=f"it has {size} neurons"):
        find_extent(sharable, {name: size + 1})
    with pytest.raises(UsageError, match="at most 2"):
        find_extent(sharable, 3)


def test_units_behind_the_last_shared_one_share_nothing(tmp_path):
    """Behind the first unit the stream's space goes on through branches of one layer, which read and make it."""

    def build(seed: int) -> Net:
        net = Net(seed)
        x = net.conv(net.input(["N", 3, 10, 10]), 8)
        for _ in range(3):
            x = net.op("Add", net.conv(net.relu(x), 8), x)
        net.head(net.relu(x))
        return net

    tasks = tasks_of([build(seed).model() for seed in range(2)], tmp_path)
    names = [layer.name for layer in find_layers(tasks[0].model)]
    sharable = find_sharable(tasks)
    assert len(sharable.spaces) == 1
    for k in range(len(sharable.cuts) + 1):
        assert list(find_extent(sharable, k).parts) == names[:k]


# --- a threshold on the functional difference -------------------------------------------------------------------------


def shared_up_to(tasks: Sequence[Task], difference: float, **given: object) -> Merged:
    sharable = find_sharable(tasks)
    sharing = WeightSharing(samples=300, threads=1, max_difference=difference, **given)  # type: ignore[arg-type]
    return share_weights(sharable, {}, tasks, len(sharable.cuts), sharing)


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("build", BUILDS)
def test_more_is_shared_the_more_neurons_may_differ(build, rule, tmp_path):
    tasks = tasks_of([build(seed=seed).model() for seed in range(3)], tmp_path)
    made = [shared_up_to(tasks, difference, rule=rule) for difference in (0, 0.1, 0.2, 1e9)]
    counts = [sum(merged.counts.values()) for merged in made]
    assert counts[0] == 0 < counts[2] < counts[3] and counts == sorted(counts)
    assert made[-1].counts == {space.name: space.size for space in find_sharable(tasks).spaces}
    sizes = [parameter_count(merged.model) for merged in made]
    assert sizes[-1] < sizes[0]
    errors = [sum(error(merged.model, task) for task in tasks) for merged in made]
    assert errors[0] < 1e-3 and errors[2] > 1e-2


@pytest.mark.parametrize("pairing", list(Pairing))
def test_exactly_the_neurons_that_are_alike_are_shared(pairing, tmp_path):
    """The second network has five of the first one's twelve neurons."""
    models = [dense(seed=seed).model() for seed in range(2)]
    ours, theirs = (find_layers(model)[0] for model in models)
    array = np.array(get_array(theirs.weight))
    places = slice(0, 5) if pairing == Pairing.CORRELATION else slice(4, None, -1)  # nobody aligned them here
    array[:5] = get_array(ours.weight)[places]
    set_array(theirs.weight, array)
    tasks = tasks_of(models, tmp_path)
    first = find_sharable(tasks).spaces[0].name
    assert shared_up_to(tasks, 1e-3, pairing=pairing).counts[first] == 5


def test_a_difference_has_no_units(tmp_path):
    """Outputs of a hundredth, and tasks that count twice, change nothing of what is shared."""
    models = [residual(seed=seed).model() for seed in range(2)]
    tasks = tasks_of(models, tmp_path / "plain")
    plain = shared_up_to(tasks, 0.1, rule=Rule.MTZ).counts
    assert 0 < sum(plain.values()) < sum(space.size for space in find_sharable(tasks).spaces)
    assert shared_up_to(tasks, 0.1, rule=Rule.MTZ, weights=(2.0, 2.0)).counts == plain
    for task in tasks:
        first = find_layers(task.model)[0]
        for value in (first.weight, first.bias):
            set_array(value, get_array(value) / 100)
    found = shared_up_to(tasks, 0.1, rule=Rule.MTZ).counts
    name = next(iter(plain))
    assert found[name] == plain[name]


def test_neurons_differ_by_no_more_than_their_energies(tmp_path):
    """Sharing two neurons costs no more than removing both."""
    tasks = tasks_of([dense(seed=seed).model() for seed in range(2)], tmp_path)
    statistics, current = [], []
    for task in tasks:
        layer, own = find_layers(task.model)[0], Regression()
        x = samples_of(task, 200)
        own.update(x[None], (x @ get_array(layer.weight).T + get_array(layer.bias)))
        statistics.append(own)
        current.append(weights_and_bias(layer))
    (cost,) = differences(statistics, current, np.ones(7, bool), [1.0, 3.0])
    ours, theirs = energies(statistics, current, [1.0, 3.0])
    assert (cost <= theirs[:, None] + ours + 1e-6).all()
    for one, task, weight in zip((ours, theirs), tasks, (1.0, 3.0), strict=True):
        layer = find_layers(task.model)[0]
        z = samples_of(task, 200) @ get_array(layer.weight).T
        np.testing.assert_allclose(one, weight / 2 * z.var(0), rtol=1e-3)
