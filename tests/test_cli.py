"""The command line as a user meets it: exit codes, one-sentence errors, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from onnxmerge.cli.app import app
from onnxmerge.report.recipe import as_recipe, history

SHARED = Path(__file__).parents[1] / "../shared/models"
DEMO = Path(__file__).parents[1] / "onnxmerge/demo"


def onnxmerge(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def tiny(path: Path, seed: int = 0, channels: int = 1, hidden: int = 6, classes: int = 4) -> Path:
    """Two convolutions and a head on [N, channels, 8, 8]."""
    random = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((random.normal(size=shape) * 0.5).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Flatten", ["r2"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], name="head", transB=1),
    ]
    weights = [
        *(weight("w1", hidden, channels, 3, 3), weight("b1", hidden)),
        *(weight("w2", hidden, hidden, 3, 3), weight("b2", hidden)),
        *(weight("w3", classes, hidden * 9), weight("b3", classes)),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tiny(tmp_path / "a.onnx", 1), tiny(tmp_path / "b.onnx", 2)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path / "samples.npz"
    np.savez(path, x=random.random((300, 1, 8, 8), np.float32))
    return path


FAST = ("--steps", 0, "--samples", 100)


def test_zip_writes_the_contract(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert [c["share"] for c in report["candidates"]] == [0, 1, 2]
    names = {path.name for path in out.iterdir()}
    assert {"merged.onnx", "k00.onnx", "k01.onnx", "k02.onnx", "plan.json", "report.json", "report.html"} <= names
    assert not [name for name in names if name.startswith(".")]
    merged = onnx.load(out / "merged.onnx")
    assert [o.name for o in merged.graph.output] == ["a/logits", "b/logits"]
    steps = history({p.key: p.value for p in merged.metadata_props})
    assert as_recipe(steps, out / "merged.onnx") == report["recipe"]
    assert report["candidates"][0]["tasks"]["a"]["agreement"] == 1.0
    assert report["candidates"][0]["tasks"]["a"]["accuracy"] is None
    assert report["chosen"] in {c["name"] for c in report["candidates"]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["zip", "--rule", "x"], ["--rule", "'x'", "mtz", "onnxmerge zip --help"]),
        (["zip", "a.onnx", "--steps", "-3"], ["--steps", "0", "onnxmerge zip --help"]),
        (["zip"], ["models", "onnxmerge zip --help"]),
        (["zip", "--stesp", "3"], ["--stesp", "--steps"]),
        (["zipp"], ["zipp", "Did you mean 'zip'", "onnxmerge --help"]),
        (["--versoin"], ["--versoin", "--version"]),
    ],
    ids=lambda own: " ".join(own),
)
def test_a_wrong_command_line_is_told_in_one_sentence(line: list[str], words: list[str]) -> None:
    code, stdout, stderr = onnxmerge(*line)
    assert (code, stdout) == (2, "")
    (sentence,) = stderr.splitlines()
    assert sentence.startswith("onnxmerge: error: ") and all(word in sentence for word in words)


def test_without_a_command_there_is_help() -> None:
    code, stdout, stderr = onnxmerge()
    assert code == 2 and "Usage" in stdout + stderr and "zip" in stdout + stderr


def test_same_seed_same_bytes(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    arguments = ("--data", samples, "--steps", 3, "--samples", 100, "--share", 2, "--threads", 1)
    for name in ("first", "second"):
        assert onnxmerge("zip", *pair, "-o", tmp_path / name, *arguments)[0] == 0
    assert (tmp_path / "first/k02.onnx").read_bytes() == (tmp_path / "second/k02.onnx").read_bytes()


def test_nothing_is_overwritten_unasked(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    code, _, stderr = onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST)
    assert code == 2
    assert str(out) in stderr and "--overwrite" in stderr
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_resume_keeps_finished_candidates(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    out = tmp_path / "out"
    assert onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST)[0] == 0
    before = (out / "k01.onnx").stat().st_mtime_ns
    (out / "k02.onnx").unlink()
    assert onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST, "--resume")[0] == 0
    assert (out / "k01.onnx").stat().st_mtime_ns == before
    assert (out / "k02.onnx").is_file()
    assert onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST, "--resume", "--seed", 1)[0] == 0
    assert (out / "k01.onnx").stat().st_mtime_ns != before, "another recipe makes its own candidates"


@pytest.mark.parametrize("damaged", ["k01.json", "k01.onnx"])
def test_resume_makes_damaged_candidates_again(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path, damaged: str
) -> None:
    out = tmp_path / "out"
    assert onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST)[0] == 0
    whole, untouched = (out / "k01.onnx").read_bytes(), (out / "k02.onnx").stat().st_mtime_ns
    content = (out / damaged).read_bytes()
    (out / damaged).write_bytes(content[: len(content) // 2])
    assert onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST, "--resume")[0] == 0
    assert (out / "k01.onnx").read_bytes() == whole
    assert (out / "k02.onnx").stat().st_mtime_ns == untouched


def test_an_interrupt_keeps_what_is_finished(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxmerge.methods.calibrating as calibrating

    real = calibrating.calibrate_merged
    calls = []

    def interrupted(merged: object, *arguments: object, **options: object) -> object:
        calls.append(merged)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(merged, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrating, "calibrate_merged", interrupted)
    out = tmp_path / "out"
    code, _, stderr = onnxmerge("zip", *pair, "-o", out, "--data", samples, "--steps", 2, "--samples", 50)
    assert code == 130
    assert "k00, k01" in stderr and "--resume" in stderr
    report = json.loads((out / "report.json").read_text())
    assert [c["name"] for c in report["candidates"]] == ["k00", "k01"]
    assert (out / "merged.onnx").is_file() and not (out / "k02.onnx").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    code, stdout, _ = onnxmerge("zip", *pair, "-o", tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(stdout)
    assert [unit["layers"] for unit in plan["units"]] == [["w1"], ["w2"]]
    assert [candidate["units"] for candidate in plan["candidates"]] == [0, 1, 2]
    assert plan["candidates"][0]["predicted"] == plan["originals"]
    assert not (tmp_path / "out").exists()


def test_an_edited_plan_is_replayed(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    _, stdout, _ = onnxmerge("zip", *pair, "--dry-run", "--json")
    plan = json.loads(stdout)
    plan["candidates"] = [{"name": "mine", "units": 1}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ("--data", samples, *FAST, "--share", tmp_path / "plan.json", "--json")
    code, stdout, stderr = onnxmerge("zip", *pair, "-o", tmp_path / "out", *arguments)
    assert code == 0, stderr
    assert [c["name"] for c in json.loads(stdout)["candidates"]] == ["mine"]


def test_a_bound_that_breaks_is_exit_1(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    arguments = ("--data", samples, *FAST, "--share", 2, "--max-drop", 0)
    code, _, stderr = onnxmerge("zip", *pair, "-o", tmp_path / "out", *arguments)
    assert code == 1
    assert "--max-drop" in stderr
    assert (tmp_path / "out/report.html").is_file() and not (tmp_path / "out/merged.onnx").exists()


def test_validate_gates(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    out = tmp_path / "out"
    assert onnxmerge("zip", *pair, "-o", out, "--data", samples, *FAST)[0] == 0
    against = ("--against", pair[0], "--against", f"b={pair[1]}", "--data", samples)
    code, stdout, stderr = onnxmerge("validate", out / "k00.onnx", *against, "--atol", 1e-5, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["candidates"][0]["tasks"]["b"]["relative_error"] < 1e-5
    code, _, stderr = onnxmerge("validate", out / "k02.onnx", *against, "--atol", 1e-6)
    assert code == 1 and "differ by more than" in stderr
    code, _, stderr = onnxmerge("validate", out / "k00.onnx", *against, "--min-speedup", 1000)
    assert code == 1 and "speed-up" in stderr
    code, _, stderr = onnxmerge("validate", pair[0], *against)
    assert code == 2 and "a/logits" in stderr


def test_bench_measures(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    code, stdout, stderr = onnxmerge("bench", *pair, "--json")
    assert code == 0, stderr
    for candidate in json.loads(stdout)["candidates"]:
        assert candidate["latency_ms"]["merged"] > 0
        assert candidate["latency_ms"]["speedup"] is None
    code, stdout, stderr = onnxmerge("bench", pair[0], "--against", pair[0], "--against", pair[1], "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["candidates"][0]["latency_ms"]["speedup"] > 0


def test_inspect_tells_spaces_and_checks_them(pair: tuple[Path, Path]) -> None:
    code, stdout, _ = onnxmerge("inspect", pair[0], "--check", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert {"layers", "spaces", "frozen", "parameters", "permutable_parameters_share", "check"} <= set(found)
    assert found["check"]["passed"] and found["check"]["max_relative_error"] < 1e-4
    assert [space["size"] for space in found["spaces"]] == [6, 6]
    assert json.loads(onnxmerge("inspect", pair[0], "--json")[1])["check"] is None


# --- bad input -----------------------------------------------------------------------------------------------------


def one_sentence(stderr: str, *parts: object) -> None:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("onnxmerge: error: ")
    assert "Traceback" not in stderr
    for part in parts:
        assert str(part) in stderr, stderr


def damaged(tmp_path: Path, kind: str) -> Path:
    good = tiny(tmp_path / "good.onnx")
    path = tmp_path / f"{kind}.onnx"
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:700])
    elif kind == "text":
        path.write_text("this is not a model\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "nan":
        model = onnx.load(good)
        broken = numpy_helper.to_array(model.graph.initializer[2]).copy()
        broken[0, 0, 0, 0] = np.nan
        model.graph.initializer[2].CopyFrom(numpy_helper.from_array(broken, "w2"))
        onnx.save(model, path)
    elif kind == "external":
        onnx.save(onnx.load(good), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (tmp_path / "weights.bin").unlink()
    return path


@pytest.mark.parametrize(
    ("kind", "named"), [("truncated", ""), ("text", ""), ("empty", ""), ("nan", "w2"), ("external", "weights.bin")]
)
def test_damaged_models_are_exit_3(tmp_path: Path, samples: Path, kind: str, named: str) -> None:
    path = damaged(tmp_path, kind)
    good = tiny(tmp_path / "other.onnx")
    for arguments in (("inspect", path), ("zip", good, path, "-o", tmp_path / "out", "--data", samples)):
        code, stdout, stderr = onnxmerge(*arguments)
        assert code == 3, stderr
        assert stdout == ""
        one_sentence(stderr, path, named)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the shared models are not here")
def test_a_model_without_opset_is_exit_3() -> None:
    code, _, stderr = onnxmerge("inspect", SHARED / "super_resolution.onnx")
    assert code == 3
    one_sentence(stderr, "super_resolution.onnx", "opset")


def test_networks_with_different_inputs_are_exit_2(tmp_path: Path, samples: Path) -> None:
    gray, colour = tiny(tmp_path / "gray.onnx"), tiny(tmp_path / "colour.onnx", channels=3)
    code, _, stderr = onnxmerge("zip", gray, colour, "-o", tmp_path / "out", "--data", samples)
    assert code == 2
    one_sentence(stderr, "colour.onnx", "Nx3x8x8", "Nx1x8x8")


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"y": np.zeros((20, 1, 8, 8), np.float32)}, "x"),
        ({"x": np.zeros((20, 1, 9, 8), np.float32)}, "x"),
        ({"x": np.full((20, 1, 8, 8), np.nan, np.float32)}, "x"),
        ({"x": np.zeros((20, 1, 8, 8), np.float32), "labels": np.zeros(19, np.int64)}, "labels"),
    ],
)
def test_data_that_do_not_match_are_exit_2(
    tmp_path: Path, pair: tuple[Path, Path], arrays: dict[str, np.ndarray], named: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    code, _, stderr = onnxmerge("zip", *pair, "-o", tmp_path / "out", "--data", tmp_path / "bad.npz", *FAST)
    assert code == 2
    one_sentence(stderr, "bad.npz", named)
    assert not list((tmp_path / "out").glob("*.onnx"))


def test_labels_of_another_task_are_exit_2(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    labels = np.arange(40) % 10
    np.savez(tmp_path / "ten.npz", x=np.zeros((40, 1, 8, 8), np.float32), labels=labels)
    code, _, stderr = onnxmerge("zip", *pair, "-o", tmp_path / "out", "--data", tmp_path / "ten.npz", *FAST)
    assert code == 2
    one_sentence(stderr, "4 classes")


def test_too_much_sharing_is_exit_2(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    for share in ("7", "1.5", "most"):
        code, _, stderr = onnxmerge("zip", *pair, "-o", tmp_path / "out", "--data", samples, "--share", share)
        assert code == 2
        one_sentence(stderr, f"--share {share}")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file size limit")
def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    """A limit on file size makes every write fail as a full disk does: with an OSError, in the middle of the file."""
    import onnxmerge.ir.save as save

    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"import {save.__name__}\n"
        f"model = __import__('onnxmerge.ir.load', fromlist=['load']).load({str(pair[0])!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from onnxmerge.errors import UsageError\n"
        "try:\n"
        f"    onnxmerge.ir.save.save(model, {str(tmp_path / 'full.onnx')!r})\n"
        "except UsageError as error:\n"
        "    print(error); sys.exit(2)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "full.onnx" in ran.stdout and "cannot write" in ran.stdout
    assert not [p for p in tmp_path.iterdir() if "full" in p.name]


def test_help_loads_no_heavy_library() -> None:
    script = (
        "import sys\nsys.argv = ['onnxmerge', '--help']\n"
        "from onnxmerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'scipy', 'matplotlib', 'pydantic', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_threads_hold_for_linear_algebra_too() -> None:
    script = (
        "import contextlib, io, os, sys\n"
        f"sys.argv = ['onnxmerge', 'inspect', {str(DEMO / 'digits.onnx')!r}, '--threads', '1']\n"
        "from onnxmerge.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n    main()\n"
        "import numpy as np\n"
        "array = np.ones((1000, 1000)); array @ array\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: text for name, text in os.environ.items() if name not in limits}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == "1"


def test_the_demo_assets_are_small() -> None:
    data = sum(path.stat().st_size for path in DEMO.glob("*.npz"))
    assert 0 < data <= 2_000_000
