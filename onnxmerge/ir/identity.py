"""When two nodes compute the same: a digest of each value that depends on what it is, never on names or order.

    d(node) = SHA-256(domain, operator, attributes, sub-graphs, d(inputs))

with attributes at their default equal to absent ones, and the two operands of a commutative operator in the order of
their digests. Reshape, Flatten, Squeeze and Unsqueeze are all one operator, told by the shape they make, however the
exporter had that shape computed. This is value numbering (Alpern, Wegman, Zadeck 1988) with digests for numbers.
"""

import hashlib
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as oir

from onnxmerge.ir.sizes import sizes_of
from onnxmerge.ir.stored import digest

_STANDARD = {"", "ai.onnx", "ai.onnx.ml"}
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
_COMMUTATIVE = {"Add", "Mul", "Sum", "Mean", "Equal", "And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
"""With two operands, bit for bit. Min and Max are not among them: max(0, -0) may be either zero."""
_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_WINDOWS = {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool"}
_NEUTRAL = {"dilations": 1, "strides": 1, "pads": 0}
"""Attributes of windowed operators whose default the operator's text tells, not its schema."""


def is_random(node: oir.Node) -> bool:
    """Whether two runs of the node on equal inputs may differ: it draws numbers, or it is a Dropout in training."""
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = node.inputs[2].const_value
        return training is None or bool(training.numpy())
    return node.op_type in _RANDOM


def is_copy(node: oir.Node) -> bool:
    """Whether the node hands on its first input: Identity, a Dropout that drops nothing, a Cast to the same type."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Dropout":
        return len(node.outputs) == 1 and not is_random(node)
    if node.op_type == "Cast":
        kind = node.inputs[0].dtype
        return kind is not None and "to" in node.attributes and kind == node.attributes["to"].as_int()
    return node.op_type == "Identity"


def draws_numbers(model: oir.Model) -> bool:
    """Whether any node of the model, or of its sub-graphs, is random."""
    return any(is_random(node) for node in model.graph.all_nodes())


class Digests:
    """Digests of the values of one graph; nodes must be added in topological order.

    Args:
        opsets: versions of the operator sets, by domain.
    """

    def __init__(self, opsets: Mapping[str, int]):
        self._known: dict[oir.Value, bytes] = {}
        self._unshaped: dict[oir.Value, oir.Value] = {}
        self._defaults = Defaults(opsets)
        self._fresh = 0

    def of(self, value: oir.Value) -> bytes:
        """The digest of `value`; one of its own where it has no history (an input, an initializer)."""
        if value not in self._known:
            self._known[value] = self._unique()
        return self._known[value]

    def alias(self, value: oir.Value, source: oir.Value) -> None:
        """`value` is a copy of `source`."""
        self._known[value] = self.of(source)

    def add(self, node: oir.Node) -> bool:
        """Give the node's outputs their digests; False when it must not be merged with any other."""
        found = self._reshape(node) or self._node(node, self._known, 0)
        for index, output in enumerate(node.outputs):
            self._known[output] = self._unique() if found is None else _hash(found, index.to_bytes(4, "little"))
        return found is not None

    def _unique(self) -> bytes:
        self._fresh += 1
        return _hash(b"unique", str(self._fresh).encode())

    def _reshape(self, node: oir.Node) -> bytes | None:
        """The digest of a node that only changes the shape, where all sizes but one are known: they decide that one."""
        source = node.inputs[0] if node.inputs else None
        if node.op_type not in _RESHAPES or node.domain not in _STANDARD or source is None:
            return None
        (made,) = node.outputs
        sizes = [size if isinstance(size, int) else -1 for size in sizes_of(made) or []]
        if made.is_graph_output() or made.shape is None or sizes.count(-1) > 1 or 0 in sizes:
            return None  # what an output declares, nobody has checked
        self._unshaped[made] = self._unshaped.get(source, source)
        return _hash(b"reshape", self.of(self._unshaped[made]), str(sizes).encode())

    def _node(self, node: oir.Node, known: dict[oir.Value, bytes], depth: int) -> bytes | None:
        if node.domain not in _STANDARD or is_random(node):
            return None
        parts = [node.domain.removeprefix("ai.onnx").encode(), node.op_type.encode()]
        parts.append(str([bool(output.name) for output in node.outputs]).encode())
        attributes = self._attributes(node, known, depth)
        if attributes is None:
            return None
        parts += attributes
        inputs = [b"" if v is None else known[v] if v in known else self.of(v) for v in node.inputs]
        while inputs and not inputs[-1]:
            inputs.pop()
        if node.op_type in _COMMUTATIVE and len(inputs) == 2:
            inputs.sort()
        return _hash(*parts, *inputs)

    def _attributes(self, node: oir.Node, known: dict[oir.Value, bytes], depth: int) -> list[bytes] | None:
        parts = []
        for attribute in self._defaults.said(node):
            if attribute.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS):
                one = attribute.type == oir.AttributeType.GRAPH
                graphs = [attribute.as_graph()] if one else list(attribute.as_graphs())
                inner = [self._graph(graph, known, depth + 1) for graph in graphs]
                if any(found is None for found in inner):
                    return None
                content: bytes | None = _hash(*(found for found in inner if found is not None))
            else:
                content = attribute_content(attribute)
            if content is None:
                return None
            parts.append(_hash(attribute.name.encode(), content))
        return [str(len(parts)).encode(), *parts]

    def _graph(self, graph: oir.Graph, outer: Mapping[oir.Value, bytes], depth: int) -> bytes | None:
        """The digest of what a sub-graph computes from its inputs and from the outer values that it captures."""
        known = dict(outer)
        for index, value in enumerate(graph.inputs):
            known[value] = _hash(b"input", f"{depth} {index}".encode())
        for value in graph.initializers.values():
            if value.const_value is not None:
                known[value] = digest(value.const_value)
        for node in graph:
            found = self._node(node, known, depth)
            if found is None:
                return None
            for index, output in enumerate(node.outputs):
                known[output] = _hash(found, index.to_bytes(4, "little"))
        return _hash(str(len(graph.inputs)).encode(), *(known[v] if v in known else self.of(v) for v in graph.outputs))


class Defaults:
    """What the attributes of a node say if they are left out.

    Args:
        opsets: versions of the operator sets, by domain.
    """

    def __init__(self, opsets: Mapping[str, int]):
        self._opsets = opsets
        self._schemas: dict[tuple[str, str], dict[str, bytes | None]] = {}

    def said(self, node: oir.Node) -> list[oir.Attr]:
        """The attributes of `node` that say something else than their absence would, by name."""
        defaults = self._of(node)
        found = []
        for name, attribute in sorted(node.attributes.items()):
            content = attribute_content(attribute)
            if not _is_neutral(node, attribute) and (content is None or content != defaults.get(name)):
                found.append(attribute)
        return found

    def _of(self, node: oir.Node) -> dict[str, bytes | None]:
        key = (node.domain, node.op_type)
        if key not in self._schemas:
            try:
                schema = onnx.defs.get_schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
                self._schemas[key] = {
                    name: attribute_content(oir.serde.deserialize_attribute(attribute.default_value))
                    for name, attribute in schema.attributes.items()
                    if attribute.default_value.name
                }
            except onnx.defs.SchemaError:
                self._schemas[key] = {}
        return self._schemas[key]


def _is_neutral(node: oir.Node, attribute: oir.Attr) -> bool:
    """Whether a windowed operator's attribute says what its absence says."""
    if node.op_type not in _WINDOWS:
        return False
    if attribute.name == "kernel_shape" and node.op_type in ("Conv", "ConvTranspose"):
        weight = node.inputs[1]
        return (
            weight is not None
            and weight.const_value is not None
            and (list(attribute.as_ints()) == list(weight.const_value.shape)[2:])
        )
    return attribute.name in _NEUTRAL and set(attribute.as_ints()) == {_NEUTRAL[attribute.name]}


def attribute_content(attribute: oir.Attr) -> bytes | None:
    """The bytes of an attribute's value; None for kinds that are not compared, such as graphs."""
    kind, value = attribute.type, attribute.value
    if kind == oir.AttributeType.TENSOR:
        return digest(attribute.as_tensor())
    if kind == oir.AttributeType.TENSORS:
        return _hash(*(digest(tensor) for tensor in attribute.as_tensors()))
    if kind in (oir.AttributeType.INT, oir.AttributeType.FLOAT, oir.AttributeType.STRING):
        return f"{kind.name} {value!r}".encode()
    if kind in (oir.AttributeType.INTS, oir.AttributeType.FLOATS, oir.AttributeType.STRINGS):
        assert isinstance(value, Sequence)
        return f"{kind.name} {list(value)!r}".encode()
    return None


def _hash(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()
