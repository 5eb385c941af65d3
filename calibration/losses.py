"""What a merged network is asked to match: its teachers' outputs and feature maps, and labels where there are any.

All functions return one scalar tensor, the mean over the batch. z and f are the merged network's outputs and feature
maps, z_t and f_t the teacher's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12


def kl(z: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z / T)) for logits [N, classes]; T^2 keeps gradients alike for every T.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    student = torch.log_softmax(z / temperature, dim=1)
    teacher = torch.log_softmax(z_t / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def logit_error(z: Tensor, z_t: Tensor, variance: float) -> Tensor:
    """mean (z - z_t)^2 / Var z_t, for outputs of any shape: 0 for a copy, 1 for whoever predicts the mean.

    `variance` is Var z_t over many samples: a batch may hold a single one.
    """
    return (z - z_t).square().mean() / (variance + _TINY)


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)[label] for logits [N, classes] and class numbers [N]: L_c of Zippering MobileNets, eq. 2."""
    return F.cross_entropy(z, labels)


def squared_error(z: Tensor, y: Tensor) -> Tensor:
    """mean (z - y)^2 for outputs and targets of any one shape."""
    return F.mse_loss(z, y)


def feature_l1(f: Tensor, f_t: Tensor, size: Tensor) -> Tensor:
    """mean |f - f_t| / mean |f_t|: L_d of Zippering MobileNets, eq. 2, made comparable between layers.

    `size` is mean |f_t| over the whole batch, of which f and f_t may be one process's part.
    """
    return (f - f_t).abs().mean() / (size + _TINY)


def feature_l2(f: Tensor, f_t: Tensor, size: Tensor) -> Tensor:
    """mean (f - f_t)^2 / mean f_t^2: the squared relative error; `size` is mean f_t^2 over the whole batch."""
    return (f - f_t).square().mean() / (size + _TINY)


FEATURES = {
    "l1": (feature_l1, lambda f_t: f_t.abs().mean()),
    "l2": (feature_l2, lambda f_t: f_t.square().mean()),
}
"""By `Settings.feature_norm`: the error of a feature map, and the size it is relative to."""
