"""docs/report.schema.json is made from the models, and what commands write is what it says."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pydantic
import pytest
from reports import make_result
from test_bounds import half
from test_cli import FAST, onnxmerge, pair, samples

from onnxmerge.report.schema import Result

__all__ = ["half", "pair", "samples"]  # fixtures
SCRIPT = Path(__file__).parents[1] / "docs" / "report.py"


@pytest.fixture
def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_the_generated_one(published: ModuleType) -> None:
    assert published.FILE.read_text(encoding="utf-8") == published.text(), "run python docs/report.py"


def test_the_schema_says_what_every_field_is_for(published: ModuleType) -> None:
    schema = json.loads(published.text())
    assert schema["properties"]["schema"]["const"] == 1 and "schema" in schema["required"]
    assert "pictures" not in schema["properties"]
    assert "additionalProperties" not in {key for own in schema["$defs"].values() for key in own}
    for name, own in schema["$defs"].items():
        assert own.get("description"), name


def check_report(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Read a report as strictly as the models do, and hold it against the published schema."""
    Result.model_validate_json(text)
    report = json.loads(text)
    jsonschema.validate(report, schema, jsonschema.Draft202012Validator)
    candidate = schema["$defs"]["Candidate"]
    for own, stored in [(schema, report), *((candidate, found) for found in report["candidates"])]:
        assert set(stored) <= set(own["properties"])
    return report


def test_reports_are_what_the_schema_says(
    tmp_path: Path, half: tuple[object, ...], pair: tuple[Path, Path], samples: Path, published: ModuleType
) -> None:
    schema = json.loads(published.FILE.read_text(encoding="utf-8"))
    calls = {
        "pack": ("pack", *pair, "-o", tmp_path / "packed.onnx"),
        "zip": ("zip", *pair, "-o", tmp_path / "out", "--data", samples, "--share", 1, *FAST),
        "validate": ("validate", *half, "--atol", 1e-5, "--min-speedup", 0),
        "bench": ("bench", half[0], "--against", pair[0], "--against", pair[1], "--batch", "1,2", "--min-speedup", 0),
    }
    for method, call in calls.items():
        _, stdout, stderr = onnxmerge(*call, "--json", "--threads", 1)
        assert stdout, stderr
        report = check_report(stdout, schema)
        assert report["method"] == method
        assert ("checks" in report) == (method in ("validate", "bench"))
        assert ("batches" in report["candidates"][0]) == (method == "bench")


def test_a_report_of_another_schema_is_refused() -> None:
    text = make_result(["a"]).to_json()
    Result.model_validate_json(text)
    for old, new in (('"schema": 1', '"schema": 2'), ('"notes"', '"remarks"')):
        assert old in text
        with pytest.raises(pydantic.ValidationError):
            Result.model_validate_json(text.replace(old, new, 1))


def test_a_loss_that_diverged_is_null_and_read_again() -> None:
    result = make_result(["a"], 1)
    result.candidates[0].losses = [(0, 1.0), (1, math.inf)]
    text = result.to_json()
    assert json.loads(text)["candidates"][0]["losses"] == [[0, 1.0], [1, None]]
    assert math.isnan(Result.model_validate_json(text).candidates[0].losses[1][1])
