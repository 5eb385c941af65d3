"""A Swin transformer: windows, cyclic shift, relative position bias, patch merging."""

import torch
from torch import Tensor, nn

from zoo.transformers import mlp


def _windows(x: Tensor, size: int) -> Tensor:
    """[N, H, W, C] to [N * windows, size, size, C]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, channels)


def _whole(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `_windows`."""
    x = windows.view(-1, height // size, width // size, size, size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, windows.shape[-1])


def _relative_index(size: int) -> Tensor:
    """[size², size²]: which row of the bias table a pair of positions reads."""
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    offset = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + size - 1
    return offset[..., 0] * (2 * size - 1) + offset[..., 1]


class _WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, size: int):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        self.register_buffer("index", _relative_index(size))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, tokens, width = x.shape
        parts = self.qkv(x).reshape(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        scores = (query * (width // self.heads) ** -0.5) @ key.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            scores = scores.view(-1, count, self.heads, tokens, tokens) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, tokens, tokens)
        return self.project((scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(rows, tokens, width))


class _SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, resolution: int, size: int, shift: int):
        super().__init__()
        self.resolution, self.size, self.shift = resolution, size, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = _WindowAttention(width, heads, size), mlp(width, 2 * width + 10)
        self.register_buffer("mask", self._mask() if shift else None)

    def _mask(self) -> Tensor:
        region = torch.zeros(1, self.resolution, self.resolution, 1)
        spans = (slice(0, -self.size), slice(-self.size, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((r, c) for r in spans for c in spans):
            region[:, rows, columns, :] = number
        flat = _windows(region, self.size).view(-1, self.size**2)
        return torch.where(flat.unsqueeze(1) == flat.unsqueeze(2), 0.0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x).view(batch, self.resolution, self.resolution, width)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = _windows(y, self.size).view(-1, self.size**2, width)
        y = self.attention(y, self.mask).view(-1, self.size, self.size, width)
        y = _whole(y, self.size, self.resolution, self.resolution)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y.view(batch, tokens, width)
        return x + self.mlp(self.norm2(x))


class _PatchMerging(nn.Module):
    def __init__(self, width: int, resolution: int):
        super().__init__()
        self.resolution = resolution
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        x = x.view(batch, self.resolution, self.resolution, width)
        corners = [x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]]
        return self.reduction(self.norm(torch.cat(corners, -1).view(batch, -1, 4 * width)))


class Swin(nn.Module):
    """Two stages of a plain and a shifted block each, patch merging between them."""

    def __init__(self, width: int = 18, heads: int = 3):
        super().__init__()
        self.patches, self.start = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            *(_SwinBlock(width, heads, 8, 4, shift) for shift in (0, 2)),
            _PatchMerging(width, 8),
            *(_SwinBlock(2 * width, 2 * heads, 4, 2, shift) for shift in (0, 1)),
        )
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(self.patches(x).flatten(2).transpose(1, 2))
        x = self.norm(self.blocks(x)).transpose(1, 2)
        return self.head(torch.flatten(x.mean(-1), 1))
