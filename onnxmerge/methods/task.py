"""A task: one original network, its data, and how its inputs stand for those of the merged model."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as oir

from onnxmerge.data import Dataset, InputSpec, Split, load_dataset
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import find_layers, parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.opset import raise_opset
from onnxmerge.ir.save import stored_bytes
from onnxmerge.passes.ensure_biases import EnsureBiases
from onnxmerge.passes.fold_batch_norm import FoldBatchNorm
from onnxmerge.passes.pad_inputs import Padding
from onnxmerge.passes.transpose_gemms import TransposeGemms
from onnxmerge.report.provenance import sha256
from onnxmerge.report.schema import InputRecord


class Feeds:
    """A split's inputs as feeds for a model that calls them by other names; labels are left out.

    Args:
        split: the samples.
        names: of its inputs, each with what the model calls it.
        paddings: what is added to some of its inputs.
        blanks: inputs of the model that other tasks feed, with the shapes of one entry: they get zeros.
    """

    def __init__(
        self,
        split: Split,
        names: Mapping[str, str],
        paddings: Mapping[str, Padding] | None = None,
        blanks: Mapping[str, Sequence[int]] | None = None,
    ):
        self._split, self._names, self._paddings, self._blanks = split, names, paddings or {}, blanks or {}

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """See `onnxmerge.runtime.activations.Samples`."""
        for batch in self._split.batches(size):
            fed = {new: self._padded(old, batch.inputs[old]) for old, new in self._names.items()}
            first = next(iter(fed.values()))
            yield fed | {name: np.zeros((len(first), *rest), first.dtype) for name, rest in self._blanks.items()}

    def _padded(self, name: str, array: np.ndarray) -> np.ndarray:
        return self._paddings[name].pad(array) if name in self._paddings else array


@dataclass
class Network:
    """One original network.

    Attributes:
        name: prefix of the task's outputs in the merged model.
        path: the file.
        model: its normal form, as a rule with batch norms folded.
        parameters: floating-point numbers in the file's normal form, before folding.
        paddings: by the inputs of the model the zeros that the network's own samples lack.
    """

    name: str
    path: Path
    model: oir.Model
    parameters: int
    paddings: Mapping[str, Padding] = field(default_factory=dict, kw_only=True)

    @property
    def inputs(self) -> list[str]:
        """Names of the network's inputs."""
        return [value.name or "" for value in self.model.graph.inputs]

    @property
    def outputs(self) -> list[str]:
        """Names of the network's outputs."""
        return [value.name or "" for value in self.model.graph.outputs]

    def record(self) -> InputRecord:
        """What the report says of it."""
        return InputRecord(
            task=self.name,
            path=str(self.path),
            sha256=sha256(self.path),
            parameters=self.parameters,
            bytes=stored_bytes(self.path),
        )


@dataclass
class Task(Network):
    """A network with its samples."""

    data: Dataset

    def feeds(self, split: Split, reader: Network) -> Feeds:
        """This task's samples under the input names of `reader`; inputs pair in order."""
        return Feeds(split, dict(zip(self.inputs, reader.inputs, strict=True)), self.paddings)

    def merged_feeds(self, split: Split, merged: oir.Model) -> Feeds:
        """This task's samples for a merged model; inputs that only other tasks read get zeros."""
        names = merged_inputs(self, [value.name or "" for value in merged.graph.inputs])
        others = [value for value in merged.graph.inputs if value.name not in names]
        return Feeds(
            split,
            dict(zip(self.inputs, names, strict=True)),
            blanks={value.name or "": [size or 1 for size in dims(value)[1:]] for value in others},
        )


def merged_inputs(task: Network, names: Sequence[str]) -> list[str]:
    """What a merged model calls the inputs of a task: `TASK/input` where tasks have inputs of their own.

    Where none is called so, all its inputs stand for the task's in their order, or those of the same names do.

    Args:
        task: one of the originals.
        names: of all inputs of the merged model.
    """
    own = [f"{task.name}/{name}" for name in task.inputs]
    if not set(own) & set(names) and len(names) == len(own):
        return list(names)
    found = [called if called in names else name for called, name in zip(own, task.inputs, strict=True)]
    return found if set(found) <= set(names) else list(names)


def check_inputs(path: str | os.PathLike[str], merged: oir.Model, networks: Sequence[Network]) -> None:
    """See that the merged model `path` has the inputs of all `networks`.

    Raises:
        UsageError: it has not.
    """
    names = [value.name or "" for value in merged.graph.inputs]
    for network in networks:
        if len(merged_inputs(network, names)) != len(network.inputs):
            raise UsageError(
                f"{path}: its inputs {', '.join(names)} do not stand for those of {network.path}: "
                f"{', '.join(network.inputs)}"
            )


