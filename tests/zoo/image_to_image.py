"""Networks that make images: U-Nets, generators, a style net, super-resolution."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.layers import ConvNorm, Lambda


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvNorm(inputs, outputs), ConvNorm(outputs, outputs))


class UNet(nn.Module):
    """Encoder, decoder, and skips that are concatenated.

    Args:
        bilinear: upsample to the skip's size and pad by the difference, as common code does, instead of transposed
            convolutions.
    """

    def __init__(self, bilinear: bool = False, widths: tuple[int, ...] = (12, 20, 28)):
        super().__init__()
        self.bilinear = bilinear
        self.down = nn.ModuleList(_double(i, o) for i, o in zip((3, *widths[:-1]), widths, strict=True))
        deep = list(reversed(widths))
        self.up, self.join = nn.ModuleList(), nn.ModuleList()
        for below, skip in pairwise(deep):
            self.up.append(nn.Identity() if bilinear else nn.ConvTranspose2d(below, skip, 2, 2))
            self.join.append(_double(skip + (below if bilinear else skip), skip))
        self.out = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for number, step in enumerate(self.down):
            x = step(functional.max_pool2d(x, 2) if number else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = self._pad(self._twice(x), skip) if self.bilinear else up(x)
            x = join(torch.cat([skip, x], dim=1))
        return self.out(x)

    @staticmethod
    def _twice(x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    @staticmethod
    def _pad(x: Tensor, like: Tensor) -> Tensor:
        rows, columns = like.size(2) - x.size(2), like.size(3) - x.size(3)
        return functional.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


class DcganGenerator(nn.Sequential):
    """Transposed convolutions with batch norm from a 1x1 code to a picture."""

    def __init__(self, widths: tuple[int, ...] = (36, 28, 20)):
        steps: list[nn.Module] = []
        inputs, stride, padding = 40, 1, 0
        for width in widths:
            steps.append(nn.ConvTranspose2d(inputs, width, 4, stride, padding, bias=False))
            steps += [nn.BatchNorm2d(width), nn.ReLU(True)]
            inputs, stride, padding = width, 2, 1
        super().__init__(*steps, nn.ConvTranspose2d(inputs, 3, 4, 2, 1, bias=False), nn.Tanh())


class ProjectedGenerator(nn.Module):
    """A dense layer whose output is viewed as maps, then nearest upsampling and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(40, 36 * 5 * 5), nn.BatchNorm1d(36 * 5 * 5), nn.ReLU())
        self.grow = nn.Sequential(
            *(nn.Upsample(scale_factor=2), ConvNorm(36, 28), nn.Upsample(scale_factor=2), ConvNorm(28, 22)),
            *(nn.Conv2d(22, 3, 3, padding=1), nn.Tanh()),
        )

    def forward(self, code: Tensor) -> Tensor:
        return self.grow(self.project(code).view(-1, 36, 5, 5))


def _reflected(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel, stride)]


class _StyleResidual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        norms = [nn.InstanceNorm2d(width, affine=True) for _ in range(2)]
        convs = [_reflected(width, width, 3) for _ in range(2)]
        self.branch = nn.Sequential(*convs[0], norms[0], nn.ReLU(), *convs[1], norms[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


class StyleNet(nn.Sequential):
    """Reflection padding, instance norm with scale and bias, residual blocks, nearest upsampling."""

    def __init__(self) -> None:
        steps: list[nn.Module] = []
        for inputs, outputs, kernel, stride in ((3, 12, 9, 1), (12, 20, 3, 2), (20, 28, 3, 2)):
            steps += [*_reflected(inputs, outputs, kernel, stride), nn.InstanceNorm2d(outputs, affine=True), nn.ReLU()]
        steps += [_StyleResidual(28), _StyleResidual(28)]
        for inputs, outputs in ((28, 20), (20, 12)):
            steps.append(Lambda(lambda x: functional.interpolate(x, scale_factor=2, mode="nearest")))
            steps += [*_reflected(inputs, outputs, 3), nn.InstanceNorm2d(outputs, affine=True), nn.ReLU()]
        super().__init__(*steps, *_reflected(12, 3, 9))


class SubPixelNet(nn.Sequential):
    """Super-resolution: the last convolution's channels become pixels."""

    def __init__(self, factor: int = 3):
        super().__init__(
            *(nn.Conv2d(1, 26, 5, padding=2), nn.ReLU(), nn.Conv2d(26, 20, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(20, factor**2 * 5, 3, padding=1), nn.PixelShuffle(factor), nn.Conv2d(5, 1, 3, padding=1)),
        )
