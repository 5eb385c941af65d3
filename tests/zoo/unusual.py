"""Blocks where the order or the grouping of channels matters, or where channels meet in uncommon ways.

Each is a convolutional net around one such block. The law must hold for all of them; how much may move differs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.layers import ConvNorm, PooledClassifier

WIDTH = 24


class _ChannelConvolution(nn.Module):
    """ECA: a convolution along the channels of the pooled map, so that neighbours matter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        gate = self.conv(pooled).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(gate)


class _SpatialGate(nn.Module):
    """CBAM: the mean and the largest over all channels gate each place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.conv(pooled))


class _SelectiveKernel(nn.Module):
    """SK: a softmax over two branches, for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = ConvNorm(WIDTH, WIDTH), ConvNorm(WIDTH, WIDTH, 5)
        self.squeeze = nn.Linear(WIDTH, 10)
        self.spread = nn.ModuleList(nn.Linear(10, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([self.left(x), self.right(x)], dim=1)
        code = torch.relu(self.squeeze(maps.sum(1).mean((2, 3))))
        weights = torch.softmax(torch.stack([layer(code) for layer in self.spread], dim=1), dim=1)
        return (maps * weights.unsqueeze(-1).unsqueeze(-1)).sum(1)


class _SplitAttention(nn.Module):
    """ResNeSt: two branches in one grouped convolution, a softmax over the branches after a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=2)
        self.squeeze, self.spread = nn.Conv2d(WIDTH, 10, 1), nn.Conv2d(10, 2 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(torch.relu(self.conv(x)), WIDTH, dim=1)
        code = torch.relu(self.squeeze(functional.adaptive_avg_pool2d(parts[0] + parts[1], 1)))
        weights = torch.softmax(self.spread(code).view(x.size(0), 2, WIDTH), dim=1).view(x.size(0), -1, 1, 1)
        left, right = torch.split(weights, WIDTH, dim=1)
        return left * parts[0] + right * parts[1]


class _NonLocal(nn.Module):
    """Attention between places: views to [batch, channels, places], two products."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(WIDTH, 10, 1), nn.Conv2d(WIDTH, 10, 1), nn.Conv2d(WIDTH, 14, 1)
        self.out = nn.Conv2d(14, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.size()
        query, key, value = (layer(x).view(batch, -1, height * width) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(torch.bmm(query.permute(0, 2, 1), key), dim=-1)
        return x + self.out(torch.bmm(value, weights.permute(0, 2, 1)).view(batch, 14, height, width))


class _ChannelAttention(nn.Module):
    """Attention between channels: the products are [channels, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        weights = torch.softmax(torch.bmm(flat, flat.transpose(1, 2)) / flat.size(2), dim=-1)
        return x + torch.bmm(weights, flat).view_as(x)


class _Modulation(nn.Module):
    """FiLM: a dense layer makes a scale and a shift for each channel, cut from one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.code(x.mean((2, 3))).chunk(2, dim=1)
        return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class _DynamicFilter(nn.Module):
    """A convolution whose filters are a computed mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(2, WIDTH, WIDTH, 3, 3))
        self.choose = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.softmax(self.choose(x.mean((0, 2, 3))), dim=0).view(2, 1, 1, 1, 1)
        return functional.conv2d(x, (chosen * self.bank).sum(0), padding=1) / 20


class _SplitChain(nn.Module):
    """Res2Net: the channels in four parts, each convolved with the sum of itself and the part before."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(WIDTH // 4, WIDTH // 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, WIDTH // 4, 1)
        outs = [parts[0]]
        for conv, part in zip(self.convs, parts[1:], strict=True):
            outs.append(conv(part if len(outs) == 1 else part + outs[-1]))
        return torch.cat(outs, 1)


class _Ghost(nn.Module):
    """GhostNet: cheap depthwise copies beside the real channels."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = ConvNorm(WIDTH, WIDTH // 2, 1), ConvNorm(WIDTH // 2, WIDTH // 2, 3, 1, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], dim=1)


class _Unshuffle(nn.Module):
    """Pixels become channels, and back after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * WIDTH, 4 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.pixel_shuffle(torch.relu(self.conv(functional.pixel_unshuffle(x, 2))), 2)


class _Normalised(nn.Module):
    """L2 norm over channels, as in face recognition, with a learned scale (SSD)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) * self.scale.view(1, -1, 1, 1)


class _TemporalBranch(nn.Module):
    """Causal one-dimensional convolutions over the flattened places: padded on both sides, cut on one; gated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, 2 * WIDTH, 3, padding=4, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(2))[:, :, :-4]
        return (functional.glu(y, dim=1)).view_as(x)


class LearnedQueries(nn.Module):
    """DETR, Perceiver: learned queries read the map by attention, and the map reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(7, WIDTH))
        self.read = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.write = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        queries = self.queries.unsqueeze(0).expand(x.size(0), -1, -1)
        read = self.norm(queries + self.read(queries, places, places)[0])
        return x + self.write(places, read, read)[0].transpose(1, 2).view_as(x)


class _Siamese(nn.Module):
    """One set of layers applied twice, and the difference of what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(ConvNorm(WIDTH, 18), nn.Conv2d(18, WIDTH // 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.shared(x), self.shared(x.flip(3))
        return torch.cat([(left - right).abs(), left * right], 1)


class _Patchwise(nn.Module):
    """MobileViT: the map unfolded into 2x2 patches, a dense layer over their channels, folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        y = x.reshape(batch * channels * height // 2, 2, width // 2, 2).transpose(1, 2)
        y = y.reshape(batch, channels, height * width // 4, 4).transpose(1, 3)
        y = (y + torch.tanh(self.dense(self.norm(y)))).transpose(1, 3)
        y = y.reshape(batch * channels * height // 2, width // 2, 2, 2).transpose(1, 2)
        return y.reshape(batch, channels, height, width)


class _RecurrentRows(nn.Module):
    """Every row read from both sides by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch * height, width, channels)
        return self.gru(rows)[0].view(batch, height, width, channels).permute(0, 3, 1, 2)


class _WeightedSum(nn.Module):
    """BiFPN: maps summed with learned positive weights that add up to one; a pooled map among them, upsampled."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(2))
        self.conv = ConvNorm(WIDTH, WIDTH, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        return weights[0] * x + weights[1] * functional.interpolate(self.conv(x), size=x.shape[2:])


def _einsum(x: Tensor) -> Tensor:
    """Gram matrix of the channels applied to them, by Einsum."""
    gram = torch.einsum("bchw,bdhw->bcd", x, x) / (x.size(2) * x.size(3))
    return torch.einsum("bcd,bdhw->bchw", gram, x) / 4


def _maxout(x: Tensor) -> Tensor:
    """The largest of each pair of neighbouring channels, beside the mean of both."""
    pairs = x.view(x.size(0), WIDTH // 2, 2, x.size(2), x.size(3))
    return torch.cat([pairs.max(2).values, pairs.mean(2)], 1)


def _first_half_twice(x: Tensor) -> Tensor:
    return torch.cat([x[:, : WIDTH // 2], x[:, : WIDTH // 2].tanh()], 1)


def _ranked(x: Tensor) -> Tensor:
    """Each place keeps the channels that are among its five largest."""
    least = x.topk(5, dim=1).values[:, -1:]
    return x * (x >= least).to(x.dtype)


def _chosen_channels(x: Tensor) -> Tensor:
    """Channels by a list of indices: some twice, some never."""
    order = [5, 3, 3, 0, *range(4, WIDTH)]
    return x[:, order]


BLOCKS: dict[str, Callable[[], nn.Module | Callable[[Tensor], Tensor]]] = {
    "channel_convolution": _ChannelConvolution,
    "spatial_gate": _SpatialGate,
    "selective_kernel": _SelectiveKernel,
    "split_attention": _SplitAttention,
    "non_local": _NonLocal,
    "channel_attention": _ChannelAttention,
    "modulation": _Modulation,
    "dynamic_filter": _DynamicFilter,
    "split_chain": _SplitChain,
    "ghost": _Ghost,
    "unshuffle": _Unshuffle,
    "normalised": _Normalised,
    "temporal_branch": _TemporalBranch,
    "siamese": _Siamese,
    "patchwise": _Patchwise,
    "recurrent_rows": _RecurrentRows,
    "weighted_sum": _WeightedSum,
    "gated": lambda: lambda x: functional.glu(torch.cat([x, x.roll(1, 3)], 1), dim=1),
    "local_response_norm": lambda: nn.LocalResponseNorm(5, alpha=1.0),
    "one_group_norm": lambda: nn.GroupNorm(1, WIDTH),
    "softmax_over_channels": lambda: nn.Softmax(dim=1),
    "flipped_channels": lambda: lambda x: x + x.flip(1).tanh(),
    "rolled_channels": lambda: lambda x: x + x.roll(3, 1).tanh(),
    "running_sum": lambda: lambda x: x.cumsum(1) / 5,
    "repeated_channels": lambda: lambda x: x.repeat_interleave(2, 1)[:, WIDTH // 2 : -WIDTH // 2],
    "tiled_channels": lambda: lambda x: x.repeat(1, 2, 1, 1)[:, 3 : 3 + WIDTH],
    "einsum": lambda: _einsum,
    "maxout": lambda: _maxout,
    "first_half_twice": lambda: _first_half_twice,
    "ranked": lambda: _ranked,
    "chosen_channels": lambda: _chosen_channels,
    "swapped_axes": lambda: lambda x: x * x.mean((2, 3)).unsqueeze(1).unsqueeze(1).mean(3, keepdim=True),
    "largest_index": lambda: lambda x: x * (1 + x.argmax(1, keepdim=True).to(x.dtype) / WIDTH),
    "standardised": lambda: lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 0.1),
}
"""Name -> makes the block, from WIDTH maps to WIDTH maps."""


class Around(nn.Module):
    """Two convolutions, the block, a convolution, a pooled classifier."""

    def __init__(self, block: Callable[[], nn.Module | Callable[[Tensor], Tensor]]):
        super().__init__()
        self.before = nn.Sequential(ConvNorm(3, 14, 3, 2), nn.Conv2d(14, WIDTH, 3, padding=1), nn.LeakyReLU(0.2))
        self.block = block()
        self.after = nn.Sequential(ConvNorm(WIDTH, 20), PooledClassifier(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.before(x)))