def all_inputs(tasks: Sequence[Network]) -> list[str]:
    """What a multi-task model calls its inputs: as the first task does, or `TASK/input` where their sizes differ."""
    if len({tuple(dims(value) for value in task.model.graph.inputs) for task in tasks}) == 1:
        return tasks[0].inputs
    return [f"{task.name}/{name}" for task in tasks for name in task.inputs]


def task_outputs(tasks: Sequence[Network]) -> dict[str, list[str]]:
    """What a multi-task model calls the outputs of each task, in order: `TASK/output`."""
    return {task.name: [f"{task.name}/{output}" for output in task.outputs] for task in tasks}


def task_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The stem of each model file; equal stems get a number.

    Raises:
        UsageError: fewer than two models.
    """
    if len(paths) < 2:
        raise UsageError(f"{len(paths)} model given: merging takes at least two")
    names: list[str] = []
    for path in paths:
        stem = Path(path).stem
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names


def load_networks(
    paths: Sequence[str | os.PathLike[str]], *, same_inputs: bool = True, folded: bool = True
) -> list[Network]:
    """Load the networks, bring them to one opset, fold their batch norms, and check that they can share their inputs.

    Without `same_inputs` these may have different sizes; without `folded` layers stay as they are.

    Raises:
        UsageError: fewer than two networks, or their inputs differ.
        ModelError: a network cannot be read, or has no inputs or no layers.
    """
    names = task_names(paths)
    models = [load(path) for path in paths]
    for path, model in zip(paths, models, strict=True):
        if not model.graph.inputs or not find_layers(model):
            raise ModelError(f"{path}: has no {'layers' if model.graph.inputs else 'inputs'}, so nothing can be shared")
    opset = max(model.opset_imports.get("", 0) for model in models)
    for model in models:
        raise_opset(model, opset)
    for path, model in zip(paths[1:], models[1:], strict=True):
        _check_inputs(paths[0], models[0], path, model, same_inputs)
    make = simple_network if folded else network
    return [make(*found) for found in zip(names, paths, models, strict=True)]


def network(name: str, path: str | os.PathLike[str], model: oir.Model) -> Network:
    """The network called `name`, read from `path`, with its layers as they are."""
    return Network(name, Path(path), model, parameter_count(model))


def simple_network(name: str, path: str | os.PathLike[str], model: oir.Model) -> Network:
    """The network called `name`, read from `path`; `model` is changed: batch norms folded, a bias in every layer."""
    count = parameter_count(model)
    FoldBatchNorm()(model)
    EnsureBiases()(model)
    TransposeGemms()(model)
    return Network(name, Path(path), model, count)


def sources_of(
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]], networks: Sequence[Network]
) -> Mapping[str, str | os.PathLike[str]]:
    """The data source of each task, where one may be given for all."""
    return data if isinstance(data, Mapping) else {network.name: data for network in networks}


def with_data(networks: Sequence[Network], sources: Mapping[str, str | os.PathLike[str]], *, seed: int) -> list[Task]:
    """Give each network its samples.

    Args:
        networks: the originals.
        sources: for each network's name its data.
        seed: of the held-out tenth where a source has no test samples.

    Raises:
        UsageError: a source is missing or does not fit its network.
    """
    loaded: dict[tuple[str, tuple[InputSpec, ...]], Dataset] = {}
    tasks = []
    for network in networks:
        if network.name not in sources:
            raise UsageError(f"no data for the task {network.name!r}; there are data for {sorted(sources)}")
        specs = tuple(input_specs(network.model))
        key = (os.fspath(sources[network.name]), specs)
        if key not in loaded:  # tasks that read one source share its splits, and so every run over them
            loaded[key] = load_dataset(sources[network.name], specs, seed=seed)
        tasks.append(Task(network.name, network.path, network.model, network.parameters, loaded[key]))
    return tasks


def input_specs(model: oir.Model) -> list[InputSpec]:
    """What data must look like to be fed to `model`."""
    return [
        InputSpec(v.name or "", dims(v), np.dtype(v.dtype.numpy())) for v in model.graph.inputs if v.dtype is not None
    ]


def _check_inputs(
    first_path: str | os.PathLike[str],
    first: oir.Model,
    path: str | os.PathLike[str],
    other: oir.Model,
    same_sizes: bool,
) -> None:
    ours, theirs = input_specs(first), input_specs(other)
    if [(s.shape, s.dtype) for s in ours] == [(s.shape, s.dtype) for s in theirs]:
        return
    if not same_sizes and [(len(s.shape), s.dtype) for s in ours] == [(len(s.shape), s.dtype) for s in theirs]:
        return
    raise UsageError(
        f"{path}: its inputs are {_described(theirs)}, but those of {first_path} are {_described(ours)}; "
        "networks that share layers must read the same inputs"
    )


def _described(specs: Sequence[InputSpec]) -> str:
    shapes = ["x".join("N" if size is None else str(size) for size in s.shape) + f" {s.dtype}" for s in specs]
    return ", ".join(f"{spec.name} {shape}" for spec, shape in zip(specs, shapes, strict=True))
