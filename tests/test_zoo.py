"""The permutation law over the architectures of the field, as both of torch's exporters write them."""

from dataclasses import replace

import numpy as np
import pytest
from zoo import ZOO
from zoo.exporting import examples, export

from onnxmerge.ir.coverage import permutable_share
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import Spaces, find_spaces
from onnxmerge.methods.check import TOLERANCE, check_spaces
from onnxmerge.runtime.session import open_session, run

LEAST_SHARE = {"cnn": 0.95, "transformer": 0.9, "recurrent": 0.9, "unusual": 0.9, "other": 0.9}
"""Kind -> the share of parameters that must lie in permutable spaces."""


def pairs(name: str) -> list[tuple[str, int]]:
    """Any batch with layer norm in one node; a batch of 1 with layer norm spelled out; the newest operators.

    `benchmarks/zoo.py` goes through all of them.
    """
    if ZOO[name].kind == "unusual":
        return [("legacy", 17)]
    fixed = 13 if ZOO[name].oldest <= 13 else 20
    return [("legacy", 17), ("legacy", fixed), ("dynamo", 23)]


pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    pytest.param(name, exporter, opset, marks=[] if opset == 17 else pytest.mark.slow, id=f"{name}-{exporter}-{opset}")
    for name in ZOO
    for exporter, opset in pairs(name)
]


@pytest.mark.parametrize(("name", "exporter", "opset"), CASES)
def test_law_holds_for_the_zoo(name, exporter, opset, tmp_path):
    if exporter == "dynamo":
        pytest.importorskip("onnxscript", reason="torch's newer exporter needs onnxscript")
    export(name, exporter, opset, tmp_path / "raw.onnx")
    feeds = {key: tensor.numpy() for key, tensor in examples(name, exporter, opset).items()}
    expected = run(open_session(tmp_path / "raw.onnx", threads=1), feeds)

    model = load(tmp_path / "raw.onnx")
    save(model, tmp_path / "normal.onnx")
    loaded = run(open_session(tmp_path / "normal.onnx", threads=1), feeds)
    for key, array in expected.items():
        np.testing.assert_allclose(loaded[key], array, rtol=0, atol=TOLERANCE * np.abs(array).max(), err_msg=key)

    spaces = find_spaces(model)
    result = check_spaces(model, spaces, seed=0, threads=1)
    assert result.passed, result
    assert permutable_share(model, spaces) >= LEAST_SHARE[ZOO[name].kind], spaces.frozen


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].kind != "unusual"])
def test_forgetting_one_array_breaks_the_law(name, tmp_path):
    """The zoo's values and inputs are such that an array left out of a permutation shows in the outputs."""
    export(name, "legacy", 17, tmp_path / "raw.onnx")
    model = load(tmp_path / "raw.onnx")
    space = max(find_spaces(model).permutable(), key=lambda space: len(space.weights))
    forgetful = replace(space, weights=space.weights[1:])
    result = check_spaces(model, Spaces((forgetful,), ()), seed=0, threads=1)
    assert result.max_relative_error > 10 * TOLERANCE
