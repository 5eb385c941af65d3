"""Detectors: several scales, class and box heads, and reshapes that bring all boxes into one list."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.layers import ConvNorm


class Ssd(nn.Module):
    """Heads on three maps; each is permuted to channels last, viewed as a list of boxes, and concatenated."""

    def __init__(self, classes: int = 4, anchors: int = 2):
        super().__init__()
        self.classes = classes
        widths = (20, 28, 36)
        self.stem = nn.Sequential(ConvNorm(3, 12, 3, 2), ConvNorm(12, 20, 3, 2))
        self.extra = nn.ModuleList(ConvNorm(i, o, 3, 2) for i, o in ((20, 28), (28, 36)))
        self.scores = nn.ModuleList(nn.Conv2d(width, anchors * classes, 3, padding=1) for width in widths)
        self.boxes = nn.ModuleList(nn.Conv2d(width, anchors * 4, 3, padding=1) for width in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.stem(x)]
        for step in self.extra:
            maps.append(step(maps[-1]))
        scores, boxes = [], []
        for features, score, box in zip(maps, self.scores, self.boxes, strict=True):
            scores.append(score(features).permute(0, 2, 3, 1).contiguous().view(x.size(0), -1, self.classes))
            boxes.append(box(features).permute(0, 2, 3, 1).contiguous().view(x.size(0), -1, 4))
        return functional.softmax(torch.cat(scores, 1), dim=-1), torch.cat(boxes, 1)


class RetinaNet(nn.Module):
    """A feature pyramid (upsampled sums) under towers that all scales share; five-axis permutes at the end."""

    def __init__(self, classes: int = 5, anchors: int = 3, width: int = 22):
        super().__init__()
        self.classes = classes
        self.stages = nn.ModuleList(
            [
                nn.Sequential(ConvNorm(3, 14, 3, 2), ConvNorm(14, 20, 3, 2)),
                ConvNorm(20, 28, 3, 2),
                ConvNorm(28, 36, 3, 2),
            ]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(i, width, 1) for i in (20, 28, 36))
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.scores, self.boxes = self._tower(width, anchors * classes), self._tower(width, anchors * 4)

    @staticmethod
    def _tower(width: int, outputs: int) -> nn.Sequential:
        norm = nn.GroupNorm(2, width)
        return nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1), norm, nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        sums = [self.lateral[-1](maps[-1])]
        for features, lateral in zip(maps[-2::-1], list(self.lateral)[-2::-1], strict=True):
            above = functional.interpolate(sums[0], size=features.shape[-2:], mode="nearest")
            sums.insert(0, lateral(features) + above)
        pyramid = [smooth(features) for features, smooth in zip(sums, self.smooth, strict=True)]
        scores = torch.cat([self._listed(self.scores(features), self.classes) for features in pyramid], dim=1)
        boxes = torch.cat([self._listed(self.boxes(features), 4) for features in pyramid], dim=1)
        return scores, boxes

    @staticmethod
    def _listed(x: Tensor, size: int) -> Tensor:
        batch, _, height, width = x.shape
        x = x.view(batch, -1, size, height, width).permute(0, 3, 4, 1, 2)
        return x.reshape(batch, -1, size)


class _Csp(nn.Module):
    """Two 1x1 branches, one with residual bottlenecks, concatenated and mixed."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.left, self.right = (ConvNorm(inputs, half, 1, activation=nn.SiLU) for _ in range(2))
        self.squeeze, self.grow = ConvNorm(half, half, 1, activation=nn.SiLU), ConvNorm(half, half, activation=nn.SiLU)
        self.mix = ConvNorm(2 * half, outputs, 1, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        left = left + self.grow(self.squeeze(left))
        return self.mix(torch.cat((left, self.right(x)), dim=1))


class _SplitCsp(nn.Module):
    """One 1x1 convolution cut in two; every bottleneck's output is kept and concatenated."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.half = outputs // 2
        self.start = ConvNorm(inputs, outputs, 1, activation=nn.SiLU)
        self.steps = nn.ModuleList(ConvNorm(self.half, self.half, activation=nn.SiLU) for _ in range(2))
        self.mix = ConvNorm(4 * self.half, outputs, 1, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.start(x).split((self.half, self.half), 1))
        for step in self.steps:
            maps.append(maps[-1] + step(maps[-1]))
        return self.mix(torch.cat(maps, 1))


class Yolo(nn.Module):
    """Focus slices, cross-stage blocks, pooling pyramid, a path upwards, and a head that decodes boxes on its grid."""

    def __init__(self, classes: int = 3, anchors: int = 2):
        super().__init__()
        self.anchors, self.size = anchors, classes + 5
        self.focus = ConvNorm(12, 14, activation=nn.SiLU)
        self.stage1 = nn.Sequential(ConvNorm(14, 22, 3, 2, activation=nn.SiLU), _Csp(22, 22))
        self.stage2 = nn.Sequential(ConvNorm(22, 34, 3, 2, activation=nn.SiLU), _SplitCsp(34, 34))
        self.before, self.after = ConvNorm(34, 17, 1), ConvNorm(4 * 17, 34, 1)
        self.lateral, self.up = ConvNorm(34, 22, 1, activation=nn.SiLU), nn.Upsample(scale_factor=2, mode="nearest")
        self.join = _Csp(44, 22)
        self.heads = nn.ModuleList(nn.Conv2d(width, anchors * self.size, 1) for width in (22, 34))
        self.register_buffer("anchor_sizes", torch.tensor([[[10.0, 13], [33, 23]], [[30.0, 61], [62, 45]]]))

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        fine = self.stage1(self.focus(torch.cat(corners, 1)))
        coarse = self.before(self.stage2(fine))
        pools = [coarse]
        for _ in range(3):
            pools.append(functional.max_pool2d(pools[-1], 5, 1, 2))
        coarse = self.after(torch.cat(pools, 1))
        fine = self.join(torch.cat([self.up(self.lateral(coarse)), fine], 1))
        decoded = []
        for features, head, sizes, stride in zip((fine, coarse), self.heads, self.anchor_sizes, (4, 8), strict=True):
            y = head(features)
            batch, _, rows, columns = y.shape
            y = y.view(batch, self.anchors, self.size, rows, columns).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            grid_y, grid_x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            grid = torch.stack((grid_x, grid_y), 2).view(1, 1, rows, columns, 2)
            centres = (y[..., 0:2] * 2 - 0.5 + grid) * stride
            extents = (y[..., 2:4] * 2) ** 2 * sizes.view(1, self.anchors, 1, 1, 2)
            decoded.append(torch.cat((centres, extents, y[..., 4:]), -1).view(batch, -1, self.size))
        return torch.cat(decoded, 1)
