"""The pictures in docs/ are those that docs/pictures.py draws, and pages show them."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parents[1] / "docs"


def test_pictures_are_current_and_shown() -> None:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for name, draw in module.PICTURES.items():
        drawn = draw()
        ElementTree.fromstring(drawn)
        assert (DOCS / name).read_text(encoding="utf-8") == drawn, "run python docs/pictures.py"
        assert f"]({name})" in pages
