"""Prune, widen, identity insertion and untie change nothing that onnxruntime could see, or say why they cannot."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, chain, dense, execute, feeds_for, relative_error, residual
from hypothesis import given, settings
from test_law import random_nets

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import Slots, Space, find_spaces
from onnxmerge.ir.weights import get_array, is_float, set_array
from onnxmerge.methods.check import check_spaces
from onnxmerge.passes import prune, widening
from onnxmerge.passes.dead_channels import dead_channels
from onnxmerge.passes.insert_identity import InsertIdentity
from onnxmerge.passes.prune import Prune
from onnxmerge.passes.roles import read_axis
from onnxmerge.passes.untie import Untie
from onnxmerge.passes.widen import Widen

IMAGE = ("N", 3, 8, 8)

# --- networks ---------------------------------------------------------------------------------------------------------


def mobile() -> Net:
    """Two inverted residuals with linear ends, after a first layer."""
    net = Net()
    limits = net.constant(np.float32(0)), net.constant(np.float32(6))
    x = net.op("Clip", net.norm(net.conv(net.input(IMAGE), 6, bias=False)), *limits)
    for _ in range(2):
        wide = net.op("Clip", net.norm(net.conv(x, 12, kernel=1, bias=False)), *limits)
        deep = net.op("Clip", net.norm(net.conv(wide, 12, group=12, bias=False)), *limits)
        x = net.op("Add", net.norm(net.conv(deep, 6, kernel=1, bias=False)), x)
    x = net.relu(net.norm(net.conv(x, 12, group=6)))  # two outputs for each channel
    net.head(net.conv(x, 7, kernel=1))
    return net


def densely_connected() -> Net:
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    for _ in range(3):
        x = net.concat(x, net.conv(net.relu(net.norm(x)), 4))
    x = net.concat(net.op("AveragePool", x, kernel_shape=[1, 1]), "x")  # the input itself beside the channels
    net.head(net.relu(net.norm(net.conv(x, 9, kernel=1))))
    return net


def squeeze_and_excitation() -> Net:
    net = Net()
    x = net.op("HardSwish", net.norm(net.conv(net.input(IMAGE), 8)))
    pooled = net.op("ReduceMean", x, net.ints(2, 3), keepdims=1)
    gate = net.op("HardSigmoid", net.conv(net.relu(net.conv(pooled, 4, kernel=1)), 8, kernel=1))
    net.head(net.op("Mul", x, gate))
    return net


def grouped() -> Net:
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 8)))
    x = net.relu(net.norm(net.conv(x, 6, group=2)))
    net.head(net.op("ConvTranspose", x, net.normal(6, 3, 2, 2), net.normal(9), group=3, channels=9))
    return net


def flattened() -> Net:
    """A map flattened with its channels first by a constant Reshape, and with its channels last."""
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 6))
    first = net.relu(net.gemm(net.reshape(x, -1, 6 * 64, channels=384), 9))
    last = net.reshape(net.op("Transpose", x, perm=[0, 2, 3, 1]), 0, 384, channels=384)
    net.output(net.gemm(net.concat(first, net.relu(net.matmul(last, 5))), 4))
    return net


def padded_shortcut() -> Net:
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(IMAGE), 6)))
    shortcut = net.pad_channels(net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), 2, 2)
    net.head(net.relu(net.op("Add", net.norm(net.conv(net.relu(net.conv(x, 10, strides=[2, 2])), 10)), shortcut)))
    return net


def picked() -> Net:
    """Split, Slice, Gather, Tile and Expand on channels, then a Reshape whose target is put together at run time."""
    net = Net()
    x = net.conv(net.input(IMAGE), 8)
    parts = [f"part{number}" for number in range(2)]
    net.op("Split", x, net.ints(3, 5), name=parts[0], axis=1)
    net.nodes[-1].output.append(parts[1])
    net.channels.update(part0=3, part1=5)
    middle = net.op("Slice", net.relu(x), net.ints(2), net.ints(-1), net.ints(1), channels=5)
    chosen = net.op("Gather", net.op("Tanh", x), net.ints(7, 0, 1), axis=1, channels=3)
    x = net.op("Tile", net.concat(net.relu(parts[1]), middle, parts[0], chosen), net.ints(1, 2, 1, 1), channels=32)
    x = net.relu(net.conv(x, 6, kernel=1))
    x = net.op("Mul", x, net.op("Expand", net.op("GlobalMaxPool", x), net.ints(1, 6, 8, 8)))
    batch = net.op("Gather", net.op("Shape", x), net.ints(0))
    target = net.op("Concat", batch, net.ints(6), net.ints(64), axis=0)
    flat = net.op("Reshape", x, target, channels=6)
    net.output(net.matmul(net.op("Transpose", flat, perm=[0, 2, 1]), 4))
    return net


def one_of_each() -> Net:
    """Instance norm, slopes, a one-channel map under its own norm, scalars, a transposed convolution."""
    net = Net()
    x = net.norm(net.conv(net.input(IMAGE), 6), "InstanceNormalization")
    x = net.op("PRelu", x, net.uniform(6, 1, 1, low=0, high=1))
    narrow = net.op("PRelu", net.norm(net.conv(x, 1)), net.uniform(1))
    x = net.concat(net.op("Mul", net.conv(x, 4), net.uniform(1)), net.op("Add", narrow, net.uniform(1)))
    net.head(net.op("ConvTranspose", x, net.normal(5, 6, 2, 2), net.normal(6), channels=6))
    return net


def shuffled() -> Net:
    net = Net()
    x = net.reshape(net.relu(net.conv(net.input(IMAGE), 8)), 0, 2, 4, 8, 8)
    x = net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), 0, 8, 8, 8, channels=8)
    net.head(net.relu(net.conv(x, 5)))
    return net


NETS: dict[str, Callable[[], Net]] = {
    build.__name__: build
    for build in (
        *(chain, residual, dense, mobile, densely_connected, squeeze_and_excitation, grouped, flattened),
        *(padded_shortcut, picked, one_of_each, shuffled),
    )
}
REAL = ("resnet20_cifar10", "mnist-net_256x2", "cnn_mnist", "candy_nc8_256")

# --- one harness ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pass on a network: how the network is prepared, what the outputs must be, and what must be true after it."""

    apply: Callable[[oir.Model], oir.Model]
    prepare: Callable[[oir.Model], None] = lambda model: None
    wanted: Callable[[oir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]] = execute
    after: Callable[[oir.Model, oir.Model], None] = lambda before, after: None


