"""docs/api.md says what `import onnxmerge` offers."""

import importlib.util
import re
from pathlib import Path

import pytest

import onnxmerge

SCRIPT = Path(__file__).parents[1] / "docs" / "api.py"


@pytest.fixture
def api():
    spec = importlib.util.spec_from_file_location("api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_generated_one(api):
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "run python docs/api.py"


def test_every_public_name_is_on_it_with_its_parameters(api):
    page = api.page()
    heads = set(re.findall(r"^## (\w+)$", page, re.MULTILINE))
    assert heads == {name for name in onnxmerge.__all__ if not name.startswith("_")}
    assert "max_difference: float | None = None" in page
    assert "settings: ZipSettings | None = None" in page
    assert " object at 0x" not in page and "<" not in page.replace("<https", "")
