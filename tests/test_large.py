"""Models beyond 2 GB are packed and taken apart without ever being in memory."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxmerge.runtime.session import open_session, run

pytestmark = pytest.mark.slow

WORDS, WIDTH = 275_000, 1024
TABLE_BYTES = 4 * WORDS * WIDTH  # 1.1 GB
PEAK_MB = 300
DISK_GB = 12


def write_table(stream, seed: int) -> None:
    """WORDS * WIDTH random floats of about 0.01, no two blocks alike."""
    block = 0.01 * np.random.default_rng(seed).standard_normal(1 << 20).astype(np.float32)
    written = 0
    while written < TABLE_BYTES:
        chunk = np.roll(block, written // 1000).tobytes()[: TABLE_BYTES - written]
        stream.write(chunk)
        written += len(chunk)


def write_model(path: Path, head: str) -> None:
    """Gather from one table, multiply with another, and an operator that the other model does not have."""
    data = path.with_suffix(".bin")
    with open(data, "wb") as stream:
        for seed in (1, 2):
            write_table(stream, seed)
    tensors = []
    for number, (name, shape) in enumerate({"embedding": [WORDS, WIDTH], "output_weight": [WIDTH, WORDS]}.items()):
        tensor = TensorProto(name=f"{head}_{name}", dims=shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": data.name, "offset": number * TABLE_BYTES, "length": TABLE_BYTES}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    nodes = [
        helper.make_node("Gather", [f"{head}_embedding", "tokens"], ["embedded"], name="gather"),
        helper.make_node("MatMul", ["embedded", f"{head}_output_weight"], ["logits"], name="matmul"),
        helper.make_node(head, ["logits"], ["y"], name="head", axis=-1),
    ]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["N"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT if head == "Softmax" else TensorProto.INT64, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < DISK_GB * 1e9:
        pytest.skip(f"less than {DISK_GB} GB of free disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


def peak_mb(*arguments: object) -> float:
    """Run the command line in a process of its own; its highest resident set size in MB (1e6 bytes).

    Not `ru_maxrss`: that of a child begins at what its parent, which has run such models, once had.
    """
    program = (
        "import sys\n"
        "from onnxmerge.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, kilobytes, _ = done.stdout.splitlines()[-2].split()
    return int(kilobytes) * 1024 / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_pair_beyond_2_gb_within_300_mb_of_memory(folder: Path) -> None:
    first, second = folder / "soft.onnx", folder / "best.onnx"
    write_model(first, "Softmax")
    write_model(second, "ArgMax")
    tokens = {"tokens": np.array([0, WORDS - 1])}
    expected = {path.stem: run(open_session(path, threads=1), tokens)["y"] for path in (first, second)}

    packed = folder / "packed.onnx"
    assert peak_mb("pack", first, second, "-o", packed, "--no-check") <= PEAK_MB
    assert 2 * TABLE_BYTES <= packed.with_name("packed.onnx.data").stat().st_size < 2.001 * TABLE_BYTES
    proto = onnx.load(packed, load_external_data=False)
    assert sorted(node.op_type for node in proto.graph.node) == ["ArgMax", "Gather", "MatMul", "Softmax"]
    got = run(open_session(packed, threads=1), tokens)
    for task, array in expected.items():
        np.testing.assert_array_equal(got[f"{task}/y"], array)

    second.with_suffix(".bin").unlink()
    back = folder / "back.onnx"
    assert peak_mb("extract", packed, "--task", "soft", "-o", back) <= PEAK_MB
    packed.with_name("packed.onnx.data").unlink()
    np.testing.assert_array_equal(run(open_session(back, threads=1), tokens)["y"], expected["soft"])
