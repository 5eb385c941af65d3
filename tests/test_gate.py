"""gate: the command and its result, from files to a report, and what it refuses."""

import json

import numpy as np
import onnx
import pytest
from graphs import Net, chain, dense, execute, relative_error, residual
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import onnxmerge
from onnxmerge.cli.app import app
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.check import check_spaces

NETS = {"dense": dense, "chain": chain, "residual": residual}
SHAPES = {"dense": (6,), "chain": (3, 10, 10), "residual": (3, 10, 10)}
CLASSES = {"dense": 4, "chain": 5, "residual": 5}


@pytest.fixture
def folder(tmp_path):
    """Networks a, b, ... of a kind and `data.npz` with labels of the first network's making."""

    def make(kind: str = "dense", count: int = 2, labels: bool = True):
        for number in range(count):
            onnx.save(NETS[kind](seed=number).proto(), tmp_path / f"{'abc'[number]}.onnx")
        x = np.random.default_rng(0).standard_normal((200, *SHAPES[kind])).astype(np.float32)
        (logits,) = execute(load(tmp_path / "a.onnx"), {"x": x}).values()
        np.savez(tmp_path / "data.npz", x=x, **({"labels": logits.argmax(1)} if labels else {}))
        return tmp_path

    return make


def gate(path, names="ab", **more):
    own = onnxmerge.GateSettings(**{"measure": False, "threads": 1, "gate_steps": 12, "steps": 12} | more)
    files = [path / f"{name}.onnx" for name in names]
    return onnxmerge.gate_models(files, path / "data.npz", path / "out", settings=own, overwrite=True)


def shapes(path) -> list[tuple[int, ...]]:
    return sorted(tuple(v.const_value.shape) for v in load(path).graph.initializers.values())


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_the_result_has_the_architecture_of_one_and_every_space_can_be_permuted(kind, folder):
    path = folder(kind)
    result = gate(path)
    merged = path / "out" / "merged.onnx"
    assert shapes(merged) == shapes(path / "a.onnx")
    assert [n.op_type for n in onnx.load(merged).graph.node] == [
        n.op_type for n in onnx.load(path / "a.onnx").graph.node
    ]
    assert [candidate.name for candidate in result.candidates] == ["pruned", "student"]
    assert result.chosen == "student"
    assert set(result.originals) == {"a", "b"}
    model = load(merged)
    assert check_spaces(model, find_spaces(model), seed=0, threads=1).passed


def test_three_networks_keep_a_third(folder):
    path = folder("chain", 3)
    result = gate(path, "abc")
    assert shapes(path / "out" / "merged.onnx") == shapes(path / "a.onnx")
    assert [(len(g.probability), len(g.kept)) for g in result.candidates[0].gates] == [(24, 8), (36, 12), (24, 8)]


def test_another_width(folder):
    path = folder("dense")
    gate(path, width=0.25)
    assert shapes(path / "out" / "merged.onnx") == [(4,), (4, 5), (5,), (6,), (6, 5), (6, 6)]


def test_networks_that_agree_stay_what_they_are_while_half_of_their_channels_go(folder):
    """Of two equal networks half of the channels are superfluous: gates must find it."""
    path = folder("dense")
    onnx.save(dense(seed=0).proto(), path / "b.onnx")
    result = gate(path, gate_steps=400, steps=400)
    assert result.candidates[1].ensemble.agreement > 0.85


def test_without_fine_tuning_the_pruned_network_is_the_result(folder):
    result = gate(folder(), steps=0)
    assert result.chosen == "pruned"


def test_the_plan_tells_which_channels_of_which_network_were_kept(folder):
    path = folder("chain")
    gated = gate(path).candidates[0].gates
    plan = json.loads((path / "out" / "plan.json").read_text())
    assert plan["networks"] == ["a", "b"] and plan["width"] == 0.5
    for space, found in zip(plan["spaces"], gated, strict=True):
        half = space["channels"] // 2
        kept = space["kept"]["a"] + [half + channel for channel in space["kept"]["b"]]
        assert kept == found.kept and len(kept) == space["keep"] == half


@pytest.mark.parametrize("labels", [True, False])
def test_the_same_seed_gives_the_same_bytes(labels, folder, tmp_path_factory):
    path = folder("residual", labels=labels)
    gate(path)
    first = (path / "out" / "merged.onnx").read_bytes()
    gate(path)
    assert (path / "out" / "merged.onnx").read_bytes() == first
    gate(path, seed=1)
    assert (path / "out" / "merged.onnx").read_bytes() != first


