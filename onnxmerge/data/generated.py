"""`module:function`: batches made by a user's own Python function."""

import tempfile
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np

from onnxmerge.data.arrays import LABELS, ArraySamples, looked_through
from onnxmerge.data.dataset import Dataset, InputSpec, hold_out
from onnxmerge.data.prepare import Preparation
from onnxmerge.errors import UsageError
from onnxmerge.user_code import guarded, imported


class _Column:
    """One array of all batches, growing in a nameless temporary file and memory-mapped at the end."""

    def __init__(self, name: str, first: np.ndarray) -> None:
        self.name = name
        self.dtype = first.dtype
        self.sample_shape = first.shape[1:]
        self.count = 0
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="onnxmerge-")  # noqa: SIM115 - outlives this call

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values).data.cast("B") if values.size else b"")
        self.count += len(values)

    def finish(self) -> np.ndarray:
        """All samples as one array (count, ...); the file lives as long as it does."""
        shape = (self.count, *self.sample_shape)
        with self._file:
            self._file.flush()
            if 0 in shape:
                return np.empty(shape, self.dtype)
            return np.memmap(self._file, self.dtype, mode="r", shape=shape)


def load_function(source: str, specs: Sequence[InputSpec], seed: int) -> Dataset:
    """The samples that `source`, written `module:function`, yields; a tenth chosen by `seed` is held out.

    The function is called once without arguments. It yields dictionaries from input name to array (samples first),
    all with the optional key `labels` or none, and must come to an end. Batches go to temporary files in TMPDIR as
    they come, so the set may be larger than memory. The module is looked for in the current folder too.

    Raises:
        UsageError: the function is not there, fails, or yields batches that do not fit, or NaN or infinity in held-out
            samples.
    """
    columns: dict[str, _Column] = {}
    label_key = None if LABELS in {spec.name for spec in specs} else LABELS
    for number, batch in enumerate(_batches(source)):
        arrays = _arrays_of(batch, f"{source}: batch {number}", specs, label_key)
        if number == 0:
            columns = {name: _Column(name, array) for name, array in arrays.items()}
        _append(columns, arrays, f"{source}: batch {number}")
    if not columns:
        raise UsageError(f"{source}: yields no batches")
    arrays = {name: column.finish() for name, column in columns.items()}
    labels = (LABELS, arrays.pop(LABELS)) if label_key in arrays else None
    named = {name: (name, array) for name, array in arrays.items()}
    samples = ArraySamples(source, specs, named, labels, Preparation())
    return looked_through(hold_out(source, samples, seed), samples)


def _batches(source: str) -> Iterable[Any]:
    """Import and call the function; whatever it raises ends in one sentence."""
    with guarded(source):
        function = imported(source)
        if not callable(function):
            raise UsageError(f"{source}: is not a function")
        yield from function()


def _arrays_of(batch: Any, where: str, specs: Sequence[InputSpec], label_key: str | None) -> dict[str, np.ndarray]:
    """The arrays of one batch that the model needs, and its labels where there are any."""
    if not isinstance(batch, dict):
        raise UsageError(f"{where} is a {type(batch).__name__}, not a dictionary from input name to array")
    missing = [spec.name for spec in specs if spec.name not in batch]
    if missing:
        raise UsageError(f"{where} has no array {missing[0]!r}; it has {', '.join(repr(name) for name in batch)}")
    wanted = [spec.name for spec in specs] + ([label_key] if label_key in batch else [])
    return {name: _array_of(batch[name], f"{where}: {name!r}") for name in wanted if name is not None}


def _array_of(values: Any, where: str) -> np.ndarray:
    """What numpy makes of a list, an array, or another library's tensor on the CPU."""
    refusal = UsageError(f"{where} is not an array of numbers with one row for each sample")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise refusal from error
    if array.dtype.hasobject or array.ndim == 0:
        raise refusal
    return array


def _append(columns: dict[str, _Column], arrays: dict[str, np.ndarray], where: str) -> None:
    """Add a batch to the columns; it must look like the first one."""
    if columns.keys() != arrays.keys():
        raise UsageError(f"{where} {'has' if LABELS in arrays else 'lacks'} labels, unlike the first")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"{where} holds arrays of different lengths: {lengths}")
    for name, array in arrays.items():
        column = columns[name]
        if array.shape[1:] != column.sample_shape or array.dtype != column.dtype:
            raise UsageError(
                f"{where}: array {name!r} has samples of shape {array.shape[1:]} and type {array.dtype}, "
                f"but in the first batch {column.sample_shape} and {column.dtype}"
            )
        try:
            column.append(array)
        except OSError as error:
            raise UsageError(
                f"{where}: cannot be stored in {tempfile.gettempdir()}: {error.strerror or error}"
            ) from error
