"""Stack the tasks' streams on the batch axis, so that a weight that they share is held and used once (exact).

Each task keeps its own activations. In front of a layer with a shared weight the tasks' inputs are concatenated along
axis 0, the layer runs once, and its output is split again where something follows that each task has of its own (a
bias, a norm, a depthwise convolution). What does not mix the entries of axis 0 stays stacked. If all tasks read the
same inputs, what comes before the first difference is computed once and not stacked at all.

Of a layer of which only some neurons are shared, y_S from the shared inputs x_S, each task t has its own connections
from its private inputs x_P and to its private outputs y_P (He, Zhou and Thiele, Multi-Task Zipping, 2018, figure 1):

    y_S = x_S W + x_P U_t,        y_P = x V_t

Sources: MTZ; Zippering MobileNets (Chou et al. 2019), where depthwise convolutions are the tasks' own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import finish
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import Layer, find_layers
from onnxmerge.ir.weights import add_initializer, get_array, set_array
from onnxmerge.passes.attach_tails import SHARED, attach_tail
from onnxmerge.passes.pad_inputs import Padding, own_input, padded_input
from onnxmerge.passes.roles import read_axis
from onnxmerge.passes.weight_parts import PRIVATE, TO_SHARED, Part, cut_up, put_together
from onnxmerge.runtime.patches import channel_axis

STACK, UNSTACK = "/stack", "/unstack"
"""How the names of the nodes end that put the streams together and take them apart."""
_BY_ENTRY = frozenset(
    (
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish"),
        *("Tanh", "Softplus", "Softsign", "ThresholdedRelu", "Clip", "Identity", "Neg", "Abs", "Exp", "Sqrt", "Erf"),
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"),
    )
)
_BY_IMAGE = frozenset(
    (
        *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
        *("BatchNormalization", "InstanceNormalization"),
    )
)


class StackTasks(oir.passes.FunctionalPass):
    """Compose one model from the tasks' stems and tails; called on the first task's stem.

    Arrays that are equal in all stems are stored once. Shared nodes and arrays get the prefix `shared/`, a task's own
    in the stem `TASK/stem/`, those of its tail `TASK/`; a task's outputs become `TASK/output`.

    Args:
        task: the first task's name.
        others: the other tasks' stems: the same graph with the same names, and other arrays.
        tails: by task; the inputs of each are, in order, its stem's outputs.
        parts: for the weights of which only a part is shared, which part.
        inputs: where tasks have inputs of their own, called `TASK/name`: by task, for each input of its stem the name
            and the zeros that it lacks. None: all read the same.
    """

    preserves = "exact"

    def __init__(
        self,
        task: str,
        others: Mapping[str, oir.Model],
        tails: Mapping[str, oir.Model],
        parts: Mapping[str, Part] | None = None,
        inputs: Mapping[str, Sequence[tuple[str, Padding]]] | None = None,
    ):
        self.task = task
        self.others = others
        self.tails = tails
        self.parts = parts or {}
        self.inputs = inputs

    def requires(self, model: oir.Model) -> None:
        """The stems have one graph."""
        for task, other in self.others.items():
            for ours, theirs in zip(model.graph, other.graph, strict=True):
                if ours.op_type != theirs.op_type or [o.name for o in ours.outputs] != [o.name for o in theirs.outputs]:
                    raise ModelError(f"the stem of {task} differs from that of {self.task} at {ours.name!r}")

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Compose a new model; stems and tails stay as they are.

        Raises:
            ModelError: a node of the stems has a sub-graph.
        """
        for node in model.graph:
            if any(a.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS) for a in node.attributes.values()):
                raise ModelError(f"{node.op_type} {node.name!r} has a sub-graph: no weights can be shared behind it")
        stems = {self.task: model, **self.others}
        inputs = [oir.Value(name=v.name, shape=v.shape, type=v.type) for v in model.graph.inputs]
        graph = oir.Graph(
            [] if self.inputs else inputs, [], nodes=[], opset_imports=dict(model.graph.opset_imports), name="onnxmerge"
        )
        streams = _Streams(graph, stems, self.parts)
        if self.inputs:
            streams.add_inputs(inputs, [self.inputs[task] for task in stems])
        for copies in zip(*(stem.graph for stem in stems.values()), strict=True):
            streams.add(copies)
        ends = [streams.own(value.name or "") for value in model.graph.outputs]
        for number, task in enumerate(stems):
            attach_tail(graph, f"{task}/", self.tails[task], [end[number] for end in ends])
        composed = oir.Model(graph, ir_version=model.ir_version or 8, producer_name="onnxmerge")
        return oir.passes.PassResult(finish(composed), modified=True)


