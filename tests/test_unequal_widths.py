"""fuse where a graph itself says how wide it is: depthwise convolutions, gates, heads of attention, channel shuffles.

With onnxruntime as the judge: a network fused with a copy of itself in other channels, or with the same function of
twice the channels, is itself; networks of other widths fuse in both directions, and keep the reference's graph.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from fusing import Random, partner_of, permuted_copy, spaces_of
from graphs import Array, Net, assert_same_outputs, execute, relative_error

import onnxmerge
from onnxmerge.errors import ModelError
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.weights import get_array, is_float, set_array
from onnxmerge.methods.fuse.choices import Rule
from onnxmerge.methods.task import load_networks
from onnxmerge.passes.channel_map import ChannelMap, transported_arrays
from onnxmerge.passes.match_channels import match_by_weights, transport

RULES = (Rule.LEAST_SQUARES, Rule.AVERAGE, Rule.TRANSPORT)
IMAGE, TOKENS = (3, 12, 12), (7, 6)

# --- networks of any width --------------------------------------------------------------------------------------------


def separable(width: int, seed: int = 0) -> Net:
    """Like MobileNetV1: depthwise and pointwise convolutions in turn."""
    net = Net(seed)
    x = net.relu(net.norm(net.conv(net.input(["N", *IMAGE]), width)))
    for out, stride in ((2 * width, 1), (3 * width, 2), (3 * width, 1)):
        group = net.channels[x]
        x = net.relu(net.norm(net.conv(x, group, group=group, bias=False, strides=[stride, stride])))
        x = net.relu(net.norm(net.conv(x, out, kernel=1, bias=False)))
    net.head(x)
    return net


def gated(width: int, seed: int = 0) -> Net:
    """Like MobileNetV3: an inverted residual with hard-swish and a gate, whose shapes are constants."""
    net = Net(seed)
    x = net.op("HardSwish", net.norm(net.conv(net.input(["N", *IMAGE]), width, strides=[2, 2])))
    hidden = 3 * width
    y = net.op("HardSwish", net.norm(net.conv(x, hidden, kernel=1)))
    y = net.op("HardSwish", net.norm(net.conv(y, hidden, group=hidden)))
    pooled = net.reshape(net.op("GlobalAveragePool", y), 0, hidden, channels=hidden)
    gate = net.op("HardSigmoid", net.gemm(net.relu(net.gemm(pooled, width)), hidden))
    y = net.op("Mul", y, net.reshape(gate, 0, hidden, 1, 1, channels=hidden))
    x = net.op("Add", x, net.norm(net.conv(y, width, kernel=1)))
    net.head(net.relu(net.norm(net.conv(x, 2 * width, kernel=1))))
    return net


def encoder(width: int, seed: int = 0, heads: int = 2) -> Net:
    """A transformer: embedding, positions, attention, a dense pair, norms behind the sums.

    Scores are divided by the size of a head, so that they stay what they are when every channel is there twice.
    """
    net = Net(seed)
    tokens = TOKENS[0]
    x = net.op("Add", net.matmul(net.input(["N", *TOKENS]), width), net.normal(1, tokens, width), channels=width)

    def by_head(name: str, *order: int) -> str:
        size = width // heads
        made = net.op("Add", net.matmul(x, width), net.normal(width, scale=0.1), channels=width, name=name)
        return net.op("Transpose", net.reshape(made, 0, tokens, heads, size), perm=order)

    scores = net.op("MatMul", by_head("q", 0, 2, 1, 3), by_head("k", 0, 2, 3, 1))
    weights = net.op("Softmax", net.op("Mul", scores, net.constant(np.float32(2 * heads / width))), axis=-1)
    seen = net.op("Transpose", net.op("MatMul", weights, by_head("v", 0, 2, 1, 3)), perm=[0, 2, 1, 3])
    x = net.op("Add", x, net.matmul(net.reshape(seen, 0, tokens, width, channels=width), width), channels=width)
    x = net.norm(x, "LayerNormalization")
    x = net.op("Add", x, net.matmul(net.op("Tanh", net.matmul(x, 3 * width)), width), channels=width)
    x = net.norm(x, "LayerNormalization")
    net.output(net.matmul(net.op("ReduceMean", x, net.ints(1), keepdims=0), 5))
    return net


def shuffled(width: int, seed: int = 0) -> Net:
    """Like ShuffleNetV2: halves cut at constant places, one passed by, both shuffled."""
    net = Net(seed)
    x = net.relu(net.conv(net.input(["N", *IMAGE]), 2 * width, strides=[2, 2]))
    for _ in range(2):
        parts = [
            net.op("Slice", x, net.ints(start), net.ints(start + width), net.ints(1), channels=width)
            for start in (0, width)
        ]
        worked = net.relu(net.conv(net.conv(parts[1], width, group=width), width, kernel=1))
        x = net.reshape(net.concat(parts[0], worked), 0, 2, width, 6, 6)
        x = net.op("Transpose", x, perm=[0, 2, 1, 3, 4])
        x = net.reshape(x, 0, 2 * width, 6, 6, channels=2 * width)
    net.head(net.relu(net.conv(x, 3 * width, kernel=1)))
    return net


NETS: dict[str, tuple[Callable[..., Net], tuple[int, ...]]] = {
    "separable": (separable, IMAGE),
    "gated": (gated, IMAGE),
    "encoder": (encoder, TOKENS),
    "shuffled": (shuffled, IMAGE),
}
NARROW, WIDE = 4, 8


def doubled(build: Callable[..., Net], width: int) -> oir.Model:
    """The function of `build(width)` with each channel twice, read with half its weight, and all in another order."""
    narrow, wide = build(width).model(), build(2 * width).model()
    spaces, partner = spaces_of(wide), partner_of(wide, narrow)
    maps = {space.name: ChannelMap.from_plan(np.kron(np.eye(space.size // 2), np.ones((1, 2)))) for space in spaces}
    for name, array in transported_arrays(wide, replace(partner, maps=maps), spaces).items():
        set_array(wide.graph.initializers[name], array)
    return permuted_copy(wide)[0]


# --- through files ----------------------------------------------------------------------------------------------------


def fuse(folder: Path, shape: tuple[int, ...], first: oir.Model, second: oir.Model, **settings: object) -> oir.Model:
    """`second` fused into `first`."""
    for name, model in (("a", first), ("b", second)):
        save(model, folder / f"{name}.onnx")
    samples = np.random.default_rng(0).standard_normal((110, *shape)).astype(np.float32)
    np.savez(folder / "data.npz", x=samples)
    given = onnxmerge.FuseSettings(**{"measure": False, "samples": 100, "threads": 1, "into": "a"} | settings)
    paths = [folder / "a.onnx", folder / "b.onnx"]
    onnxmerge.fuse_models(paths, folder / "data.npz", folder / "out", settings=given)
    return load(folder / "out" / "merged.onnx")


def fresh(shape: tuple[int, ...]) -> dict[str, Array]:
    (feeds,) = Random(shape, 8, seed=5).batches(8)
    return feeds


def assert_itself(model: oir.Model, fused: oir.Model, shape: tuple[int, ...], rule: Rule) -> None:
    assert_same_outputs(model, fused, fresh(shape), tolerance=1e-3 if rule == Rule.LEAST_SQUARES else 1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
def test_a_network_fused_with_a_permuted_copy_is_itself(name, rule, tmp_path):
    build, shape = NETS[name]
    model = build(WIDE).model()
    assert_itself(model, fuse(tmp_path, shape, model, permuted_copy(model)[0], rule=rule), shape, rule)


@pytest.mark.parametrize("rule", [Rule.LEAST_SQUARES, Rule.AVERAGE])
@pytest.mark.parametrize("wider", ["other", "reference"])
@pytest.mark.parametrize("name", NETS)
def test_a_network_fused_with_itself_in_halves_is_itself(name, wider, rule, tmp_path):
    """Not with OTFusion's rule as published, which scales what reads a space of another width."""
    build, shape = NETS[name]
    narrow, wide = build(NARROW).model(), doubled(build, NARROW)
    assert_same_outputs(narrow, wide, fresh(shape))
    first, second = (narrow, wide) if wider == "other" else (wide, narrow)
    assert_itself(first, fuse(tmp_path, shape, first, second, rule=rule), shape, rule)


