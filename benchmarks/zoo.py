"""The permutation law over the zoo, by every exporter and opset, and over the shared models.

Exports are kept in `benchmarks/cache/zoo`; a name leaves all others out.

    python benchmarks/zoo.py [NAME ...]
"""

import sys
from collections import Counter
from pathlib import Path

import markdown
import numpy as np
import torch
from datasets import CACHE, ROOT, SHARED

sys.path.insert(0, str(ROOT / "tests"))

from zoo import ZOO
from zoo.exporting import examples, export, exports

from onnxmerge.errors import OnnxMergeError
from onnxmerge.ir.coverage import permutable_share
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import Spaces, find_spaces
from onnxmerge.methods.check import check_spaces
from onnxmerge.runtime.session import open_session, random_feeds, run

HEADER = ["model", "exporter", "opset", "spaces", "parameters in them", "law error", "load error", "frozen operators"]
_REASON = 60


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    rows = []
    for name in ZOO:
        if wanted and name not in wanted:
            continue
        for exporter, opset in exports(name):
            rows.append([name, exporter, opset, *_exported(name, exporter, opset)])
            print(*rows[-1], file=sys.stderr, flush=True)
    for path in sorted((SHARED / "models").glob("*.onnx")):
        if not wanted or path.stem in wanted:
            rows.append([path.stem, "shared", "", *_judge(path, None)])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown.table(HEADER, rows))


def _exported(name: str, exporter: str, opset: int) -> list[object]:
    path = CACHE / "zoo" / f"{name}-{exporter}-{opset}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        export(name, exporter, opset, path)
    return _judge(path, {key: tensor.numpy() for key, tensor in examples(name, exporter, opset).items()})


def _judge(path: Path, feeds: dict[str, np.ndarray] | None) -> list[object]:
    """Spaces, share, error of the law, error of the normal form, frozen operators; or why there are none."""
    try:
        model = load(path)
        session = open_session(path, threads=1)
        feeds = random_feeds(session) if feeds is None else feeds
        expected = run(session, feeds)
        spaces = find_spaces(model)
        share = permutable_share(model, spaces)
        result = check_spaces(model, spaces, seed=0, threads=1)
        normal = path.with_suffix(".normal") if path.parent.name == "zoo" else CACHE / "zoo" / f"{path.stem}.normal"
        save(model, normal)
        loaded = run(open_session(normal, threads=1), feeds)
        normal.unlink()
    except OnnxMergeError as error:
        return [*[""] * 4, "refused: " + str(error).removeprefix(f"{path}: ")]
    drift = max(float(np.abs(loaded[key] - expected[key]).max() / np.abs(expected[key]).max()) for key in expected)
    law = f"{result.max_relative_error:.1e}" + ("" if result.passed else f" FAILED ({result.worst_space})")
    return [len(spaces.permutable()), f"{share:.1%}", law, f"{drift:.1e}", _frozen(spaces)]


def _frozen(spaces: Spaces) -> str:
    """Operator x count: reason, most frequent first."""
    kinds = Counter((node.op, node.reason.split(";")[0]) for node in spaces.frozen)
    return "; ".join(f"{op} x{count}: {reason[:_REASON]}" for (op, reason), count in kinds.most_common())


if __name__ == "__main__":
    main()
