"""The joint fit of a stem's last layer and the adapters behind it, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxmerge.passes.fit_split import solve_split
from onnxmerge.runtime.statistics import Regression

ROWS, FAN_IN, CHANNELS = 400, 7, 3


def gathered(inputs: np.ndarray, targets: np.ndarray) -> Regression:
    statistics = Regression()
    for part in np.array_split(np.arange(len(inputs)), 3):
        statistics.update(inputs[None, part], targets[part])
    return statistics


def error(weights: np.ndarray, designs: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> float:
    """What is left of all targets behind the best adapters, each task's as a share of its variance."""
    total = 0.0
    for inputs, targets, skip in designs:
        shared = inputs @ weights[:-1] + weights[-1] + (0 if skip is None else skip)
        regressors = np.concatenate([shared, np.ones((len(shared), 1))], axis=1)
        fitted = regressors @ np.linalg.lstsq(regressors, targets, rcond=None)[0]
        total += float(((targets - fitted) ** 2).mean() / targets.var(0).mean())
    return total


@pytest.mark.parametrize("skipped", [False, True])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_it_beats_its_start_and_the_average_target(skipped: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    designs = []
    for _ in range(2):
        inputs = random.normal(size=(ROWS, FAN_IN)) @ random.normal(size=(FAN_IN, FAN_IN))
        targets = inputs @ random.normal(size=(FAN_IN, CHANNELS)) + random.normal(size=CHANNELS)
        designs.append((inputs, targets, random.normal(size=(ROWS, CHANNELS)) if skipped else None))
    joined = [np.concatenate([x, s], 1) if s is not None else x for x, _, s in designs]
    statistics = [gathered(x, z) for x, (_, z, _) in zip(joined, designs, strict=True)]
    start = random.normal(size=(FAN_IN + 1, CHANNELS))
    found = solve_split(statistics, start)
    assert error(found, designs) < error(start, designs)
    pooled = np.concatenate([np.concatenate([x, np.ones((ROWS, 1))], 1) for x, _, _ in designs])
    average = np.linalg.lstsq(pooled, np.concatenate([z for _, z, _ in designs]), rcond=None)[0]
    assert error(found, designs) <= error(average, designs) * 1.05


def test_one_task_is_matched_exactly() -> None:
    """With one task the shared channels can be the task's own, up to the adapter."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(ROWS, FAN_IN))
    targets = inputs @ random.normal(size=(FAN_IN, CHANNELS)) + 1.0
    found = solve_split([gathered(inputs, targets)], random.normal(size=(FAN_IN + 1, CHANNELS)))
    assert error(found, [(inputs, targets, None)]) < 1e-4


def test_two_tasks_that_read_the_same_subspace_are_both_matched() -> None:
    random = np.random.default_rng(1)
    basis = random.normal(size=(FAN_IN, CHANNELS))
    designs = []
    for _ in range(2):
        inputs = random.normal(size=(ROWS, FAN_IN))
        designs.append((inputs, inputs @ basis @ random.normal(size=(CHANNELS, CHANNELS)), None))
    statistics = [gathered(x, z) for x, z, _ in designs]
    found = solve_split(statistics, random.normal(size=(FAN_IN + 1, CHANNELS)))
    assert error(found, designs) < 1e-3
