"""Residual networks: basic, bottleneck, grouped, with squeeze-and-excitation, with group norm, ConvNeXt."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.layers import PooledClassifier


class SqueezeExcitation(nn.Module):
    """Dense gate for each channel, with the pooled map viewed as a vector and back."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.size()
        gate = self.gate(self.pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return x * gate.expand_as(x)


class _Residual(nn.Module):
    """`branch` added to the input, or to its 1x1 projection where the shape changes."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.branch = branch
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.branch(x) + identity)


class ResNet(nn.Module):
    """Stem, three stages of two blocks, pooled classifier.

    Args:
        widths: of the 3x3 convolutions in each stage.
        expansion: 1 makes basic blocks, more makes bottlenecks with outputs so many times as wide.
        groups: of the bottleneck's 3x3 convolution.
        norm: makes a norm for so many channels.
        excite: hidden size of a squeeze-and-excitation at the end of each branch; 0 for none.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (20, 28, 36),
        expansion: int = 1,
        groups: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        excite: int = 0,
    ):
        super().__init__()
        inputs = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, inputs, 7, 2, 3, bias=False), norm(inputs), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks = []
        for number, width in enumerate(widths):
            for stride in (1 if number == 0 else 2, 1):
                outputs = width * expansion
                steps = self._basic if expansion == 1 else self._bottleneck
                branch = steps(inputs, width, outputs, stride, groups, norm)
                if excite:
                    branch.append(SqueezeExcitation(outputs, excite))
                blocks.append(_Residual(nn.Sequential(*branch), inputs, outputs, stride, norm))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = PooledClassifier(inputs)

    @staticmethod
    def _basic(inputs: int, width: int, outputs: int, stride: int, groups: int, norm: Callable) -> list[nn.Module]:
        return [
            *(nn.Conv2d(inputs, width, 3, stride, 1, bias=False), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 3, 1, 1, bias=False), norm(outputs)),
        ]

    @staticmethod
    def _bottleneck(inputs: int, width: int, outputs: int, stride: int, groups: int, norm: Callable) -> list[nn.Module]:
        return [
            *(nn.Conv2d(inputs, width, 1, bias=False), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class _LayerNormFirst(nn.Module):
    """Layer norm over axis 1, written out."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class _ConvNextBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(nn.functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Depthwise 7x7, then a dense pair on channels-last maps with layer scale; layer norms on either side of axis 1."""

    def __init__(self, widths: tuple[int, ...] = (22, 34)):
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _LayerNormFirst(widths[0])]
        for number, width in enumerate(widths):
            if number:
                steps += [_LayerNormFirst(widths[number - 1]), nn.Conv2d(widths[number - 1], width, 2, 2)]
            steps += [_ConvNextBlock(width), _ConvNextBlock(width)]
        self.features = nn.Sequential(*steps)
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x).mean([-2, -1])))


class _ChannelsLastMix(nn.Module):
    """An island of channels-last code: dense layers, a scale on the last axis, a concat there, and back."""

    def __init__(self, width: int):
        super().__init__()
        self.left, self.right = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1).contiguous()
        y = torch.cat([torch.relu(self.left(y)), torch.sigmoid(self.right(y))], -1) * self.scale
        return x + y.permute(0, 3, 1, 2).contiguous()


class ChannelsLastIsland(nn.Sequential):
    """Convolutions with channels-last code between them."""

    def __init__(self, width: int = 22):
        super().__init__(
            *(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), _ChannelsLastMix(width)),
            *(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), _ChannelsLastMix(width)),
            PooledClassifier(width),
        )
