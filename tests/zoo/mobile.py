"""Networks for small devices: depthwise convolutions, inverted residuals, channel shuffles."""

import torch
from torch import Tensor, nn

from zoo.layers import ConvNorm, PooledClassifier


class MobileNetV1(nn.Sequential):
    """Depthwise and pointwise convolutions in turn."""

    def __init__(self) -> None:
        steps: list[nn.Module] = [ConvNorm(3, 12, 3, 2)]
        for inputs, outputs, stride in ((12, 24, 1), (24, 40, 2), (40, 40, 1), (40, 72, 2)):
            steps += [ConvNorm(inputs, inputs, 3, stride, inputs), ConvNorm(inputs, outputs, 1)]
        super().__init__(*steps, PooledClassifier(72))


class _Gate(nn.Module):
    """Squeeze-and-excitation by 1x1 convolutions."""

    def __init__(self, channels: int, hidden: int, inner: type[nn.Module], outer: type[nn.Module]):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(channels, hidden, 1), inner(), nn.Conv2d(hidden, channels, 1), outer())

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.pool(x)) * x


class _InvertedResidual(nn.Module):
    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        kernel: int,
        stride: int,
        activation: type[nn.Module],
        gate: nn.Module | None = None,
    ):
        super().__init__()
        wide = [] if hidden == inputs else [ConvNorm(inputs, hidden, 1, activation=activation)]
        deep = ConvNorm(hidden, hidden, kernel, stride, hidden, activation)
        narrow = ConvNorm(hidden, outputs, 1, activation=None)
        self.steps = nn.Sequential(*wide, deep, *([] if gate is None else [gate]), narrow)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.skip else self.steps(x)


class MobileNetV2(nn.Sequential):
    """Inverted residuals with linear bottlenecks and ReLU6."""

    def __init__(self) -> None:
        steps: list[nn.Module] = [ConvNorm(3, 12, 3, 2, activation=nn.ReLU6)]
        inputs = 12
        for expansion, outputs, stride in ((1, 10, 1), (6, 14, 2), (6, 14, 1), (6, 22, 2), (6, 22, 1)):
            steps.append(_InvertedResidual(inputs, expansion * inputs, outputs, 3, stride, nn.ReLU6))
            inputs = outputs
        super().__init__(*steps, ConvNorm(22, 90, 1, activation=nn.ReLU6), PooledClassifier(90))


class MobileNetV3(nn.Sequential):
    """Inverted residuals with squeeze-and-excitation, ReLU and hard-swish; two dense layers at the end."""

    def __init__(self) -> None:
        rows = (
            (3, 12, 12, True, nn.ReLU, 2),
            (3, 44, 14, False, nn.ReLU, 1),
            (5, 52, 22, True, nn.Hardswish, 2),
            (5, 60, 22, True, nn.Hardswish, 1),
        )
        steps: list[nn.Module] = [ConvNorm(3, 12, 3, 2, activation=nn.Hardswish)]
        inputs = 12
        for kernel, hidden, outputs, gated, activation, stride in rows:
            gate = _Gate(hidden, hidden // 4, nn.ReLU, nn.Hardsigmoid) if gated else None
            steps.append(_InvertedResidual(inputs, hidden, outputs, kernel, stride, activation, gate))
            inputs = outputs
        super().__init__(
            *steps,
            *(ConvNorm(22, 90, 1, activation=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(90, 70), nn.Hardswish(), nn.Dropout(), nn.Linear(70, 10)),
        )


class EfficientNet(nn.Sequential):
    """MBConv: inverted residuals with SiLU, 5x5 depthwise filters and a gate sized by the block's input."""

    def __init__(self) -> None:
        steps: list[nn.Module] = [ConvNorm(3, 12, 3, 2, activation=nn.SiLU)]
        inputs = 12
        for expansion, outputs, kernel, stride in ((1, 10, 3, 1), (6, 14, 3, 2), (6, 14, 3, 1), (6, 20, 5, 2)):
            hidden = expansion * inputs
            gate = _Gate(hidden, max(2, inputs // 4), nn.SiLU, nn.Sigmoid)
            steps.append(_InvertedResidual(inputs, hidden, outputs, kernel, stride, nn.SiLU, gate))
            inputs = outputs
        super().__init__(*steps, ConvNorm(inputs, 90, 1, activation=nn.SiLU), PooledClassifier(90))


class _ShuffleUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        read = inputs if stride > 1 else half
        self.left = None
        if stride > 1:
            self.left = nn.Sequential(ConvNorm(inputs, inputs, 3, stride, inputs, None), ConvNorm(inputs, half, 1))
        self.right = nn.Sequential(
            ConvNorm(read, half, 1), ConvNorm(half, half, 3, stride, half, None), ConvNorm(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.left is None:
            kept, read = x.chunk(2, dim=1)
            y = torch.cat((kept, self.right(read)), dim=1)
        else:
            y = torch.cat((self.left(x), self.right(x)), dim=1)
        return _shuffle(y, 2)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleNetV2(nn.Sequential):
    """Units that pass one half of the channels by and shuffle both halves afterwards."""

    def __init__(self) -> None:
        super().__init__(
            *(ConvNorm(3, 14, 3, 2), nn.MaxPool2d(3, 2, 1)),
            *(_ShuffleUnit(14, 28, 2), *(_ShuffleUnit(28, 28, 1) for _ in range(4))),
            *(_ShuffleUnit(28, 52, 2), *(_ShuffleUnit(52, 52, 1) for _ in range(4))),
            *(ConvNorm(52, 90, 1), PooledClassifier(90)),
        )
