"""What the tests of fusing share: networks, copies of them in other channels, and what is seen on samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
from graphs import Array, Net, chain, dense, residual

from onnxmerge.ir.correspond import correspond
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.passes.channel_map import MappedPartner, matching_spaces
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm
from onnxmerge.passes.permute import Permute
from onnxmerge.runtime.activations import stream
from onnxmerge.runtime.patches import Positions, grid_of, output_rows
from onnxmerge.runtime.statistics import PairStatistics


@dataclass
class Random:
    """Normal random inputs `x`, the same at every pass."""

    shape: tuple[int, ...]
    count: int = 256
    seed: int = 0

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        data = np.random.default_rng(self.seed).standard_normal((self.count, *self.shape)).astype(np.float32)
        for start in range(0, self.count, size):
            yield {"x": data[start : start + size]}


# --- networks ---------------------------------------------------------------------------------------------------------


def dense_without_biases(seed: int = 0) -> Net:
    net = Net(seed)
    x = net.input(["N", 6])
    for transposed, out in ((True, 12), (False, 10), (True, 4)):
        shape = (out, net.channels[x]) if transposed else (net.channels[x], out)
        x = net.op("Gemm", x, net.normal(*shape, scale=0.5), channels=out, transB=int(transposed))
        x = net.relu(x) if out > 4 else x
    net.output(x)
    return net


def products(seed: int = 0) -> Net:
    """Matrices with biases that are added behind them, over tokens."""
    net = Net(seed)
    x = net.input(["N", 5, 6])
    net.output(net.matmul(net.relu(net.matmul(net.relu(net.matmul(x, 9)), 7)), 4))
    return net


def flattened(seed: int = 0) -> Net:
    """Two convolutions, a flatten that gives each channel a block of columns, two matrices."""
    net = Net(seed)
    x = net.relu(net.conv(net.relu(net.conv(net.input(["N", 3, 6, 6]), 8)), 6, strides=[2, 2]))
    net.output(net.gemm(net.relu(net.gemm(net.flatten(x, 6 * 9), 7)), 4))
    return net


def joined(seed: int = 0) -> Net:
    """Two branches side by side with the input itself."""
    net = Net(seed)
    x = net.input(["N", 3, 6, 6])
    both = net.concat(net.relu(net.conv(x, 5)), x, net.relu(net.conv(x, 4)))
    net.head(net.relu(net.norm(net.conv(both, 6))))
    return net


def grouped(seed: int = 0) -> Net:
    net = Net(seed)
    x = net.relu(net.norm(net.conv(net.input(["N", 3, 8, 8]), 8, bias=False)))
    net.head(net.relu(net.norm(net.conv(x, 6, group=2))))
    return net


def transposed(seed: int = 0, width: int = 8) -> Net:
    """A transposed convolution in groups: it makes channels group by group."""
    net = Net(seed)
    x = net.relu(net.conv(net.input(["N", 3, 6, 6]), width))
    x = net.op("ConvTranspose", x, net.normal(width, 3, 2, 2, scale=0.4), net.normal(6), channels=6, group=2)
    net.head(net.relu(net.conv(net.relu(x), 5)))
    return net


def depthwise(seed: int = 0) -> Net:
    net = Net(seed)
    x = net.relu(net.norm(net.conv(net.input(["N", 3, 8, 8]), 6, bias=False)))
    net.head(net.conv(net.relu(net.norm(net.conv(x, 12, group=6, bias=False))), 5, kernel=1))
    return net


def folded(build: Callable[..., Net]) -> Callable[..., oir.Model]:
    def built(seed: int = 0) -> oir.Model:
        model = build(seed).model()
        FoldBatchNorm()(model)
        return model

    return built


def plain(build: Callable[..., Net]) -> Callable[..., oir.Model]:
    return lambda seed=0: build(seed).model()


IMAGE = (3, 10, 10)
ANY_WIDTH: dict[str, tuple[Callable[..., oir.Model], tuple[int, ...]]] = {
    "dense": (plain(dense), (6,)),
    "dense without biases": (plain(dense_without_biases), (6,)),
    "products": (plain(products), (5, 6)),
    "convolutions and a flatten": (plain(flattened), (3, 6, 6)),
    "side by side": (plain(joined), (3, 6, 6)),
    "batch norms": (plain(chain), IMAGE),
    "batch norms folded": (folded(chain), IMAGE),
    "residual": (plain(residual), IMAGE),
    "residual folded": (folded(residual), IMAGE),
    "groups": (plain(grouped), (3, 8, 8)),
}
"""Networks whose widths may differ, and the shape of an input."""
NETS = {
    **ANY_WIDTH,
    "transposed, in groups": (plain(transposed), (3, 6, 6)),
    "depthwise": (plain(depthwise), (3, 8, 8)),
}

# --- copies -----------------------------------------------------------------------------------------------------------


def spaces_of(model: oir.Model) -> list[Space]:
    return [space for space in find_spaces(model).permutable() if not space.blocks]


def permuted_copy(model: oir.Model, seed: int = 3) -> tuple[oir.Model, dict[str, Array]]:
    """A copy with every space permuted, and for each channel of the model the copy's channel."""
    generator = np.random.default_rng(seed)
    spaces = {space.name: space for space in spaces_of(model)}
    permutations = {name: generator.permutation(space.size) for name, space in spaces.items()}
    copy = model.clone()
    Permute(permutations, spaces)(copy)
    return copy, {name: np.argsort(permutation) for name, permutation in permutations.items()}