@dataclass
class _Held:
    """The forms in which one value of the stems is in the merged graph."""

    one: oir.Value | None = None
    """The same for all tasks."""
    stacked: oir.Value | None = None
    own: list[oir.Value] | None = None
    """One for each task."""


class _Streams:
    """The merged graph while it grows, and where each value of the stems is in it."""

    def __init__(self, graph: oir.Graph, stems: Mapping[str, oir.Model], parts: Mapping[str, Part]):
        self._graph = graph
        self._tasks = list(stems)
        self._parts = parts
        self._layers = {layer.node: layer for stem in stems.values() for layer in find_layers(stem)}
        self._held = {value.name or "": _Held(one=value) for value in graph.inputs}

    def add_inputs(self, wide: Sequence[oir.Value], inputs: Sequence[Sequence[tuple[str, Padding]]]) -> None:
        """Give each task inputs of its own for those of the stems."""
        for number, value in enumerate(wide):
            own = []
            for task, named in enumerate(inputs):
                name, padding = named[number]
                source = own_input(value, f"{self._tasks[task]}/{name}", padding)
                self._graph.inputs.append(source)
                own.append(padded_input(self._graph, source, padding, self._own_name(task, f"{name}__padded")))
            self._held[value.name or ""] = _Held(own=own)

    def add(self, copies: Sequence[oir.Node]) -> None:
        """Add one node of the stems, given as each task has it."""
        layers = [self._layers[node] for node in copies if node in self._layers and by_row(node)]
        if not layers:
            self._add_plain(copies, layer=False)
        elif layers[0].weight.name in self._parts:
            self._add_partly(layers, self._parts[layers[0].weight.name or ""])
        elif len(copies[0].inputs) > 2 and _same(copies, 1) and not _same(copies, 2):
            self._add_without_bias(layers)
        else:
            self._add_plain(copies, layer=True)

    def own(self, name: str) -> list[oir.Value]:
        """The value `name` of each task."""
        held = self._held[name]
        if held.own is None and held.one is not None:
            return [held.one] * len(self._tasks)
        if held.own is None:
            assert held.stacked is not None
            held.own = [oir.Value(name=self._own_name(task, name)) for task in range(len(self._tasks))]
            attributes = {"axis": 0, "num_outputs": len(self._tasks)}
            node = oir.node("Split", [held.stacked], attributes, outputs=held.own, name=f"{SHARED}{name}{UNSTACK}")
            self._graph.append(node)
        return held.own

    def _stacked(self, name: str) -> oir.Value:
        held = self._held[name]
        if held.stacked is None:
            made = f"{SHARED}{name}"
            held.stacked = self._node("Concat", self.own(name), {"axis": 0}, f"{made}{STACK}", f"{made}__stacked")
        return held.stacked

    def _one_or_stacked(self, name: str) -> oir.Value:
        return self._held[name].one or self._stacked(name)

    def _shared(self, read: str, made: oir.Value) -> _Held:
        """What a shared node makes of the value `read`, in the form in which it reads it."""
        return _Held(one=made) if self._held[read].one is not None else _Held(stacked=made)

    def _add_plain(self, copies: Sequence[oir.Node], layer: bool) -> None:
        """Once for all tasks, stacked, or once for each."""
        first = copies[0]
        computed = [v.name or "" for v in first.inputs if v is not None and v.const_value is None]
        held = [self._held[name] for name in computed]
        same = all(_same(copies, index) for index in range(len(first.inputs)))
        if same and all(value.one is not None for value in held):
            made = [_Held(one=value) for value in self._copy(first, SHARED, lambda name: self._held[name].one)]
        elif same and by_row(first) and (layer or _is_stacked(held)):
            made = [_Held(stacked=value) for value in self._copy(first, SHARED, self._stacked)]
        else:
            read = {name: self.own(name) for name in computed}
            each = [
                self._copy(node, self._own_name(task, ""), {name: own[task] for name, own in read.items()}.__getitem__)
                for task, node in enumerate(copies)
            ]
            made = [_Held(own=list(own)) for own in zip(*each, strict=True)]
        self._held.update(zip([output.name or "" for output in first.outputs], made, strict=True))

    def _copy(self, node: oir.Node, prefix: str, find: Callable[[str], oir.Value | None]) -> list[oir.Value]:
        inputs = [
            None if v is None else find(v.name or "") if v.const_value is None else self._array(v, prefix)
            for v in node.inputs
        ]
        outputs = [oir.Value(name=f"{prefix}{output.name}" if output.name else "") for output in node.outputs]
        kept = node.attributes.values()
        name = f"{prefix}{node.name}"
        self._graph.append(oir.Node(node.domain, node.op_type, inputs, kept, outputs=outputs, name=name))
        return outputs

    def _add_without_bias(self, layers: Sequence[Layer]) -> None:
        """One weight for all, a bias for each."""
        first = layers[0]
        read, made = first.input.name or "", f"{first.linear.name}__product"
        weight = self._array(first.weight, SHARED)
        product = self._product(first, self._one_or_stacked(read), weight, f"{SHARED}{made}")
        self._held[made] = self._shared(read, product)
        self._add_biases(layers, self.own(made))

    def _add_biases(self, layers: Sequence[Layer], products: Sequence[oir.Value]) -> None:
        """Give each task its own bias, if the layers have one; a MatMul's is a node of its own."""
        made = layers[0].node.outputs[0].name or ""
        own = list(products)
        for task, layer in enumerate(layers):
            if layer.op != "MatMul" and layer.bias is not None:
                name = self._own_name(task, made)
                axes = len(layer.weight_shape) - 2  # those behind the channels
                array = get_array(layer.bias).reshape(-1, *[1] * axes)
                bias = self._stored(self._own_name(task, layer.bias.name or ""), array)
                own[task] = self._node("Add", [own[task], bias], {}, f"{name}__bias", name)
        self._held[made] = _Held(own=own)

    def _add_partly(self, layers: Sequence[Layer], part: Part) -> None:
        """The shared neurons from the shared inputs for all tasks together, all other connections for each."""
        first, axis = layers[0], channel_axis(layers[0])
        read, made, weight = first.input.name or "", first.node.outputs[0].name or "", first.weight.name or ""
        picked, common = f"{made}__reads", f"{made}__shared"
        self._held[picked] = self._picked(read, part.reads, axis, picked)
        array = self._stored(f"{SHARED}{weight}", cut_up(first, get_array(first.weight), part)[""])
        product = self._product(first, self._one_or_stacked(picked), array, f"{SHARED}{common}")
        self._held[common] = self._shared(picked, product)
        products = []
        for task, layer in enumerate(layers):
            name, data, total = self._own_name(task, made), self.own(read)[task], self.own(common)[task]
            pieces = cut_up(layer, get_array(layer.weight), part)
            stored = {
                ending: self._stored(self._own_name(task, f"{weight}{ending}"), pieces[ending])
                for ending in (TO_SHARED, PRIVATE)
                if pieces[ending].size
            }
            if TO_SHARED in stored:
                private = self._gather(data, np.flatnonzero(~part.reads), axis, f"{name}__unshared")
                more = self._product(layer, private, stored[TO_SHARED], f"{name}{TO_SHARED}")
                total = self._node("Add", [total, more], {}, f"{name}__sum", f"{name}__sum")
            if PRIVATE in stored:
                private = self._product(layer, data, stored[PRIVATE], f"{name}{PRIVATE}")
                total = self._side_by_side(total, private, part.makes, axis, f"{name}__product")
            products.append(total)
        self._add_biases(layers, products)

    def _picked(self, data: str, where: np.ndarray, axis: int, name: str) -> _Held:
        """The channels of the value `data` at which `where` holds."""
        held, places = self._held[data], np.flatnonzero(where)
        if where.all():
            return held
        if held.one is not None:
            return _Held(one=self._gather(held.one, places, axis, f"{SHARED}{name}"))
        if held.stacked is not None:
            return _Held(stacked=self._gather(held.stacked, places, axis, f"{SHARED}{name}"))
        own = enumerate(self.own(data))
        return _Held(own=[self._gather(value, places, axis, self._own_name(task, name)) for task, value in own])

    def _side_by_side(
        self, shared: oir.Value, private: oir.Value, where: np.ndarray, axis: int, name: str
    ) -> oir.Value:
        """The shared channels at the places where `where` holds, the private ones at the others."""
        joined = self._node("Concat", [shared, private], {"axis": axis}, f"{name}__join", f"{name}__joined")
        order = np.argsort(np.argsort(~where, kind="stable"))
        return joined if (np.diff(order) == 1).all() else self._gather(joined, order, axis, name)

    def _gather(self, value: oir.Value, places: np.ndarray, axis: int, name: str) -> oir.Value:
        index = self._stored(f"{name}__channels", places.astype(np.int64))
        return self._node("Gather", [value, index], {"axis": axis}, f"{name}__gather", name)

    def _product(self, layer: Layer, data: oir.Value, weight: oir.Value, name: str) -> oir.Value:
        return self._node(layer.op, [data, weight], layer.node.attributes, name, name)

    def _node(
        self, op: str, inputs: Sequence[oir.Value], attributes: Mapping[str, int | oir.Attr], name: str, made: str
    ) -> oir.Value:
        output = oir.Value(name=made)
        self._graph.append(oir.node(op, inputs, dict(attributes), outputs=[output], name=name))
        return output

    def _array(self, value: oir.Value, prefix: str) -> oir.Value:
        return self._stored(f"{prefix}{value.name}", get_array(value))

    def _stored(self, name: str, array: np.ndarray) -> oir.Value:
        return self._graph.initializers.get(name) or add_initializer(self._graph, name, array)

    def _own_name(self, task: int, name: str) -> str:
        return f"{own_prefix(self._tasks[task])}{name}"


