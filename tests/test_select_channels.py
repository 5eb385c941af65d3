"""Selecting channels: exact greedy by brute force, twins, dead channels, ties, wide spaces in rounds."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxmerge.passes.select_channels import Reading, _greedy, _State, predictions, select_channels


def reading(generator: np.random.Generator, channels: int, rank: int | None = None, columns: int = 3) -> Reading:
    """Random channels that `rank` sources span, read by random weights."""
    sources = generator.standard_normal((600, rank or channels))
    values = sources @ generator.standard_normal((rank or channels, channels))
    return Reading(np.cov(values.T).reshape(channels, channels), generator.standard_normal((channels, columns)))


def left(readings: Sequence[Reading], chosen: Sequence[int]) -> float:
    """sum tr(M K_res), from the definition."""
    total = 0.0
    for own in readings:
        k, s = own.covariance, list(chosen)
        residual = k - k[:, s] @ np.linalg.pinv(k[np.ix_(s, s)], rcond=1e-10, hermitian=True) @ k[s] if s else k
        total += float(np.trace(own.root.T @ residual @ own.root))
    return total


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 8), places=st.integers(1, 3), data=st.data())
def test_each_step_takes_the_channel_that_lowers_the_objective_most(seed, channels, places, data):
    generator = np.random.default_rng(seed)
    readings = [reading(generator, channels) for _ in range(places)]
    chosen = select_channels(readings, data.draw(st.integers(1, channels)))
    assert len(set(chosen)) == len(chosen)
    start = left(readings, [])
    for place, channel in enumerate(chosen):
        before = chosen[:place]
        now = left(readings, before)
        best = min(left(readings, [*before, other]) for other in range(channels) if other not in before)
        got = left(readings, [*before, channel])
        assert got <= best + 1e-6 * start
        assert got <= now + 1e-9 * start


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 8))
def test_twins_are_not_both_chosen_while_another_says_more(seed, channels):
    own = reading(np.random.default_rng(seed), channels)
    twice = Reading(np.tile(own.covariance, (2, 2)), np.concatenate([own.root, own.root]))
    chosen = select_channels([twice], channels)
    assert sorted(channel % channels for channel in chosen) == list(range(channels))
    assert chosen[0] < channels  # of equal channels the first; later ones are equal only to rounding


def test_dead_channels_come_last_in_order():
    own = reading(np.random.default_rng(0), 6)
    covariance, root = own.covariance.copy(), own.root.copy()
    covariance[[1, 4]] = covariance[:, [1, 4]] = 0
    root[2] = 0  # read by nobody, yet it says something about others
    chosen = select_channels([Reading(covariance, root)], 6)
    assert chosen[4:] == [1, 4]
    assert sorted(chosen) == list(range(6))


@pytest.mark.parametrize("count", [1, 3, 100])
def test_channels_that_say_nothing_at_all_keep_their_order(count):
    assert select_channels([Reading(np.zeros((120, 120)), np.ones((120, 2)))], count) == list(range(count))


def test_equal_channels_are_chosen_in_order():
    assert select_channels([Reading(np.eye(9), np.eye(9))], 9) == list(range(9))


@pytest.mark.parametrize("count", [128, 200])
def test_rounds_of_several_channels_come_close_to_single_steps(count):
    generator = np.random.default_rng(1)
    readings = [reading(generator, 320, rank=300, columns=40) for _ in range(2)]
    exact = single_steps(readings, count)
    chosen = select_channels(readings, count)
    assert len(set(chosen)) == count
    assert left(readings, chosen) <= 1.05 * left(readings, exact)
    assert left(readings, chosen) < 0.9 * left(readings, range(count))


def test_a_round_takes_one_of_two_channels_that_are_nearly_alike():
    generator = np.random.default_rng(3)
    sources, count = generator.standard_normal((2000, 256)), 256  # four in a round
    values = np.concatenate([sources, sources + 0.05 * generator.standard_normal(sources.shape)], axis=1)
    root = np.tile(np.diag(generator.uniform(0.5, 2, count)), (2, 1))
    chosen = select_channels([Reading(np.cov(values.T), root)], count)
    assert sorted(channel % count for channel in chosen) == list(range(count))


def test_rounds_end_where_nothing_is_left_to_say():
    own = reading(np.random.default_rng(4), 320, rank=131, columns=40)
    chosen = select_channels([own], 200)
    assert len(set(chosen)) == 200
    assert abs(left([own], chosen[:131])) < 1e-6 * left([own], [])
    spoken = set(chosen[:131])
    assert chosen[131:] == [channel for channel in range(320) if channel not in spoken][:69]


def test_a_round_whose_pool_is_all_one_channel_takes_it_once():
    copies, count = 16, 200  # three in a round, from the twelve that say most: all copies of one
    covariance = np.kron(np.ones((copies, copies)), np.eye(count))
    root = np.tile(np.diag(np.linspace(2, 1, count)), (copies, 1))
    chosen = select_channels([Reading(covariance, root)], count)
    assert sorted(channel % count for channel in chosen) == list(range(count))


def residual(own: Reading, chosen: Sequence[int]) -> np.ndarray:
    """K_res, from the definition."""
    k, s = own.covariance, list(chosen)
    return k - k[:, s] @ np.linalg.solve(k[np.ix_(s, s)], k[s])


ROUNDS = [[3, 17], [8], [0, 21, 30, 5], [39, 12, 11]]


@pytest.mark.parametrize("rounds", range(1, len(ROUNDS) + 1))
def test_a_later_round_sees_what_the_earlier_ones_left(rounds):
    own = reading(np.random.default_rng(5), 40, columns=7)
    state = _State(own, 12)
    for channels in ROUNDS[:rounds]:
        state.take(channels)
    taken = [channel for channels in ROUNDS[:rounds] for channel in channels]
    left_open = residual(own, taken)
    seen = left_open @ own.root @ own.root.T @ left_open
    pool = np.array([channel for channel in (33, 2, 8, 26, 3, 14) if channel not in taken])
    part = state.part(pool)
    np.testing.assert_allclose(part.inner, left_open[np.ix_(pool, pool)], atol=1e-9 * np.abs(own.covariance).max())
    np.testing.assert_allclose(part.seen, seen[np.ix_(pool, pool)], atol=1e-9 * np.abs(seen).max())
    scores = np.divide(np.diag(seen), np.diag(left_open), out=np.zeros(40), where=~np.isin(np.arange(40), taken))
    np.testing.assert_allclose(state.scores(), scores, atol=1e-9 * scores.max())
    np.testing.assert_allclose(part.scores(), scores[pool], atol=1e-9 * scores.max())


@pytest.mark.parametrize("seed", range(5))
def test_a_later_round_takes_single_steps_within_its_pool(seed):
    generator = np.random.default_rng(seed)
    readings = [reading(generator, 40, rank=25, columns=5) for _ in range(2)]
    states, taken = [_State(own, 20) for own in readings], [31, 4, 19]
    for state in states:
        state.take(taken)
    pool = np.array([channel for channel in range(40) if channel % 3 and channel not in taken])
    wanted: list[int] = []
    for _ in range(9):
        best = min(set(pool.tolist()) - set(wanted), key=lambda channel: left(readings, [*taken, *wanted, channel]))
        wanted.append(best)
    assert [int(pool[place]) for place in _greedy([state.part(pool) for state in states], 9)] == wanted


def test_channels_that_follow_from_others_of_their_round_are_left_out():
    own = reading(np.random.default_rng(6), 12, rank=5, columns=4)
    state = _State(own, 12)
    state.take(list(range(8)))  # the last three say nothing new
    np.testing.assert_allclose(state.scores(), 0, atol=1e-9)
    assert left([own], range(5)) == pytest.approx(0, abs=1e-6 * left([own], []))


def single_steps(readings: Sequence[Reading], count: int) -> list[int]:
    residuals = [own.covariance.copy() for own in readings]
    chosen: list[int] = []
    for _ in range(count):
        score = np.zeros(len(residuals[0]))
        for k, own in zip(residuals, readings, strict=True):
            score += ((k @ own.root) ** 2).sum(1) / np.maximum(np.diag(k), 1e-9)
        score[chosen] = -1
        best = int(score.argmax())
        chosen.append(best)
        residuals = [k - np.outer(k[best], k[best]) / k[best, best] for k in residuals]
    return chosen


def test_predictions_say_linear_dependence():
    generator = np.random.default_rng(2)
    mixture = generator.standard_normal((3, 2))
    free = reading(generator, 3).covariance
    whole = np.concatenate([np.eye(3), mixture.T])  # channels 3 and 4 are mixtures of the first three
    covariance = whole @ free @ whole.T
    found = predictions([Reading(covariance, np.eye(5))], [0, 1, 2])
    np.testing.assert_allclose(found, whole, atol=1e-3)
    assert np.isfinite(predictions([Reading(np.zeros((4, 4)), np.eye(4))], [0, 1])).all()