def split_in_halves(model: oir.Model) -> oir.Model:
    """The same function with twice the channels: each is there twice and read with half its weight."""
    wide = model.clone()
    places = [slots for space in spaces_of(model) for slots in space.weights]
    for slots in sorted(places, key=lambda s: -int(s.index.max())):  # what stands before is not moved yet
        assert slots.rows is None and len(slots.axes) == 1
        value, axis = wide.graph.initializers[slots.name], slots.axes[0]
        array = get_array(value)
        factor = np.ones(array.shape[axis])
        if axis in _reading(value):
            factor[slots.index] = 0.5
        along = [1] * array.ndim
        along[axis] = -1
        halved = array * factor.reshape(along)
        behind = np.full(slots.index.size, slots.index.max() + 1)  # spaces side by side stay so
        set_array(value, np.insert(halved, behind, np.take(halved, slots.index.ravel(), axis), axis))
    infer_shapes(wide)
    return wide


def _reading(value: oir.Value) -> set[int]:
    ((node, place),) = value.uses()
    if place != 1 or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return set()
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return {1} if node.op_type == "Conv" or transposed else {0}


def partner_of(model: oir.Model, other: oir.Model, **more: object) -> MappedPartner:
    found = correspond(model, other, same_sizes=False)
    assert not found.stopped
    spaces = matching_spaces(spaces_of(model), find_spaces(other).spaces, found.constants)
    return MappedPartner(other, found.values, found.constants, spaces, **more)  # type: ignore[arg-type]


# --- what is seen -----------------------------------------------------------------------------------------------------


def statistics_of(model: oir.Model, partner: MappedPartner, samples: Random) -> dict[str, PairStatistics]:
    """Of every pre-activation with one slot for each channel."""
    wanted = {layer.pre_activation.name for layer in find_layers(model)}
    axes = {
        slots.name: slots.axes[0]
        for space in spaces_of(model)
        for slots in space.values
        if slots.name in wanted and len(slots.axes) == 1
    }
    found = {name: PairStatistics() for name in axes}
    streams = (
        stream(network, samples, [names[name] for name in axes], threads=1)
        for network, names in ((model, {name: name for name in axes}), (partner.model, partner.values))
    )
    for a, b in zip(*streams, strict=True):
        for name, axis in axes.items():
            ours, theirs = a[name], b[partner.values[name]]
            positions = Positions.sample(np.random.default_rng(0), grid_of(ours, axis), 16)
            found[name].update(*(output_rows(x, axis, positions) for x in (ours, theirs)))
    return found
