"""JUnit files: well-formed whatever the names, and counted as readers of JUnit expect."""

from pathlib import Path
from xml.etree import ElementTree as tree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import make_result
from test_bounds import half
from test_cli import onnxmerge, pair, samples

from onnxmerge.report.junit import junit_xml
from onnxmerge.report.schema import BoundCheck, Result

__all__ = ["half", "pair", "samples"]  # fixtures

SUITES = {"name", "tests", "failures", "errors", "time"}
ORDER = ["properties", "testcase", "system-out", "system-err"]


def check_junit(text: str) -> list[tree.Element]:
    """Hold a file against the usual JUnit schema; its test cases."""
    root = tree.fromstring(text.encode("utf-8", errors="strict"))
    assert root.tag == "testsuites" and set(root.attrib) == SUITES
    for suite in root:
        assert suite.tag == "testsuite"
        assert set(suite.attrib) == SUITES | {"skipped", "timestamp", "hostname"}
        tags = [own.tag for own in suite]
        assert tags == sorted(tags, key=ORDER.index) and tags.count("properties") == 1
        assert all(set(own.attrib) == {"name", "value"} for own in suite.iter("property"))
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == len(cases)
        for tag, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.get(count)) == sum(case.find(tag) is not None for case in cases)
        assert float(suite.get("time")) == pytest.approx(
            sum(float(c.get("time")) for c in cases), abs=1e-3 * len(cases)
        )
        for case in cases:
            assert set(case.attrib) == {"classname", "name", "time"} and all(case.attrib.values())
            assert {own.tag for own in case} <= {"failure", "skipped", "system-out"}
        for failure in suite.iter("failure"):
            assert failure.get("message") and failure.get("type") and failure.text == failure.get("message")
    for count in ("tests", "failures", "errors"):
        assert int(root.get(count)) == sum(int(suite.get(count)) for suite in root)
    return list(root.iter("testcase"))


def result_with(*checks: BoundCheck) -> Result:
    return make_result(["a"]).model_copy(update={"method": "validate", "checks": list(checks)})


def bound(of: str, passed: bool | None, measured: float | None = 0.5) -> BoundCheck:
    return BoundCheck(
        bound="max-drop", of=of, limit=0.01, measured=measured, passed=passed, told=f"task {of}: drops", seconds=0.25
    )


def test_kept_broken_and_skipped() -> None:
    kept, broken, skipped = check_junit(
        junit_xml(result_with(bound("a", True), bound("b", False, float("inf")), bound("c", None, None)))
    )
    assert kept.get("name") == "max-drop: a" and [own.tag for own in kept] == ["system-out"]
    assert "measured 0.5, limit 0.01" in kept.find("system-out").text
    assert broken.find("failure").get("message") == "task b: drops" and "inf" in broken.find("system-out").text
    assert skipped.find("skipped").get("message") == "task c: drops"
    assert "measured" not in skipped.find("system-out").text


@given(st.text(min_size=1), st.sampled_from([True, False, None]))
def test_any_name_is_well_formed(name: str, passed: bool | None) -> None:
    check_junit(junit_xml(result_with(bound(name, passed))))


@pytest.mark.parametrize("name", ["<a&b>", "]]>", "\"'", "\x00\x1b[31m", "\ud800", "\ufffe", "名\U0001f600", "a\nb"])
def test_nasty_names_stay_one_line(name: str) -> None:
    (case,) = check_junit(junit_xml(result_with(bound(name, False))))
    assert case.get("name").startswith("max-drop: ") and "\n" not in case.get("name")


def test_validate_writes_every_bound(tmp_path: Path, half: tuple[object, ...]) -> None:
    file = tmp_path / "junit.xml"
    options = ("--atol", 1e-5, "--rtol", "a/logits=1e-3", "--max-bytes", "1MB", "--max-drop", 0.1, "--threads", 1)
    code, _, stderr = onnxmerge("validate", *half, *options, "--junit", file)
    assert code == 1, stderr
    cases = check_junit(file.read_text(encoding="utf-8"))
    merged = half[0]
    assert {case.get("name"): case.find("failure") is not None for case in cases} == {
        "atol+rtol: a/logits": False,
        "max-drop: a": False,
        "atol: b/logits": True,
        "max-drop: b": True,
        f"max-bytes: {merged}": False,
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    code, _, stderr = onnxmerge("validate", *half, "--max-drop", 1, "--junit", tmp_path / "absent/junit.xml")
    assert code == 2 and "junit.xml" in stderr