# --- other widths -----------------------------------------------------------------------------------------------------


def shape_of(model: oir.Model) -> list[tuple[object, ...]]:
    """All of a graph but its floating-point arrays: operators, attributes, what is read, integers, lone numbers."""
    found: list[tuple[object, ...]] = []
    for node in model.graph:
        attributes = {name: str(attribute.value) for name, attribute in node.attributes.items()}
        found.append((node.op_type, sorted(attributes.items()), [v and v.name for v in node.inputs]))
    for name, value in sorted(model.graph.initializers.items()):
        array = get_array(value)
        found.append((name, array.shape, None if is_float(value) and array.size > 1 else array.tolist()))
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
def test_networks_of_other_widths_fuse_and_only_weights_change(name, rule, tmp_path):
    build, shape = NETS[name]
    for first, second in ((WIDE, 12), (12, WIDE)):
        folder = tmp_path / str(first)
        folder.mkdir()
        fused = fuse(folder, shape, build(first).model(), build(second, seed=1).model(), rule=rule, samples=30)
        (reference, _) = load_networks([folder / "a.onnx", folder / "b.onnx"])
        assert shape_of(fused) == shape_of(reference.model)
        (before,), (after,) = (execute(model, fresh(shape)).values() for model in (reference.model, fused))
        assert np.isfinite(after).all() and relative_error(before, after) > 1e-3


@pytest.mark.parametrize("name", NETS)
def test_channels_are_found_by_weights_too(name):
    build, _ = NETS[name]
    model = build(WIDE).model()
    copy, orders = permuted_copy(model)
    partner, spaces = partner_of(model, copy), spaces_of(model)
    maps = match_by_weights(model, spaces, partner, transport)
    for space in spaces:
        np.testing.assert_array_equal(maps[space.name].order, orders[space.name])
    for own, array in transported_arrays(model, replace(partner, maps=maps), spaces).items():
        np.testing.assert_array_equal(array, get_array(model.graph.initializers[own]))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_heads_of_another_number_are_refused(tmp_path):
    first, second = encoder(8, heads=2).model(), encoder(16, heads=4).model()
    with pytest.raises(ModelError, match=r"MatMul 'MatMul_v7': .* 2 channel spaces .* and 4 .* such as heads"):
        fuse(tmp_path, TOKENS, first, second)
    assert not (tmp_path / "out" / "merged.onnx").exists()


def test_a_number_that_goes_by_the_width_stays_the_references():
    """The scale of the scores; between equal widths it is one of the weights."""
    model = encoder(8).model()
    for width, expected in ((8, True), (12, False)):
        partner = partner_of(model, encoder(width, seed=1).model())
        plans = {s.name: np.ones((partner.spaces[s.name].size, s.size)) for s in spaces_of(model)}
        maps = {name: ChannelMap.from_plan(plan) for name, plan in plans.items()}
        found = transported_arrays(model, replace(partner, maps=maps), spaces_of(model))
        lone = {
            name for name, value in model.graph.initializers.items() if is_float(value) and get_array(value).ndim == 0
        }
        assert len(lone) == 1
        assert (lone <= found.keys()) is expected
