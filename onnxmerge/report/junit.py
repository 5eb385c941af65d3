"""The bounds of a result as JUnit XML: a test case for each bound of each output, task or model."""

from datetime import UTC, datetime
from xml.etree import ElementTree as tree

from onnxmerge.report.figures import one_line
from onnxmerge.report.schema import BoundCheck, Result


def junit_xml(result: Result) -> str:
    """The text of a JUnit file.

    One suite holds a test case for each of `Result.checks`: a broken bound is a failure, one that does not apply is
    skipped, and what was measured stands in each case's `system-out`. Times are seconds. What XML cannot hold becomes
    U+FFFD.
    """
    name = f"onnxmerge {result.method}"
    counts = {
        "tests": str(len(result.checks)),
        "failures": str(sum(check.passed is False for check in result.checks)),
        "errors": "0",
    }
    seconds = _seconds(sum(check.seconds for check in result.checks))
    root = tree.Element("testsuites", {"name": name, **counts, "time": seconds})
    skipped = {"skipped": str(sum(check.passed is None for check in result.checks))}
    when = {"timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"), "hostname": "localhost"}
    suite = tree.SubElement(root, "testsuite", {"name": name, **counts, **skipped, "time": seconds, **when})
    properties = tree.SubElement(suite, "properties")
    for key, value in {f"version {library}": version for library, version in result.versions.items()}.items():
        tree.SubElement(properties, "property", {"name": one_line(key), "value": one_line(value)})
    for check in result.checks:
        suite.append(_case(check, f"onnxmerge.{result.method}"))
    tree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tree.tostring(root, encoding="unicode")}\n'


def _case(check: BoundCheck, group: str) -> tree.Element:
    title = one_line(f"{check.bound}: {check.of}")
    attributes = {"classname": group, "name": title, "time": _seconds(check.seconds)}
    case = tree.Element("testcase", attributes)
    told = one_line(check.told)
    if check.passed is False:
        tree.SubElement(case, "failure", {"message": told, "type": check.bound}).text = told
    elif check.passed is None:
        tree.SubElement(case, "skipped", {"message": told})
    measured = "" if check.measured is None else f"measured {check.measured:.9g}, limit {check.limit:.9g}\n"
    tree.SubElement(case, "system-out").text = f"{measured}{told}"
    return case


def _seconds(value: float) -> str:
    return f"{value:.3f}"
