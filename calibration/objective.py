"""One task's loss: what the merged network gives for it against what the task's original gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from onnxmerge.calibration import losses, ranks
from onnxmerge.calibration.devices import chosen_device, moved
from onnxmerge.calibration.module import GraphModule, channels_last
from onnxmerge.calibration.remembered import Remembered
from onnxmerge.calibration.settings import Settings
from onnxmerge.data import Batch, Split
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.outputs import is_class_shape, may_name_classes, same_but_for_ones


@dataclass(frozen=True)
class FeatureTap:
    """A value of the merged model that should equal a value of one task's original.

    Attributes:
        task: the task's name.
        student: name of the value in the merged model.
        teacher: name of the value in the task's original.
        channels: the teacher's channel `channels[i]` stands at the student's channel i on axis 1; None: same order.
    """

    task: str
    student: str
    teacher: str
    channels: np.ndarray | None = None


@dataclass(frozen=True)
class Pair:
    """A value of the merged model and its target among the teacher's values; `classes`: it may hold logits."""

    student: str
    teacher: str
    channels: Tensor | None = None
    classes: bool = False


class Objective:
    """The loss of one task, with the weights that `Settings` give its parts.

    KL and classes are for classifiers (`onnxmerge.ir.outputs`: output [N, classes] or [N, classes, 1, 1]); for
    images, boxes and other numbers the logit error, which is for anything, stands alone. A Softmax that ends both
    networks is left out: losses see logits. Nothing of the teacher is run that no weight asks for.

    Attributes:
        task: the task's name.
        inputs: the teacher's input name for each of the merged model's.
    """

    def __init__(
        self,
        task: str,
        merged: onnx_ir.Model,
        teacher: onnx_ir.Model,
        outputs: Mapping[str, str],
        inputs: Mapping[str, str],
        taps: Sequence[FeatureTap],
        settings: Settings,
        share: float = 1.0,
    ):
        """`outputs` and `inputs` map the merged model's names to the teacher's; `share` scales the whole loss.

        Raises:
            ModelError: the task has no float output, or the teacher cannot be run.
            UsageError: a name is no value of its model, or there is no GPU that was asked for.
        """
        self.task, self.inputs = task, dict(inputs)
        self._settings, self._share, self._device = settings, share, chosen_device(settings.device)
        self._terms: dict[str, float] = {}
        self._counts = share
        self._remembered: Remembered | None = None
        floats = {s: t for s, t in outputs.items() if _is_float(merged, s)}
        if not floats:
            raise ModelError(f"task {task!r} has no float output, so there is nothing to calibrate towards")
        first = next(iter(floats))
        # Classes are told by what goes into a Softmax, numbers by what comes out; which of them labels are, data say.
        self._labelled = (_softmax_input(merged, first) or first, first) if settings.label_weight else None
        matches = settings.kl_weight or settings.logit_weight
        self._outputs = [_logits(merged, teacher, s, t) for s, t in floats.items()] if matches else []
        self._taps = [_tapped(tap, self._device) for tap in taps if tap.task == task] if settings.feature_weight else []
        pairs = self._outputs + self._taps
        self._teacher = GraphModule(teacher, [pair.teacher for pair in pairs]).requires_grad_(False) if pairs else None
        if self._teacher is not None:
            self._teacher.to(self._device)
        self._variances = [1.0] * len(self._outputs)

    @property
    def outputs(self) -> list[str]:
        """The merged model's values that the output losses need."""
        matched = [pair.student for pair in self._outputs]
        return list(dict.fromkeys([*matched, *(self._labelled or ())]))

    @property
    def taps(self) -> list[str]:
        """The merged model's values that the feature losses need."""
        return [pair.student for pair in self._taps]

    @property
    def terms(self) -> dict[str, float]:
        """What the last loss consisted of: "outputs", "kl", "labels" and "features", each with its weight."""
        return {name: self._counts * term for name, term in self._terms.items()}

    def feed(self, batch: Batch) -> dict[str, Tensor]:
        """The merged model's inputs for `batch`."""
        return {student: self._input(batch, teacher) for student, teacher in self.inputs.items()}

    def output_targets(self, batch: Batch) -> list[Tensor]:
        """The teacher's outputs for `batch`; none where no loss needs them."""
        return self._run(batch, self._outputs)

    def scale(self, targets: Sequence[Sequence[Tensor]]) -> None:
        """Divide logit errors from now on by the variance of these teacher's outputs, one list for each batch."""
        self._variances = [_variance(outputs) for outputs in zip(*targets, strict=True)]

    def targets(self, batch: Batch) -> list[Tensor]:
        """The teacher's outputs for `batch`, then its feature maps in the merged model's channel order."""
        if self._remembered is not None:
            assert batch.numbers is not None
            return [moved(value, self._device) for value in self._remembered(batch.numbers)]
        pairs = self._outputs + self._taps
        return [
            value if pair.channels is None else value.index_select(1, pair.channels)
            for pair, value in zip(pairs, self._run(batch, pairs), strict=True)
        ]

    def remember(self, split: Split, batch: int, limit: int) -> int:
        """Keep the targets for all samples of `split`, whose batches are all that is asked for; bytes that they take.

        Raises:
            UsageError: these are more than `limit`, or there is no room for them.
        """
        if self._teacher is None:
            return 0
        self._remembered = Remembered(self.targets, split, batch, limit)
        return self._remembered.bytes

    def output_loss(self, values: Mapping[str, Tensor], targets: Sequence[Tensor], batch: Batch) -> Tensor:
        """The weighted logit error and KL, summed over the task's outputs, and the label loss at the first of them.

        Raises:
            ModelError: the shapes of an output and its target differ.
            UsageError: labels are needed and missing or do not fit the output, or no loss applies to the outputs.
        """
        weights, total = self._settings, torch.zeros((), device=self._device)
        self._terms, self._counts = {}, self._share
        for pair, z_t, variance in zip(self._outputs, targets, self._variances, strict=False):
            z = values[pair.student].float()
            self._check_shapes(pair, z, z_t)
            if weights.logit_weight:
                total = total + self._term("outputs", weights.logit_weight * losses.logit_error(z, z_t, variance))
            if weights.kl_weight and pair.classes and is_class_shape(z.shape):
                divergence = losses.kl(z.flatten(1), z_t.flatten(1), weights.temperature)
                total = total + self._term("kl", weights.kl_weight * divergence)
        if self._labelled is not None:
            logits, output = (values[name].float() for name in self._labelled)
            total = total + self._term("labels", weights.label_weight * self._label_loss(logits, output, batch))
        elif not weights.logit_weight:
            self._check_that_kl_applies(values)
        return self._share * total

    def loss(
        self, values: Mapping[str, Tensor], targets: Sequence[Tensor], batch: Batch, weight: float = 1.0
    ) -> Tensor:
        """`output_loss` plus the weighted mean of the feature losses; `targets` as `self.targets` gives them.

        Where processes share a batch, `weight` is how many times their mean part this one has: the mean of what they
        return is the loss of the whole batch.

        Raises:
            ModelError: the shapes of a value and its target differ.
            UsageError: see `output_loss`.
        """
        total = self.output_loss(values, targets, batch)
        self._counts = weight * self._share
        if not self._taps:
            return weight * total
        error, size = losses.FEATURES[self._settings.feature_norm]
        maps = targets[len(self._outputs) :]
        sizes = weight * torch.stack([size(f_t) for f_t in maps])
        ranks.average([sizes])
        errors = []
        for pair, f_t, scale in zip(self._taps, maps, sizes, strict=True):
            self._check_shapes(pair, values[pair.student], f_t)
            errors.append(error(values[pair.student].float(), f_t, scale))
        mean = torch.stack(errors).mean()
        self._term("features", self._settings.feature_weight * mean)
        return weight * (total + self._share * self._settings.feature_weight * mean)

    def _term(self, name: str, loss: Tensor) -> Tensor:
        """Remember a part of the loss."""
        self._terms[name] = self._terms.get(name, 0.0) + loss.item()
        return loss

    def _run(self, batch: Batch, pairs: Sequence[Pair]) -> list[Tensor]:
        if self._teacher is None:
            return []
        names = [pair.teacher for pair in pairs]
        inputs = {name: self._input(batch, name) for name in self.inputs.values()}
        with torch.no_grad():
            values = self._teacher(inputs, names)
        return [values[name].float() for name in names]

    def _input(self, batch: Batch, name: str) -> Tensor:
        """The batch's array for one input; tasks with one input may share data whatever they call it."""
        if name not in batch.inputs and len(batch.inputs) != 1:
            raise UsageError(f"the data of task {self.task!r} has no array for the input {name!r}")
        array = batch.inputs[name] if name in batch.inputs else next(iter(batch.inputs.values()))
        return moved(channels_last(torch.tensor(array)), self._device)

    def _check_shapes(self, pair: Pair, value: Tensor, target: Tensor) -> None:
        if value.shape != target.shape:
            raise ModelError(
                f"task {self.task!r}: {pair.student!r} of the merged model is {list(value.shape)}, "
                f"{pair.teacher!r} of the original {list(target.shape)}"
            )

    def _check_that_kl_applies(self, values: Mapping[str, Tensor]) -> None:
        shapes = [values[pair.student].shape for pair in self._outputs]
        classes = [pair.classes for pair in self._outputs]
        if not any(may and is_class_shape(shape) for may, shape in zip(classes, shapes, strict=True)):
            raise UsageError(
                f"task {self.task!r} is no classifier (output {list(shapes[0])}), and the KL divergence is for "
                "classifiers only; give the logit error a weight"
            )

    def _label_loss(self, logits: Tensor, output: Tensor, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise UsageError(f"the data of task {self.task!r} has no labels; calibrate without labels")
        labels = batch.classes
        if labels is None:
            return self._number_loss(output, torch.tensor(batch.labels, device=self._device))
        if not is_class_shape(logits.shape):
            raise UsageError(
                f"task {self.task!r} is no classifier (output {list(logits.shape)}); calibrate without labels"
            )
        if labels.max() >= logits.shape[1]:
            raise UsageError(
                f"the data of task {self.task!r} have the label {labels.max()}, but the classes of its output are "
                f"0 to {logits.shape[1] - 1}"
            )
        return losses.cross_entropy(logits.flatten(1), torch.tensor(labels, device=self._device))

    def _number_loss(self, z: Tensor, y: Tensor) -> Tensor:
        if not same_but_for_ones(z.shape[1:], y.shape[1:]):
            raise UsageError(
                f"the labels of task {self.task!r} are numbers of shape {list(y.shape[1:])} for each sample, but its "
                f"output has {list(z.shape[1:])}"
            )
        return losses.squared_error(z, y.reshape(z.shape))


def _tapped(tap: FeatureTap, device: torch.device) -> Pair:
    channels = None if tap.channels is None else torch.tensor(np.asarray(tap.channels, dtype=np.int64), device=device)
    return Pair(tap.student, tap.teacher, channels)


def _logits(merged: onnx_ir.Model, teacher: onnx_ir.Model, student: str, target: str) -> Pair:
    """The pair of outputs, or of what goes into the Softmax where both end in one."""
    before = _softmax_input(merged, student), _softmax_input(teacher, target)
    names = (before[0], before[1]) if before[0] and before[1] else (student, target)
    return Pair(*names, classes=may_name_classes(teacher, target))


def _softmax_input(model: onnx_ir.Model, output: str) -> str | None:
    node = next((value.producer() for value in model.graph.outputs if value.name == output), None)
    if node is None or node.op_type != "Softmax" or node.inputs[0] is None:
        return None
    return node.inputs[0].name


def _is_float(model: onnx_ir.Model, output: str) -> bool:
    dtype = next((value.dtype for value in model.graph.outputs if value.name == output), None)
    return dtype is None or dtype.is_floating_point()


def _variance(batches: Sequence[Tensor]) -> float:
    """The variance of all numbers of `batches`, one after the other: images are too large to be joined."""
    count = sum(batch.numel() for batch in batches)
    mean = sum(float(batch.sum(dtype=torch.float64)) for batch in batches) / count
    return sum(float((batch.double() - mean).square().sum()) for batch in batches) / count
