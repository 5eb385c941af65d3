"""Networks whose maps flow forward: dense, stacked, densely connected, and with parallel branches."""

import torch
from torch import Tensor, nn

from zoo.layers import ConvNorm, PooledClassifier


class Mlp(nn.Sequential):
    """Dense layers with batch norm and dropout on flattened digits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            *(nn.Linear(784, 100), nn.BatchNorm1d(100), nn.ReLU()),
            *(nn.Linear(100, 90), nn.LeakyReLU(0.1), nn.Dropout()),
            *(nn.Linear(90, 70), nn.PReLU(70)),
            nn.Linear(70, 10),
        )


class LeNet(nn.Sequential):
    """LeNet-5: tanh, average pooling, a flatten of 5x5 maps."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
        )


class Vgg(nn.Module):
    """VGG with batch norm: stacks of 3x3 convolutions, a pooled grid that is flattened, three dense layers."""

    def __init__(self) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        inputs = 3
        for width in (20, 28, 0, 36, 36, 0, 44, 44, 0):
            if width == 0:
                steps.append(nn.MaxPool2d(2))
                continue
            steps += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        self.features = nn.Sequential(*steps)
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            *(nn.Linear(44 * 4, 96), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(96, 70), nn.ReLU(True), nn.Dropout()),
            nn.Linear(70, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.pool(self.features(x)), 1)
        return self.classifier(x)


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.conv1(torch.relu(self.norm1(torch.cat(maps, 1))))
        return self.conv2(torch.relu(self.norm2(x)))


class DenseNet(nn.Module):
    """Dense blocks (every layer reads all maps before it) between transitions that halve size and width."""

    def __init__(self, growth: int = 11, layers: tuple[int, ...] = (3, 3)):
        super().__init__()
        width = 2 * growth
        self.stem = nn.Sequential(ConvNorm(3, width, 5, 2), nn.MaxPool2d(3, 2, 1))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for count in layers:
            self.blocks.append(nn.ModuleList(_DenseLayer(width + i * growth, growth) for i in range(count)))
            width += count * growth
            transition = [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False)]
            self.transitions.append(nn.Sequential(*transition, nn.AvgPool2d(2)))
            width //= 2
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), PooledClassifier(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            maps = [x]
            for layer in block:
                maps.append(layer(maps))
            x = transition(torch.cat(maps, 1))
        return self.head(x)


class _Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, left: int, right: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.left, self.right = nn.Conv2d(squeezed, left, 1), nn.Conv2d(squeezed, right, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)


class SqueezeNet(nn.Module):
    """Fire modules, ceil-mode pooling, and a classifier that is a 1x1 convolution before the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(_Fire(24, 10, 20, 26), _Fire(46, 12, 20, 26), nn.MaxPool2d(3, 2, ceil_mode=True), _Fire(46, 14, 36, 30)),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(66, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class _Inception(nn.Module):
    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.one = ConvNorm(inputs, 14, 1)
        self.five = nn.Sequential(ConvNorm(inputs, 11, 1), ConvNorm(11, 13, 5))
        self.three = nn.Sequential(ConvNorm(inputs, 14, 1), ConvNorm(14, 17), ConvNorm(17, 17))
        self.wide = nn.Sequential(ConvNorm(inputs, 12, 1), ConvNorm(12, 12, (1, 7)), ConvNorm(12, 15, (7, 1)))
        self.pool = ConvNorm(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(nn.functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.one(x), self.five(x), self.three(x), self.wide(x), pooled], 1)


class _Reduction(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.left = ConvNorm(inputs, 21, 3, 2)
        self.right = nn.Sequential(ConvNorm(inputs, 15, 1), ConvNorm(15, 19), ConvNorm(19, 23, 3, 2))
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x), self.pool(x)], 1)


class Inception(nn.Module):
    """Inception v3 in small: parallel branches, factorised filters, a pooling branch, a reduction, input scaling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 18, 3, 2), ConvNorm(18, 22))
        self.mixed = nn.Sequential(_Inception(22, 9), _Inception(68, 12), _Reduction(71), _Inception(115, 12))
        self.head = PooledClassifier(71)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0].unsqueeze(1) * 0.458 - 0.03
        second = x[:, 1].unsqueeze(1) * 0.448 - 0.088
        third = x[:, 2].unsqueeze(1) * 0.45 - 0.188
        return self.head(self.mixed(self.stem(torch.cat((first, second, third), 1))))
