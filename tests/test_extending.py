"""docs/extending.md: its code does what the page says."""

import re
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from fusing import NETS, Random, permuted_copy, spaces_of
from graphs import Net, assert_same_outputs, feeds_for
from structures import law
from test_cli import onnxmerge
from test_fuse_rules import by_weights, refitted

from onnxmerge.ir.rules import RULES
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.passes import GROUP

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = {name: code for language, name, code in re.findall(r"```(python|toml)\n# ([^\n]*)\n(.*?)```", PAGE, re.DOTALL)}


def module(name: str) -> types.ModuleType:
    made = types.ModuleType(f"extending_{Path(name).stem}")
    exec(compile(BLOCKS[name], name, "exec"), made.__dict__)
    return made


def test_all_code_of_the_page_is_run() -> None:
    assert list(BLOCKS) == [
        "users_passes.py",
        "the distribution's pyproject.toml",
        "onnxmerge/ir/rules/cumulative.py",
        "passes/largest.py",
        "passes/half_way.py",
    ]


def dividing(path: Path) -> Path:
    net = Net()
    x = net.op("Div", net.conv(net.input(["N", 3, 8, 8]), 4), net.constant(np.float32([[[2]], [[3]], [[4]], [[5]]])))
    net.output(net.op("Div", x, net.constant(np.float32(1e-4))))
    onnx.save(net.proto(), path)
    return path


def test_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_passes", raising=False)
    Path("users_passes.py").write_text(BLOCKS["users_passes.py"])
    line = ("apply", dividing(tmp_path / "a.onnx"), "-o", "out.onnx")
    code, stdout, stderr = onnxmerge(*line, "--pass", "users_passes:MultiplyInstead", "--set", "smallest=1e-3")
    assert code == 0 and "(exact)" in stdout, stderr
    assert [node.op_type for node in onnx.load("out.onnx").graph.node] == ["Conv", "Mul", "Div"]

    declared = tomllib.loads(BLOCKS["the distribution's pyproject.toml"])["project"]["entry-points"][GROUP]
    info = Path("users-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: users\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "\n".join(f"{k} = {v}" for k, v in declared.items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "MultiplyInstead" in onnxmerge("passes", "--json")[1]
    Path("recipe.yaml").write_text(
        "steps: [{apply: {model: a.onnx, output: again.onnx, pass: MultiplyInstead, set: {smallest: 1.0e-6}}}]"
    )
    code, _, stderr = onnxmerge("run", "recipe.yaml")
    assert code == 0, stderr
    assert [node.op_type for node in onnx.load("again.onnx").graph.node] == ["Conv", "Mul", "Mul"]


@pytest.fixture
def cumulative() -> Iterator[None]:
    assert "CumSum" not in RULES, "the page shows how to add a rule that is there by now"
    module("onnxmerge/ir/rules/cumulative.py")
    yield
    del RULES["CumSum"]


def summing(axis: int) -> Net:
    net = Net()
    x = net.relu(net.conv(net.input(["N", 3, 6, 6]), 5))
    net.head(net.relu(net.conv(net.op("CumSum", x, net.constant(np.array(axis, np.int64))), 4)))
    return net


def test_the_operator(cumulative: None) -> None:
    def sizes(axis: int) -> list[int]:
        model = summing(axis).model()
        assert law(model).passed
        return sorted(space.size for space in find_spaces(model).permutable())

    assert sizes(2) == [4, 5]
    assert sizes(1) == [4]


def test_the_law_catches_the_operators_rule_when_it_is_wrong(cumulative: None) -> None:
    code = BLOCKS["onnxmerge/ir/rules/cumulative.py"]
    exec(code.replace("> 1:", "> 1000:"), {})
    assert not law(summing(1).model()).passed


@pytest.mark.parametrize("name", NETS)
def test_the_rule_on_weights(name: str) -> None:
    build, shape = NETS[name]
    model = build()
    copy, _ = permuted_copy(model)
    fused = model.clone()
    partner = by_weights(model, copy, Random(shape))
    module("passes/largest.py").Largest([partner], spaces_of(model))(fused)
    assert_same_outputs(model, fused, feeds_for(model), 1e-4)


@pytest.mark.parametrize("name", ["dense", "batch norms folded"])
def test_the_rule_on_activations(name: str) -> None:
    build, shape = NETS[name]
    model = build()
    copy, _ = permuted_copy(model)
    samples = Random(shape)
    fused = model.clone()
    refitted(module("passes/half_way.py").half_way, compensate=True)(fused, [by_weights(model, copy, samples)], samples)
    assert_same_outputs(model, fused, feeds_for(model), 1e-3)
