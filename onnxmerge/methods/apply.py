"""apply: rewrite one model by passes and by edits, each checked before the next."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as oir

from onnxmerge.errors import GateFailed, ModelError, UsageError
from onnxmerge.files import claim_file
from onnxmerge.ir.identity import draws_numbers
from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.load import load, read
from onnxmerge.ir.save import save, staged, stored_bytes
from onnxmerge.ir.stored import is_external
from onnxmerge.ir.surgeon import edited
from onnxmerge.methods.passes import Found, find_pass, make_pass
from onnxmerge.methods.same import TOLERANCE, Runs
from onnxmerge.report.recipe import hashes, step_of, with_steps
from onnxmerge.scratch import scratch
from onnxmerge.user_code import guarded, imported


@dataclass(frozen=True)
class Applied:
    """What one step did.

    Attributes:
        name: the pass's or edit's.
        kind: "pass" or "edit".
        exact: whether outputs had to stay equal.
        differences: by output the largest max|after - before| / max|before| on made-up inputs; None: not compared.
    """

    name: str
    kind: str
    exact: bool
    differences: Mapping[str, float] | None


@dataclass(frozen=True)
class Rewritten:
    """What `apply_model` did.

    Attributes:
        path: of the model written.
        steps: in order.
        parameters: before and after, in the normal form.
        bytes: of the files before and after.
        notes: sentences on what was not compared.
    """

    path: Path
    steps: Sequence[Applied]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    notes: Sequence[str]


@dataclass(frozen=True)
class _Step:
    name: str
    kind: str
    exact: bool
    """Whether it claims that outputs stay equal."""
    rewrite: Callable[[oir.Model], oir.Model | onnx.ModelProto]
    source: str
    """The distribution with its version that it comes from, where it is one."""


def apply_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    passes: Sequence[str] = (),
    settings: Sequence[str] = (),
    edits: Sequence[str] = (),
    exact: bool = False,
    change_interface: bool = False,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> Rewritten:
    """Rewrite the model at `model` and write the result to `output`.

    Passes come first, in their order, on the normal form (`onnxmerge.ir.normalise`); then edits. After each step the
    model is checked: it is well formed, onnx's checker and onnxruntime take it, and its inputs and outputs have kept
    their names and types. Metadata stay, and tell what was applied.

    Args:
        model: the ONNX file.
        output: the `.onnx` file; weights go beside it when those of `model` lie beside it.
        passes: what `find_pass` knows.
        settings: `key=value`, or `PASS.key=value` where there are several passes.
        edits: `module:function`; see `onnxmerge.ir.surgeon`.
        exact: outputs must stay equal up to `TOLERANCE` after every step, not only after passes that claim it.
        change_interface: inputs and outputs may change; then those of equal name are compared.
        seed: of the inputs on which outputs are compared.
        threads: for onnxruntime.
        overwrite: replace the files of an earlier run.

    Raises:
        UsageError: the output exists, a pass or edit is not there or fails, or changes inputs or outputs.
        ModelError: the model cannot be read, or is none any more after a step.
        GateFailed: outputs changed where they must not; nothing is written.
    """
    if not passes and not edits:
        raise UsageError("nothing to apply: give --pass or --edit")
    steps = [*_passes(passes, settings), *map(_edit, edits)]
    path = Path(model)
    stored = _checked(path)
    runs = Runs(path, seed, threads)
    beside, draws = is_external(stored), draws_numbers(stored)
    notes = ["The model draws random numbers, so its outputs were not compared."] if draws else []
    done = []
    current = load(path) if passes else stored
    claimed = claim_file(output, overwrite=overwrite)
    with claimed as target, scratch() as folder:
        for number, step in enumerate(steps):
            file = folder / f"{number}.onnx"
            current = _rewritten(step, current, file, beside)
            after = Runs(file, seed, threads)
            if not change_interface:
                runs.check_interface(after, step.name)
            wanted, differences = exact or step.exact, None if draws else runs.compare(after)
            if differences is None and not draws:
                reason = f": {runs.failure}" if runs.failure else ", for the model reads other inputs now"
                notes.append(f"{step.name}: the outputs were not compared{reason}.")
            if wanted:
                _check_same(step, differences or {})
            done.append(Applied(step.name, step.kind, wanted, differences))
            runs = after
        size, counts = stored_bytes(file), (parameter_count(load(path)), parameter_count(load(file)))
        options = {"model": model, "pass": passes, "set": settings, "edit": edits, "exact": exact or None}
        told = step_of("apply", hashes([path]), {**options, "change_interface": change_interface or None})
        versions = {**told.versions, **{own.name: own.source for own in steps if own.source}}
        metadata = with_steps(stored.metadata_props, replace(told, versions=versions))
        with staged(current, target, metadata, beside=beside):
            pass
    return Rewritten(target, done, counts, (stored_bytes(path), size), notes)


def _passes(names: Sequence[str], settings: Sequence[str]) -> Iterator[_Step]:
    """The passes asked for, each with its own settings.

    Raises:
        UsageError: one cannot be made, or a setting belongs to none of them.
    """
    own: list[dict[str, str]] = [{} for _ in names]
    for text in settings:
        key, separator, value = text.partition("=")
        owner, _, short = key.rpartition(".")
        fitting = [number for number, name in enumerate(names) if owner == name or (not owner and len(names) == 1)]
        if not separator or len(fitting) != 1:
            raise UsageError(f"--set {text}: give key=value, or PASS.key=value where there are several passes")
        own[fitting[0]][short] = value
    for name, given in zip(names, own, strict=True):
        found = find_pass(name)
        made = make_pass(found, given)
        yield _Step(name, "pass", found.is_exact, functools.partial(_run_pass, found, made), found.source)


def _run_pass(found: Found, made: oir.passes.PassBase, model: oir.Model) -> oir.Model:
    if not found.is_ours:
        with _calling(found.name):
            return made(model).model
    try:
        return made(model).model
    except oir.passes.PreconditionError as error:
        raise error.__cause__ or error from None


def _edit(source: str) -> _Step:
    function = imported(source)
    if not callable(function):
        raise UsageError(f"{source}: is not a function")

    def rewrite(model: oir.Model) -> onnx.ModelProto:
        with _calling(source):
            return edited(model, function)

    return _Step(source, "edit", False, rewrite, "")


@contextlib.contextmanager
def _calling(name: str) -> Iterator[None]:
    """Run a user's code; what it prints does not mix with results."""
    with guarded(name), contextlib.redirect_stdout(sys.stderr):
        yield


def _rewritten(step: _Step, model: oir.Model, file: Path, beside: bool) -> oir.Model:
    """The model after a step, which lies in `file` too; `model` is used up.

    Raises:
        UsageError: the step fails.
        ModelError: it is no well-formed model any more.
    """
    made = step.rewrite(model)
    try:
        if isinstance(made, oir.Model):
            save(made, file, beside=beside)
            _checked(file)
            return made
        onnx.save(made, file, save_as_external_data=beside, location=f"{file.name}.data")
        return _checked(file)
    except ModelError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ModelError(f"{step.name}: what it makes is no well-formed model: {reason}") from error


def _checked(path: Path) -> oir.Model:
    """The model at `path` as stored, which onnx's checker takes too."""
    model = read(path)
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path}: onnx's checker refuses it: {' '.join(str(error).split())[:300]}") from error
    return model


def _check_same(step: _Step, differences: Mapping[str, float]) -> None:
    for name, found in differences.items():
        if not found <= TOLERANCE:
            said = (
                f"{step.name} says that outputs stay equal" if step.exact else f"{step.name} shall keep outputs equal"
            )
            raise GateFailed(
                f"{said}, but {name!r} differs by {found:.1e} (relative), more than {TOLERANCE:g}; nothing was written"
            )
