"""Keep the best of what was trained so far."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class BestWeights:
    """A copy of the tensors with the least held-out loss so far; at first of the start.

    Attributes:
        step: the step they come from.
        loss: their held-out loss; infinite before the first offer.
        kept: the copies, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors, self.loss = tensors, math.inf
        self._keep(0)

    def offer(self, step: int, loss: float) -> float:
        """Keep the current tensors if `loss` is the least so far (NaN never is); returns `loss`."""
        if loss < self.loss:
            self.loss = loss
            self._keep(step)
        return loss

    def restore(self) -> None:
        """Put the best ones back."""
        copy_into(self._tensors, self.kept)

    def _keep(self, step: int) -> None:
        self.step = step
        self.kept = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}


def copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give every tensor the value of its name; its memory order stays."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
