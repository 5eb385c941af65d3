"""Datasets made of named arrays: which array feeds which input, and whether it fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxmerge.data.archive import Archive
from onnxmerge.data.dataset import Batch, Dataset, InputSpec, Split, hold_out
from onnxmerge.data.prepare import Preparation, convert, describe, is_floating
from onnxmerge.errors import UsageError

LABELS = "labels"
TEST = "test_"


@dataclass(frozen=True)
class Names:
    """Which array feeds which model input, as a data card may say; what it leaves open has its standard name.

    The standard is an array named like the input, `labels`, and for held-out samples the same with prefix `test_`.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    labels: str | None = None
    test_inputs: Mapping[str, str] = field(default_factory=dict)
    test_labels: str | None = None


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
            self._labels = _class_numbers(source, *labels, first_name, len(first))

    @property
    def has_labels(self) -> bool:
        """Whether there are class numbers."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._arrays[self._specs[0].name][1])

    def sample_shape(self, spec: InputSpec) -> tuple[int, ...]:
        """The shape of one stored sample for an input."""
        return self._arrays[spec.name][1].shape[1:]

    def read(self, rows: np.ndarray) -> Batch:
        """See `Samples.read`."""
        inputs = {}
        for spec in self._specs:
            name, array = self._arrays[spec.name]
            values = self._preparation.apply(array[rows], spec, self._source)
            if is_floating(spec.dtype) and not np.isfinite(values).all():
                bad = next(row for row, sample in zip(rows, values, strict=True) if not np.isfinite(sample).all())
                raise UsageError(
                    f"{self._source}: array {name!r} holds NaN or infinity as {spec.dtype} in sample {bad}"
                )
            inputs[spec.name] = values
        return Batch(inputs, None if self._labels is None else self._labels[rows])

    def _check_shape(self, name: str, array: np.ndarray, spec: InputSpec) -> None:
        """Prepare one sample: its shape is what the model would be fed."""
        got = self._preparation.apply(array[:1], spec, f"{self._source}: array {name!r}").shape[1:]
        if not spec.accepts(got):
            prepared = "" if got == array.shape[1:] else f", once prepared {describe((None, *got))}"
            raise UsageError(
                f"{self._source}: array {name!r} has shape {describe((None, *array.shape[1:]))}{prepared}, "
                f"but the model's input {spec.name!r} expects {describe(spec.shape)}"
            )


def load_archive(
    archive: Archive, specs: Sequence[InputSpec], seed: int, names: Names | None = None, preparation: Preparation | None = None
) -> Dataset:
    """The samples of an `.npz`.

    Args:
        archive: The file.
        specs: The model's inputs.
        seed: Chooses which tenth is held out where the file has no test samples.
        names: Which array feeds which input.
        preparation: How stored values become what the model is fed; None feeds them as they are.

    Raises:
        UsageError: an array is missing or does not fit.
    """
    source = str(archive.path)
    names = names or Names()
    preparation = preparation or Preparation()
    calibration_names = {spec.name: names.inputs.get(spec.name, spec.name) for spec in specs}
    test_names = {spec.name: names.test_inputs.get(spec.name, TEST + spec.name) for spec in specs}
    used = {*calibration_names.values(), *test_names.values()}

    def samples(array_names: Mapping[str, str], asked: str | None, standard: str) -> ArraySamples:
        """The samples in the arrays named, with the labels asked for or, where they exist, those of standard name."""
        labels = asked or (standard if standard in archive.names and standard not in used else None)
        if labels is not None and labels not in archive.names:
            raise UsageError(f"{source}: has no array {labels!r} for the labels; it has {_listed(archive.names)}")
        arrays = {name: (array, archive.open(array)) for name, array in array_names.items()}
        return ArraySamples(source, specs, arrays, labels and (labels, archive.open(labels)), preparation)

    missing = [name for name, array in calibration_names.items() if array not in archive.names]
    if missing:
        raise UsageError(_missing_array(archive, specs, missing[0], calibration_names[missing[0]], names, preparation))
    calibration = samples(calibration_names, names.labels, LABELS)

    absent = [array for array in test_names.values() if array not in archive.names]
    test_labels = names.test_labels or (TEST + LABELS if TEST + LABELS in archive.names else None)
    expects_test = bool(names.test_inputs) or len(absent) < len(specs) or (test_labels and test_labels not in used)
    if absent and expects_test:
        found = _listed([name for name in archive.names if name in test_names.values() or name == test_labels])
        raise UsageError(
            f"{source}: has {found} to hold out, but no array {absent[0]!r}"
            if found
            else f"{source}: has no array {absent[0]!r} to hold out; it has {_listed(archive.names)}"
        )
    if not expects_test:
        return hold_out(source, calibration, seed)
    held_out = samples(test_names, names.test_labels, TEST + LABELS)
    for spec in specs:
        if held_out.sample_shape(spec) != calibration.sample_shape(spec):
            raise UsageError(
                f"{source}: array {test_names[spec.name]!r} has samples of shape {held_out.sample_shape(spec)}, "
                f"but those of {calibration_names[spec.name]!r} have {calibration.sample_shape(spec)}"
            )
    return Dataset(source, Split(calibration), Split(held_out))


def _missing_array(
    archive: Archive, specs: Sequence[InputSpec], name: str, array: str, names: Names, preparation: Preparation
) -> str:
    """The sentence for an input without an array: what is there, what was expected, and the likely remedy."""
    spec = next(spec for spec in specs if spec.name == name)
    wanted = f"{array!r} (which the data card names for it)" if name in names.inputs else f"{array!r}"
    sentence = (
        f"{archive.path}: has no array {wanted} for the model's input {name!r} {describe(spec.shape)}; "
        f"it has {_listed(archive.names) or 'no arrays'}"
    )
    if len(specs) > 1:
        return sentence
    fitting = []
    for candidate in archive.names:
        if candidate == LABELS or candidate.startswith(TEST):
            continue
        stored = archive.open(candidate)
        if stored.ndim and spec.accepts(stored.shape[1:]):
            fitting.append(candidate)
    if len(fitting) != 1:
        return sentence
    return f"{sentence}, of which {fitting[0]!r} fits: rename it, or map it in a data card (inputs: {{{name}: {fitting[0]}}})"


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


def _class_numbers(source: str, name: str, labels: np.ndarray, samples_name: str, count: int) -> np.ndarray:
    """Labels as (samples,) int64, checked."""
    if labels.dtype.kind not in "iu":
        raise UsageError(f"{source}: array {name!r} is {labels.dtype}, but labels are integers, a class number each")
    if labels.shape != (count,):
        raise UsageError(
            f"{source}: array {name!r} has shape {labels.shape}, but the {count} samples of {samples_name!r} "
            f"need labels of shape ({count},)"
        )
    if labels.min() < 0:
        raise UsageError(f"{source}: array {name!r} holds the class number {labels.min()}, but they start from 0")
    return labels.astype(np.int64)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
