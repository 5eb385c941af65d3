"""Gates of one channel space alone, learned from what layers read there: no network is run.

With u the channels of several networks side by side, K their covariance where they are read, and L L' what reads them
(see `select_channels`), the networks read L' u. Through gates g and weights B, which start from L, they read B' (g * u)
instead, at the mean error

    E |L' u - B' (g * u)|^2 = tr(A' K A) + sum_c K_cc Var(g_c) |B_c|^2,    A = L - diag(E g) B,

here as a share of tr(L' K L). B and g are learned together, with the half loss (see `gating`); so a channel is worth
what the others cannot make up for. Pašen and Boža name learning gates layer by layer as future work.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxmerge.calibration.gates import HardConcrete, growing_weight
from onnxmerge.passes.select_channels import Reading

STEPS = 300
RATE = 3e-2


@dataclass(frozen=True)
class LocalGates:
    """The gates of one space.

    Attributes:
        log_alpha: [n] the importance of each channel.
        probability: [n] P[g > 0].
    """

    log_alpha: np.ndarray
    probability: np.ndarray


def learn_local_gates(reading: Reading, share: float, seed: int) -> LocalGates:
    """The gates of the n channels of `reading`, of which about `share` are to be open."""
    covariance = torch.from_numpy(np.asarray(reading.covariance, np.float32))
    root = torch.from_numpy(np.asarray(reading.root, np.float32))
    total = max(float((root * (covariance @ root)).sum()), 1e-30)
    gates = HardConcrete(len(covariance), seed)
    size = max(float(root.square().mean().sqrt()), 1e-30)
    weights = torch.nn.Parameter(root / size)
    optimiser = torch.optim.Adam([weights, gates.scaled], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for step in range(STEPS):
        optimiser.zero_grad(set_to_none=True)
        mean, variance = gates.moments()
        error = _error(covariance, root, size * weights, mean, variance) / total
        half = (share - gates.probability().mean()).square()
        (error + growing_weight(step / STEPS) * half).backward()
        optimiser.step()
        schedule.step()
    found = (tensor.detach().numpy().astype(np.float64) for tensor in (gates.log_alpha, gates.probability()))
    return LocalGates(*found)


def _error(covariance: Tensor, root: Tensor, weights: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    left = root - mean[:, None] * weights
    drawn = covariance.diagonal() * variance * weights.square().sum(1)
    return (left * (covariance @ left)).sum() + drawn.sum()
