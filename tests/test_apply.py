"""apply: passes and edits on one model, each checked."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from graphs import Net, chain, execute
from test_cli import onnxmerge, pair, tiny  # noqa: F401 (fixtures)

from onnxmerge.errors import UsageError
from onnxmerge.methods.passes import GROUP, find_pass, list_passes
from onnxmerge.report.recipe import Made, history

MINE = '''
import onnx_ir as ir


class Scale(ir.passes.InPlacePass):
    """Multiply the first weight."""

    preserves = "approximate"

    def __init__(self, factor: float = 2.0, label=None):
        super().__init__()
        self.factor = factor

    def call(self, model):
        print("a user's pass prints")
        value = next(iter(model.graph.initializers.values()))
        value.const_value = ir.tensor(value.const_value.numpy() * self.factor, name=value.name)
        return ir.passes.PassResult(model, modified=True)


class Claims(Scale):
    """Multiply the first weight, and claim that nothing changes."""

    preserves = "exact"


class Fails(ir.passes.InPlacePass):
    """Fail."""

    def call(self, model):
        raise RuntimeError("a user's\\nfault")


class Leaves(ir.passes.InPlacePass):
    """End the process."""

    def call(self, model):
        raise SystemExit(0)


class Breaks(ir.passes.InPlacePass):
    """Leave a node without its maker."""

    def call(self, model):
        node = next(iter(model.graph))
        node.outputs[0].name = ""
        return ir.passes.PassResult(model, modified=True)


class Hard(Scale):
    """Need what no text tells."""

    def __init__(self, array: ir.Model):
        super().__init__()


NOTHING = 1
'''


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_passes.py").write_text(MINE)
    monkeypatch.delitem(__import__("sys").modules, "users_passes", raising=False)
    path = tiny(tmp_path / "a.onnx")
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {"owner": "me"})
    onnx.save(proto, path)
    return path


def applied(path: Path) -> list[Made]:
    return history({p.key: p.value for p in onnx.load(path).metadata_props})


def test_passes_are_applied_in_order_and_told(model: Path) -> None:
    code, stdout, stderr = onnxmerge(
        "apply", model, "-o", "out.onnx", "--pass", "InsertIdentity", "--set", "InsertIdentity.after=r1",
        "--set", "InsertIdentity.kind=conv", "--pass", "Reinitialise", "--set", "Reinitialise.seed=1", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    found = json.loads(stdout)
    assert [(step["name"], step["exact"]) for step in found["steps"]] == [
        ("InsertIdentity", True),
        ("Reinitialise", False),
    ]
    assert found["steps"][0]["differences"]["logits"] < 1e-4 < found["steps"][1]["differences"]["logits"]
    assert found["parameters"][1] > found["parameters"][0]
    assert [step.options["pass"] for step in applied(Path("out.onnx"))] == [["InsertIdentity", "Reinitialise"]]
    props = {p.key: p.value for p in onnx.load("out.onnx").metadata_props}
    assert props["owner"] == "me"
    first = Path("out.onnx").read_bytes()
    again = ("--pass", "InsertIdentity", "--set", "InsertIdentity.after=r1", "--set", "InsertIdentity.kind=conv")
    again += ("--pass", "Reinitialise", "--set", "Reinitialise.seed=1")
    assert onnxmerge("apply", model, "-o", "twice.onnx", *again)[0] == 0
    assert Path("twice.onnx").read_bytes() == first
    assert onnxmerge("apply", "out.onnx", "-o", "third.onnx", "--pass", "EnsureBiases")[0] == 0
    assert len(applied(Path("third.onnx"))) == 2  # what was applied before is told too


def test_an_exact_pass_of_ours_keeps_a_networks_outputs(tmp_path: Path) -> None:
    onnx.save(chain().proto(), tmp_path / "a.onnx")
    code, stdout, stderr = onnxmerge("apply", tmp_path / "a.onnx", "-o", tmp_path / "b.onnx", "--pass", "FoldBatchNorm")
    assert code == 0, stderr
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "b.onnx").graph.node}
    assert "FoldBatchNorm (exact): largest relative difference" in stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--pass", "users_passes:Scale"], 0, ""),
        (["--pass", "users_passes:Scale", "--set", "factor=1", "--exact"], 0, ""),
        (
            ["--pass", "users_passes:Claims"],
            1,
            "Claims says that outputs stay equal, but 'logits' differs",
        ),
        (["--pass", "users_passes:Scale", "--exact"], 1, "users_passes:Scale shall keep outputs equal, but 'logits'"),
        (
            ["--pass", "users_passes:Scale", "--set", "factor=x"],
            2,
            "--set factor=x: users_passes:Scale: ",
        ),
        (["--pass", "users_passes:Scale", "--set", "nothing=1"], 2, "has no such setting; it has factor"),
        (["--pass", "users_passes:Scale", "--set", "factor"], 2, "--set factor: give key=value"),
        (["--pass", "users_passes:Fails"], 2, "users_passes:Fails: failed with RuntimeError: a user's fault"),
        (["--pass", "users_passes:Leaves"], 2, "users_passes:Leaves: failed with SystemExit: 0"),
        (["--pass", "users_passes:Breaks"], 3, "users_passes:Breaks: what it makes is no well-formed model"),
        (["--pass", "users_passes:Hard"], 2, "takes array, which --set cannot tell"),
        (["--pass", "users_passes:NOTHING"], 2, "users_passes:NOTHING: is no pass"),
        (["--pass", "users_passes:Absent"], 2, "AttributeError"),
        (["--pass", "absent:Absent"], 2, "ModuleNotFoundError"),
        (["--pass", "Absent"], 2, "there is no such pass; there are DeduplicateInitializers"),
        (["--pass", "Refit"], 2, "takes teachers, cuts, solve"),
        (["--pass", "TakeStream", "--set", "task=a"], 2, "onnxmerge extract takes a task out"),
        (["--pass", "InsertIdentity", "--set", "kind=conv"], 2, "needs --set after=..."),
        (["--pass", "InsertIdentity", "--set", "after=nix", "--set", "kind=conv"], 2, "no value 'nix'"),
        (["--pass", "PrefixNames", "--set", "prefix=a/"], 2, "the input 'x' is gone; --change-interface allows it"),
        (["--pass", "PrefixNames", "--set", "prefix=a/", "--change-interface"], 0, ""),
        (["--edit", "users_passes:NOTHING"], 2, "users_passes:NOTHING: is not a function"),
        (["--edit", "nothing"], 2, "nothing: is not written module:name"),
        ([], 2, "nothing to apply"),
    ],
)
def test_what_a_user_meets(model: Path, arguments: list[str], code: int, said: str) -> None:
    found, stdout, stderr = onnxmerge("apply", model, "-o", "out.onnx", *arguments)
    assert found == code, stderr
    assert said in stderr and "Traceback" not in stderr and "a user's pass prints" not in stdout
    assert Path("out.onnx").exists() == (code == 0)
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    if code == 0:
        assert onnxmerge("apply", model, "-o", "out.onnx", *arguments)[0] == 2  # nothing is overwritten


def test_a_users_traceback_is_shown_on_demand(model: Path) -> None:
    assert "line" in onnxmerge("apply", model, "-o", "out.onnx", "--pass", "users_passes:Fails", "-v")[2]


def test_names_stay_in_order(model: Path) -> None:
    """Renamed inputs and outputs are paired in order, and compared."""
    options = ("--pass", "PrefixNames", "--set", "prefix=a/", "--change-interface", "--json")
    (step,) = json.loads(onnxmerge("apply", model, "-o", "out.onnx", *options)[1])["steps"]
    assert step["differences"] == {"logits": 0.0}


def test_random_networks_are_not_compared(tmp_path: Path) -> None:
    net = Net()
    x = net.input(["N", 4])
    net.output(net.op("Add", x, net.op("RandomNormalLike", x)))
    onnx.save(net.proto(), tmp_path / "a.onnx")
    code, stdout, stderr = onnxmerge("apply", tmp_path / "a.onnx", "-o", tmp_path / "b.onnx", "--pass", "Untie")
    assert code == 0 and "draws random numbers" in stdout, stderr


# --- passes of other distributions ------------------------------------------------------------------------------------


@pytest.fixture
def installed(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution that brings three passes, one of a name of ours and one that cannot be loaded."""
    info = Path("users-1.2.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: users\nVersion: 1.2\n")
    entries = ("Scale = users_passes:Scale", "Permute = users_passes:Scale", "Gone = users_passes:Gone")
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *entries]))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert [entry.name for entry in metadata.entry_points(group=GROUP)]
    return model


