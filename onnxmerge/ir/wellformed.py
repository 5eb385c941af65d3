"""Is a stored model well formed? Asked of the protobuf message, before anything is built from it.

Names: every value is made once and everything read is made somewhere, without a cycle. Nodes: operators of the standard
have the inputs, outputs and attributes that the standard asks for. Tensors: see `onnxmerge.ir.tensors`. Errors do not
name the file; whoever read it does.
"""

import functools
import graphlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxmerge.errors import ModelError
from onnxmerge.ir.tensors import check_tensor

STANDARD = ("", "ai.onnx")
"""The two names of the domain of the operators that ONNX itself defines."""
_MOST_NODES = 1_000_000
"""So many nodes may stand in a model when its functions are inlined; a few nested functions can make billions."""

_POSITIVE = {"strides", "dilations", "kernel_shape", "group", "blocksize", "num_groups", "num_outputs", "hidden_size"}
"""Attributes of the standard's operators by which runtimes divide, some after squaring them."""
_LARGEST = 2**31 - 1

_FunctionId = tuple[str, str, str]


def check_wellformed(model: onnx.ModelProto, folder: Path) -> bool:
    """Check `model`, whose external data lie in `folder`; whether its nodes stand in topological order.

    Raises:
        ModelError: the model is not well formed; the sentence names the node, value or tensor.
    """
    functions = {_function_id(function): function for function in model.functions}
    if len(functions) < len(model.functions):
        raise ModelError("it defines one function twice")
    _check_expansion(model.graph, functions)
    graphs = [_Scope(model.opset_import, set(functions), folder).check_graph(model.graph)]
    graphs += [_Scope(f.opset_import, set(functions), folder).check_function(f) for f in model.functions]
    return all(graphs)


class _Scope:
    """The names that can be read where we are, outermost graph first."""

    def __init__(self, opsets: Sequence[onnx.OperatorSetIdProto], functions: set[_FunctionId], folder: Path):
        self._opset = _standard_opset(opsets)
        self._functions, self._folder = functions, folder
        self._names: list[set[str]] = []
        self._sorted = True

    def check_graph(self, graph: onnx.GraphProto) -> bool:
        """Check the main graph; whether all nodes stand in order."""
        self._graph(graph)
        return self._sorted

    def check_function(self, function: onnx.FunctionProto) -> bool:
        """Check the body of a function; whether all nodes stand in order."""
        self._body(list(function.input), function.node, function.output)
        return self._sorted

    def _graph(self, graph: onnx.GraphProto) -> set[str]:
        """Check a graph inside the current scope; the names of the scope that it reads."""
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise ModelError(f"the sparse initializer {name!r} is not supported; store it dense")
        for tensor in graph.initializer:
            check_tensor(tensor, f"initializer {tensor.name!r}", self._folder)
        for value in itertools.chain(graph.input, graph.output, graph.value_info):
            _check_sizes(value)
        inputs = [value.name for value in graph.input]
        constants = [tensor.name for tensor in graph.initializer]
        _once(inputs, "input")
        _once(constants, "initializer")
        return self._body(list(dict.fromkeys(inputs + constants)), graph.node, [value.name for value in graph.output])

    def _body(self, given: list[str], nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> set[str]:
        _once(outputs, "output")
        makers: dict[str, int | None] = dict.fromkeys(given)
        for number, node in enumerate(nodes):
            for name in filter(None, node.output):
                if name in makers:
                    raise ModelError(f"the value {name!r} is made twice, the second time by {_called(node)}")
                makers[name] = number
        self._names.append(set(makers))
        reads = [self._node(node) for node in nodes]
        for name in outputs:
            if not self._is_known(name):
                raise ModelError(f"nothing makes the output {name!r}")
        self._names.pop()
        self._sorted &= _check_order(nodes, reads, makers)
        return set().union(*reads, outputs) - makers.keys()

    def _node(self, node: onnx.NodeProto) -> set[str]:
        """Check a node with its sub-graphs; the names it reads, theirs included."""
        for name in filter(None, node.input):
            if not self._is_known(name):
                raise ModelError(f"{_called(node)} reads {name!r}, which nothing makes")
        if node.domain in STANDARD and ("", node.op_type, "") not in self._functions:
            if self._opset is None:
                raise ModelError(f"{_called(node)} is an operator of ONNX itself, of which no opset is declared")
            _check_signature(node, self._opset)
        reads = set(filter(None, node.input))
        for attribute in node.attribute:
            for tensor in ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors):
                check_tensor(tensor, f"attribute {attribute.name!r} of {_called(node)}", self._folder)
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ModelError(f"{_called(node)} holds a sparse tensor, which is not supported; store it dense")
            for graph in _graphs(attribute):
                reads |= self._graph(graph)
        return reads

    def _is_known(self, name: str) -> bool:
        return any(name in names for names in self._names)


def _standard_opset(opsets: Sequence[onnx.OperatorSetIdProto]) -> int | None:
    """The opset of the standard domain; None where it is not imported."""
    versions: dict[str, int] = {}
    for opset in opsets:
        domain = "" if opset.domain in STANDARD else opset.domain
        if versions.setdefault(domain, opset.version) != opset.version:
            raise ModelError(f"it declares two opsets for the domain {domain!r}")
    return versions.get("")


