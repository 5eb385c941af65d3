"""Normalisations. Running statistics stay what they were, unless the operators of `IN_TRAINING` are asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, Operator, operator

EPSILON = 1e-5
MOMENTUM = 0.1
"""Running statistics come nearer to those of each batch by this share."""


@operator("BatchNormalization")
def batch_normalisation(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """`scale (x - mean) / sqrt(variance + epsilon) + bias`, each vector along axis 1."""
    return _batch_norm(attributes, x, scale, bias, mean, variance, training=False)


def batch_normalisation_in_training(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """The same with the batch's own statistics; `mean` and `variance` follow them in place."""
    return _batch_norm(attributes, x, scale, bias, mean, variance, training=True)


IN_TRAINING: dict[str, Operator] = {"BatchNormalization": batch_normalisation_in_training}
"""Operators that differ while batch statistics are used."""


@operator("InstanceNormalization")
def instance_normalisation(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each channel of each sample to mean 0 and variance 1, then `scale` and `bias`, both [C]."""
    return _group_norm(x, x.shape[1], scale, bias, attributes.get("epsilon", EPSILON))


@operator("GroupNormalization")
def group_normalisation(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each group of channels to mean 0 and variance 1; `scale` and `bias` are [groups] before opset 21, [C] since."""
    groups = attributes["num_groups"]
    if scale.shape[0] != x.shape[1]:
        scale, bias = (vector.repeat_interleave(x.shape[1] // groups) for vector in (scale, bias))
    return _group_norm(x, groups, scale, bias, attributes.get("epsilon", EPSILON))


@operator("LayerNormalization")
def layer_normalisation(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """All axes from `axis` on to mean 0 and variance 1 together; `scale` and `bias` broadcast."""
    axis, epsilon = attributes.get("axis", -1) % x.dim(), attributes.get("epsilon", EPSILON)
    normalised = x.shape[axis:]
    if scale.shape == normalised and (bias is None or bias.shape == normalised):
        return F.layer_norm(x, normalised, scale, bias, epsilon)
    y = F.layer_norm(x, normalised, eps=epsilon) * scale
    return y if bias is None else y + bias


@operator("LpNormalization")
def lp_normalisation(attributes: Attributes, x: Tensor) -> Tensor:
    """Divide by the L1 or L2 norm along one axis."""
    axis = attributes.get("axis", -1)
    return x / torch.linalg.vector_norm(x, ord=attributes.get("p", 2), dim=axis, keepdim=True)


@operator("LRN")
def local_response_normalisation(attributes: Attributes, x: Tensor) -> Tensor:
    """`x / (bias + alpha / size * sum of squares of `size` neighbouring channels) ** beta`."""
    size = attributes["size"]
    squares = F.pad((x * x).flatten(2).unsqueeze(1), (0, 0, (size - 1) // 2, size // 2))
    nearby = F.avg_pool2d(squares, (size, 1), stride=1).squeeze(1).reshape(x.shape)
    alpha, beta, bias = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75), attributes.get("bias", 1.0)
    return x / (bias + alpha * nearby) ** beta


def _batch_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, training: bool
) -> Tensor:
    if attributes.get("training_mode", 0):
        raise NotImplementedError("training_mode is set; export the network for inference")
    epsilon = attributes.get("epsilon", EPSILON)
    return F.batch_norm(x, mean, variance, scale, bias, training=training, momentum=MOMENTUM, eps=epsilon)


def _group_norm(x: Tensor, groups: int, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    # On channels-last tensors torch subtracts two large sums; on contiguous ones it loses no digits.
    return torch.group_norm(x.contiguous(), groups, scale, bias, epsilon)