def check_exact(case: Case, model: oir.Model) -> None:
    case.prepare(model)
    feeds = feeds_for(model)
    wanted = case.wanted(model, feeds)
    result = case.apply(model.clone())
    got = execute(result, feeds)
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert relative_error(array, got[name]) < 1e-5, name
    case.after(model, result)


def spaces_of(model: oir.Model) -> dict[str, Space]:
    return {space.name: space for space in find_spaces(model).permutable()}


def set_slots(model: oir.Model, slots: Slots, channels: np.ndarray) -> None:
    """Set what `channels` own in the array to 0."""
    value = model.graph.initializers[slots.name]
    array = np.array(get_array(value))
    inside = array
    if slots.rows is not None:
        inside = array[(slice(None),) * slots.rows.axis + (slice(slots.rows.start, slots.rows.stop),)]
    moved = np.moveaxis(inside, slots.axes, range(len(slots.axes)))
    moved[np.unravel_index(slots.index[channels].ravel(), moved.shape[: len(slots.axes)])] = 0
    set_array(value, array)


def plant(model: oir.Model, reading: bool) -> None:
    """Kill a third of each space: zero the weights that read it, or all arrays that make it."""
    generator = np.random.default_rng(0)
    for space in spaces_of(model).values():
        channels = generator.choice(space.size, space.size // 3, replace=False)
        for slots in space.weights:
            ((node, index),) = model.graph.initializers[slots.name].uses()
            reads = index == 1 and read_axis(node) is not None and slots.axes == (read_axis(node),)
            variance = node.op_type == "BatchNormalization" and index == 4
            if reads == reading and not variance:
                set_slots(model, slots, channels)


def pruning(model: oir.Model) -> Prune:
    """The pass that drops the dead channels."""
    spaces = spaces_of(model)
    dead = dead_channels(model, spaces)
    return Prune({name: np.setdiff1d(np.arange(spaces[name].size), own) for name, own in dead.items()}, spaces)


def prune_dead(model: oir.Model) -> oir.Model:
    return pruning(model)(model).model


def fewer_parameters(before: oir.Model, after: oir.Model) -> None:
    assert parameter_count(after) < 0.95 * parameter_count(before)


def siblings(model: oir.Model) -> list[oir.Model]:
    """Two networks of the same architecture with other weights."""
    found = []
    for seed in (1, 2):
        sibling, generator = model.clone(), np.random.default_rng(seed)
        for node in sibling.graph:
            for value in node.inputs:
                weight = value is not None and value.const_value is not None and is_float(value)
                if weight and node.op_type not in ("Clip", "Resize", "Pad"):
                    set_array(value, get_array(value) * generator.uniform(0.6, 1.4, get_array(value).shape))
        found.append(sibling)
    return found


WEIGHTS = [0.5, 0.3, 0.2]


def mean_of_outputs(model: oir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = [execute(network, feeds) for network in (model, *siblings(model))]
    return {name: np.average([own[name] for own in outputs], axis=0, weights=WEIGHTS) for name in outputs[0]}


def three_times_as_wide(before: oir.Model, after: oir.Model) -> None:
    assert max(s.size for s in find_spaces(after).spaces) == 3 * max(s.size for s in find_spaces(before).spaces)
    assert parameter_count(after) > 2 * parameter_count(before)


EXACT = {
    "prune what is not read": Case(prune_dead, lambda model: plant(model, True), after=fewer_parameters),
    "prune what is zero": Case(prune_dead, lambda model: plant(model, False), after=fewer_parameters),
    "widen": Case(
        lambda model: Widen(siblings(model), WEIGHTS)(model).model, wanted=mean_of_outputs, after=three_times_as_wide
    ),
    "untie": Case(lambda model: Untie()(model).model),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("net", NETS)
def test_exact_pass(case, net):
    check_exact(EXACT[case], NETS[net]().model())


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("name", REAL)
def test_exact_pass_on_a_real_network(case, name, shared):
    check_exact(EXACT[case], load(shared(name)))


@pytest.mark.slow
def test_exact_passes_on_random_graphs():
    """What cannot be done is refused, and most can."""
    done = dict.fromkeys(EXACT, 0)

    @settings(max_examples=60)
    @given(random_nets())
    def holds(net):
        for name, case in EXACT.items():
            bare = Case(case.apply, case.prepare, case.wanted)  # there may be nothing to drop
            try:
                check_exact(bare, net.model())
                done[name] += 1
            except ModelError as error:
                assert name == "widen", error

    holds()
    assert done["widen"] >= 20  # a third holds a softmax over channels, and many a map of one channel


# --- the harness and the proof notice mistakes ------------------------------------------------------------------------


def test_the_harness_notices_channels_that_were_alive():
    def behead(model: oir.Model) -> oir.Model:
        spaces = spaces_of(model)
        return Prune({name: np.arange(1, space.size) for name, space in spaces.items()}, spaces)(model).model

    with pytest.raises(AssertionError):
        check_exact(Case(behead), chain().model())


@pytest.mark.parametrize(
    ("net", "case"),
    [("flattened", "prune what is not read"), ("picked", "prune what is zero"), ("padded_shortcut", "widen")],
)
def test_the_proof_notices_sizes_that_did_not_follow(net, case, monkeypatch):
    model = NETS[net]().model()
    EXACT[case].prepare(model)
    rewrite = Widen(siblings(model)) if case == "widen" else pruning(model)
    for module in (prune, widening):
        monkeypatch.setattr(module, "resize_constants", lambda *_: None)
    with pytest.raises(ModelError, match="channels come out in another order"):
        rewrite(model)


def test_the_proof_notices_channels_in_another_order(monkeypatch):
    original = widening.side_by_side

    def interleaved(numbers, space_of, networks):
        joint = original(numbers, space_of, networks)
        order = np.lexsort((joint.parent, joint.source))
        return widening.AxisMap(joint.source[order], joint.parent[order])

    monkeypatch.setattr(widening, "side_by_side", interleaved)
    with pytest.raises(ModelError, match=r"Reshape.*come out in another order"):
        check_exact(EXACT["widen"], flattened().model())


# --- dead channels ----------------------------------------------------------------------------------------------------


def zeroed(net: Net, array: str, entry: int) -> oir.Model:
    """The network with entry `entry` along axis 0 of a constant set to zero."""
    model = net.model()
    value = model.graph.initializers[array]
    changed = np.array(get_array(value))
    changed[entry] = 0
    set_array(value, changed)
    return model


def zero_maker(*then: str, bias: bool = False, **attributes: float) -> dict[str, np.ndarray]:
    """Dead channels of a network whose first layer makes channel 1 zero, behind the given operators."""
    net = Net()
    x = net.conv(net.input(IMAGE), 4, bias=bias)
    for op_type in then:
        x = net.op(op_type, x, **attributes)
    net.head(net.relu(net.conv(x, 5)))
    model = zeroed(net, "c0", 1)
    return dead_channels(model, spaces_of(model))


@pytest.mark.parametrize("ops", [(), ("Relu",), ("Tanh", "HardSwish"), ("GlobalMaxPool",), ("Abs", "Sqrt")])
def test_zeros_are_followed(ops):
    assert zero_maker(*ops)["c0"].tolist() == [1]


@pytest.mark.parametrize("ops", [("Sigmoid",), ("Relu", "Exp"), ("Softplus",), ("Cos",), ("LRN",)])
def test_a_channel_that_becomes_something_is_alive(ops):
    assert zero_maker(*ops, **({"size": 3} if ops == ("LRN",) else {})) == {}


def test_a_bias_or_a_shift_keeps_a_channel_alive():
    assert zero_maker(bias=True) == {}
    net = Net()
    net.head(net.relu(net.conv(net.norm(net.conv(net.input(IMAGE), 4, bias=False)), 5)))
    model = zeroed(net, "c0", 1)
    assert dead_channels(model, spaces_of(model)) == {}  # scale * (0 - mean) + shift


@pytest.mark.parametrize(("op_type", "axes"), [("Softmax", None), ("ReduceMean", (1,)), ("ReduceMax", (1,))])
def test_operators_that_mix_channels_keep_them_and_cannot_be_pruned(op_type, axes):
    net = Net()
    x = net.conv(net.input(IMAGE), 4, bias=False)
    mixed = net.op(op_type, x, net.ints(*axes), channels=1) if axes else net.op(op_type, x, axis=1)
    net.head(net.op("Add", net.conv(mixed, 2), net.conv(x, 2)))
    model = zeroed(net, "c0", 1)
    spaces = spaces_of(model)
    assert "c0" not in dead_channels(model, spaces)
    with pytest.raises(ModelError, match=f"{op_type} .*over channels"):
        Prune({"c0": np.array([0, 2, 3])}, spaces)(model)


@pytest.mark.parametrize(("axis", "computes"), [(1, True), (2, False)], ids=["channels", "height"])
def test_a_number_of_channels_that_is_computed_with_keeps_them(axis, computes):
    net = Net()
    x = net.relu(net.conv(net.input(["N", 3, "H", 8]), 4, bias=False))
    sizes = net.op("Shape", x)
    if computes:  # alone a size that is known is folded
        sizes = net.op("Mul", sizes, net.ints(1, 1, 1, 1))
    count = net.op("Cast", net.op("Gather", sizes, net.ints(axis)), to=1)
    net.head(net.op("Div", net.conv(x, 5), net.op("Sqrt", count)))
    model = zeroed(net, "c0", 1)
    spaces = spaces_of(model)
    assert ("c0" not in dead_channels(model, spaces)) == computes
    if computes:
        with pytest.raises(ModelError, match=r"Shape .*number of channels"):
            Prune({"c0": np.array([0, 2, 3])}, spaces)(model)
    kept_apart = replace(EXACT["widen"], after=lambda *_: None)  # each network's channels meet a number of its own
    check_exact(kept_apart if computes else EXACT["widen"], model)


def test_all_readers_must_leave_a_channel_alone():
    net = Net()
    x = net.relu(net.conv(net.input(IMAGE), 4))
    net.head(net.op("Add", net.conv(x, 5), net.conv(x, 5)))
    model = net.model()
    space = spaces_of(model)["c0"]
    readers = [slots for slots in space.weights if slots.axes == (1,)]
    assert len(readers) == 2
    for number, slots in enumerate(readers):
        assert dead_channels(model, spaces_of(model)) == {}, number
        set_slots(model, slots, np.array([2]))
    assert dead_channels(model, spaces_of(model))["c0"].tolist() == [2]


def test_one_channel_of_a_dead_space_stays():
    net = Net()
    net.head(net.relu(net.conv(net.relu(net.conv(net.input(IMAGE), 4)), 5)))
    model = zeroed(net, "c0", slice(None))
    set_array(model.graph.initializers["c1"], np.zeros(4))
    assert dead_channels(model, spaces_of(model))["c0"].tolist() == [1, 2, 3]
    check_exact(Case(prune_dead, after=fewer_parameters), model)


def test_groups_lose_equally_many_channels():
    model = grouped().model()
    spaces = spaces_of(model)
    inputs = [space for space in spaces.values() if space.name.startswith("c0")]
    for count, space in enumerate(inputs, start=1):  # one dead in the first group, two in the second
        for slots in (own for own in space.weights if own.axes == (1,)):
            set_slots(model, slots, np.arange(count))
    dead = dead_channels(model, spaces)
    assert [dead[space.name].tolist() for space in inputs] == [[0], [0]]
    check_exact(Case(prune_dead, after=fewer_parameters), model)
    with pytest.raises(ModelError, match=r"Conv .*groups would no longer be of equal size"):
        Prune({inputs[0].name: np.arange(1, 4)}, spaces)(model)


def test_what_cannot_be_dropped_is_not_listed():
    net = Net()
    x = net.relu(net.conv(net.input(["N", 3, "H", 8]), 6, bias=False))
    sizes = net.op("Mul", net.op("Shape", x), net.ints(1, 1, 1, 1))  # not folded, since some are free
    half = net.op("Div", net.op("Gather", sizes, net.ints(1)), net.ints(2))
    part = net.op("Slice", x, net.ints(0), half, net.ints(1), channels=3)
    net.head(net.relu(net.conv(part, 4)))
    model = zeroed(net, "c0", 1)
    space = spaces_of(model)["c0"]
    assert dead_channels(model, spaces_of(model)) == {}
    with pytest.raises(ModelError, match=r"Slice .*places that are computed"):
        Prune({"c0": np.delete(np.arange(space.size), 1)}, spaces_of(model))(model)


def test_a_shuffle_takes_equal_rows_only():
    model = shuffled().model()
    spaces = spaces_of(model)
    (reader,) = (slots for slots in spaces["c0"].weights if slots.axes == (1,))
    set_slots(model, reader, np.array([1, 5, 6]))
    assert dead_channels(model, spaces)["c0"].tolist() == [1, 5]
    check_exact(Case(prune_dead, after=fewer_parameters), model)
    with pytest.raises(ModelError, match="equal rows and columns"):
        Prune({"c0": np.array([0, 1, 2, 3, 4])}, spaces)(model)


@pytest.mark.parametrize("kept", [[], [0, 0], [1, 0], [99], [-1, 2]])
def test_prune_refuses_what_is_no_selection(kept):
    model = chain().model()
    for name in ("absent", "c0"):
        with pytest.raises(oir.passes.PreconditionError) as caught:
            Prune({name: np.array(kept, np.int64)}, spaces_of(model))(model)
        assert isinstance(caught.value.__cause__, ModelError)


def test_an_open_output_shrinks_with_its_space():
    net = Net()
    net.output(net.relu(net.conv(net.input(IMAGE), 6)))
    model = net.model()
    (name,) = (output.name for output in model.graph.outputs)
    spaces = {space.name: space for space in find_spaces(model, frozenset([name])).permutable()}
    assert dead_channels(zeroed(net, "c0", 1), spaces) == {}
    pruned = Prune({"c0": np.array([0, 2, 5])}, spaces)(model).model
    np.testing.assert_allclose(
        execute(pruned, feeds_for(model))[name], execute(model, feeds_for(model))[name][:, [0, 2, 5]], rtol=1e-6
    )


# --- widen ------------------------------------------------------------------------------------------------------------


def test_two_networks_count_alike_and_groups_add_up():
    model = mobile().model()
    other = siblings(model)[0]
    widened = Widen([other])(model).model
    feeds = feeds_for(model)
    got, *parents = (execute(network, feeds) for network in (widened, model, other))
    for name, array in got.items():
        assert relative_error((parents[0][name] + parents[1][name]) / 2, array) < 1e-5
    groups = [[layer.groups for layer in find_layers(network)] for network in (model, widened)]
    assert [2 * count if count > 1 else 1 for count in groups[0]] == groups[1]


@pytest.mark.parametrize("build", [chain, residual, mobile, grouped, flattened])
def test_half_of_a_widened_network_has_the_size_of_one(build):
    model = build().model()
    widened = Widen(siblings(model)[:1])(model).model
    spaces = spaces_of(widened)
    half = Prune({name: np.arange(space.size // 2) for name, space in spaces.items()}, spaces)(widened).model
    shapes = [[value.shape for value in network.graph.initializers.values()] for network in (model, half)]
    if build is not grouped:  # its groups have gone from 2 to 4, of which 2 stay
        assert shapes[0] == shapes[1]
    assert parameter_count(half) == parameter_count(model)
    assert all(np.isfinite(array).all() for array in execute(half, feeds_for(model)).values())


def test_logits_are_averaged_before_a_final_softmax():
    net = dense()
    logits = net.outputs.pop().name
    net.output(net.op("Softmax", logits, axis=1))
    model = net.model()
    others = siblings(model)
    feeds = feeds_for(model)
    outputs = [np.log(next(iter(execute(network, feeds).values()))) for network in (model, *others)]
    mean = np.exp(np.mean(outputs, axis=0))  # each differs from its logits by one number for each sample
    (got,) = execute(Widen(others)(model).model, feeds).values()
    np.testing.assert_allclose(got, mean / mean.sum(1, keepdims=True), rtol=1e-5)


def test_a_scalar_that_two_layers_share_becomes_two_arrays():
    net = Net()
    slope = net.uniform(1, low=0, high=1)
    x = net.op("PRelu", net.conv(net.input(IMAGE), 4), slope)
    net.head(net.op("PRelu", net.conv(x, 6), slope))
    check_exact(EXACT["widen"], net.model())


def over_channels(op_type: str, **attributes: float) -> Net:
    net = Net()
    net.head(net.conv(net.op(op_type, net.conv(net.input(IMAGE), 4), channels=4, **attributes), 4))
    return net


def layer_norm(post: bool) -> Net:
    """Two dense layers over tokens, each normalised: before what reads the stream, or after the sum."""
    net = Net()
    x = net.matmul(net.input(["N", 5, 6]), 8)
    for _ in range(2):
        y = x if post else net.op("LayerNormalization", x, net.uniform(8), net.normal(8), channels=8, axis=-1)
        x = net.op("Add", x, net.matmul(net.relu(net.matmul(y, 12)), 8), channels=8)
        x = net.op("LayerNormalization", x, net.uniform(8), net.normal(8), channels=8, axis=-1) if post else x
    net.output(net.matmul(x, 3))
    return net


def norm_spelled_out() -> Net:
    net = Net()
    x = net.matmul(net.input(["N", 5, 6]), 8)
    gap = net.op("Sub", x, net.op("ReduceMean", x, net.ints(-1)), channels=8)
    size = net.op("Sqrt", net.op("ReduceMean", net.op("Mul", gap, gap), net.ints(-1)))
    x = net.op("Mul", net.op("Div", gap, size, channels=8), net.uniform(8), channels=8)
    net.output(net.matmul(net.op("Add", x, net.normal(8), channels=8), 3))
    return net


def attention() -> Net:
    """Queries and keys of three heads, of which the reshape's constants tell, and a stream."""
    net = Net()
    x = net.matmul(net.input(["N", 5, 6]), 12)
    made = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        heads = net.op("Reshape", net.matmul(x, 12), net.ints(0, 5, 3, 4))
        made.append(net.op("Transpose", heads, perm=order))
    mixed = net.op("MatMul", net.op("Softmax", net.op("MatMul", made[0], made[1]), axis=-1), made[2])
    mixed = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, 5, 12), channels=12)
    x = net.op("Add", x, net.matmul(mixed, 12), channels=12)
    net.output(net.matmul(net.relu(net.matmul(x, 9)), 3))
    return net


def spread() -> Net:
    """One channel that multiplies all."""
    net = Net()
    x = net.conv(net.input(IMAGE), 6)
    net.head(net.op("Mul", net.op("Sigmoid", net.conv(x, 1)), x, channels=6))
    return net


def read_output() -> Net:
    """An output in the middle, which is read on: its channels keep their place."""
    net = Net()
    x = net.conv(net.input(IMAGE), 4)
    net.output(x)
    net.head(net.relu(net.conv(x, 4)))
    return net


def product_of_outputs() -> Net:
    net = Net()
    x = net.relu(net.gemm(net.input(["N", 6]), 8))
    net.output(net.op("Mul", net.gemm(x, 3), net.op("Sigmoid", net.gemm(x, 3))))
    return net


ALONE = {
    "softmax": lambda: over_channels("Softmax", axis=1),
    "lp norm": lambda: over_channels("LpNormalization", axis=1),
    "response norm": lambda: over_channels("LRN", size=3),
    "layer norm before": lambda: layer_norm(False),
    "layer norm after": lambda: layer_norm(True),
    "norm spelled out": norm_spelled_out,
    "attention": attention,
    "spread": spread,
    "read output": read_output,
    "product of outputs": product_of_outputs,
}


@pytest.mark.parametrize("kind", ALONE)
def test_what_would_mix_the_networks_stands_once_for_each(kind):
    model = ALONE[kind]().model()
    others = siblings(model)
    widened = Widen(others, WEIGHTS)(model).model
    feeds = feeds_for(model)
    got = execute(widened, feeds)
    for name, array in mean_of_outputs(model, feeds).items():
        assert relative_error(array, got[name]) < 1e-5
    assert any((node.name or "").endswith("@3") for node in widened.graph)
    assert not any("/replaced" in (value.name or "") for node in widened.graph for value in node.outputs)
    assert check_spaces(widened, find_spaces(widened), seed=0, threads=1).passed


def test_widen_refuses_another_architecture():
    for other in (chain(width=10).model(), chain(norm=False).model(), dense().model()):
        with pytest.raises(ModelError, match="network 2 is not of the same architecture"):
            Widen([other])(chain().model())


# --- identity ---------------------------------------------------------------------------------------------------------


def activations(model: oir.Model) -> list[str]:
    return [node.outputs[0].name for node in model.graph if node.op_type in ("Relu", "Clip")]


def insert_everywhere(model: oir.Model, kind: str, **options: object) -> oir.Model:
    """Behind every activation on which that kind fits."""
    ranks = {value.name: len(value.shape) for node in model.graph for value in node.outputs if value.shape is not None}
    for name in activations(model):
        if ranks[name] > 2 or kind != "conv":
            InsertIdentity(name, "dense" if ranks[name] == 2 and kind == "conv" else kind, **options)(model)
    return model


def lawful(before: oir.Model, after: oir.Model) -> None:
    assert len(find_layers(after)) > len(find_layers(before))
    assert check_spaces(after, find_spaces(after), seed=0, threads=1).passed


def deeper_and_lawful(before: oir.Model, after: oir.Model) -> None:
    assert len(find_spaces(after).permutable()) > len(find_spaces(before).permutable())
    lawful(before, after)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("net", "kind"),
    [("chain", "conv"), ("residual", "conv"), ("residual", "residual"), ("mobile", "conv"), ("chain", "residual"),
     ("dense", "dense"), ("dense", "residual"), ("grouped", "conv")],
)  # fmt: skip
def test_inserted_layers_change_nothing(net, kind, norm):
    case = Case(lambda model: insert_everywhere(model, kind, norm=norm), after=deeper_and_lawful)
    check_exact(case, NETS[net]().model())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("resnet8_cifar10", "residual"), ("resnet8_cifar10", "conv"), ("mnist-net_256x2", "dense"), ("cnn_mnist", "conv")],
)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_inserted_layers_change_nothing_in_real_networks(name, kind, norm, shared):
    def insert(model: oir.Model) -> oir.Model:
        for value in activations(model)[:-1]:
            if kind != "conv" or len(next(v for n in model.graph for v in n.outputs if v.name == value).shape) > 2:
                InsertIdentity(value, kind, norm=norm)(model)
        return model

    check_exact(Case(insert, after=deeper_and_lawful), load(shared(name)))


@pytest.mark.parametrize("options", [{"kernel": 1}, {"kernel": 5}, {"groups": 8}, {"groups": 2, "kernel": 3}])
def test_kernels_and_groups(options):
    model = chain().model()
    value = activations(model)[0]
    depthwise = options.get("groups") == 8  # its channels are those it reads: no new space
    after = lawful if depthwise else deeper_and_lawful
    check_exact(Case(lambda m: InsertIdentity(value, "conv", **options)(m).model, after=after), model)


def test_a_batch_norm_that_is_inserted_is_exact_to_the_bit():
    net = Net()
    net.output(net.relu(net.input(["N", 4, 8, 8])))
    model = net.model()
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)}
    wanted = execute(model, feeds)
    InsertIdentity(activations(model)[0], "residual", norm=True)(model)
    for name, array in execute(model, feeds).items():
        np.testing.assert_array_equal(array, wanted[name])


