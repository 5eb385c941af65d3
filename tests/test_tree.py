"""Trees of stems: groups of tasks that share further than all do, judged by onnxruntime against the originals."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, execute, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import onnxmerge
from onnxmerge.cli.app import app
from onnxmerge.errors import UsageError
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.normalise import normalise
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.ir.units import find_units
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.methods.calibrating import feature_taps
from onnxmerge.methods.check import check_spaces
from onnxmerge.methods.extract import extract_task
from onnxmerge.methods.task import load_networks
from onnxmerge.methods.zip.alignment import find_sharable
from onnxmerge.methods.zip.choices import Mode, Start
from onnxmerge.methods.zip.stems.grow_tree import Kept, grow_tree
from onnxmerge.methods.zip.stems.tree import Branch, Forest
from onnxmerge.methods.zip.structure import size_of
from onnxmerge.methods.zip.zip import plan_zip
from onnxmerge.passes.permute import Permute
from onnxmerge.report.schema import Result

IMAGES = np.random.default_rng(0).uniform(size=(64, 3, 10, 10)).astype(np.float32)
DEMO = Path(onnxmerge.__file__).parent / "demo"
UNITS = 3
"""Of each network that `original` makes."""


def original(path: Path, seed: int) -> Path:
    """Three convolutions and a head that is no classifier's, so that it is judged by its relative error."""
    net = Net(seed)
    x = net.input(["N", 3, 10, 10])
    for width in (8, 12, 8):
        x = net.relu(net.conv(x, width))
    x = net.flatten(net.op("GlobalAveragePool", x), 8)
    net.output(net.op("Tanh", net.gemm(x, 5)))
    onnx.save(net.proto(), path)
    return path


def twin(path: Path, of: Path, seed: int = 5) -> Path:
    """A copy with every channel space permuted at random."""
    model, random = load(of), np.random.default_rng(seed)
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    Permute({name: random.permutation(space.size) for name, space in spaces.items()}, spaces)(model)
    save(model, path)
    return path


def other(path: Path) -> Path:
    """Its first layer is like that of the others, what follows is not."""
    net = Net(7)
    x = net.op("Tanh", net.conv(net.input(["N", 3, 10, 10]), 8))
    net.head(net.relu(net.conv(x, 6, strides=[2, 2])))
    onnx.save(net.proto(), path)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, x=np.random.default_rng(1).uniform(size=(240, 3, 10, 10)).astype(np.float32))
    return path


@pytest.fixture
def trio(tmp_path: Path) -> list[Path]:
    """a, b and c: b is a permuted copy of a."""
    a = original(tmp_path / "a.onnx", 1)
    return [a, twin(tmp_path / "b.onnx", a), original(tmp_path / "c.onnx", 2)]


def branch(tasks: str, units: int) -> dict[str, Any]:
    return {"tasks": list(tasks), "units": units}


def edited(folder: Path, models: Sequence[Path], *candidates: dict[str, Any]) -> Path:
    """A plan of these candidates, whose tasks read their stems through adapters unless said otherwise."""
    plan = json.loads(plan_zip(models).to_json())
    plan["candidates"] = [
        {"name": f"t{number}", "adapters": True} | candidate for number, candidate in enumerate(candidates)
    ]
    path = folder / "edited.json"
    path.write_text(json.dumps(plan))
    return path


def zipped(
    folder: Path, models: Sequence[Path], data: object, share: object, *, resume: bool = False, **changes: Any
) -> Result:
    quick = {"steps": 0, "samples": 200, "measure": False, "start": (Start.KEEP,), "max_drop": None, "threads": 1}
    chosen = onnxmerge.ZipSettings(share=str(share), **(quick | changes))
    out = folder / "out"
    return onnxmerge.zip_models(models, data, out, settings=chosen, overwrite=not resume, resume=resume)  # type: ignore[arg-type]


def merged_outputs(path: str | None) -> dict[str, np.ndarray]:
    assert path is not None
    return execute(onnx.load(path), {"x": IMAGES})


