"""Build small ONNX graphs node by node, with random weights whose activations stay near unit scale."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.ir.normalise import normalise
from onnxmerge.runtime.session import open_session, run

Array = np.ndarray


class Net:
    """A graph under construction. Methods add nodes and return the name of the value made.

    `channels[value]` is the size of axis 1 (of the last axis after `flatten`, `gemm` and `matmul`).
    """

    def __init__(self, seed: int = 0, opset: int = 18):
        self.generator = np.random.default_rng(seed)
        self.opset = opset
        self.channels: dict[str, int] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._numbers = itertools.count()

    def input(self, shape: Sequence[int | str], name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.channels[name] = int(shape[1] if len(shape) == 4 else shape[-1])
        return name

    def output(self, *names: str) -> None:
        self.outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]

    def constant(self, array: Any, name: str | None = None) -> str:
        name = name or f"c{next(self._numbers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((scale * self.generator.standard_normal(shape)).astype(np.float32))

    def uniform(self, *shape: int, low: float = 0.5, high: float = 1.5) -> str:
        return self.constant(self.generator.uniform(low, high, shape).astype(np.float32))

    def op(
        self, op_type: str, *inputs: str, channels: int | None = None, name: str | None = None, **attributes: Any
    ) -> str:
        made = name or f"v{next(self._numbers)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [made], name=f"{op_type}_{made}", **attributes))
        known = [self.channels[i] for i in inputs if i in self.channels]
        self.channels[made] = channels if channels is not None else max(known, default=1)
        return made

    def conv(self, x: str, out: int, kernel: int = 3, group: int = 1, bias: bool = True, **attributes: Any) -> str:
        fan_in = self.channels[x] // group * kernel**2
        weights = [self.normal(out, self.channels[x] // group, kernel, kernel, scale=(2 / fan_in) ** 0.5)]
        weights += [self.normal(out, scale=0.3)] if bias else []
        if "auto_pad" not in attributes:
            attributes.setdefault("pads", [kernel // 2] * 4)
        return self.op("Conv", x, *weights, channels=out, group=group, kernel_shape=[kernel, kernel], **attributes)

    def norm(self, x: str, kind: str = "BatchNormalization") -> str:
        count = self.channels[x]
        parameters = [self.uniform(count), self.normal(count, scale=0.3)]
        if kind == "BatchNormalization":
            parameters += [self.normal(count, scale=0.3), self.uniform(count)]
        return self.op(kind, x, *parameters)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def concat(self, *parts: str, axis: int = 1) -> str:
        return self.op("Concat", *parts, channels=sum(self.channels[part] for part in parts), axis=axis)

    def flatten(self, x: str, columns: int) -> str:
        return self.op("Flatten", x, channels=columns, axis=1)

    def gemm(self, x: str, out: int, transposed: bool = True) -> str:
        fan_in = self.channels[x]
        shape = (out, fan_in) if transposed else (fan_in, out)
        weight = self.normal(*shape, scale=(2 / fan_in) ** 0.5)
        return self.op("Gemm", x, weight, self.normal(out, scale=0.3), channels=out, transB=int(transposed))

    def matmul(self, x: str, out: int) -> str:
        fan_in = self.channels[x]
        product = self.op("MatMul", x, self.normal(fan_in, out, scale=(2 / fan_in) ** 0.5), channels=out)
        return self.op("Add", product, self.normal(out, scale=0.3), channels=out)

    def reshape(self, x: str, *shape: int, channels: int = 1) -> str:
        return self.op("Reshape", x, self.ints(*shape), channels=channels)

    def pad_channels(self, x: str, before: int, after: int) -> str:
        amounts = self.ints(0, before, 0, 0, 0, after, 0, 0)
        return self.op("Pad", x, amounts, channels=self.channels[x] + before + after)

    def head(self, x: str, out: int = 5) -> str:
        """Average over space, then a dense layer: the usual end of a classifier."""
        pooled = self.op("GlobalAveragePool", x)
        logits = self.gemm(self.flatten(pooled, self.channels[x]), out)
        self.output(logits)
        return logits

    def proto(self, infer: bool = True) -> onnx.ModelProto:
        """The model as an exporter would have written it; without `infer` the outputs have no shapes."""
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        if infer:
            model = onnx.shape_inference.infer_shapes(model)
            model.graph.ClearField("value_info")
            onnx.checker.check_model(model)
        return model

    def model(self) -> oir.Model:
        """Its normal form."""
        return normalise(oir.from_proto(self.proto()))


def execute(model: oir.Model | onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    """The outputs of `model` in onnxruntime."""
    proto = oir.to_proto(model) if isinstance(model, oir.Model) else model
    return run(open_session(proto.SerializeToString(), threads=1), feeds)


def feeds_for(model: oir.Model | onnx.ModelProto, batch: int = 2, seed: int = 0) -> dict[str, Array]:
    """Uniform random inputs; symbolic axes get size `batch` in front and 32 elsewhere."""
    proto = oir.to_proto(model) if isinstance(model, oir.Model) else model
    generator = np.random.default_rng(seed)
    weights = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for value in proto.graph.input:
        if value.name in weights:
            continue
        sizes = value.type.tensor_type.shape.dim
        shape = [d.dim_value or (batch if axis == 0 else 32) for axis, d in enumerate(sizes)]
        feeds[value.name] = generator.uniform(size=shape).astype(np.float32)
    return feeds


def relative_error(wanted: Array, got: Array) -> float:
    """max |wanted - got| / max |wanted|."""
    assert wanted.shape == got.shape
    return float(np.abs(wanted - got).max() / np.abs(wanted).max())


def assert_same_outputs(first: Any, second: Any, feeds: dict[str, Array], tolerance: float = 1e-5) -> None:
    """Both models give the same outputs, by order, up to float rounding."""
    ours, theirs = execute(first, feeds), execute(second, feeds)
    assert len(ours) == len(theirs)
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        assert relative_error(a, b) < tolerance, name


# --- networks that several tests use ----------------------------------------------------------------------------------


def chain(seed: int = 0, width: int = 8, norm: bool = True) -> Net:
    """Three convolutions with batch norm and ReLU, then a classifier."""
    net = Net(seed)
    x = net.input(["N", 3, 10, 10])
    for out in (width, width + 4, width):
        x = net.conv(x, out)
        x = net.relu(net.norm(x) if norm else x)
    net.head(x)
    return net


def residual(seed: int = 0, width: int = 8) -> Net:
    """Stem, an identity block, a block with a strided 1x1 shortcut, a classifier."""
    net = Net(seed)
    x = net.relu(net.norm(net.conv(net.input(["N", 3, 10, 10]), width)))
    branch = net.norm(net.conv(net.relu(net.norm(net.conv(x, width))), width))
    x = net.relu(net.op("Add", branch, x))
    branch = net.norm(net.conv(net.relu(net.norm(net.conv(x, 2 * width, strides=[2, 2]))), 2 * width))
    shortcut = net.norm(net.conv(x, 2 * width, kernel=1, strides=[2, 2]))
    x = net.relu(net.op("Add", branch, shortcut))
    net.head(x)
    return net


def dense(seed: int = 0, sizes: Sequence[int] = (6, 12, 10, 4)) -> Net:
    """A multi-layer perceptron."""
    net = Net(seed)
    x = net.input(["N", sizes[0]])
    for number, out in enumerate(sizes[1:], start=1):
        x = net.gemm(x, out, transposed=number % 2 == 1)
        x = net.relu(x) if number < len(sizes) - 1 else x
    net.output(x)
    return net
