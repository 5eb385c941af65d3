"""Adapters that are folded change nothing that onnxruntime could see; a zip without adapters is what its plan says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net, execute, feeds_for, relative_error
from hypothesis import given
from hypothesis import strategies as st

import onnxmerge
from onnxmerge.errors import ModelError
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.labels import dims
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.task import load_networks
from onnxmerge.methods.zip.alignment import find_sharable
from onnxmerge.methods.zip.choices import Start
from onnxmerge.methods.zip.plan import Plan
from onnxmerge.methods.zip.zip import plan_zip
from onnxmerge.passes.fold_adapter import FoldAdapter, reading_place
from onnxmerge.passes.insert_adapter import InsertAdapter
from onnxmerge.passes.permute import Permute

IMAGE = ("N", 3, 8, 8)
DEMO = Path(onnxmerge.__file__).parent / "demo"
MODELS = [DEMO / "digits.onnx", DEMO / "fashion.onnx"]
DATA = {"digits": DEMO / "digits.yaml", "fashion": DEMO / "fashion.yaml"}

# --- networks: each returns the value behind which an adapter is to stand, and where it can be folded -----------------


def _convolution(net: Net) -> tuple[str, str]:
    cut = net.conv(net.input(IMAGE), 6)
    place = net.op("MaxPool", net.relu(cut), kernel_shape=[2, 2], strides=[2, 2])
    net.head(net.relu(net.conv(place, 5)))
    return cut, place


def _two_readers(net: Net) -> tuple[str, str]:
    cut = net.conv(net.input(IMAGE), 6)
    place = net.op("HardSwish", cut)
    pooled = net.op("AveragePool", place, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    net.head(net.relu(net.op("Add", net.conv(place, 5), net.conv(pooled, 5, kernel=1))))
    return cut, place


def _flattened(net: Net) -> tuple[str, str]:
    cut = net.conv(net.input(IMAGE), 6)
    place = net.op("Clip", cut, net.constant(np.float32(0)), net.constant(np.float32(6)))
    net.output(net.gemm(net.flatten(place, 6 * 64), 4))
    return cut, place


def _channels_last(net: Net) -> tuple[str, str]:
    cut = net.conv(net.input(IMAGE), 6)
    place = net.relu(cut)
    moved = net.op("Transpose", place, perm=[0, 2, 3, 1])
    net.output(net.gemm(net.flatten(moved, 6 * 64), 4, transposed=False))
    return cut, place


def _head(net: Net) -> tuple[str, str]:
    cut = net.conv(net.input(IMAGE), 6)
    place = net.relu(cut)
    net.head(place)
    return cut, place


def _linear(net: Net) -> tuple[str, str]:
    cut = net.conv(net.input(IMAGE), 6)
    net.head(net.relu(net.conv(cut, 5)))
    return cut, cut


def _tokens(net: Net) -> tuple[str, str]:
    cut = net.matmul(net.input(("N", 7, 5)), 6)
    place = net.op("Gelu", cut) if net.opset >= 20 else net.op("Tanh", cut)
    net.output(net.matmul(place, 4))
    return cut, place


FOLDABLE = [_convolution, _two_readers, _flattened, _channels_last, _head, _linear, _tokens]


def _depthwise(net: Net) -> str:
    cut = net.conv(net.input(IMAGE), 6)
    net.head(net.relu(net.conv(net.relu(cut), 6, group=6)))
    return cut


def _residual(net: Net) -> str:
    cut = net.conv(net.input(IMAGE), 6)
    x = net.relu(cut)
    net.head(net.relu(net.op("Add", net.conv(x, 6), x)))
    return cut


def _gated(net: Net) -> str:
    cut = net.conv(net.input(IMAGE), 6)
    net.head(net.op("Mul", cut, net.op("Sigmoid", cut)))
    return cut


def _slopes(net: Net) -> str:
    cut = net.conv(net.input(IMAGE), 6)
    net.head(net.op("PRelu", cut, net.normal(6, 1, 1)))
    return cut


def _normed(net: Net) -> str:
    cut = net.conv(net.input(IMAGE), 6)
    net.head(net.relu(net.norm(cut, "InstanceNormalization")))
    return cut


def _answered(net: Net) -> str:
    cut = net.conv(net.input(IMAGE), 6)
    x = net.relu(cut)
    net.output(x)
    net.head(x)
    return cut


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", FOLDABLE)
@given(seed=st.integers(0, 2**16), arriving=st.integers(1, 13))
def test_a_folded_adapter_computes_what_the_adapter_did(
    build: Callable[[Net], tuple[str, str]], seed: int, arriving: int
) -> None:
    net = Net(seed)
    place = build(net)[1]
    with_adapter = _tail(net.model(), place, arriving, seed)
    folded = FoldAdapter("adapted")(with_adapter).model
    assert not any((node.name or "").startswith("adapter") for node in folded.graph)
    feeds = feeds_for(folded, seed=seed)
    for name, value in execute(with_adapter, feeds).items():
        assert relative_error(value, execute(folded, feeds)[name]) < 1e-5
    _law(folded, feeds)


def _tail(model: oir.Model, place: str, arriving: int, seed: int) -> oir.Model:
    value = next(o for node in model.graph for o in node.outputs if o.name == place)
    axis = len(dims(value)) - 1 if len(dims(value)) == 3 else 1
    tail = cut_out(model, [place], [v.name or "" for v in model.graph.outputs]).clone()
    own = dims(tail.graph.inputs[0])[axis]
    matrix = np.random.default_rng(seed).normal(size=(own, arriving)).astype(np.float32)
    InsertAdapter(axis, matrix, "adapted")(tail)
    return tail


def _law(model: oir.Model, feeds: dict[str, np.ndarray]) -> None:
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    random, permuted = np.random.default_rng(0), model.clone()
    Permute({name: random.permutation(space.size) for name, space in spaces.items()}, spaces)(permuted)
    for name, value in execute(model, feeds).items():
        assert relative_error(value, execute(permuted, feeds)[name]) < 1e-4


@pytest.mark.parametrize("build", FOLDABLE)
def test_the_reading_place_is_behind_the_nonlinearity(build: Callable[[Net], tuple[str, str]]) -> None:
    net = Net()
    cut, place = build(net)
    model = net.model()
    axis = 2 if build is _tokens else 1
    assert reading_place(model, cut, axis) == place


@pytest.mark.parametrize("build", [_depthwise, _residual, _gated, _slopes, _normed, _answered])
def test_where_others_than_layers_read_there_is_none(build: Callable[[Net], str]) -> None:
    net = Net()
    cut = build(net)
    assert reading_place(net.model(), cut, 1) is None


def test_what_cannot_be_folded_is_refused() -> None:
    net = Net()
    cut = _depthwise(net)
    with pytest.raises(ModelError, match="not only layers read it"):
        FoldAdapter("adapted")(_tail(net.model(), cut, 6, 0))
    net = Net()
    place = net.relu(net.conv(net.input(IMAGE), 6))
    net.output(net.gemm(net.reshape(place, -1, 6 * 64, channels=6 * 64), 4))
    with pytest.raises(ModelError, match="holds the number of channels"):
        FoldAdapter("adapted")(_tail(net.model(), place, 5, 0))


# --- zip --------------------------------------------------------------------------------------------------------------


def test_cuts_of_the_demo_can_be_read_directly() -> None:
    sharable = find_sharable(load_networks(MODELS))
    for cut in sharable.cuts:
        assert cut.adapted and cut.direct is not None and not cut.direct.adapted
        assert cut.value == cut.unit.cut != cut.direct.value


def _planned(folder: Path, **changes: object) -> Path:
    plan = plan_zip(MODELS)
    candidate = plan.candidates[4].model_copy(update={"predicted": None, **changes})
    path = folder / "plan.json"
    path.write_text(plan.model_copy(update={"candidates": [candidate]}).to_json())
    return path


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("start", list(Start))
def test_a_zip_is_as_large_as_planned_with_and_without_adapters(tmp_path: Path, start: Start, adapters: bool) -> None:
    path = _planned(tmp_path, adapters=adapters)
    settings = onnxmerge.ZipSettings(
        share=str(path), start=(start,), steps=0, samples=200, measure=False, max_drop=None
    )
    result = onnxmerge.zip_models(MODELS, DATA, tmp_path / "out", settings=settings)
    written = Plan.model_validate_json((tmp_path / "out/plan.json").read_text()).candidates[0]
    assert written.predicted is not None
    (candidate,) = result.candidates
    if start is Start.KEEP and adapters:  # the first network needs none behind its own stem
        assert candidate.parameters < written.predicted.parameters
    else:
        assert candidate.parameters == written.predicted.parameters
    assert all(score.agreement is not None and score.agreement > 0.5 for score in candidate.tasks.values())


def test_private_channels_and_other_widths_are_read_directly_too(tmp_path: Path) -> None:
    settings = onnxmerge.ZipSettings(
        share="4", width=(1.25,), sharing=(0.5,), steps=0, samples=200, measure=False, max_drop=None
    )
    (candidate,) = onnxmerge.zip_models(MODELS, DATA, tmp_path / "out", settings=settings).candidates
    written = Plan.model_validate_json((tmp_path / "out/plan.json").read_text()).candidates[0]
    assert written.predicted is not None
    assert (candidate.parameters, candidate.macs) == (written.predicted.parameters, written.predicted.macs)
    assert all(score.agreement is not None and score.agreement > 0.95 for score in candidate.tasks.values())