def test_inserting_twice_and_behind_inputs_outputs_and_sums():
    model = residual().model()
    sums = [node.outputs[0].name for node in model.graph if node.op_type == "Add"]
    places = [sums[0], sums[0], model.graph.inputs[0].name, model.graph.outputs[0].name]

    def insert(model: oir.Model) -> oir.Model:
        for place in places:
            InsertIdentity(place, "residual")(model)
        return model

    check_exact(Case(insert, after=deeper_and_lawful), model)


def test_a_residual_block_on_tokens_is_dense():
    net = Net()
    x = net.relu(net.matmul(net.input(["N", 5, 6]), 8))
    net.output(net.matmul(x, 3))
    case = Case(lambda model: InsertIdentity(x, "residual")(model).model, after=deeper_and_lawful)
    check_exact(case, net.model())


def test_identity_refuses_what_does_not_fit():
    model = chain().model()
    value = activations(model)[0]
    for arguments, options, error, message in [
        (("absent", "conv"), {}, UsageError, "no value 'absent'"),
        ((value, "conv"), {"kernel": 2}, UsageError, "odd"),
        ((value, "conv"), {"groups": 3}, UsageError, "groups"),
        ((value, "dense"), {}, ModelError, "axes"),
        ((model.graph.outputs[0].name, "conv"), {}, ModelError, "rank 2"),
    ]:
        with pytest.raises(error, match=message):
            InsertIdentity(*arguments, **options)(model)
    for op_type in ("Sigmoid", "LeakyRelu", "HardSwish", "Tanh"):
        net = Net()
        net.head(net.op(op_type, net.conv(net.input(IMAGE), 4), name="bent"))
        with pytest.raises(ModelError, match="not idempotent"):
            InsertIdentity("bent", "conv")(net.model())


# --- untie ------------------------------------------------------------------------------------------------------------


def test_untie_gives_each_layer_its_own_array():
    net = Net()
    weight = net.normal(6, 6, scale=0.5)
    x = net.op("Gemm", net.input(["N", 6]), weight, channels=6)
    net.output(net.op("Gemm", net.relu(x), weight, channels=6))
    tied = oir.from_proto(net.proto())

    def separate(before: oir.Model, after: oir.Model) -> None:
        assert len(after.graph.initializers) == len(before.graph.initializers) + 1
        assert not Untie()(after).modified

    check_exact(Case(lambda model: Untie()(model).model, after=separate), tied)
