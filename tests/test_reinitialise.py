"""Fresh weights are spread as PyTorch's are, depend on nothing but seed and name, and replace every learnt array."""

import numpy as np
import onnx
import onnx_ir as oir
import pytest
import torch
from graphs import Net, chain, execute, feeds_for, relative_error
from test_exact_passes import NETS, REAL

from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.normalise import normalise
from onnxmerge.ir.weights import get_array
from onnxmerge.passes.reinitialise import Reinitialise

NORMS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization")


def arrays(model: oir.Model) -> dict[str, bytes]:
    return {name: get_array(value).tobytes() for name, value in model.graph.initializers.items()}


def fresh(model: oir.Model, seed: int = 0) -> oir.Model:
    return Reinitialise(seed)(model.clone()).model


# ---- the spread, with PyTorch's own layers as the judge -------------------------------------------------------------


def wide(kind: str) -> tuple[Net, torch.nn.Module]:
    """A network of one large layer, and the same layer as PyTorch initialises it."""
    net = Net()
    if kind in ("gemm", "gemm [in, out]", "matmul"):
        x = net.input(["N", 50])
        net.output(net.matmul(x, 400) if kind == "matmul" else net.gemm(x, 400, transposed=kind == "gemm"))
        return net, torch.nn.Linear(50, 400)
    x = net.input(["N", 20, 6, 6])
    if kind == "transposed conv":
        weights = net.normal(20, 30, 3, 3), net.normal(60)
        net.output(net.op("ConvTranspose", x, *weights, group=2))
        return net, torch.nn.ConvTranspose2d(20, 60, 3, groups=2)
    group = 5 if kind == "grouped conv" else 1
    net.output(net.conv(x, 400, group=group))
    return net, torch.nn.Conv2d(20, 400, 3, groups=group)


@pytest.mark.parametrize("kind", ["gemm", "gemm [in, out]", "matmul", "conv", "grouped conv", "transposed conv"])
def test_layers_are_spread_as_pytorch_spreads_them(kind: str) -> None:
    torch.manual_seed(0)
    net, judge = wide(kind)
    (layer,) = find_layers(fresh(net.model()))
    assert layer.bias is not None
    for value, theirs in ((layer.weight, judge.weight), (layer.bias, judge.bias)):
        ours, bound = get_array(value), float(theirs.detach().abs().max())
        assert ours.shape in (tuple(theirs.shape), tuple(theirs.shape)[::-1])
        assert abs(np.abs(ours).max() / bound - 1) < 0.05
        assert abs(ours.mean()) < 0.15 * bound
        assert abs(ours.std() / (bound / 3**0.5) - 1) < 0.15


# ---- what is replaced, and what stays -------------------------------------------------------------------------------


def check_replaced(before: oir.Model, after: oir.Model) -> None:
    learnt = set()
    for layer in find_layers(before):
        learnt |= {value.name for value in (layer.weight, layer.bias) if value is not None}
    for name in learnt:
        ours, theirs = (get_array(model.graph.initializers[name]) for model in (after, before))
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert not np.isclose(ours, theirs, atol=1e-6).mean() > 0.01, name
    for node in (node for node in after.graph if node.op_type in NORMS):
        numbers = [set(get_array(value).ravel().tolist()) for value in node.inputs[1:]]
        assert numbers == [{1.0}, {0.0}, {0.0}, {1.0}][: len(numbers)], node.name
        learnt |= {value.name for value in node.inputs[1:]}
    kept_before, kept_after = arrays(before), arrays(after)
    assert {name for name in kept_before if kept_before[name] != kept_after[name]} <= learnt
    assert list(kept_before) == list(kept_after)


def check_outputs(before: oir.Model, after: oir.Model) -> None:
    feeds = feeds_for(before)
    wanted, got = execute(before, feeds), execute(after, feeds)
    for name, array in wanted.items():
        assert np.isfinite(got[name]).all()
        assert relative_error(array, got[name]) > 1e-2


@pytest.mark.parametrize("net", NETS)
def test_every_layer_and_norm_is_replaced_and_nothing_else(net: str) -> None:
    model = NETS[net]().model()
    result = Reinitialise(0)(model.clone())
    assert result.modified
    check_replaced(model, result.model)
    check_outputs(model, result.model)


@pytest.mark.parametrize("name", REAL)
def test_a_real_network(name: str, shared) -> None:
    model = load(shared(name))
    check_replaced(model, fresh(model))
    check_outputs(model, fresh(model))


def test_nothing_to_draw() -> None:
    net = Net()
    net.output(net.relu(net.input(["N", 4])))
    assert not Reinitialise(0)(net.model()).modified


def test_element_types_stay() -> None:
    half = onnx.ModelProto()
    half.CopyFrom(chain(norm=False).proto())
    for tensor in half.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    model = normalise(oir.from_proto(half))
    after = fresh(model)
    check_replaced(model, after)
    assert {get_array(layer.weight).dtype for layer in find_layers(after)} == {np.dtype(np.float16)}


# ---- one seed, one model --------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_bytes_and_layers_differ_from_each_other() -> None:
    model = chain().model()
    assert arrays(fresh(model, 3)) == arrays(fresh(model, 3)) == arrays(fresh(fresh(model, 7), 3))
    assert arrays(fresh(model, 3)) != arrays(fresh(model, 4))
    ratios = [w[0] / w[1] for w in (get_array(layer.weight).ravel() for layer in find_layers(fresh(model)))]
    assert len({round(float(ratio), 3) for ratio in ratios}) == len(ratios)


def test_the_order_of_arrays_and_nodes_does_not_matter() -> None:
    def two_branches(turned: bool) -> oir.Model:
        net = Net()
        x = net.input(["N", 3, 8, 8])
        ends = [net.conv(x, 6) for _ in range(2)]
        net.head(net.op("Add", *ends))
        proto = net.proto()
        if turned:
            first, second, *rest = list(proto.graph.node)
            initializers = list(proto.graph.initializer)[::-1]
            for field, content in ((proto.graph.node, [second, first, *rest]), (proto.graph.initializer, initializers)):
                del field[:]
                field.extend(content)
        return normalise(oir.from_proto(proto))

    straight, turned = (arrays(fresh(two_branches(turned))) for turned in (False, True))
    assert list(straight) != list(turned) and straight == turned
