"""MTZ's rule: the weights of each layer that change the networks' outputs of that layer least in sum (approximate).

Moving a neuron of network t from w_t to w changes the layer's mean squared error by 1/2 (w - w_t)' H_t (w - w_t) with
the layer-wise Hessian H_t = (a_t / n_t) X_t' X_t (He, Zhou and Thiele 2018, eq. 6 to 8), X_t the inputs of the layer in
that network, a column of ones for the bias. The sum over all networks is least at

    w = w_1 + (sum_t H_t)^-1 sum_t H_t (w_t - w_1),

which for two networks is their update w_1 + H_1^-1 (H_1^-1 + H_2^-1)^-1 (w_2 - w_1) (eq. 10 and 11), and what is left
of it for two neurons is their functional difference 1/2 dw' (H_1^-1 + H_2^-1)^-1 dw (eq. 12), as
(H_1^-1 + H_2^-1)^-1 = H_1 (H_1 + H_2)^-1 H_2. In this form nothing singular is inverted but the sum. To it the damping
`DAMPING` s a_t is added on each network's diagonal, s the mean diagonal of all X_t' X_t / n_t: along directions that no
network's inputs take, w is the weighted mean.

If all networks have the same inputs the rule is the weighted mean, so X_t are each network's own, in our channels.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.spaces import Space
from onnxmerge.passes.channel_map import MappedPartner, carry_value, transported_arrays
from onnxmerge.passes.refit import set_weights_and_bias, stacked, weights_and_bias
from onnxmerge.passes.transport import TransportAverage
from onnxmerge.runtime.activations import BATCH, Samples, lockstep
from onnxmerge.runtime.patches import Positions, channel_axis, grid_of, input_rows, positions_needed

DAMPING = 1e-6
_ENTRIES = 1 << 26
"""Entries of all Hessians that are gathered in one walk through the samples (512 MiB); one layer may have more."""


class HessianAverage(oir.passes.InPlacePass):
    """Fuse the layers by MTZ's rule and everything else by `TransportAverage`.

    Transposed convolutions, and layers that a partner has not, are averaged too.

    Args:
        partners: the other networks.
        spaces: of the model it is called on, without blocks.
        samples: what each network reads, that model first.
        count: number of samples of each.
        weight: a_1, that of the model; the partners have their own.
        seed: of the sampled positions.
        threads: for onnxruntime.
    """

    preserves = "approximate"

    def __init__(
        self,
        partners: Sequence[MappedPartner],
        spaces: Sequence[Space],
        samples: Sequence[Samples],
        count: int,
        weight: float = 1.0,
        *,
        seed: int = 0,
        threads: int | None = None,
    ):
        self.partners = partners
        self.spaces = spaces
        self.samples = samples
        self.count = count
        self.weight = weight
        self.seed = seed
        self.threads = threads

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Gather the inputs of all networks as they are, then rewrite the model."""
        original = model.clone()
        TransportAverage(self.partners, self.spaces, self.weight)(model)
        arrays = [transported_arrays(original, partner, self.spaces) for partner in self.partners]
        fused = {layer.name: layer for layer in find_layers(model)}
        shares = [self.weight, *(partner.weight for partner in self.partners)]
        for layers in _portions([layer for layer in find_layers(original) if self._fits(layer)]):
            moments = [self._moments(original, None, layers, self.samples[0])]
            for partner, samples in zip(self.partners, self.samples[1:], strict=True):
                moments.append(self._moments(original, partner, layers, samples))
            for number, layer in enumerate(layers):
                weights = [weights_and_bias(layer), *(_stacked(layer, own) for own in arrays)]
                solution = solve_hessian([own[number] for own in moments], weights, shares)
                set_weights_and_bias(fused[layer.name], solution)
        return oir.passes.PassResult(model, modified=True)

    def _fits(self, layer: Layer) -> bool:
        constants = [layer.name, *([] if layer.bias is None else [layer.bias.name or ""])]
        values = [layer.input.name or "", layer.linear.name or ""]
        return layer.op != "ConvTranspose" and all(
            set(values) <= set(partner.values) and set(constants) <= set(partner.constants) for partner in self.partners
        )

    def _moments(
        self, model: oir.Model, partner: MappedPartner | None, layers: Sequence[Layer], samples: Samples
    ) -> list[np.ndarray]:
        """For each layer X'X / n [groups, fan in + 1, fan in + 1] in the partner, in our channels; or in the model.

        The last row and column are zero for a layer without bias.
        """
        network, names = (model, None) if partner is None else (partner.model, partner.values)
        numbers = {layer.name: number for number, layer in enumerate(find_layers(model))}
        generators = [np.random.default_rng([self.seed, numbers[layer.name]]) for layer in layers]
        sums: list[np.ndarray | float] = [0.0] * len(layers)
        rows, unknowns = [0] * len(layers), [weights_and_bias(layer).shape[1] for layer in layers]
        wanted = [value.name or "" for layer in layers for value in (layer.input, layer.linear)]
        read = [name if names is None else names[name] for name in wanted]
        positions: dict[int, Positions] = {}
        seen = 0
        for (values,) in lockstep((network, samples, list(dict.fromkeys(read))), threads=self.threads):
            if seen % BATCH == 0:
                positions = {}
            seen += len(next(iter(values.values())))
            for number, layer in enumerate(layers):
                inputs, outputs = (values[name] for name in read[2 * number : 2 * number + 2])
                if partner is not None:
                    inputs = carry_value(layer.input.name or "", inputs, partner, self.spaces)
                grid = grid_of(outputs, channel_axis(layer))
                needed = positions_needed(unknowns[number], self.count)
                if number not in positions:
                    positions[number] = Positions.sample(generators[number], grid, needed)
                x = input_rows(layer, inputs, positions[number]).astype(np.float64)
                ones = np.full((*x.shape[:2], 1), 0.0 if layer.bias is None else 1.0)
                x = np.concatenate([x, ones], axis=2)
                sums[number] += x.transpose(0, 2, 1) @ x
                rows[number] += x.shape[1]
        return [np.asarray(total) / count for total, count in zip(sums, rows, strict=True)]


