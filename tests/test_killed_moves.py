"""kill -9 between any two steps that put files into place: the old model or the new one, never a mixture of both."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
from test_cli import tiny

from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.methods.candidates import Shelf
from onnxmerge.methods.recipe import Recipe
from onnxmerge.report.recipe import Made

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
STEPS = ("replace", "unlink")


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do `work` in a process that is killed before its `step`-th replacement or removal; whether it came so far."""
    process = os.fork()
    if process == 0:
        done = 0

        def counted(real: Callable[..., None]) -> Callable[..., None]:
            def function(*given: object, **more: object) -> None:
                nonlocal done
                done += 1
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*given, **more)

            return function

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def contents(target: Path) -> list[bytes]:
    """Of a model and its data file; that of an older model, which this one does not read, is no part of it."""
    model = onnx.load(target, load_external_data=False)
    data = target.with_name(f"{target.name}.data")
    read = any(tensor.external_data for tensor in model.graph.initializer)
    return [target.read_bytes()] + ([data.read_bytes()] if read else [])


@pytest.mark.parametrize("beside", [(False, False), (False, True), (True, False), (True, True)])
def test_a_model_replaces_another(beside: tuple[bool, bool], tmp_path: Path) -> None:
    models = [load(tiny(tmp_path / f"{seed}.onnx", seed, hidden=40)) for seed in (1, 2)]
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    wanted = []
    for model, own in zip(models, beside, strict=True):
        save(model, target, beside=own)
        wanted.append(contents(target))
    assert wanted[0] != wanted[1] and list(map(len, wanted)) == [1 + own for own in beside]
    step, seen = 0, []
    going = True
    while going:
        step += 1
        for left in target.parent.glob("*"):
            left.unlink()
        save(models[0], target, beside=beside[0])
        going = killed_at(step, lambda: save(models[1], target, beside=beside[1]))
        if target.exists():
            seen.append(wanted.index(contents(target)))  # which fails for any other
            onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        else:
            assert beside == (True, True)  # two files of the same names: the old model has to go first
        save(models[1], target, beside=beside[1])
        assert contents(target) == wanted[1]
        assert {path.name for path in target.parent.iterdir()} == {"m.onnx", "m.onnx.data"} if beside[1] else {"m.onnx"}
    assert seen == sorted(seen) and set(seen) == {0, 1}


def test_another_candidate_is_chosen(tmp_path: Path) -> None:
    shelf, target = Shelf(tmp_path, Recipe(Made("zip", {}, {}, {}), [], ""), resume=True), tmp_path / "merged.onnx"
    for seed, name in enumerate("ab"):
        save(load(tiny(tmp_path / "original.onnx", seed)), shelf.model_path(name))
    shelf.choose("a")
    old, new, step = target.read_bytes(), shelf.model_path("b").read_bytes(), 1
    assert old != new
    seen = []
    while killed_at(step, lambda: shelf.choose("b")):
        seen.append([old, new].index(target.read_bytes()))
        shelf.choose("a")
        step += 1
    assert seen == sorted(seen) and set(seen) == {0, 1} and target.read_bytes() == new