def test_numbers_can_be_labels(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        onnx.save(dense(seed=seed, sizes=(2, 10, 1)).proto(), tmp_path / f"{name}.onnx")
    x = np.random.default_rng(0).standard_normal((300, 2)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=x[:, :1] * 2)
    result = gate(tmp_path, gate_steps=100, steps=200)
    losses = [loss for _, loss in result.candidates[1].losses]
    assert min(losses) < 0.5 * losses[0]
    assert "Labels taught." in result.notes


def test_each_network_may_bring_its_own_data_under_its_own_names(tmp_path):
    onnx.save(dense(seed=0).proto(), tmp_path / "a.onnx")
    net = Net(1)
    x = net.input(["N", 6], name="features")
    for number, out in enumerate((12, 10, 4), start=1):
        x = net.gemm(x, out, transposed=number % 2 == 1)
        x = net.relu(x) if out > 4 else x
    net.output(x)
    onnx.save(net.proto(), tmp_path / "b.onnx")
    drawn = np.random.default_rng(0).standard_normal((2, 120, 6)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=drawn[0])
    np.savez(tmp_path / "b.npz", features=drawn[1])
    own = onnxmerge.GateSettings(measure=False, threads=1, gate_steps=4, steps=4)
    sources = {"a": tmp_path / "a.npz", "b": tmp_path / "b.npz"}
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    result = onnxmerge.gate_models(files, sources, tmp_path / "out", settings=own)
    assert result.chosen == "student"
    assert onnx.load(tmp_path / "out" / "merged.onnx").graph.input[0].name == "x"


def test_what_is_finished_is_kept_and_resumed(folder):
    path = folder()
    gate(path)
    before = {name: (path / "out" / f"{name}.onnx").read_bytes() for name in ("pruned", "student")}
    (path / "out" / "student.onnx").unlink()
    stamp = (path / "out" / "pruned.onnx").stat().st_mtime_ns
    own = onnxmerge.GateSettings(measure=False, threads=1, gate_steps=12, steps=12)
    files = [path / f"{name}.onnx" for name in "ab"]
    result = onnxmerge.gate_models(files, path / "data.npz", path / "out", settings=own, resume=True)
    assert (path / "out" / "pruned.onnx").stat().st_mtime_ns == stamp
    assert (path / "out" / "student.onnx").read_bytes() == before["student"]
    assert result.candidates[0].gates


@settings(max_examples=6)
@given(seed=st.integers(0, 9), share=st.sampled_from([0.25, 0.5, 0.75]))
def test_the_report_tells_of_every_gate(seed, share, tmp_path_factory):
    path = tmp_path_factory.mktemp("gate")
    for number, name in enumerate("ab"):
        onnx.save(dense(seed=seed + number).proto(), path / f"{name}.onnx")
    np.savez(path / "data.npz", x=np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32))
    gate(path, gate_steps=2, steps=0, width=share)
    stored = json.loads((path / "out" / "report.json").read_text())
    for space in stored["candidates"][0]["gates"]:
        assert len(space["kept"]) == max(1, round(share * len(space["probability"])))
        assert all(0 <= p <= 1 for p in space["probability"])


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["gate", *map(str, arguments)])


