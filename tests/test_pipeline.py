"""examples/pipeline runs as it stands, and fails the build when a bound is broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_junit import check_junit

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A copy of the example, beside the networks that it names, with `onnxmerge` on the path."""
    (tmp_path / "onnxmerge").symlink_to(ROOT / "onnxmerge")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/onnxmerge"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onnxmerge "$@"\n')
    program.chmod(0o755)
    ignored = shutil.ignore_patterns("out")
    return shutil.copytree(ROOT / "examples/pipeline", tmp_path / "examples/pipeline", ignore=ignored)


def built(example: Path) -> subprocess.CompletedProcess[str]:
    path = f"{example.parents[1] / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        ["bash", example / "build.sh"], env=environment, capture_output=True, text=True, check=False, cwd="/"
    )


def test_the_build_passes(example: Path) -> None:
    ran = built(example)
    assert ran.returncode == 0, ran.stderr
    assert "all bounds are kept" in ran.stdout
    cases = check_junit((example / "out/junit.xml").read_text())
    assert len(cases) == 6 and all(case.find("failure") is None for case in cases)
    report = json.loads((example / "out/validate.json").read_text())
    assert all(check["passed"] for check in report["checks"])


def test_a_bound_that_cannot_be_met_fails_the_build(example: Path) -> None:
    recipe = yaml.safe_load((example / "recipe.yaml").read_text())
    merge, check = (next(iter(step.values())) for step in recipe["steps"])
    merge |= {"share": 0, "samples": 50}
    check["min-speedup"] = 1000
    (example / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ran = built(example)
    assert ran.returncode == 1, ran.stderr
    assert "a bound is broken" in ran.stdout
    failed = [
        c.get("name") for c in check_junit((example / "out/junit.xml").read_text()) if c.find("failure") is not None
    ]
    assert failed == ["max-bytes: out/merged.onnx", "min-speedup: out/merged.onnx"]
    (example / "recipe.yaml").write_text(yaml.safe_dump({"steps": recipe["steps"][1:]}))
    ran = built(example)
    assert ran.returncode == 2 and "did not run" in ran.stdout and not (example / "out/junit.xml").exists()
