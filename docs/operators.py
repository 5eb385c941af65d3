"""Write operators.md: what the channel analysis does with each operator of the current opset.

python docs/operators.py
"""

import inspect
from pathlib import Path

import onnx

from onnxmerge.ir.rules import RULES

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Operators

What the channel analysis does with each operator of ONNX opset {opset}, generated from the label rules by
`python docs/operators.py`.

- *exact*: a label rule says where channels go. Where a node is beyond its rule (a computed weight, say), it freezes the
  channels that reach it and says why.
- *frozen*: no rule. The operator survives untouched, and the channels that reach it keep their order. So does every
  operator of another domain.
- *refused*: no longer part of the opset. Files of older opsets that use it are converted; in a file of this opset it is
  an error.

{counts}

| operator | | what its rule says |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    schemas = [s for s in onnx.defs.get_all_schemas() if s.domain == ""]
    rows, counts = [], {"exact": 0, "frozen": 0, "refused": 0}
    for schema in sorted(schemas, key=lambda schema: schema.name):
        rule = RULES.get(schema.name)
        state = "refused" if schema.deprecated else "frozen" if rule is None else "exact"
        counts[state] += 1
        says = _first_sentence(rule) if state == "exact" else ""
        rows.append(f"| {schema.name} | *{state}* | {says} |")
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    head = HEAD.format(opset=onnx.defs.onnx_opset_version(), counts=f"{len(rows)} operators: {summary}.")
    return head + "\n".join(rows) + "\n"


def _first_sentence(rule: object) -> str:
    paragraph = " ".join((inspect.getdoc(rule) or "").split("\n\n")[0].split())
    return paragraph.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
