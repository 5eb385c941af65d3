"""Write report.schema.json: the JSON Schema of the reports.

python docs/report.py
"""

import json
from pathlib import Path

from onnxmerge.files import write_text
from onnxmerge.report.schema import Result

FILE = Path(__file__).with_suffix(".schema.json")


def text() -> str:
    """The whole file."""
    schema = Result.model_json_schema(by_alias=True, mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "onnxmerge report"}
    whole = {**schema, **head, "required": ["schema", *schema["required"]]}
    return json.dumps(head | whole, indent=2) + "\n"


if __name__ == "__main__":
    write_text(FILE, text())
