"""A task: one original network, its data, and how its inputs stand for those of the merged model."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from onnxmerge.passes.transpose_gemms import TransposeGemms
from onnxmerge.report.provenance import sha256
from onnxmerge.report.schema import InputRecord


class Feeds:
    """A split's inputs as feeds for a model that calls them by other names; labels are left out."""

    def __init__(self, split: Split, names: Mapping[str, str]):
        self._split, self._names = split, names

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """See `onnxmerge.runtime.activations.Samples`."""
        for batch in self._split.batches(size):
            yield {new: batch.inputs[old] for old, new in self._names.items()}


@dataclass
class Network:
    """One original network.

    Attributes:
        name: prefix of the task's outputs in the merged model.
        path: the file.
        model: its normal form with batch norms folded.
        parameters: floating-point numbers in the file's normal form, before folding.
    """

    name: str
    path: Path
    model: oir.Model
    parameters: int

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
        return Feeds(split, dict(zip(self.inputs, reader.inputs, strict=True)))


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


def load_networks(paths: Sequence[str | os.PathLike[str]]) -> list[Network]:
    """Load the networks, bring them to one opset, fold their batch norms, and check that they can share their inputs.

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
        _check_inputs(paths[0], models[0], path, model)
    networks = []
    for name, path, model in zip(names, paths, models, strict=True):
        count = parameter_count(model)
        FoldBatchNorm()(model)
        EnsureBiases()(model)
        TransposeGemms()(model)
        networks.append(Network(name, Path(path), model, count))
    return networks


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
    first_path: str | os.PathLike[str], first: oir.Model, path: str | os.PathLike[str], other: oir.Model
) -> None:
    ours, theirs = input_specs(first), input_specs(other)
    if [(s.shape, s.dtype) for s in ours] == [(s.shape, s.dtype) for s in theirs]:
        return
    raise UsageError(
        f"{path}: its inputs are {_described(theirs)}, but those of {first_path} are {_described(ours)}; "
        "networks that share layers must read the same inputs"
    )


def _described(specs: Sequence[InputSpec]) -> str:
    shapes = ["x".join("N" if size is None else str(size) for size in s.shape) + f" {s.dtype}" for s in specs]
    return ", ".join(f"{spec.name} {shape}" for spec, shape in zip(specs, shapes, strict=True))