def _is_stacked(held: Sequence[_Held]) -> bool:
    """Whether values are all stacked, or taking them apart would cost as much as stacking the others."""
    return all(value.stacked or value.one for value in held) or any(value.stacked and not value.own for value in held)


def own_prefix(task: str) -> str:
    """What stands before the names of a task's own nodes and arrays in the stem."""
    return f"{task}/stem/"


def _same(copies: Sequence[oir.Node], index: int) -> bool:
    """Whether the nodes' inputs `index` are computed, or equal constants."""
    first, *others = (node.inputs[index] for node in copies)
    if first is None or first.const_value is None:
        return True
    array = get_array(first)
    return all(other is not None and np.array_equal(array, get_array(other)) for other in others)


def by_row(node: oir.Node) -> bool:
    """Whether the node treats each entry of axis 0 of what it reads alone, whatever their number."""
    first = node.inputs[0] if node.inputs else None
    if node.domain not in ("", "ai.onnx") or first is None or first.shape is None or len(node.outputs) != 1:
        return False
    if node.op_type in ("Gemm", "MatMul"):
        return read_axis(node) is not None and len(first.shape) > 1
    if node.op_type == "Conv" or node.op_type in _BY_IMAGE:
        return all(value is None or value.const_value is not None for value in node.inputs[1:])
    if node.op_type == "Flatten":
        return "axis" not in node.attributes or node.attributes["axis"].as_int() >= 1
    return node.op_type in _BY_ENTRY and _batch_leads(node)