def test_the_command_end_to_end(folder):
    path = folder("residual")
    out = path / "out"
    done = command(
        path / "a.onnx", path / "b.onnx", "--data", path / "data.npz", "-o", out, "--gate-steps", 8, "--steps", 8,
        "--threads", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "student *" in done.stdout and "gates selected" in done.stdout.replace("\n", " ")
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "gate" and report["chosen"] == "student"
    assert [len(candidate["losses"]) > 1 for candidate in report["candidates"]] == [True, True]
    page = (out / "report.html").read_text()
    assert "<h2>Gates</h2>" in page or "Gates" in page
    assert {file.name for file in out.iterdir()} >= {"merged.onnx", "pruned.onnx", "student.onnx", "plan.json"}
    again = command(path / "a.onnx", path / "b.onnx", "--data", path / "data.npz", "-o", out)
    assert again.exit_code == 2 and "--overwrite" in again.output


def test_a_dry_run_prints_the_plan_and_needs_no_data(folder):
    path = folder("residual")
    done = command(path / "a.onnx", path / "b.onnx", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert [(space["channels"], space["keep"]) for space in plan["spaces"]] == [(16, 8), (16, 8), (32, 16), (32, 16)]
    assert "32" in command(path / "a.onnx", path / "b.onnx", "--dry-run").stdout


def test_a_bound_that_is_not_kept_ends_with_1(folder):
    path = folder()
    done = command(
        path / "a.onnx", path / "b.onnx", "--data", path / "data.npz", "-o", path / "out", "--gate-steps", 1, "--steps",
        0, "--max-drop", 0, "--threads", 1,
    )  # fmt: skip
    assert done.exit_code == 1
    assert not (path / "out" / "merged.onnx").exists()


def test_the_command_takes_the_optimiser_its_rate_and_the_batch(folder):
    path = folder()
    given = ["--optimiser", "sgd", "--rate", 0.003, "--batch", 16, "--gate-steps", 2, "--steps", 2, "--threads", 1]
    done = command(path / "a.onnx", path / "b.onnx", "--data", path / "data.npz", "-o", path / "out", *given)
    assert done.exit_code == 0, done.output
    recipe = json.loads((path / "out" / "report.json").read_text())["recipe"]["steps"][0]["gate"]
    assert (recipe["optimiser"], recipe["rate"], recipe["batch"]) == ("sgd", 0.003, 16)


@pytest.mark.parametrize(("option", "value"), [("--optimiser", "adam"), ("--rate", 0), ("--batch", 0)])
def test_the_command_refuses_a_training_that_cannot_be(option, value, folder):
    path = folder()
    done = command(path / "a.onnx", path / "b.onnx", "--dry-run", option, value)
    assert done.exit_code == 2 and option.strip("-") in done.output
    assert "Traceback" not in done.output


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_another_architecture_is_told_by_its_first_difference_and_fuse_is_named(folder):
    path = folder("chain")
    onnx.save(chain(seed=1, norm=False).proto(), path / "b.onnx")
    with pytest.raises(ModelError, match=r"b\.onnx: is not of the same architecture as .*a\.onnx: .*BatchNorm.*fuse"):
        gate(path)


def test_other_widths_are_another_architecture(folder):
    path = folder("chain")
    onnx.save(chain(seed=1, width=6).proto(), path / "b.onnx")
    with pytest.raises(ModelError, match=r"b\.onnx: is not of the same architecture.*fuse"):
        gate(path)


def test_the_odd_one_of_three_is_named(folder):
    path = folder("chain", 3)
    onnx.save(chain(seed=1, width=6).proto(), path / "c.onnx")
    with pytest.raises(ModelError, match=r"c\.onnx: is not of the same architecture"):
        gate(path, "abc")


def test_one_network_alone_is_refused(folder):
    path = folder()
    with pytest.raises(UsageError, match="at least two"):
        gate(path, "a")


def test_labels_that_are_asked_for_and_missing(folder):
    path = folder(labels=False)
    with pytest.raises(UsageError, match=r"no labels for the task 'a'.*--no-labels"):
        gate(path, labels=True)


def test_no_data(folder):
    path = folder()
    done = command(path / "a.onnx", path / "b.onnx", "-o", path / "out")
    assert done.exit_code == 2 and "the task 'a' has no data" in done.output
    assert not (path / "out").exists()


def test_networks_all_of_whose_channels_are_kept_whole_are_refused_with_the_reason(tmp_path):
    def tokens(seed):
        net = Net(seed)
        x = net.matmul(net.input(["N", 5, 6]), 8)
        x = net.op("LayerNormalization", x, net.uniform(8), net.normal(8), channels=8)
        net.output(net.matmul(net.relu(x), 4))
        return net.proto()

    for number, name in enumerate("ab"):
        onnx.save(tokens(number), tmp_path / f"{name}.onnx")
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 5, 6), np.float32))
    with pytest.raises(ModelError, match=r"no channels can be chosen.*LayerNormalization .*normalises over channels"):
        gate(tmp_path)


def test_networks_without_channels_to_choose_are_refused(tmp_path):
    for number, name in enumerate("ab"):
        net = Net(number)
        net.output(net.gemm(net.input(["N", 6]), 4))
        onnx.save(net.proto(), tmp_path / f"{name}.onnx")
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 6), np.float32))
    with pytest.raises(ModelError, match="no channels can be chosen"):
        gate(tmp_path)


def test_a_negative_weight_is_refused():
    with pytest.raises(UsageError, match="--mean-weight"):
        onnxmerge.GateSettings(mean_weight=-1)


def test_the_mean_teaches_beside_labels_in_fine_tuning_only():
    own = onnxmerge.GateSettings(mean_weight=0.5)
    both = (own.learning(labels=True), own.tuning(labels=True))
    weights = [(training.kl_weight, training.logit_weight, training.label_weight) for training in both]
    assert weights == [(0, 0, 1), (0.5, 0, 1)]
    assert own.tuning(labels=False).label_weight == 0


@pytest.mark.parametrize("width", [0, 1.5, -1])
def test_a_width_that_is_no_share_is_refused(width):
    with pytest.raises(UsageError, match="--width"):
        onnxmerge.GateSettings(width=width)


def test_channels_that_are_kept_whole_are_noted(tmp_path):
    for number, name in enumerate("ab"):
        net = Net(number)
        x = net.relu(net.conv(net.input(["N", 3, 8, 8]), 8))
        net.head(net.relu(net.conv(net.relu(net.conv(x, 6, group=2)), 6)))
        onnx.save(net.proto(), tmp_path / f"{name}.onnx")
    x = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    result = gate(tmp_path, gate_steps=2, steps=2)
    assert sum("are all kept: its channels lie in the groups" in note for note in result.notes) == 1
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [space["reason"] is None for space in plan["spaces"]].count(True) == 1


def test_the_widened_student_is_the_average(folder):
    path = folder("chain")
    from onnxmerge.methods.gate.plan import make_gate_plan
    from onnxmerge.methods.task import load_networks

    networks = load_networks([path / "a.onnx", path / "b.onnx"], folded=False)
    planned = make_gate_plan(networks, onnxmerge.GateSettings())
    x = {"x": np.random.default_rng(3).standard_normal((4, 3, 10, 10)).astype(np.float32)}
    outputs = [next(iter(execute(onnx.load(path / f"{name}.onnx"), x).values())) for name in "ab"]
    (got,) = execute(planned.widened, x).values()
    assert relative_error(np.mean(outputs, axis=0), got) < 1e-5
