"""The law test over the shared models: spaces, share of parameters in permutable spaces, largest relative error.

python benchmarks/law.py
"""

import markdown
from datasets import SHARED

import onnxmerge
from onnxmerge.errors import ModelError


def main() -> None:
    rows = []
    for path in sorted((SHARED / "models").glob("*.onnx")):
        try:
            found = onnxmerge.inspect_model(path, check=True)
        except ModelError as error:
            rows.append([path.stem, "", "", "", "", f"refused: {str(error).removeprefix(str(path) + ': ')}"])
            continue
        verdict = "passed" if found["check"]["passed"] else "FAILED"
        rows.append(
            [
                path.stem,
                len(found["layers"]),
                len(found["spaces"]),
                f"{found['permutable_parameters_share']:.1%}",
                len(found["frozen"]),
                f"{verdict}, {found['check']['max_relative_error']:.1e}",
            ]
        )
    print(markdown.table(["model", "layers", "spaces", "parameters in them", "frozen nodes", "law test"], rows))


if __name__ == "__main__":
    main()
