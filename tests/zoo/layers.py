"""What several architectures share, and random values for everything that training would have moved."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_FAN_IN = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, activation; padded to keep the size at stride 1."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ):
        padding = tuple(size // 2 for size in kernel) if isinstance(kernel, tuple) else kernel // 2
        steps: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*steps, *([] if activation is None else [activation()]))


class PooledClassifier(nn.Sequential):
    """Global average pooling, flatten, one dense layer."""

    def __init__(self, inputs: int, classes: int = 10):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter and every running statistic random values that differ between channels, in place.

    Matrices and filters keep activations near unit scale; biases, scales and statistics are far from 0 and 1, so that
    an array that somebody forgot to permute shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                fan_in = parameter.numel() / parameter.shape[0] if isinstance(module, _FAN_IN) else 2
                parameter.normal_(0, math.sqrt(1.5 / fan_in), generator=generator)
            elif "bias" in name:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
