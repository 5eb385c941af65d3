"""An ONNX graph as a torch module: interpreted node by node, so that gradients reach its weights."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir
import torch
from torch import Tensor

from onnxmerge.calibration.operators import OPERATORS, Attributes
from onnxmerge.calibration.operators.constants import to_torch
from onnxmerge.calibration.operators.normalisation import IN_TRAINING
from onnxmerge.calibration.operators.registry import Operator
from onnxmerge.calibration.roles import Role, roles
from onnxmerge.errors import ModelError, UsageError


@dataclass(frozen=True)
class _Step:
    """One node, ready to run: value names ("" = omitted) and what is no longer needed afterwards."""

    label: str
    function: Operator
    in_training: Operator
    attributes: Attributes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    finished: tuple[str, ...]


@dataclass(frozen=True)
class _Program:
    steps: tuple[_Step, ...]
    feeds: tuple[str, ...]


class GraphModule(torch.nn.Module):
    """Runs an ONNX graph of opset 13 to 20 in torch; weights and norm scales are its parameters, the rest buffers.

    Dropout passes through, and batch norms use their running statistics: the network behaves as it will when deployed.
    Half-precision graphs are computed in float32.

    Attributes:
        batch_statistics: whether batch norms use the statistics of the batch instead, and the running ones follow them.
        outputs: the value names that `forward` returns unless it is asked for others.
        roles: the role of each initializer by name.
    """

    def __init__(self, model: onnx_ir.Model, outputs: Sequence[str] | None = None):
        """Read the graph and its weights; `outputs` may name any value, by default the graph's outputs.

        Raises:
            ModelError: an operator has no implementation, or the opset is older than 13.
            UsageError: the graph has no value of a name in `outputs`.
        """
        super().__init__()
        _check_opset(model)
        self._graph = model.graph
        self._producers = {value.name: node for node in model.graph for value in node.outputs if value.name}
        self._inputs = {str(value.name) for value in model.graph.inputs} - set(model.graph.initializers)
        self.batch_statistics = False
        self._programs: dict[tuple[str, ...], _Program] = {}
        self.roles = roles(model.graph)
        self._attribute_of: dict[str, str] = {}
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                raise ModelError(f"the initializer {name!r} holds no data")
            self._register(name, to_torch(value.const_value.numpy()))
        self.outputs = tuple(str(value.name) for value in model.graph.outputs) if outputs is None else tuple(outputs)
        self._program(self.outputs)

    def forward(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the nodes that `outputs` (default: `self.outputs`) need, and return those values by name.

        Raises:
            ModelError: a node cannot be run.
            UsageError: an input that is needed is missing, or an output is no value of the graph.
        """
        names = self.outputs if outputs is None else tuple(outputs)
        program = self._program(names)
        values = {name: getattr(self, attribute) for name, attribute in self._attribute_of.items()}
        for name in program.feeds:
            if name not in inputs:
                raise UsageError(f"the model's input {name!r} is needed and was not given")
            values[name] = inputs[name]
        for step in program.steps:
            function = step.in_training if self.batch_statistics else step.function
            results = _run(step, [values[name] if name else None for name in step.inputs], function)
            values.update(zip(step.outputs, results, strict=False))
            for name in step.finished:
                values.pop(name, None)
        return {name: values[name] for name in names}

    def value_bytes(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> int:
        """Bytes of all values computed on the way to `outputs`: what a step with gradients keeps."""
        program, total = self._program(tuple(outputs)), 0
        values = {name: getattr(self, attribute) for name, attribute in self._attribute_of.items()} | dict(inputs)
        for step in program.steps:
            results = _run(step, [values[name] if name else None for name in step.inputs], step.function)
            values.update(zip(step.outputs, results, strict=False))
            total += sum(result.nbytes for result in results)
        return total

    def feeds(self, outputs: Sequence[str] | None = None) -> tuple[str, ...]:
        """The graph inputs that `outputs` depend on."""
        return self._program(self.outputs if outputs is None else tuple(outputs)).feeds

    def trainable(self, roles: Sequence[str] = (Role.WEIGHT, Role.NORM)) -> list[torch.nn.Parameter]:
        """The parameters of the given roles, in the order of the graph's initializers."""
        return list(self.trainable_by_name(roles).values())

    def trainable_by_name(self, roles: Sequence[str] = (Role.WEIGHT, Role.NORM)) -> dict[str, torch.nn.Parameter]:
        """The same under the names of their initializers."""
        return {name: getattr(self, self._attribute_of[name]) for name, role in self.roles.items() if role in roles}

    def statistics(self) -> dict[str, Tensor]:
        """The running means and variances of batch norms, by the names of their initializers."""
        return {
            name: getattr(self, self._attribute_of[name]) for name, role in self.roles.items() if role is Role.STATISTIC
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(itertools.chain(self.parameters(), self.buffers(), [torch.empty(0)])).device

    def write_back(self, model: onnx_ir.Model) -> None:
        """Put the current parameters and running statistics into the initializers of the same names, in their type."""
        for name, role in self.roles.items():
            if role is not Role.CONSTANT:
                value = model.graph.initializers[name]
                assert value.const_value is not None
                parameter = getattr(self, self._attribute_of[name]).detach().cpu().contiguous()
                array = parameter.numpy().astype(value.const_value.dtype.numpy())
                value.const_value = onnx_ir.tensor(array, dtype=value.const_value.dtype, name=name)

    def _keep_constant(self, node: onnx_ir.Node) -> None:
        """Hold what a node always gives, where the weights are."""
        name = str(node.outputs[0].name)
        if name not in self._attribute_of:
            step = _prepare(node, ())
            (value,) = _run(step, [], step.function)
            self._register(name, value.to(self.device))

    def _register(self, name: str, tensor: Tensor) -> None:
        # Names of initializers hold dots, which torch reserves.
        attribute = f"initializer{len(self._attribute_of)}"
        self._attribute_of[name] = attribute
        tensor = channels_last(tensor)
        if self.roles.get(name, Role.CONSTANT) in (Role.CONSTANT, Role.STATISTIC):
            self.register_buffer(attribute, tensor)
        else:
            self.register_parameter(attribute, torch.nn.Parameter(tensor))

    def _program(self, outputs: tuple[str, ...]) -> _Program:
        if outputs not in self._programs:
            self._programs[outputs] = self._compile(outputs)
        return self._programs[outputs]

    def _compile(self, outputs: tuple[str, ...]) -> _Program:
        """The needed nodes in graph order, each with the values whose last reader it is."""
        wanted, needed = list(outputs), set()
        feeds = dict.fromkeys(name for name in outputs if name in self._inputs)
        while wanted:
            name = wanted.pop()
            node = self._producers.get(name)
            if node is None and name not in self._inputs and name not in self._attribute_of:
                raise UsageError(f"the model has no value {name!r}")
            if node is None or node in needed:
                continue
            needed.add(node)
            wanted.extend(str(value.name) for value in node.inputs if value is not None)
        for node in (node for node in needed if node.op_type == "Constant"):
            self._keep_constant(node)
        nodes = [node for node in self._graph if node in needed and node.op_type != "Constant"]
        last = {str(value.name): node for node in nodes for value in (*node.inputs, *node.outputs) if value is not None}
        kept = {*outputs, *self._attribute_of}
        steps = []
        for node in nodes:
            reads = dict.fromkeys(str(value.name) for value in node.inputs if value is not None)
            feeds.update(dict.fromkeys(name for name in reads if name in self._inputs))
            writes = [str(value.name) for value in node.outputs]
            finished = tuple(name for name in (*reads, *writes) if last[name] is node and name not in kept)
            steps.append(_prepare(node, finished))
        return _Program(tuple(steps), tuple(feeds))


def channels_last(tensor: Tensor) -> Tensor:
    """A 4-D tensor in the memory order that is convolved faster (on CPUs a seventh in float32, a third in bfloat16)."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _check_opset(model: onnx_ir.Model) -> None:
    version = model.opset_imports.get("")
    if version is None or version < 13:
        raise ModelError(f"opset {version} is too old to calibrate (13 is the lowest); convert the model first")


def _prepare(node: onnx_ir.Node, finished: tuple[str, ...]) -> _Step:
    label = f"node {node.name!r} ({node.op_type})"
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise ModelError(f"node {node.name!r}: the operator {operator} has no gradient implementation")
    return _Step(
        label=label,
        function=OPERATORS[node.op_type],
        in_training=IN_TRAINING.get(node.op_type, OPERATORS[node.op_type]),
        attributes=Attributes({name: a.value for name, a in node.attributes.items()}, len(node.outputs)),
        inputs=tuple("" if value is None else str(value.name) for value in node.inputs),
        outputs=tuple(str(value.name) for value in node.outputs),
        finished=finished,
    )


def _run(step: _Step, inputs: list[Tensor | None], function: Operator) -> tuple[Tensor, ...]:
    try:
        result = function(step.attributes, *inputs)
    except torch.cuda.OutOfMemoryError:  # which is no fault of the model
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{step.label}: {reason}") from error
    return result if isinstance(result, tuple) else (result,)
