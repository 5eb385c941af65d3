"""Datasets made of named arrays: which array feeds which input, and whether it fits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxmerge.data.archive import Archive
from onnxmerge.data.dataset import Batch, Dataset, InputSpec, Split, hold_out
from onnxmerge.data.prepare import Preparation, describe, is_floating
from onnxmerge.errors import UsageError

LABELS = "labels"
TEST = "test_"
_CHUNK = 1 << 18  # bytes read at once where samples are only looked through


@dataclass(frozen=True)
class Names:
    """Which array feeds which model input, as a data card may say; what it leaves open has its standard name.

    The standard is an array named like the input, `labels`, and for held-out samples the same with prefix `test_`.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    labels: str | None = None
    test_inputs: Mapping[str, str] = field(default_factory=dict)
    test_labels: str | None = None

    def completed(self, specs: Sequence[InputSpec], present: Collection[str]) -> "Names":
        """The same with every input named; labels and test samples are left out where nothing speaks of them.

        An array that feeds an input is never taken for labels, whatever its name.
        """
        inputs = {spec.name: self.inputs.get(spec.name, spec.name) for spec in specs}
        test_inputs = {spec.name: self.test_inputs.get(spec.name, TEST + spec.name) for spec in specs}
        free = set(present) - set(inputs.values()) - set(test_inputs.values())
        labels = self.labels or (LABELS if LABELS in free else None)
        test_labels = self.test_labels or (TEST + LABELS if TEST + LABELS in free else None)
        holds_test = bool(self.test_inputs or test_labels or set(test_inputs.values()) & set(present))
        return Names(inputs, labels, test_inputs if holds_test else {}, test_labels)