def test_installed_passes_are_listed_and_applied(installed: Path) -> None:
    found = {(own.name, own.distribution): own for own in list_passes()}
    assert found["Scale", "users 1.2"].settings == {"factor": "2.0"}
    assert found["Gone", "users 1.2"].settings is None and "AttributeError" in found["Gone", "users 1.2"].summary
    assert ("Permute", "onnxmerge") in found
    code, stdout, _ = onnxmerge("passes")
    assert code == 0 and "(users 1.2)" in stdout
    code, _, stderr = onnxmerge("apply", installed, "-o", "out.onnx", "--pass", "Scale", "--set", "factor=3")
    assert code == 0, stderr
    (told,) = applied(Path("out.onnx"))
    assert (told.options["pass"], told.options["set"]) == (["Scale"], ["factor=3"])
    assert told.versions["Scale"] == "users 1.2"
    with pytest.raises(UsageError, match=r"onnxmerge and users 1\.2 both have a pass"):
        find_pass("Permute")


def test_a_recipe_runs_installed_passes_and_no_other_code_unless_trusted(installed: Path) -> None:
    def recipe(**options: object) -> Path:
        step = {"apply": {"model": "a.onnx", "output": "out.onnx", **options}}
        Path("recipe.yaml").write_text(yaml.safe_dump({"steps": [step]}))
        return Path("recipe.yaml")

    code, _, stderr = onnxmerge("run", recipe(**{"pass": "Scale", "set": {"factor": 3}}))
    assert code == 0, stderr
    for options in ({"pass": ["EnsureBiases", "users_passes:Scale"]}, {"edit": "users_passes:Scale"}, {"edit": "x"}):
        code, _, stderr = onnxmerge("run", recipe(**options), "--overwrite")
        assert code == 2 and "would run code; --trust-code allows it" in stderr
    code, _, stderr = onnxmerge("run", recipe(**{"pass": "users_passes:Scale"}), "--overwrite", "--trust-code")
    assert code == 0, stderr
    same = {"pass": "InsertIdentity", "set": {"after": "c1", "kind": "conv", "norm": True}}
    code, _, stderr = onnxmerge("run", recipe(**same), "--overwrite")
    assert code == 0, stderr


# --- what was merged stays merged -------------------------------------------------------------------------------------


def test_tasks_outlive_what_is_applied(tmp_path: Path, pair: tuple[Path, Path]) -> None:  # noqa: F811
    merged, out, back = (tmp_path / name for name in ("merged.onnx", "out.onnx", "back.onnx"))
    assert onnxmerge("pack", *pair, "-o", merged)[0] == 0
    passes = ("--pass", "DeduplicateInitializers", "--pass", "MergeIdenticalNodes", "--pass", "TransposeGemms")
    code, _, stderr = onnxmerge("apply", merged, "-o", out, *passes)
    assert code == 0, stderr
    assert [value.name for value in onnx.load(out).graph.output] == ["a/logits", "b/logits"]
    assert onnxmerge("extract", out, "--task", "b", "-o", back)[0] == 0
    x = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    (ours,), (theirs,) = (list(execute(onnx.load(path), {"x": x}).values()) for path in (back, pair[1]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
