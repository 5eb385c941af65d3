"""Passes: the exact ones change nothing that onnxruntime could see, alignment finds a planted permutation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, assert_same_outputs, chain, dense, execute, feeds_for, relative_error, residual

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.ir.units import find_units
from onnxmerge.ir.weights import get_array
from onnxmerge.passes.align import align_by_activations, align_by_weights
from onnxmerge.passes.attach_tails import AttachTails, bare_stem
from onnxmerge.passes.average import Average, Partner
from onnxmerge.passes.ensure_biases import EnsureBiases
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm
from onnxmerge.passes.insert_adapter import InsertAdapter
from onnxmerge.passes.permute import Permute
from onnxmerge.passes.transpose_gemms import TransposeGemms
from onnxmerge.runtime.activations import stream
from onnxmerge.runtime.patches import Positions, grid_of, output_rows
from onnxmerge.runtime.statistics import PairStatistics

# --- networks ---------------------------------------------------------------------------------------------------------


def depthwise() -> Net:
    net = Net()
    x = net.op("Clip", net.norm(net.conv(net.input(["N", 3, 8, 8]), 6, bias=False)), "", net.constant(np.float32(2)))
    x = net.relu(net.norm(net.conv(x, 12, group=6, bias=False)))
    net.head(net.norm(net.conv(x, 5, kernel=1)))
    return net


def grouped() -> Net:
    net = Net()
    x = net.relu(net.norm(net.conv(net.input(["N", 3, 8, 8]), 8, bias=False)))
    net.head(net.relu(net.norm(net.conv(x, 6, group=2))))
    return net


def norms_after_matrices() -> Net:
    net = Net()
    x = net.relu(net.norm(net.gemm(net.input(["N", 6]), 8)))
    x = net.relu(net.norm(net.gemm(x, 7, transposed=False)))
    net.output(net.norm(net.op("Gemm", x, net.normal(7, 4), channels=4)))
    return net


def norms_that_must_stay() -> Net:
    """Behind a concat, behind a convolution that another node reads too, and on the input."""
    net = Net()
    x = net.norm(net.input(["N", 3, 8, 8]))
    left, right = net.conv(x, 4), net.conv(x, 4)
    both = net.norm(net.concat(left, net.norm(right)))
    net.head(net.op("Add", net.norm(net.conv(both, 4)), net.relu(left)))
    net.output(right)
    return net


def norm_that_is_the_output() -> Net:
    net = Net()
    net.output(net.norm(net.conv(net.input(["N", 3, 8, 8]), 4)))
    return net


def scalar_bias() -> Net:
    net = Net()
    x = net.op("Gemm", net.input(["N", 6]), net.normal(6, 8), net.uniform(1), channels=8)
    x = net.op("Gemm", net.relu(x), net.normal(8, 5), net.constant(np.float32(0.5)), channels=5)
    x = net.op("Gemm", net.relu(x), net.normal(5, 4), net.normal(1, 4), channels=4)
    net.output(net.op("MatMul", net.relu(x), net.normal(4, 3), channels=3))
    return net


def computed_parameters() -> Net:
    """A bias and a norm's scale that are inputs: neither can be folded."""
    net = Net()
    x = net.op("Conv", net.input(["N", 3, 8, 8]), net.normal(4, 3, 3, 3), net.input([4], "shift"), channels=4)
    x = net.conv(net.norm(x), 5)
    x = net.op("BatchNormalization", x, net.input([5], "scale"), net.normal(5), net.normal(5), net.uniform(5))
    net.head(net.relu(x))
    return net


NETS: dict[str, Callable[[], Net]] = {
    build.__name__: build
    for build in (
        *(chain, residual, dense, depthwise, grouped),
        *(norms_after_matrices, norms_that_must_stay, norm_that_is_the_output, scalar_bias, computed_parameters),
    )
}
REAL = ("resnet20_cifar10", "ultraface_rfb_320", "candy_nc8_256", "ppocr_v2_cls", "mnist-net_256x2")

# --- exact passes: one harness ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pass on a network: what must be there after it, beside the same outputs."""

    apply: Callable[[oir.Model], object]
    after: Callable[[oir.Model], None] = lambda model: None


def permute_everything(model: oir.Model) -> None:
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    Permute(random_permutations(list(spaces.values()), seed=1), spaces)(model)


