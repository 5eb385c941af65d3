"""torch's optimisers and schedules, as `Training` names them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from onnxmerge.calibration.settings import Training


def make_optimiser(
    parameters: Sequence[torch.nn.Parameter], settings: Training
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The optimiser that `settings` name, and its learning rate over the steps."""
    sgd = settings.optimiser == "sgd"
    relative = not sgd if settings.relative_rate is None else settings.relative_rate
    rates = [settings.rate * (_magnitude(parameter) if relative else 1.0) for parameter in parameters]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    decay = settings.weight_decay if settings.weight_decay is not None else 5e-4 if sgd else 1e-2
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay)
        if sgd
        else torch.optim.AdamW(groups, weight_decay=decay)
    )
    if (settings.schedule or ("milestones" if sgd else "one-cycle")) == "one-cycle":
        return optimiser, OneCycleLR(optimiser, rates, total_steps=max(settings.steps, 1))
    milestones = [max(round(share * settings.steps), 1) for share in settings.milestones]
    return optimiser, MultiStepLR(optimiser, milestones, settings.gamma)


def _magnitude(parameter: Tensor) -> float:
    """Root mean square of an array, at least 1e-3: Adam's steps are taken relative to it.

    Folded batch norms leave neighbouring layers with weights of very different size (0.007 and 0.6 in one block of a
    ResNet-20); one absolute rate would wreck the one before it moved the other. Adafactor (Shazeer and Stern 2018)
    scales its steps alike.
    """
    return max(float(parameter.detach().square().mean().sqrt()), 1e-3)