def _check_order(nodes: Sequence[onnx.NodeProto], reads: list[set[str]], makers: dict[str, int | None]) -> bool:
    """Whether each node stands behind those it reads from. Raises where no order can do that."""
    sources = [{makers[name] for name in names if makers.get(name) is not None} for names in reads]
    if all(source < number for number, own in enumerate(sources) for source in own if source is not None):
        return True
    try:
        graphlib.TopologicalSorter(dict(enumerate(sources))).prepare()
    except graphlib.CycleError as error:
        raise ModelError(f"{_called(nodes[error.args[1][0]])} reads its own output (a cycle)") from error
    return False


def _check_sizes(value: onnx.ValueInfoProto) -> None:
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_value < 0:
            raise ModelError(f"the value {value.name!r} has the negative size {dim.dim_value}")


def _once(names: Iterable[str], kind: str) -> None:
    seen = set()
    for name in names:
        if not name:
            raise ModelError(f"an {kind} has no name")
        if name in seen:
            raise ModelError(f"the {kind} {name!r} stands there twice")
        seen.add(name)


# --- nodes against the standard ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    required: tuple[bool, ...]
    attributes: dict[str, tuple[int, bool]]
    deprecated: bool


@functools.cache
def _signature(op_type: str, opset: int) -> _Signature | None:
    """What the standard asks of an operator; None where this version of onnx does not know it."""
    if opset > onnx.defs.onnx_opset_version():
        return None
    try:
        schema = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return _Signature(
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        tuple(parameter.option == single for parameter in schema.inputs),
        {n: (a.type.value, a.required) for n, a in schema.attributes.items()},  # type: ignore[attr-defined]
        schema.deprecated,
    )


def _check_signature(node: onnx.NodeProto, opset: int) -> None:
    """Check the inputs, outputs and attributes of a standard operator. Unknown ones are left to onnxruntime."""
    wanted = _signature(node.op_type, opset)
    if wanted is None:
        return
    if wanted.deprecated:
        raise ModelError(f"{_called(node)} no longer exists in opset {opset}")
    for kind, names, (least, most) in (("input", node.input, wanted.inputs), ("output", node.output, wanted.outputs)):
        if not least <= len(names) <= most:
            few_or_many = f"at least {least}" if len(names) < least else f"at most {most}"
            raise ModelError(f"{_called(node)} has {len(names)} {kind}s, but takes {few_or_many}")
    for number, (name, required) in enumerate(zip(node.input, wanted.required, strict=False)):
        if required and not name:
            raise ModelError(f"{_called(node)} lacks input {number}")
    own = {attribute.name: attribute for attribute in node.attribute}
    if len(own) < len(node.attribute):
        raise ModelError(f"{_called(node)} has an attribute twice")
    for name, attribute in own.items():
        if name not in wanted.attributes:
            raise ModelError(f"{_called(node)} has the attribute {name!r}, which opset {opset} does not know")
        if attribute.type != wanted.attributes[name][0]:
            raise ModelError(f"the attribute {name!r} of {_called(node)} is of a wrong type")
        numbers = [] if name not in _POSITIVE or attribute.ref_attr_name else attribute.ints or [attribute.i]
        if not all(1 <= number <= _LARGEST for number in numbers):
            raise ModelError(f"the attribute {name!r} of {_called(node)} holds a number that is not in 1..{_LARGEST}")
    for name, (_, required) in wanted.attributes.items():
        if required and name not in own:
            raise ModelError(f"{_called(node)} lacks the attribute {name!r}")


def _called(node: onnx.NodeProto) -> str:
    if node.name:
        return f"{node.op_type} {node.name!r}"
    made = next(filter(None, node.output), None)
    return f"the {node.op_type} that makes {made!r}" if made else f"a {node.op_type} without outputs"


# --- functions --------------------------------------------------------------------------------------------------------


def _check_expansion(graph: onnx.GraphProto, functions: dict[_FunctionId, onnx.FunctionProto]) -> None:
    """Refuse functions that call themselves, or that are too large when inlined."""
    calls = {own: [_function_id(n) for n in _all_nodes(function.node)] for own, function in functions.items()}
    sizes: dict[_FunctionId, int] = {}
    try:
        for own in graphlib.TopologicalSorter(calls).static_order():
            sizes[own] = sum(sizes[called] for called in calls[own]) if own in calls else 1
    except graphlib.CycleError as error:
        raise ModelError(f"the function {error.args[1][0][1]!r} calls itself") from error
    total = sum(sizes.get(_function_id(node), 1) for node in _all_nodes(graph.node))
    if total > _MOST_NODES:
        raise ModelError(f"it has {total} nodes when its functions are inlined; {_MOST_NODES} is the most")


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their sub-graphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                yield from _all_nodes(graph.node)


def _graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)


def _function_id(called: onnx.NodeProto | onnx.FunctionProto) -> _FunctionId:
    name = called.name if isinstance(called, onnx.FunctionProto) else called.op_type
    return "" if called.domain in STANDARD else called.domain, name, called.overload