def _batch_leads(node: oir.Node) -> bool:
    """Whether all that an element-wise node reads has one and the same axis 0, or is constant along it."""
    given = [value for value in node.inputs if value is not None]
    computed = [value for value in given if value.const_value is None]
    ranks = {None if value.shape is None else len(value.shape) for value in computed}
    leading = {None if value.shape is None else str(value.shape[0]) for value in computed}
    if len(ranks) != 1 or len(leading) != 1 or not ranks - {None} or not leading - {None, "None"}:
        return False
    (rank,) = ranks
    constant = [dims(value) for value in given if value.const_value is not None]
    return all(len(sizes) < (rank or 0) or sizes[0] == 1 for sizes in constant)


def read_streams(merged: oir.Model, stems: Mapping[str, oir.Model], parts: Mapping[str, Part]) -> None:
    """Put the arrays of a merged model back into the stems that it was stacked from, in place."""
    arrays = merged.graph.initializers
    for task, stem in stems.items():
        layers = {layer.weight.name: layer for layer in find_layers(stem)}
        for name, value in stem.graph.initializers.items():
            own, common = f"{own_prefix(task)}{name}", arrays.get(f"{SHARED}{name}")
            if name in parts and common is not None:
                pieces = {ending: arrays[own + ending] for ending in (TO_SHARED, PRIVATE) if own + ending in arrays}
                found = {ending: get_array(piece) for ending, piece in ({"": common} | pieces).items()}
                set_array(value, put_together(layers[name], found, parts[name]))
            else:
                stored = common or arrays[own]
                set_array(value, get_array(stored).reshape(get_array(value).shape))
