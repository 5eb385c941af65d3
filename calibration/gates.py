"""Hard-concrete gates: zeros and ones that gradients can learn.

With s = sigmoid((log u - log(1 - u) + log alpha) / beta), u uniform in (0, 1), the gate is

    g = min(1, max(0, s (zeta - gamma) + gamma)),

which is exactly 0 and exactly 1 with positive probability, and P[g > 0] = sigmoid(log alpha - beta log(-gamma / zeta)).
Where nothing is drawn, the gate is the same with sigmoid(log alpha) for s.

Source: Louizos, Welling and Kingma, Learning sparse neural networks through L0 regularization, ICLR 2018, equations 10
to 13.
"""

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 1.0
"""log alpha of a fresh gate: it is open with a probability of 0.93."""
SPREAD = 0.01
"""Standard deviation of log alpha among fresh gates."""
SPEED = math.sqrt(10)
"""What is trained is not log alpha but this much less: gates are to be decided while weights only adapt. Plain gradient
descent then moves log alpha by ten times the learning rate, as Pašen and Boža have it, and Adam by the root of ten."""

_QUANTILES = 64


class HardConcrete(torch.nn.Module):
    """A vector of gates."""

    def __init__(self, count: int, seed: int):
        """`count` fresh gates."""
        super().__init__()
        drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        self.scaled = torch.nn.Parameter(1 + SPREAD / SPEED * drawn)

    @property
    def log_alpha(self) -> Tensor:
        """[gates] The larger, the more a gate is open."""
        return START + SPEED * (self.scaled - 1)

    def draw(self, samples: int) -> Tensor:
        """[samples, gates] Gates drawn for each sample, from torch's generator."""
        u = torch.rand(samples, len(self.scaled), device=self.scaled.device).clamp(1e-6, 1 - 1e-6)
        return _stretched((u.logit() + self.log_alpha) / BETA)

    def settled(self) -> Tensor:
        """[gates] The gates where nothing is drawn."""
        return _stretched(self.log_alpha)

    def moments(self) -> tuple[Tensor, Tensor]:
        """[gates] Mean and variance of what `draw` draws, over equally likely u."""
        u = (torch.arange(_QUANTILES, device=self.scaled.device) + 0.5) / _QUANTILES
        drawn = _stretched((u.logit()[:, None] + self.log_alpha) / BETA)
        return drawn.mean(0), drawn.var(0, correction=0)

    def probability(self) -> Tensor:
        """[gates] P[g > 0]."""
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA))


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def growing_weight(share: float) -> float:
    """lambda, the weight of the half loss, after `share` (0 to 1) of the steps.

    It grows by 0.05 sqrt(lambda) each epoch: too large at first, it would half close every gate; too small at last,
    more than half would stay open (Pašen and Boža, figure 5). They learn gates in 150 epochs, so 150 equal parts of the
    steps count as an epoch each.
    """
    weight = 0.01
    for _ in range(1 + round(149 * share)):
        weight += 0.05 * math.sqrt(weight)
    return weight
