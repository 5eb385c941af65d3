"""The shared subspace: joined networks, stems of other widths, private channels, and what is chosen to be shared."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from fusing import depthwise, flattened, folded
from graphs import Net, chain, dense, execute, feeds_for, relative_error, residual
from hypothesis import given
from hypothesis import strategies as st

import onnxmerge
from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.compose import chain as put_behind
from onnxmerge.ir.compose import cut_out
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import Space, find_spaces
from onnxmerge.ir.units import find_units
from onnxmerge.ir.weights import get_array, set_array
from onnxmerge.methods.zip.bounds import Bounds
from onnxmerge.methods.zip.choices import Start
from onnxmerge.methods.zip.structure import size_of
from onnxmerge.passes.attach_tails import AttachTails
from onnxmerge.passes.join_values import Joined, JoinValues
from onnxmerge.passes.permute import Permute
from onnxmerge.passes.prune import Prune
from onnxmerge.passes.roles import read_axis
from onnxmerge.passes.set_widths import SetWidths
from onnxmerge.passes.split_off import STEM, SplitOff
from onnxmerge.passes.subspace import Bend, Sight, choose_channels, choose_private, choose_subspace, decoder
from onnxmerge.report.schema import Candidate, Result, TaskScore

BUILDS: list[Callable[..., Net]] = [chain, residual, depthwise, flattened, dense]


def stem_of(build: Callable[..., Net], seed: int = 0) -> tuple[oir.Model, str]:
    """A network up to its last cut."""
    model = folded(build)(seed) if build in (chain, residual, dense) else folded(build)()
    cut = find_units(model)[-1].cut
    return cut_out(model, [v.name or "" for v in model.graph.inputs], [cut]), cut


def spaces_of(stem: oir.Model, cut: str) -> dict[str, Space]:
    return {space.name: space for space in find_spaces(stem, frozenset([cut])).permutable()}


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [chain, residual, dense])
def test_joined_values_are_the_networks_side_by_side(build: Callable[..., Net]) -> None:
    first, cut = stem_of(build)
    second, _ = stem_of(build, 1)
    names = [layer.linear.name or "" for layer in find_layers(first)]
    axis = 1
    values = [Joined(name, {"a": name, "b": name}, axis) for name in dict.fromkeys([*names, cut])]
    joined: oir.Model = JoinValues("a", {"b": second}, values)(first).model
    feeds = feeds_for(first)
    (got,) = execute(joined, feeds).values()
    wanted = [next(iter(execute(stem, feeds).values())) for stem in (first, second)]
    assert relative_error(np.concatenate(wanted, axis), got) < 1e-5
    rest = cut_out(joined, [names[0]], [cut])  # what follows a joined value reads it alone
    assert [value.name for value in rest.graph.inputs] == [names[0]]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_a_stem_of_another_width_is_a_network(build: Callable[..., Net], factor: float) -> None:
    stem, cut = stem_of(build)
    spaces = spaces_of(stem, cut)
    widths = {name: max(1, round(factor * space.size)) for name, space in spaces.items()}
    resized: oir.Model = SetWidths(widths, 1)(stem).model
    found = spaces_of(resized, cut)
    assert {name: space.size for name, space in found.items()} == widths
    (output,) = execute(resized, feeds_for(stem)).values()
    (before,) = execute(stem, feeds_for(stem)).values()
    assert output.ndim == before.ndim and output.shape[1] == round(factor * before.shape[1])


def test_a_width_of_no_space_is_refused() -> None:
    stem, _ = stem_of(chain)
    with pytest.raises(ModelError, match="no channel space 'other'"):
        SetWidths({"other": 3}, 1)(stem)


@pytest.mark.parametrize("build", BUILDS)
@given(data=st.data())
def test_private_channels_beside_the_stem_are_the_whole_network(build: Callable[..., Net], data: st.DataObject) -> None:
    """Where shared channels read no private ones, stem and split-off part compute what the whole network does."""
    whole, cut = stem_of(build)
    whole = whole.clone()
    spaces = spaces_of(whole, cut)
    shared = {name: data.draw(st.integers(1, space.size), label=name) for name, space in spaces.items()}
    _forget_private(whole, spaces, shared)
    stem: oir.Model = Prune({n: np.arange(shared[n]) for n, s in spaces.items()}, spaces)(whole).model
    side: oir.Model = SplitOff(shared, stem)(whole).model
    reads = [(value.name or "").removeprefix(STEM) for value in side.graph.inputs]
    inputs = [value.name or "" for value in whole.graph.inputs]
    part = cut_out(stem, inputs, list(dict.fromkeys(n for n in reads if n not in inputs)) or [cut])
    both = AttachTails({"t": side}, {"t": reads})(part).model
    feeds = feeds_for(whole)
    (got,), (wanted,) = execute(both, feeds).values(), execute(whole, feeds).values()
    assert relative_error(wanted, got) < 1e-5


def _forget_private(whole: oir.Model, spaces: dict[str, Space], shared: dict[str, int]) -> None:
    """Set to zero what shared channels read of private ones."""
    for layer in find_layers(whole):
        reading = read_axis(layer.node)
        array = np.array(get_array(layer.weight))
        forgotten = np.ones(array.shape, bool)
        kinds = set()
        for name, space in spaces.items():
            for slots in space.weights:
                if slots.name == layer.weight.name and layer.groups == 1:
                    (axis,) = slots.axes
                    chosen = np.zeros(array.shape[axis], bool)
                    own = slots.index[shared[name] :] if axis == reading else slots.index[: shared[name]]
                    chosen[own.ravel()] = True
                    forgotten &= chosen.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
                    kinds.add(axis == reading)
        if len(kinds) == 2:
            array[forgotten] = 0
            set_array(layer.weight, array)


def test_one_network_behind_another() -> None:
    first, cut = stem_of(chain)
    second = folded(chain)(0)
    rest = cut_out(second, [cut], [v.name or "" for v in second.graph.outputs])
    feeds = feeds_for(first)
    (got,), (wanted,) = execute(put_behind(first, rest, "p/"), feeds).values(), execute(second, feeds).values()
    assert relative_error(wanted, got) < 1e-6


# --- what is shared ---------------------------------------------------------------------------------------------------


def sight(rows: np.ndarray, bend: Bend | None) -> Sight:
    return Sight(rows.astype(np.float32), np.eye(rows.shape[1], dtype=np.float32), bend)


def missed(subspace: object, seen: Sight) -> float:
    """The share of the variance that is not predicted."""
    back = decoder(subspace, [seen])  # type: ignore[arg-type]
    mix, shift = subspace.mix, subspace.shift  # type: ignore[attr-defined]
    made = seen.rows @ mix.T + shift
    made = made if seen.bend is None else seen.bend(made)
    wanted = seen.read()
    left = (wanted - wanted.mean(0)) - (made - made.mean(0)) @ back.T
    return float((left**2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())


@pytest.mark.parametrize("bend", [None, Bend(), Bend(0, 6), Bend(leak=0.1)])
def test_copies_are_shared_without_loss(bend: Bend | None) -> None:
    generator = np.random.default_rng(0)
    own = generator.standard_normal((2000, 8))
    rows = np.concatenate([own, own[:, generator.permutation(8)]], axis=1)
    found = choose_subspace([sight(rows, bend)], 8, seed=0)
    assert missed(found, sight(rows, bend)) < 1e-4


def test_without_a_nonlinearity_it_is_the_leading_subspace() -> None:
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((3000, 10)) @ generator.standard_normal((10, 10))
    found = choose_subspace([sight(rows, None)], 4, seed=0)
    values = np.linalg.eigvalsh(np.cov(rows.T))
    assert missed(found, sight(rows, None)) == pytest.approx(values[:6].sum() / values.sum(), rel=0.02)


def test_before_a_relu_mixing_loses_less_than_choosing() -> None:
    generator = np.random.default_rng(2)
    rows = generator.standard_normal((4000, 6)) @ generator.standard_normal((6, 12))
    seen = sight(rows, Bend())
    assert missed(choose_subspace([seen], 6, seed=0), seen) < 0.9 * missed(choose_channels([seen], 6), seen)


def test_what_nobody_reads_is_not_shared() -> None:
    rows = np.random.default_rng(3).standard_normal((1000, 6)).astype(np.float32)
    root = np.diag([1, 0, 1, 0, 1, 0]).astype(np.float32)
    found = choose_channels([Sight(rows, root, Bend())], 3)
    assert np.flatnonzero(found.mix.sum(0)).tolist() == [0, 2, 4]


def test_private_channels_are_those_that_the_shared_ones_leave_open() -> None:
    rows = np.random.default_rng(4).standard_normal((1000, 4)).astype(np.float32)
    first_two = Sight(rows, np.diag([1, 1, 0, 0]).astype(np.float32), Bend())
    found = choose_private(choose_channels([first_two], 2), [sight(rows, Bend())], slice(0, 4), 2)
    assert np.flatnonzero(found.mix[:2].sum(0)).tolist() == [0, 1]
    assert np.flatnonzero(found.mix[2:].sum(0)).tolist() == [2, 3]


# --- zip --------------------------------------------------------------------------------------------------------------

DEMO = Path(onnxmerge.__file__).parent / "demo"
MODELS = [DEMO / "digits.onnx", DEMO / "fashion.onnx"]
DATA = {"digits": DEMO / "digits.yaml", "fashion": DEMO / "fashion.yaml"}


def zipped(folder: Path, **changes: object) -> Result:
    quick = {"steps": 0, "samples": 400, "measure": False, "start": (Start.SUBSPACE,), "max_drop": None}
    settings = onnxmerge.ZipSettings(**(quick | changes))  # type: ignore[arg-type]
    return onnxmerge.zip_models(MODELS, DATA, folder, settings=settings, overwrite=True)


def test_a_permuted_copy_is_shared_for_free(tmp_path: Path) -> None:
    model = load(MODELS[0])
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    random = np.random.default_rng(3)
    Permute({name: random.permutation(space.size) for name, space in spaces.items()}, spaces)(model)
    save(model, tmp_path / "twin.onnx")
    settings = onnxmerge.ZipSettings(share="1.0", steps=0, samples=400, measure=False, start=(Start.SUBSPACE,))
    result = onnxmerge.zip_models(
        [MODELS[0], tmp_path / "twin.onnx"], DATA["digits"], tmp_path / "out", settings=settings
    )
    for score in result.candidates[0].tasks.values():
        assert score.agreement is not None and score.agreement > 0.995


@pytest.mark.parametrize("sharing", [0.5, 0.75])
def test_a_candidate_is_as_large_as_its_plan_says(tmp_path: Path, sharing: float) -> None:
    result = zipped(tmp_path / "out", share="3", sharing=(sharing,), width=(1.0, 1.25))
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    for candidate, planned in zip(result.candidates, plan["candidates"], strict=True):
        assert candidate.path is not None
        size = size_of([oir.load(candidate.path)])
        assert planned["name"] == candidate.name and planned["predicted"]["macs"] == candidate.macs
        assert planned["predicted"]["parameters"] == size.parameters == candidate.parameters
        assert min(score.agreement or 0 for score in candidate.tasks.values()) > 0.6


def test_a_candidate_is_the_same_alone_and_in_the_sequence(tmp_path: Path) -> None:
    """So a run that is resumed ends as one that was not stopped."""
    sequence, alone = zipped(tmp_path / "all", share="auto"), zipped(tmp_path / "one", share="3")
    first, second = load(sequence.candidates[3].path or ""), load(alone.candidates[0].path or "")
    for name, value in first.graph.initializers.items():
        np.testing.assert_array_equal(get_array(value), get_array(second.graph.initializers[name]))


def test_private_channels_help_the_closed_form_of_a_narrow_stem(tmp_path: Path) -> None:
    """A stem with half of the channels, alone and with the other half for each task."""
    alone, beside = (
        zipped(tmp_path / name, share="3", **more).candidates[0]
        for name, more in (("a", {"width": (0.5,)}), ("b", {"sharing": (0.5,)}))
    )
    worst = [min(score.agreement or 0 for score in candidate.tasks.values()) for candidate in (alone, beside)]
    assert worst[1] > worst[0]


def test_a_plan_that_names_what_is_not_there(tmp_path: Path) -> None:
    zipped(tmp_path / "out", share="1")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    space, size = next(iter(plan["spaces"].items()))
    for more, said in (
        ({"units": 99}, "shares 99 units, but there are"),
        ({"channels": {"nowhere": 3}}, "'nowhere'"),
        ({"channels": {space: 2 * size + 1}}, f"from 1 to {2 * size}"),
        ({"private": {space: size + 1}}, f"{size + 1} private channels .* from 1 to {size} fit"),
        ({"name": "a/b"}, "cannot name"),
    ):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan | {"candidates": [{"name": "mine", "units": 1} | more]}))
        with pytest.raises(UsageError, match=said):
            onnxmerge.zip_models(
                MODELS, DATA, tmp_path / "new", settings=onnxmerge.ZipSettings(share=str(path), measure=False)
            )
        assert not (tmp_path / "new").exists()


def test_channels_that_a_norm_reads_together_keep_their_number(tmp_path: Path) -> None:
    for seed in (0, 1):
        net = Net(seed)
        x = net.norm(net.matmul(net.input(("N", 7, 5)), 6), "LayerNormalization")
        net.output(net.matmul(net.op("Tanh", net.matmul(net.op("Tanh", x), 8)), 4))
        onnx.save(net.proto(), tmp_path / f"{seed}.onnx")
    samples = np.random.default_rng(0).standard_normal((400, 7, 5)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=samples)
    models, settings = [tmp_path / "0.onnx", tmp_path / "1.onnx"], {"steps": 0, "measure": False, "max_drop": None}
    result = onnxmerge.zip_models(
        models,
        tmp_path / "x.npz",
        tmp_path / "out",
        settings=onnxmerge.ZipSettings(share="1.0", sharing=(0.5,), **settings),  # type: ignore[arg-type]
    )
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    (planned,) = plan["candidates"]
    (normed,) = set(plan["spaces"]) - set(planned["channels"])
    assert plan["spaces"][normed] == 6 and list(planned["channels"].values()) == [4]
    assert planned["predicted"]["parameters"] == result.candidates[0].parameters
    planned["channels"] = {normed: 3}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=r"all channels of .* are shared"):
        onnxmerge.zip_models(
            models,
            tmp_path / "x.npz",
            tmp_path / "new",
            settings=onnxmerge.ZipSettings(share=str(tmp_path / "plan.json"), **settings),  # type: ignore[arg-type]
        )


def candidate(name: str, share: int, drop: float, size: int, macs: int) -> Candidate:
    score = TaskScore(accuracy=0.9 - drop, original_accuracy=0.9, agreement=None, relative_error=None)
    return Candidate(
        name=name, share=share, path=None, parameters=1, bytes=size, macs=macs, tasks={"a": score}, steps=0, seconds=0
    )


CANDIDATES = [candidate("k0", 0, 0.0, 100, 100), candidate("k1", 1, 0.01, 80, 70), candidate("k2", 2, 0.05, 60, 50)]


@pytest.mark.parametrize(
    ("bounds", "chosen"),
    [
        (Bounds(0.02, None, None, 100), "k1"),
        (Bounds(None, 85, None, 100), "k1"),
        (Bounds(None, None, 1.3, 100), "k1"),
        (Bounds(None, None, 1.9, 100), "k2"),
        (Bounds(None, None, None, 100), "k2"),
        (Bounds(0.02, None, 1.9, 100), None),
    ],
)
def test_what_is_chosen_within_bounds(bounds: Bounds, chosen: str | None) -> None:
    found = bounds.choose(CANDIDATES)
    assert (found and found.name) == chosen
    if chosen is None:
        assert bounds.closest(CANDIDATES) == (
            "No candidate keeps the bounds; k2 came closest: its worst task loses 0.0500 (--max-drop 0.02)."
        )