def errors(result: Result, models: Sequence[Path], candidate: int = 0) -> dict[str, float]:
    """By task, max |original - merged| / max |original|."""
    merged = merged_outputs(result.candidates[candidate].path)
    found = {}
    for path in models:
        ((name, wanted),) = execute(onnx.load(path), {"x": IMAGES}).items()
        found[path.stem] = relative_error(wanted, merged[f"{path.stem}/{name}"])
    return found


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_two_copies_share_all_behind_a_stem_that_a_third_task_shares(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", UNITS)]})
    result = zipped(tmp_path, trio, samples, share)
    found = errors(result, trio)
    assert max(found["a"], found["b"]) < 1e-3
    assert found["c"] < 0.2
    merged = onnx.load(result.candidates[0].path)
    assert [value.name.split("/")[0] for value in merged.graph.output] == ["a", "b", "c"]
    prefixes = [node.name.rsplit("/", 1)[0] for node in merged.graph.node if node.op_type == "Conv"]
    assert [prefix for prefix, _ in itertools.groupby(prefixes)] == ["shared", "shared/a+b", "b", "c"]
    assert result.candidates[0].branches == {"a+b": UNITS} and result.candidates[0].share == 1


@pytest.mark.parametrize("start", list(Start))
def test_a_group_that_shares_nothing_with_the_others_is_a_zip_of_its_own(tmp_path, trio, samples, start):
    """The stem is nothing, so the group is zipped as alone, and the third task stays as it is."""
    share = edited(tmp_path, trio, {"units": 0, "branches": [branch("ba", 2)], "adapters": False})
    tree = zipped(tmp_path, trio, samples, share, start=(start,))
    alone = zipped(tmp_path / "alone", trio[:2], samples, 2, start=(start,))
    found = errors(tree, trio)
    assert found["c"] < 1e-5
    pairs, wanted = merged_outputs(tree.candidates[0].path), merged_outputs(alone.candidates[0].path)
    for name, values in wanted.items():
        np.testing.assert_array_equal(pairs[name], values)
    if start in (Start.KEEP, Start.AVERAGE):
        assert max(found.values()) < 1e-3


def test_two_groups_of_two(tmp_path, trio, samples):
    models = [*trio, twin(tmp_path / "d.onnx", trio[2])]
    share = edited(
        tmp_path,
        models,
        {"units": 0, "branches": [branch("ab", UNITS), branch("cd", 2)]},
        {"units": 1, "branches": [branch("ac", 2), branch("bd", UNITS)]},
    )
    result = zipped(tmp_path, models, samples, share)
    assert max(errors(result, models).values()) < 1e-3
    assert max(errors(result, models, 1).values()) < 0.6
    merged = onnx.load(result.candidates[1].path)
    assert [value.name[:2] for value in merged.graph.output] == ["a/", "b/", "c/", "d/"]
    names = [node.name for node in merged.graph.node]
    assert {name.split("/")[1] for name in names if name.startswith("shared/") and name.count("/") > 1} == {
        "a+c",
        "b+d",
    }


def test_groups_within_groups(tmp_path, trio, samples):
    models = [*trio, twin(tmp_path / "d.onnx", trio[0], 6), original(tmp_path / "e.onnx", 3)]
    groups = [branch("ab", UNITS), branch("dbac", 1), branch("adb", 2)]
    result = zipped(tmp_path, models, samples, edited(tmp_path, models, {"units": 0, "branches": groups}))
    found = errors(result, models)
    assert max(found[task] for task in "abde") < 1e-3 and found["c"] < 0.2
    names = {node.name.rsplit("/", 1)[0] for node in onnx.load(result.candidates[0].path).graph.node}
    assert {"shared/a+b+c+d", "shared/a+b+d", "shared/a+b"} <= names


def test_a_group_shares_deeper_than_all_can(tmp_path, trio, samples):
    """The third network differs behind its first layer."""
    models = [*trio[:2], other(tmp_path / "c.onnx")]
    assert len(plan_zip(models).units) == 1
    share = edited(tmp_path, models, {"units": 1, "branches": [branch("ab", UNITS)]})
    found = errors(zipped(tmp_path, models, samples, share), models)
    assert max(found["a"], found["b"]) < 1e-3
    assert found["c"] < 0.5


def test_each_task_may_have_its_own_data(tmp_path, trio):
    """Data that lie far apart: what is fitted on another task's is worse than this (0.15 and 0.46 at the worst)."""
    data = {}
    for number, task in enumerate("abc"):
        data[task] = tmp_path / f"{task}.npz"
        images = np.random.default_rng(number).normal(3 * number - 3, 1, (90, 3, 10, 10))
        np.savez(data[task], x=images.astype(np.float32))
    share = edited(tmp_path, trio, *({"units": 1, "branches": [branch(group, UNITS)]} for group in ("ab", "bc")))
    for start in (Start.SUBSPACE, Start.LEAST_SQUARES):
        for candidate in zipped(tmp_path, trio, data, share, start=(start,), weights=(1.0, 2.0, 3.0)).candidates:
            assert all((score.relative_error or 1) < 0.12 for score in candidate.tasks.values())


@pytest.mark.slow
def test_calibration_trains_a_tree(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ac", 2)]})
    weights, losses = [], []
    for steps in (0, 60):
        candidate = zipped(tmp_path, trio, samples, share, start=(Start.AVERAGE,), steps=steps).candidates[0]
        layers = find_layers(load(candidate.path or ""))
        weights.append({layer.node.name: get_array(layer.weight) for layer in layers})
        losses = candidate.losses
    assert losses[0][0] == 0 and min(loss for _, loss in losses) < losses[0][1]
    before, after = weights
    still = [name for name, array in before.items() if np.array_equal(array, after[name])]
    assert len(before) > 2 * UNITS and not still  # stem, fork, adapters and tails alike


def test_calibration_is_told_of_what_a_task_computes_behind_its_last_stem(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", 2)]})
    path = zipped(tmp_path, trio, samples, share, start=(Start.SUBSPACE,)).candidates[0].path
    networks = load_networks(trio)
    taps = feature_taps(load(path or ""), networks)  # type: ignore[arg-type]
    cuts = {network.name: [unit.cut for unit in find_units(network.model)] for network in networks}
    wanted = [
        (task, f"{task}/{cut}", cut) for task, first in (("a", 1), ("b", 1), ("c", 0)) for cut in cuts[task][first:]
    ]
    assert [(tap.task, tap.student, tap.teacher) for tap in taps] == wanted


# --- what other commands make of it -----------------------------------------------------------------------------------


def test_each_task_can_be_extracted(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", UNITS)]})
    result = zipped(tmp_path, trio, samples, share, start=(Start.SUBSPACE,))
    path = result.candidates[0].path
    assert path is not None
    whole, sizes = merged_outputs(path), {}
    for task in "abc":
        extract_task(path, task, tmp_path / f"only-{task}.onnx")
        ((name, values),) = execute(onnx.load(tmp_path / f"only-{task}.onnx"), {"x": IMAGES}).items()
        assert relative_error(whole[f"{task}/{name}"], values) < 1e-6
        own = load(tmp_path / f"only-{task}.onnx")
        sizes[task] = size_of([own]).parameters
        assert not [node.name for node in own.graph if node.name.startswith(tuple(f"{t}/" for t in "abc" if t != task))]
    assert sizes["c"] < sizes["a"] == sizes["b"] < size_of([load(path)]).parameters


@pytest.mark.parametrize("adapters", [True, False])
def test_it_is_as_large_as_predicted(tmp_path, trio, samples, adapters):
    share = edited(
        tmp_path,
        trio,
        {"units": 1, "branches": [branch("ab", 2)]},
        {"units": 0, "branches": [branch("bc", UNITS)]},
        {"units": 1, "channels": {}, "branches": [branch("ac", UNITS)]},
        {"units": 2, "branches": [branch("bc", UNITS)]},
    )
    plan = json.loads(share.read_text())
    plan["candidates"] = [candidate | {"adapters": adapters} for candidate in plan["candidates"]]
    plan["candidates"][2]["channels"] = {next(iter(plan["spaces"])): 12}
    share.write_text(json.dumps(plan))
    result = zipped(tmp_path, trio, samples, share, start=(Start.SUBSPACE,))
    written = json.loads((tmp_path / "out/plan.json").read_text())
    assert written["schema"] == 2
    for planned, candidate in zip(written["candidates"], result.candidates, strict=True):
        size = size_of([oir.load(candidate.path or "")])
        assert planned["predicted"] == size.model_dump()
        assert (candidate.parameters, candidate.macs) == (size.parameters, size.macs)
    originals = written["originals"]
    assert result.candidates[0].macs is not None and result.candidates[0].macs < originals["macs"]


def test_other_commands_take_it(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", UNITS)]})
    path = zipped(tmp_path, trio, samples, share).candidates[0].path
    against = [part for model in trio for part in ("--against", str(model))]
    for bound, code in (("0.2", 0), ("1e-4", 1)):
        arguments = ["validate", str(path), *against, "--data", str(samples), "--max-drop", bound, "--json"]
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == code, found.stderr
        assert set(json.loads(found.stdout)["candidates"][0]["tasks"]) == set("abc")
    headline = (tmp_path / "out/report.html").read_text()
    assert "shares 1 of 3 stem units between 3 tasks, 3 units between a+b" in headline


def test_the_law_holds_for_a_tree(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", UNITS)]})
    path = zipped(tmp_path, trio, samples, share, start=(Start.SUBSPACE,)).candidates[0].path
    assert path is not None
    model = load(path)
    spaces = find_spaces(model)
    found = check_spaces(model, spaces, seed=0, threads=1)
    assert found.passed, found
    assert len(spaces.permutable()) == 1 + 3 + 2 * 1 + 1 + 2  # stem; adapter and layers of a+b; adapters; c's layers


# --- bad plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "sentence"),
    [
        ({"units": 1, "branches": [branch("ax", 2)]}, "names the task 'x'; the tasks are a, b, c"),
        ({"units": 1, "branches": [branch("a", 2)]}, "a group takes at least two tasks, each once, not a"),
        ({"units": 1, "branches": [branch("aba", 2)]}, "a group takes at least two tasks, each once, not a, b, a"),
        ({"units": 1, "branches": [branch("cab", 2)]}, "a group of all tasks (c, a, b) is no branch"),
        ({"units": 1, "branches": [branch("ab", 1)]}, "a, b must share more than the 1 units that a, b, c share"),
        ({"units": 0, "branches": [branch("ab", 2), branch("bc", 3)]}, "a, b and b, c overlap, but are not nested"),
        ({"units": 0, "branches": [branch("ab", 2), branch("ba", 3)]}, "a, b and a, b overlap, but are not nested"),
        ({"units": 0, "branches": [branch("ab", 4)]}, "a, b can share at most 3 units: what follows is each"),
        ({"units": 1, "private": {"": 1}, "branches": [branch("ab", 2)]}, "has branches and private channels"),
    ],
)
def test_a_bad_plan_is_one_sentence(tmp_path, trio, samples, candidate, sentence):
    share = edited(tmp_path, trio, candidate)
    plan = json.loads(share.read_text())
    if "private" in candidate:
        plan["candidates"][0]["private"] = {next(iter(plan["spaces"])): 1}
        share.write_text(json.dumps(plan))
    arguments = ["zip", *map(str, trio), "-o", str(tmp_path / "out"), "--data", str(samples), "--share", str(share)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert f"{share}: t0" in found.stderr and sentence in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr and not (tmp_path / "out").exists()


def test_a_nested_group_must_be_deeper_than_the_group_around_it(tmp_path, trio):
    models = [*trio, original(tmp_path / "d.onnx", 4)]
    networks = load_networks(models)
    forest = Forest(networks, find_sharable(networks))
    with pytest.raises(UsageError, match="a, b must share more than the 2 units that a, b, c share"):
        forest.tree(1, [Branch(tasks=["a", "b"], units=2), Branch(tasks=["a", "b", "c"], units=2)])


def test_weights_mode_has_no_branches(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", 2)]})
    share.write_text(share.read_text().replace('"mode": "compute"', '"mode": "weights"'))
    with pytest.raises(UsageError, match="t0 has branches, but with --mode weights there are none"):
        plan_zip(trio, str(share), mode=Mode.WEIGHTS)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_finished_tree_is_taken_again(tmp_path, trio, samples):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", 2)]}, {"units": 1})
    first = zipped(tmp_path, trio, samples, share)
    (tmp_path / "out/t1.onnx").unlink()
    before = (tmp_path / "out/t0.onnx").stat().st_mtime_ns
    again = zipped(tmp_path, trio, samples, share, resume=True)
    assert (tmp_path / "out/t0.onnx").stat().st_mtime_ns == before and (tmp_path / "out/t1.onnx").is_file()
    assert again.candidates[0] == first.candidates[0]


def test_trees_that_were_found_are_found_again(tmp_path, trio, samples):
    first = zipped(tmp_path, trio, samples, "tree", max_drop=1e-3)
    plan, before = (tmp_path / "out/plan.json").read_text(), (tmp_path / "out/tree01.onnx").read_bytes()
    again = zipped(tmp_path, trio, samples, "tree", max_drop=1e-3, resume=True)
    assert again.candidates == first.candidates and again.chosen == first.chosen
    assert (tmp_path / "out/plan.json").read_text() == plan
    replayed = zipped(tmp_path / "again", trio, samples, tmp_path / "out/plan.json", max_drop=1e-3)
    assert [own.tasks for own in replayed.candidates] == [own.tasks for own in first.candidates]
    weights = [
        onnx.load_from_string(text).graph for text in (before, (tmp_path / "again/out/tree01.onnx").read_bytes())
    ]
    assert weights[0] == weights[1]  # only the recipes differ


def test_the_dry_run_prints_a_tree(tmp_path, trio):
    share = edited(tmp_path, trio, {"units": 1, "branches": [branch("ab", 2)]})
    found = CliRunner().invoke(
        app, ["zip", *map(str, trio), "--dry-run", "--share", str(share)], env={"COLUMNS": "160"}
    )
    assert found.exit_code == 0 and "1, a+b 2" in found.stdout
    found = CliRunner().invoke(app, ["zip", *map(str, trio), "--dry-run", "--share", "tree"], env={"COLUMNS": "160"})
    assert found.exit_code == 0 and "Trees are planned when these candidates are measured" in found.stdout


# --- trees that are found ---------------------------------------------------------------------------------------------


def test_an_automatic_tree_finds_the_copies(tmp_path, trio, samples):
    result = zipped(tmp_path, trio, samples, "tree", max_drop=1e-3)
    assert result.chosen is not None
    chosen = result.candidate(result.chosen)
    assert chosen.branches == {"a+b": UNITS} and chosen.share == 0
    plain = [candidate for candidate in result.candidates if not candidate.branches]
    assert [candidate.share for candidate in plain] == [0, 1, 2, 3]
    assert (chosen.macs or 0) < min(c.macs or 0 for c in plain if (c.worst_drop or 0) <= 1e-3)
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert [candidate["name"] for candidate in plan["candidates"]] == [c.name for c in result.candidates]
    assert "a+b" in (tmp_path / "out/report.html").read_text()


@pytest.mark.slow
def test_tasks_of_one_backbone_are_grouped(tmp_path):
    """Digits, whether they are odd (the digits' network with another head, permuted), and clothes."""
    model = load(DEMO / "digits.onnx")
    head = find_layers(model)[-1]
    assert head.bias is not None
    odd = np.eye(2, dtype=np.float32)[np.arange(10) % 2].T  # [2, 10]
    along = get_array(head.weight).shape.index(10)
    set_array(head.weight, np.moveaxis(np.tensordot(odd, get_array(head.weight), (1, along)), 0, along))
    set_array(head.bias, odd @ get_array(head.bias))
    save(normalise(model), tmp_path / "plain.onnx")
    models = [DEMO / "digits.onnx", DEMO / "fashion.onnx", twin(tmp_path / "odd.onnx", tmp_path / "plain.onnx")]
    with np.load(DEMO / "digits.npz") as samples:
        arrays = {name: samples[name] % 2 if "labels" in name else samples[name] for name in samples.files}
    np.savez(tmp_path / "odd.npz", **arrays)
    (tmp_path / "odd.yaml").write_text((DEMO / "digits.yaml").read_text().replace("digits.npz", "odd.npz"))
    data = {"digits": DEMO / "digits.yaml", "fashion": DEMO / "fashion.yaml", "odd": tmp_path / "odd.yaml"}
    result = zipped(tmp_path, models, data, "tree", start=(Start.LEAST_SQUARES,), samples=400, max_drop=0.03)
    chosen = result.candidate(result.chosen or "")
    plain = [own for own in result.candidates if not own.branches and own.within(0.03) == set(own.tasks)]
    assert chosen.branches == {"digits+odd": 5}
    assert (chosen.macs or 0) < 0.9 * min(own.macs or 0 for own in plain)


@pytest.mark.parametrize(
    ("number", "max_drop", "sentence"),
    [
        (2, 0.1, "No tree was made: two tasks have no smaller groups."),
        (3, None, "No tree was made: there is no --max-drop to keep."),
        (3, 10.0, "No group of tasks can share further than all tasks within --max-drop."),
    ],
)
def test_why_there_is_no_tree(tmp_path, trio, samples, number, max_drop, sentence):
    result = zipped(tmp_path, trio[:number], samples, "tree", max_drop=max_drop)
    assert sentence in result.notes
    assert not [candidate for candidate in result.candidates if candidate.branches]


def test_trees_are_for_whole_stems(tmp_path, trio, samples):
    with pytest.raises(UsageError, match="--share tree: trees are for"):
        zipped(tmp_path, trio, samples, "tree", width=(0.5,))


class Imagined:
    """Five tasks; any group keeps the bound up to the least `depth` of its tasks, less one for each pair of kinds."""

    def __init__(self, depth: dict[str, int], kind: dict[str, int], limit: int):
        self.depth, self.kind, self.limit = depth, kind, limit
        self.tried: list[tuple[int, tuple[tuple[str, int], ...]]] = []

    def sharable(self, group: Sequence[str]) -> "Imagined":
        return self

    @property
    def cuts(self) -> range:
        return range(self.limit)

    def kept(self, group: Sequence[str], units: int) -> Kept:
        mixed = len({self.kind[task] for task in group}) - 1
        return frozenset(task for task in group if units <= max(0, self.depth[task] - mixed))

    def attempt(self, units: int, branches: Sequence[Branch]) -> Kept:
        self.tried.append((units, tuple((own.name, own.units) for own in branches)))
        good = self.kept(list(self.depth), units)
        for own in branches:
            good -= frozenset(own.tasks) - self.kept(own.tasks, own.units)
        return good


@settings(max_examples=200)
@given(st.data())
def test_a_grown_tree_keeps_the_bound_and_is_laminar(data):
    names = list("abcde")[: data.draw(st.integers(3, 5))]
    depth = {name: data.draw(st.integers(0, 6)) for name in names}
    kind = {name: data.draw(st.integers(0, 2)) for name in names}
    case = Imagined(depth, kind, 6)
    plain = {k: case.kept(names, k) for k in range(7)}
    branches = grow_tree(names, case, plain, case.attempt)  # type: ignore[arg-type]
    units = max(k for k, kept in plain.items() if kept >= set(names))
    assert case.attempt(units, branches) >= set(names)
    assert len(set(case.tried[:-1])) == len(case.tried) - 1  # nothing is tried twice
    for one, two in itertools.combinations(branches, 2):
        common = set(one.tasks) & set(two.tasks)
        assert not common or (common == set(two.tasks) and two.units > one.units)
    assert all(own.units > units and 2 <= len(own.tasks) < len(names) for own in branches)
    for own in branches:  # as deep as its tasks can go together, unless a part of it goes on
        assert own.units == case.limit or case.kept(own.tasks, own.units + 1) != frozenset(own.tasks)
