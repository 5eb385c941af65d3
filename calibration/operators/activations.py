"""Activations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, operator, register_plain

register_plain(
    {
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "HardSwish": F.hardswish,
        "Mish": F.mish,
        "Erf": torch.erf,
    }
)


@operator("LeakyRelu")
def leaky_relu(attributes: Attributes, x: Tensor) -> Tensor:
    """`x` where positive, `alpha x` elsewhere."""
    return F.leaky_relu(x, attributes.get("alpha", 0.01))


@operator("PRelu")
def prelu(attributes: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    """`x` where positive, `slope x` elsewhere; `slope` broadcasts from the last axis as in numpy."""
    return torch.where(x < 0, slope * x, x)


@operator("Elu")
def elu(attributes: Attributes, x: Tensor) -> Tensor:
    """`alpha (exp(x) - 1)` where negative."""
    return F.elu(x, attributes.get("alpha", 1.0))


@operator("Celu")
def celu(attributes: Attributes, x: Tensor) -> Tensor:
    """`alpha (exp(x / alpha) - 1)` where negative."""
    return F.celu(x, attributes.get("alpha", 1.0))


@operator("Selu")
def selu(attributes: Attributes, x: Tensor) -> Tensor:
    """`gamma elu(x, alpha)`; the defaults are the specification's."""
    return attributes.get("gamma", 1.0507009873554805) * F.elu(x, attributes.get("alpha", 1.6732632423543772))


@operator("ThresholdedRelu")
def thresholded_relu(attributes: Attributes, x: Tensor) -> Tensor:
    """`x` where above `alpha`, else 0."""
    return F.threshold(x, attributes.get("alpha", 1.0), 0.0)


@operator("HardSigmoid")
def hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    """`alpha x + beta`, clipped to 0..1."""
    return (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(0.0, 1.0)


@operator("Gelu")
def gelu(attributes: Attributes, x: Tensor) -> Tensor:
    """Gaussian error linear unit, exact or by tanh."""
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("Softmax")
def softmax(attributes: Attributes, x: Tensor) -> Tensor:
    """Softmax over one axis."""
    return torch.softmax(x, attributes.get("axis", -1))


@operator("LogSoftmax")
def log_softmax(attributes: Attributes, x: Tensor) -> Tensor:
    """Logarithm of the softmax over one axis."""
    return torch.log_softmax(x, attributes.get("axis", -1))


@operator("Clip")
def clip(attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clip to `low..high`, scalars; either may be missing."""
    return x if low is None and high is None else torch.clamp(x, min=low, max=high)
