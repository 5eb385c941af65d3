"""`--cache-bytes`: what teachers give is computed once for each sample."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrating import Memory, interrupted_at, merge, train, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibrate import calibrate, work
from test_checkpoint import run
from torch import Tensor

from onnxmerge.calibration.objective import FeatureTap, Objective
from onnxmerge.calibration.remembered import Remembered
from onnxmerge.calibration.settings import Checkpoint, Settings
from onnxmerge.data import Batch, Split
from onnxmerge.errors import UsageError

__all__ = ["work"]  # a fixture
CACHE = 10_000_000


def small(name: str, x: Tensor) -> Tensor:
    """A value of x [N, 1, 6, 6] whose memory lies in some order."""
    return {
        "vector": lambda: x.flatten(1)[:, :5].contiguous(),
        "scalar": lambda: x.mean((1, 2, 3)),
        "image": lambda: x.expand(-1, 3, -1, -1).contiguous(),
        "channels last": lambda: torch.cat([x, 2 * x, -x], 1).contiguous(memory_format=torch.channels_last),
        "turned": lambda: x[:, 0].transpose(1, 2),
        "samples last": lambda: x.flatten(1).T.contiguous().T,
        "empty": lambda: x[:, :0],
    }[name]()


NAMES = ["vector", "scalar", "image", "channels last", "turned", "samples last", "empty"]


@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    count=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_what_is_remembered_is_what_was_computed(names: list[str], count: int, batch: int, seed: int) -> None:
    def compute(samples: Batch) -> list[Tensor]:
        return [small(name, torch.tensor(samples.inputs["x"])) for name in names]

    source = Memory(50, seed)
    rows = np.random.default_rng(seed).permutation(50)[:count]
    remembered = Remembered(compute, Split(source, rows), batch, CACHE)
    assert source.reads == -(-count // batch)
    drawn = next(Split(source, rows).shuffled(7, seed))
    assert drawn.numbers is not None
    for name, found, expected in zip(names, remembered(drawn.numbers), compute(drawn), strict=True):
        assert torch.equal(found, expected) and found.dtype == torch.float32
        if name != "samples last" and len(expected) > 1 and found.numel():
            assert found.stride() == expected.stride()  # else sums over it might be taken in another order
    assert source.reads == -(-count // batch) + 1


WAYS: dict[str, dict[str, Any]] = {
    "one stream": {},
    "two streams": {"one_split": False},
    "features": {"taps": [FeatureTap("b", "r", "r")]},
    "rearranged features": {"taps": [FeatureTap("b", "r", "r", np.array([2, 0, 3, 1]))], "one_split": False},
    "bfloat16": {"precision": "bfloat16"},
    "labels too": {"label_weight": 0.5, "accumulate": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_and_teachers_run_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = Objective._run
    monkeypatch.setattr(Objective, "_run", lambda self, *given: (ran.append(self.task), real(self, *given))[1])
    found = []
    for cache in (0, CACHE):
        ran.clear()
        merged = merge()
        found.append((train(merged, cache_bytes=cache, steps=30, **WAYS[way])[0], weights(merged), len(ran)))
    (plain, before, often), (cached, after, seldom) = found
    rounds = 30 * WAYS[way].get("accumulate", 1)
    assert often - seldom == 2 * (rounds - 256 // 64)  # 256 samples, 64 at a time
    np.testing.assert_allclose([loss for _, loss in cached.losses], [loss for _, loss in plain.losses], rtol=1e-6)
    for name in before:
        ours, theirs = (np.frombuffer(own[name], np.float32) for own in (after, before))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_run_that_sees_no_sample_twice_remembers_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "remember", lambda *given: pytest.fail("it was asked to"))
    train(merge(), steps=4, cache_bytes=CACHE)


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped, resumed = merge(), merge(), merge()
    path = tmp_path / "c"
    expected = run(whole, None, cache_bytes=CACHE)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 19)
        run(stopped, Checkpoint(path), cache_bytes=CACHE)
    assert run(resumed, Checkpoint(path, resume=True), cache_bytes=CACHE) == expected
    assert weights(resumed) == weights(whole)


def test_more_than_is_allowed_is_refused(work: Path, tmp_path: Path) -> None:
    given = ["-o", tmp_path / "out", "--batch", 32]
    code, _, stderr = calibrate(work, *given, "--cache-bytes", 1000)
    assert code == 2 and "what the teachers give for 360 samples takes " in stderr
    assert "more than are left of --cache-bytes (1,000); allow more, or leave it out" in stderr
    assert calibrate(work, *given, "--cache-bytes", 10_000_000, "--overwrite")[0] == 0
    with pytest.raises(UsageError, match="cache_bytes must be at least 0"):
        Settings(steps=1, cache_bytes=-1)


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: memoryview) -> int:
            return len(bytes(data)) // 2 if self.room() else self.refuse()

        left = True

        def room(self) -> bool:
            self.left, before = False, self.left
            return before

        def refuse(self) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: Full())
    with pytest.raises(UsageError, match="cannot keep what the teachers give: No space left on device"):
        train(merge(), cache_bytes=CACHE)