def _stacked(layer: Layer, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    return stacked(layer, arrays[layer.name], None if layer.bias is None else arrays[layer.bias.name or ""])


def _portions(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """The layers in order, as many at a time as `_ENTRIES` allows."""
    portion: list[Layer] = []
    entries = 0
    for layer in layers:
        groups, unknowns, _ = weights_and_bias(layer).shape
        if portion and entries + groups * unknowns**2 > _ENTRIES:
            yield portion
            portion, entries = [], 0
        portion.append(layer)
        entries += groups * unknowns**2
    if portion:
        yield portion


def solve_hessian(moments: Sequence[np.ndarray], weights: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """The weights that change the networks' layers least in sum.

    Args:
        moments: for each network X'X / n, [groups, fan in, fan in].
        weights: for each network its own weights [groups, fan in, outputs], in one channel order.
        shares: a_t.

    Returns:
        [groups, fan in, outputs]
    """
    first = weights[0]
    total, pull = np.zeros_like(moments[0]), np.zeros_like(first)
    for own, hessian in zip(weights, _hessians(moments, shares), strict=True):
        total += hessian
        pull += hessian @ (own - first)
    return first + np.linalg.solve(total, pull)


def functional_difference(
    moments: Sequence[np.ndarray], ours: np.ndarray, theirs: np.ndarray, shares: Sequence[float] = (1.0, 1.0)
) -> np.ndarray:
    """What sharing a neuron costs at best (eq. 12), for every neuron of theirs with every one of ours.

    Args:
        moments: X'X / n in our network and in theirs, [fan in, fan in].
        ours: weights [fan in, n], a column for each neuron.
        theirs: weights [fan in, m] of the same inputs.
        shares: a_t of the two networks.

    Returns:
        [m, n], a cost for `assign` or `transport` in place of the paper's greedy choice.
    """
    first, second = (hessian[0] for hessian in _hessians([own[None] for own in moments], shares))
    parallel = first @ np.linalg.solve(first + second, second)
    parallel = (parallel + parallel.T) / 2
    own, other = (np.einsum("fo,fo->o", w, parallel @ w) for w in (ours, theirs))
    return np.maximum(other[:, None] + own - 2 * theirs.T @ parallel @ ours, 0) / 2


def _hessians(moments: Sequence[np.ndarray], shares: Sequence[float]) -> list[np.ndarray]:
    """a_t (M_t + DAMPING s I) for each network, [groups, fan in, fan in]."""
    size = moments[0].shape[-1]
    scale = np.mean([np.trace(own, axis1=1, axis2=2) / size for own in moments], axis=0)
    damping = DAMPING * np.where(scale > 0, scale, 1.0)[:, None, None] * np.eye(size)
    return [share * (own + damping) for own, share in zip(moments, shares, strict=True)]
