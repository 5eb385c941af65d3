"""report.json, provenance and the files."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from reports import make_result

from onnxmerge.errors import UsageError
from onnxmerge.report import write
from onnxmerge.report.page import render_page
from onnxmerge.report.provenance import hardware, library_versions, sha256
from onnxmerge.report.schema import (
    LatencyRecord,
    Result,
)
from onnxmerge.report.write import write_report


def test_json_has_the_documented_keys_at_every_level() -> None:
    result = make_result(["a", "b"])
    result.candidates[0].latency_ms = LatencyRecord()
    stored = json.loads(result.to_json())
    contract = {"schema", "method", "versions", "inputs", "candidates", "chosen"}
    extras = {"recipe", "hardware", "similarity", "units", "notes"}
    assert set(stored) == contract | extras
    assert stored["schema"] == 1
    for record in stored["inputs"]:
        assert set(record) == {"task", "path", "sha256", "parameters", "bytes"}
    for candidate in stored["candidates"]:
        contract = {
            "name",
            "share",
            "path",
            "parameters",
            "bytes",
            "tasks",
            "latency_ms",
            "memory_mb",
            "steps",
            "seconds",
        }
        more = {"macs", "ensemble", "start", "shared_layers", "total_layers", "branches", "channels", "losses"}
        assert set(candidate) == contract | more
        assert set(candidate["latency_ms"]) == {"merged", "separate", "separate_default", "speedup"}
        assert set(candidate["memory_mb"]) == {"merged", "separate", "device_merged", "device_separate"}
        for score in candidate["tasks"].values():
            assert set(score) == {"accuracy", "original_accuracy", "agreement", "relative_error"}
    assert list(stored["candidates"][0]["latency_ms"].values()) == [None] * 4
    assert Result.model_validate(stored) == result


def test_versions_are_read_without_importing_the_libraries() -> None:
    program = (
        "import sys, json; from onnxmerge.report.provenance import library_versions; versions = library_versions(); "
        "print(json.dumps([versions, sorted({'torch', 'onnxruntime', 'onnx', 'scipy'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    versions, imported = json.loads(done.stdout)
    assert versions == library_versions()
    assert imported == []
    assert {"onnxmerge", "python", "onnx", "onnx-ir", "numpy", "scipy", "torch"} <= set(versions)
    assert {"onnxruntime", "onnxruntime-gpu"} & set(versions)


def test_hardware_holds_only_what_is_known() -> None:
    found = hardware()
    assert set(found) <= {"cpu", "physical_cores", "logical_cores", "memory_gb", "platform", "gpus"}
    assert found["logical_cores"] >= 1
    assert all(found.values())
    json.dumps(found)


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_write_report_writes_both_files(tmp_path: Path) -> None:
    result = make_result(["a", "b"])
    write_report(result, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert Result.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8")) == result
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_page(result)


def test_write_report_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(result: Result) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(write, "render_page", fail)
    with pytest.raises(RuntimeError):
        write_report(make_result(["a"]), tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"report\.json"):
        write_report(make_result(["a"]), tmp_path / "absent")
