"""docs/operators.md says what the label rules are."""

import importlib.util
import re
from pathlib import Path

import onnx
import pytest

from onnxmerge.ir.rules import RULES

SCRIPT = Path(__file__).parents[1] / "docs" / "operators.py"


@pytest.fixture
def table():
    spec = importlib.util.spec_from_file_location("operators", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_generated_one(table):
    stored = table.PAGE.read_text(encoding="utf-8")
    opset = int(re.search(r"opset (\d+)", stored).group(1))
    if opset != onnx.defs.onnx_opset_version():
        pytest.skip(f"the page was generated for opset {opset}, the onnx here has {onnx.defs.onnx_opset_version()}")
    assert stored == table.page()


def test_every_operator_of_the_opset_is_on_it(table):
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    listed = set(re.findall(r"^\| (\w+) \| \*", table.page(), re.MULTILINE))
    assert listed == names
    assert {"If", "Loop", "Scan"} <= listed - RULES.keys()