class ArraySamples:
    """Samples in arrays of one length, one array for each input of the model, prepared as they are read."""

    def __init__(
        self,
        source: str,
        specs: Sequence[InputSpec],
        arrays: Mapping[str, tuple[str, np.ndarray]],
        labels: tuple[str, np.ndarray] | None,
        preparation: Preparation,
    ) -> None:
        """Check that the arrays fit the inputs and each other; `arrays` maps an input's name to (array's name, array).

        Raises:
            UsageError: an array's type, rank, sizes or length do not fit, or there are no samples.
        """
        self._source = source
        self._specs = specs
        self._arrays = arrays
        self._preparation = preparation
        self._labels: np.ndarray | None = None
        first_name, first = arrays[specs[0].name]
        for spec in specs:
            name, array = arrays[spec.name]
            _check_type(source, name, array, spec, preparation)
            if array.ndim == 0 or len(array) == 0:
                raise UsageError(f"{source}: array {name!r} for the model's input {spec.name!r} holds no samples")
            if len(array) != len(first):
                raise UsageError(
                    f"{source}: array {name!r} holds {len(array)} samples, but {first_name!r} holds {len(first)}"
                )
            self._check_shape(name, array, spec)
        if labels is not None:
            self._labels = _labels(source, *labels, first_name, len(first))

    @property
    def has_labels(self) -> bool:
        """See `Samples.has_labels`."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._arrays[self._specs[0].name][1])

    def stored_shape(self, spec: InputSpec) -> tuple[int, ...]:
        """The shape of the array that feeds an input."""
        return self._arrays[spec.name][1].shape

    @property
    def chunk(self) -> int | None:
        """How many samples to look through at once for NaN and infinity; None where integers leave no room for them."""
        sizes = [array.itemsize * array[:1].size for _, array in self._arrays.values() if is_floating(array.dtype)]
        return max(1, _CHUNK // max(1, *sizes)) if sizes else None

    def read(self, rows: np.ndarray) -> Batch:
        """See `Samples.read`."""
        inputs = {}
        for spec in self._specs:
            name, array = self._arrays[spec.name]
            values = self._preparation.apply(array[rows], spec, f"{self._source}: array {name!r}")
            if is_floating(spec.dtype) and not np.isfinite(values).all():
                bad = next(row for row, sample in zip(rows, values, strict=True) if not np.isfinite(sample).all())
                raise UsageError(
                    f"{self._source}: array {name!r} holds NaN or infinity as {spec.dtype} in sample {bad}"
                )
            inputs[spec.name] = values
        return Batch(inputs, None if self._labels is None else _as_read(self._labels[rows]))

    def _check_shape(self, name: str, array: np.ndarray, spec: InputSpec) -> None:
        """Prepare one sample: its shape is what the model would be fed."""
        got = self._preparation.apply(array[:1], spec, f"{self._source}: array {name!r}").shape[1:]
        if not spec.accepts(got):
            prepared = "" if got == array.shape[1:] else f", once prepared {describe((None, *got))}"
            raise UsageError(
                f"{self._source}: array {name!r} has shape {describe((None, *array.shape[1:]))}{prepared}, "
                f"but the model's input {spec.name!r} expects {describe(spec.shape)}"
            )


def looked_through(dataset: Dataset, held_out: ArraySamples) -> Dataset:
    """The dataset, its held-out samples read once: what is wrong with them must not come out after hours of work.

    They are all read in the end anyway, whereas of those to calibrate with a few may do.

    Raises:
        UsageError: a held-out sample holds NaN or infinity.
    """
    if held_out.chunk is not None:
        for _ in dataset.held_out.batches(held_out.chunk):
            pass
    return dataset


def load_archive(
    archive: Archive, specs: Sequence[InputSpec], seed: int, names: Names, preparation: Preparation
) -> Dataset:
    """The samples of an `.npz`; without test samples of its own, a tenth chosen by `seed` is held out.

    Raises:
        UsageError: an array is missing or does not fit, or a held-out sample holds NaN or infinity.
    """
    source = str(archive.path)
    full = names.completed(specs, archive.names)
    calibration = _open_samples(archive, specs, full.inputs, full.labels, preparation)
    if not full.test_inputs:
        return looked_through(hold_out(source, calibration, seed), calibration)
    held_out = _open_samples(archive, specs, full.test_inputs, full.test_labels, preparation)
    for spec in specs:
        test_shape, shape = held_out.stored_shape(spec), calibration.stored_shape(spec)
        if test_shape[1:] != shape[1:]:
            raise UsageError(
                f"{source}: array {full.test_inputs[spec.name]!r} has shape {describe(test_shape)}, "
                f"but {full.inputs[spec.name]!r} has {describe(shape)}"
            )
    return looked_through(Dataset(source, Split(calibration), Split(held_out)), held_out)


def _open_samples(
    archive: Archive,
    specs: Sequence[InputSpec],
    array_names: Mapping[str, str],
    labels_name: str | None,
    preparation: Preparation,
) -> ArraySamples:
    """Map the arrays named for each input, and the labels if any."""
    for spec in specs:
        if array_names[spec.name] not in archive.names:
            raise UsageError(_missing_array(archive, specs, spec, array_names[spec.name]))
    if labels_name is not None and labels_name not in archive.names:
        raise UsageError(
            f"{archive.path}: has no array {labels_name!r} for the labels; it has {_listed(archive.names)}"
        )
    arrays = {spec.name: (array_names[spec.name], archive.open(array_names[spec.name])) for spec in specs}
    labels = None if labels_name is None else (labels_name, archive.open(labels_name))
    return ArraySamples(str(archive.path), specs, arrays, labels, preparation)


def _missing_array(archive: Archive, specs: Sequence[InputSpec], spec: InputSpec, wanted: str) -> str:
    """The sentence for an input without an array: what was expected, what is there, and the likely remedy."""
    sentence = (
        f"{archive.path}: has no array {wanted!r} for the model's input {spec.name!r} {describe(spec.shape)}; "
        f"it has {_listed(archive.names) or 'no arrays at all'}"
    )
    if len(specs) > 1:
        return sentence
    candidates = [name for name in archive.names if name != LABELS and not name.startswith(TEST)]
    fitting = [name for name in candidates if _shape_fits(archive.open(name).shape, spec)]
    if len(fitting) != 1:
        return sentence
    remedy = f"rename it, or map it in a data card (inputs: {{{spec.name}: {fitting[0]}}})"
    return f"{sentence}, of which {fitting[0]!r} fits: {remedy}"


def _shape_fits(shape: tuple[int, ...], spec: InputSpec) -> bool:
    return len(shape) > 0 and spec.accepts(shape[1:])


def _check_type(source: str, name: str, array: np.ndarray, spec: InputSpec, preparation: Preparation) -> None:
    """Refuse an element type that would change meaning when fed."""
    stored = array.dtype
    where = f"{source}: array {name!r} is {stored}, but the model's input {spec.name!r}"
    if is_floating(spec.dtype):
        if is_floating(stored) or (stored.kind in "iu" and preparation.normalises):
            return
        if stored.kind in "iu":
            raise UsageError(
                f"{where} expects {spec.dtype}; say how to scale it in a data card (for example scale: 1/255)"
            )
    elif (stored.kind in "iu" and spec.dtype.kind in "iu") or (stored.kind == "b" and spec.dtype.kind == "b"):
        return
    raise UsageError(f"{where} expects {spec.dtype}")


def _labels(source: str, name: str, labels: np.ndarray, samples_name: str, count: int) -> np.ndarray:
    """Class numbers (samples,) int64, or numbers (samples, ...) as they are stored; checked."""
    kind = labels.dtype.kind
    if kind not in "iuf":
        raise UsageError(
            f"{source}: array {name!r} is {labels.dtype}, but labels are integers, a class number each, or floats, "
            "what the model's first output should be"
        )
    if labels.shape[:1] != (count,) or (labels.ndim > 1 and kind != "f"):
        raise UsageError(
            f"{source}: array {name!r} has shape {labels.shape}, but the {count} samples of {samples_name!r} "
            f"need labels of shape ({count},{' ...' if kind == 'f' else ''})"
        )
    if kind == "f":
        return _finite(source, name, labels)
    if labels.min() < 0:
        raise UsageError(f"{source}: array {name!r} holds the class number {labels.min()}, but they start from 0")
    return labels.astype(np.int64)


def _finite(source: str, name: str, numbers: np.ndarray) -> np.ndarray:
    """The same; read once, a piece at a time."""
    rows = max(1, _CHUNK // max(1, numbers.itemsize * numbers[:1].size))
    for start in range(0, len(numbers), rows):
        with np.errstate(over="ignore"):
            piece = _as_read(numbers[start : start + rows])
        finite = np.isfinite(piece).reshape(len(piece), -1).all(1)
        if not finite.all():
            row = start + int(finite.argmin())
            raise UsageError(f"{source}: array {name!r} holds NaN or infinity as {piece.dtype} in sample {row}")
    return numbers


def _as_read(labels: np.ndarray) -> np.ndarray:
    """Labels as batches have them."""
    return labels if labels.dtype == np.int64 else labels.astype(np.float32)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