def random_permutations(spaces: list[Space], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {space.name: generator.permutation(space.size) for space in spaces}


def no_norm_behind_a_layer(model: oir.Model) -> None:
    for layer in find_layers(model):
        foldable = layer.norm is not None and all(value.const_value is not None for value in layer.norm.inputs[1:])
        assert not foldable or layer.norm.op_type != "BatchNormalization" or layer.op not in ("Conv", "Gemm")


def gemms_as_out_in(model: oir.Model) -> None:
    assert all(layer.transposed for layer in find_layers(model) if layer.op == "Gemm")


def biases_everywhere(model: oir.Model) -> None:
    for layer in find_layers(model):
        assert layer.bias is not None and get_array(layer.bias).shape == (layer.out_channels,)


EXACT = {
    "fold batch norms": Case(FoldBatchNorm(), no_norm_behind_a_layer),
    "ensure biases": Case(EnsureBiases(), biases_everywhere),
    "fold, then ensure biases": Case(lambda model: EnsureBiases()(FoldBatchNorm()(model)), biases_everywhere),
    "transpose gemms": Case(TransposeGemms(), gemms_as_out_in),
    "permute": Case(permute_everything),
}


def check_exact(case: Case, model: oir.Model) -> None:
    before, feeds = model.clone(), feeds_for(model)
    case.apply(model)
    assert [v.name for v in model.graph.outputs] == [v.name for v in before.graph.outputs]
    assert_same_outputs(before, model, feeds)
    case.after(model)


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("net", NETS)
def test_exact_pass(case, net):
    check_exact(EXACT[case], NETS[net]().model())


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("name", REAL)
def test_exact_pass_on_a_real_network(case, name, shared):
    check_exact(EXACT[case], load(shared(name)))


def test_the_harness_notices_a_wrong_pass():
    def forgetful(model: oir.Model) -> None:
        spaces = {space.name: space for space in find_spaces(model).permutable()}
        first, *_ = spaces.values()
        part = Space(first.name, first.size, first.weights[:1], first.values)
        Permute({first.name: np.roll(np.arange(first.size), 1)}, {first.name: part})(model)

    with pytest.raises(AssertionError):
        check_exact(Case(forgetful), chain().model())


def count(model: oir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


def test_folding_removes_norms_and_their_parameters():
    model = chain().model()
    FoldBatchNorm()(model)
    assert count(model, "BatchNormalization") == 0
    assert len(model.graph.initializers) == 8  # a weight and a bias for each of four layers

    model = norms_that_must_stay().model()
    FoldBatchNorm()(model)
    assert count(model, "BatchNormalization") == 3
    assert not FoldBatchNorm()(model).modified


def test_folding_keeps_the_name_of_the_norms_output():
    model = residual().model()
    taps = [layer.pre_activation.name for layer in find_layers(model)]
    FoldBatchNorm()(model)
    assert [layer.pre_activation.name for layer in find_layers(model)] == taps


def test_permute_refuses_what_is_no_permutation():
    model = chain().model()
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    name, *_ = spaces
    for permutations in ({"absent": np.arange(3)}, {name: np.zeros(spaces[name].size, int)}, {name: np.arange(2)}):
        with pytest.raises(oir.passes.PreconditionError) as caught:
            Permute(permutations, spaces)(model)
        assert isinstance(caught.value.__cause__, ModelError)


# --- adapters ---------------------------------------------------------------------------------------------------------


def image_tail() -> tuple[Net, int]:
    net = Net()
    net.head(net.conv(net.relu(net.input(["N", 6, 8, 8])), 4))
    return net, 1


def sequence_tail() -> tuple[Net, int]:
    net = Net()
    x = net.relu(net.input(["N", 6, 9]))
    net.output(net.op("Conv", x, net.normal(4, 6, 3), channels=4))
    return net, 1


def flat_tail() -> tuple[Net, int]:
    net = Net()
    net.output(net.gemm(net.relu(net.input(["N", 6])), 4))
    return net, 1


def token_tail() -> tuple[Net, int]:
    net = Net()
    net.output(net.matmul(net.relu(net.input(["N", 5, 6])), 4))
    return net, 2


def tail_that_reads_its_input_twice() -> tuple[Net, int]:
    net = Net()
    x = net.input(["N", 6, 8, 8])
    net.head(net.op("Add", net.conv(net.relu(x), 6), x))
    return net, 1


@pytest.mark.parametrize(
    "build",
    [image_tail, sequence_tail, flat_tail, token_tail, tail_that_reads_its_input_twice],
    ids=lambda b: b.__name__,
)
def test_an_adapter_undoes_order_and_gain(build):
    net, axis = build()
    model, original = net.model(), net.model()
    generator = np.random.default_rng(0)
    order, gain = generator.permutation(6), generator.uniform(0.5, 2, 6).astype(np.float32)
    matrix = np.zeros((6, 6), np.float32)
    matrix[order, np.arange(6)] = gain
    InsertAdapter(axis, matrix, "adapted")(model)
    feeds = feeds_for(original)
    shape = [1] * feeds["x"].ndim
    shape[axis] = 6
    arriving = np.take(feeds["x"], order, axis) / gain.reshape(shape)
    wanted, got = execute(original, feeds), execute(model, {"x": arriving})
    assert model.graph.inputs[0].name == "x"
    assert [v.name for node in model.graph for v in node.outputs].count("adapted") == 1
    for name, array in wanted.items():
        assert relative_error(array, got[name]) < 1e-5
    unadapted = execute(original, {"x": arriving})
    assert all(relative_error(array, unadapted[name]) > 1e-2 for name, array in wanted.items())


# --- stem and tails ---------------------------------------------------------------------------------------------------


def split(model: oir.Model, cut: str) -> tuple[oir.Model, oir.Model]:
    inputs, outputs = ([v.name or "" for v in values] for values in (model.graph.inputs, model.graph.outputs))
    return cut_out(model, inputs, [cut]), cut_out(model, [cut], outputs)


def check_merged(merged: oir.Model, originals: dict[str, oir.Model]) -> None:
    feeds = feeds_for(merged)
    got = execute(merged, feeds)
    assert list(got) == [f"{task}/{v.name}" for task, model in originals.items() for v in model.graph.outputs]
    for task, model in originals.items():
        own = dict(zip([v.name for v in model.graph.inputs], feeds.values(), strict=True))
        for name, array in execute(model, own).items():
            assert relative_error(array, got[f"{task}/{name}"]) < 1e-5


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_stem_and_tails_equal_the_originals(k):
    """Two networks with one stem and two heads, split behind unit k."""
    first = residual().model()
    second = first.clone()
    head = find_layers(second)[-1]
    head.weight.const_value = oir.tensor(-2 * get_array(head.weight), name=head.weight.name)
    originals = {"a": first, "b": second}
    if k == 0:
        merged = AttachTails(originals)(bare_stem(first)).model
    else:
        cut = find_units(first)[k - 1].cut
        stem, _ = split(first, cut)
        merged = AttachTails({task: split(model, cut)[1] for task, model in originals.items()})(stem).model
    check_merged(merged, originals)
    shared = [name for name in merged.graph.initializers if name.startswith("shared/")]
    assert bool(shared) == (k > 0)


def test_attaching_leaves_stem_and_tails_as_they_are():
    model = residual().model()
    stem, tail = split(model, find_units(model)[1].cut)
    names = [[v.name for node in piece.graph for v in node.outputs] for piece in (stem, tail)]
    AttachTails({"a": tail, "b": tail})(stem)
    assert names == [[v.name for node in piece.graph for v in node.outputs] for piece in (stem, tail)]
    first = AttachTails({"a": tail, "b": tail})(stem).model
    check_merged(first, {"a": model, "b": model})


def test_a_tail_that_passes_its_input_through():
    model = residual().model()
    cut = find_units(model)[0].cut
    stem, rest = split(model, cut)
    empty = cut_out(model, [v.name for v in model.graph.inputs], [cut])
    passing = bare_stem(rest)  # its input is its output
    merged = AttachTails({"rest": rest, "end": passing})(stem).model
    feeds = feeds_for(merged)
    got = execute(merged, feeds)
    assert set(got) == {f"rest/{model.graph.outputs[0].name}", f"end/{cut}"}
    np.testing.assert_allclose(got[f"end/{cut}"], execute(empty, feeds)[cut], rtol=1e-5)


def test_stem_and_tails_of_real_networks(shared):
    model = load(shared("resnet20_cifar10"))
    other = load(shared("resnet20_cifar100"))
    cut = find_units(model)[3].cut
    stem, tail = split(model, cut)
    _, foreign = split(other, find_units(other)[3].cut)
    merged = AttachTails({"own": tail, "foreign": foreign})(stem).model
    feeds = feeds_for(merged)
    got = execute(merged, feeds)
    middle = execute(stem, feeds)[cut]
    assert (
        relative_error(
            execute(model, {model.graph.inputs[0].name: next(iter(feeds.values()))})[model.graph.outputs[0].name],
            got[f"own/{model.graph.outputs[0].name}"],
        )
        < 1e-5
    )
    wanted = execute(foreign, {foreign.graph.inputs[0].name: middle})
    for name, array in wanted.items():
        assert relative_error(array, got[f"foreign/{name}"]) < 1e-5


# --- alignment --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A network, a copy whose channels are permuted, and the alignment that undoes it."""

    model: oir.Model
    copy: oir.Model
    spaces: list[Space]
    alignment: dict[str, np.ndarray]
    constants: dict[str, str]


def plant(model: oir.Model) -> Planted:
    spaces = find_spaces(model).permutable()
    permutations = random_permutations(spaces, seed=3)
    copy = model.clone()
    Permute(permutations, {space.name: space for space in spaces})(copy)
    constants = {name: name for name in model.graph.initializers}
    return Planted(model, copy, spaces, {name: np.argsort(p) for name, p in permutations.items()}, constants)


PLANTED = ("chain", "residual", "dense", "depthwise", "grouped")


def planted(name: str, shared: Callable) -> Planted:
    return plant(NETS[name]().model() if name in NETS else load(shared(name)))


@pytest.mark.parametrize("name", [*PLANTED, "resnet14_cifar10", "ppocr_v2_cls"])
def test_average_with_an_aligned_copy_changes_nothing(name, shared):
    case = planted(name, shared)
    merged = case.model.clone()
    Average([Partner(case.copy, case.constants, case.alignment, weight=2.0)], case.spaces, weight=1.0)(merged)
    assert_same_outputs(case.model, merged, feeds_for(merged))

    unaligned = {space.name: np.arange(space.size) for space in case.spaces}
    Average([Partner(case.copy, case.constants, unaligned)], case.spaces)(merged)
    wanted, got = execute(case.model, feeds_for(merged)), execute(merged, feeds_for(merged))
    assert max(relative_error(wanted[name], got[name]) for name in wanted) > 1e-2


def test_average_weighs_the_networks():
    first, second = dense(seed=1).model(), dense(seed=2).model()
    merged = first.clone()
    spaces = find_spaces(first).permutable()
    constants = {name: name for name in first.graph.initializers if name != "c0"}
    alignment = {space.name: np.arange(space.size) for space in spaces}
    Average([Partner(second, constants, alignment, weight=3.0)], spaces)(merged)
    for name, value in merged.graph.initializers.items():
        a, b = (get_array(model.graph.initializers[name]) for model in (first, second))
        np.testing.assert_allclose(get_array(value), (a + 3 * b) / 4 if name in constants else a, rtol=1e-6)


@pytest.mark.parametrize("name", [*PLANTED, "cnn_mnist", "mnist-net_256x4", "resnet14_cifar10", "candy_nc8_256"])
def test_weights_find_a_planted_permutation(name, shared):
    case = planted(name, shared)
    found = align_by_weights(case.spaces, case.model, case.copy, case.constants, seed=0)
    for space in case.spaces:
        np.testing.assert_array_equal(found[space.name], case.alignment[space.name])


def pair_statistics(case: Planted) -> dict[str, PairStatistics]:
    """Statistics of every value that carries channels on one axis."""

    class Samples:
        def batches(self, size):
            for seed in range(2):
                yield feeds_for(case.model, batch=16, seed=seed)

    axes = {slots.name: slots.axes[0] for space in case.spaces for slots in space.values if len(slots.axes) == 1}
    found = {name: PairStatistics() for name in axes}
    generator = np.random.default_rng(0)
    streams = (stream(model, Samples(), list(axes), threads=1) for model in (case.model, case.copy))
    for a, b in zip(*streams, strict=True):
        for name, axis in axes.items():
            positions = Positions.sample(generator, grid_of(a[name], axis))
            found[name].update(*(output_rows(x[name], axis, positions) for x in (a, b)))
    return found


@pytest.mark.parametrize("name", [*PLANTED, "cnn_mnist", "resnet14_cifar10"])
def test_activations_find_a_planted_permutation(name, shared):
    """Channels that never vary on these inputs are interchangeable, and no others."""
    case = planted(name, shared)
    statistics = pair_statistics(case)
    found = align_by_activations(case.spaces, statistics)
    for space in case.spaces:
        right = found[space.name] == case.alignment[space.name]
        seen = [statistics[slots.name].deviations()[0][slots.index].max(1) for slots in space.values]
        assert (right | (np.max(seen, axis=0) < 1e-4)).all()
        assert name == "cnn_mnist" or right.mean() > 0.9


def test_a_space_that_was_not_recorded_keeps_its_order():
    case = plant(dense().model())
    found = align_by_activations(case.spaces, {})
    for space in case.spaces:
        np.testing.assert_array_equal(found[space.name], np.arange(space.size))


def test_alignment_by_weights_is_deterministic():
    case = plant(residual().model())
    other = residual(seed=9).model()
    runs = [align_by_weights(case.spaces, case.model, other, case.constants, seed=4) for _ in range(2)]
    for space in case.spaces:
        np.testing.assert_array_equal(runs[0][space.name], runs[1][space.name])
