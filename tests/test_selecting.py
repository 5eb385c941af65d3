"""Channels selected from several networks: the law, what each channel is taken from, and the ensemble."""

from dataclasses import replace

import numpy as np
import pytest
from fusing import ANY_WIDTH, NETS, permuted_copy, spaces_of, split_in_halves
from graphs import dense, execute, relative_error

from onnxmerge.ir.save import save
from onnxmerge.methods.align import align_layers
from onnxmerge.methods.ensemble import Ensemble
from onnxmerge.methods.fuse.choices import Targets
from onnxmerge.methods.fuse.counterparts import FuseOptions, find_counterpart, mapped_spaces, reference_itself
from onnxmerge.methods.fuse.fusing import fuse_networks, kept_network, refit_heads
from onnxmerge.methods.fuse.selecting import select
from onnxmerge.methods.progress import Silent
from onnxmerge.methods.task import Task, load_networks, with_data
from onnxmerge.passes.take_channels import TakeChannels

OPTIONS = FuseOptions(samples=400, threads=1, targets=Targets.SELECTED)


def loaded(folder, models: dict[str, object], shape: tuple[int, ...], labels: int | None = None) -> list[Task]:
    """The models as networks of one task with 400 normal samples."""
    for name, model in models.items():
        save(model, folder / f"{name}.onnx")
    generator = np.random.default_rng(0)
    arrays = {"x": generator.standard_normal((400, *shape)).astype(np.float32)}
    arrays["test_x"] = generator.standard_normal((200, *shape)).astype(np.float32)
    if labels is not None:
        arrays |= {"labels": generator.integers(labels, size=400), "test_labels": generator.integers(labels, size=200)}
    np.savez(folder / "data.npz", **arrays)
    networks = load_networks([folder / f"{name}.onnx" for name in models])
    return with_data(networks, {network.name: folder / "data.npz" for network in networks}, seed=0)


def selected(reference: Task, others: list[Task], weights: list[float]):
    spaces = mapped_spaces(reference.model)
    members = [reference_itself(reference, spaces)]
    for task in others:
        members.append(find_counterpart(reference, task, align_layers(reference, task).pairs, spaces, OPTIONS))
    return spaces, select(members, spaces, weights, OPTIONS)


def assert_same_outputs(first, second, shape: tuple[int, ...], tolerance: float) -> None:
    x = {"x": np.random.default_rng(5).standard_normal((64, *shape)).astype(np.float32)}
    for a, b in zip(execute(first, x).values(), execute(second, x).values(), strict=True):
        assert relative_error(a, b) < tolerance


def put_together(reference: Task, members, spaces, weights):
    model = reference.model.clone()
    partners = [replace(m.partner, weight=w) for m, w in zip(members, weights, strict=True) if w]
    TakeChannels(partners, spaces)(model)
    return model


@pytest.mark.parametrize("name", NETS)
def test_a_network_put_together_with_a_permuted_copy_is_itself(name, tmp_path):
    build, shape = NETS[name]
    model = build(seed=1)
    tasks = loaded(tmp_path, {"a": model, "b": permuted_copy(model)[0]}, shape)
    spaces, members = selected(tasks[0], tasks[1:], [1.0, 1.0])
    assert_same_outputs(tasks[0].model, put_together(tasks[0], members, spaces, [1.0, 1.0]), shape, tolerance=1e-3)


@pytest.mark.parametrize("name", [name for name in ANY_WIDTH if name != "groups"])
def test_a_network_among_its_own_halves_is_itself(name, tmp_path):
    build, shape = ANY_WIDTH[name]
    model = build(seed=1)
    tasks = loaded(tmp_path, {"a": model, "b": split_in_halves(model)}, shape)
    spaces, members = selected(tasks[0], tasks[1:], [1.0, 1.0])
    assert_same_outputs(tasks[0].model, put_together(tasks[0], members, spaces, [1.0, 1.0]), shape, tolerance=1e-3)


def test_every_channel_belongs_to_one_network(tmp_path):
    tasks = loaded(tmp_path, {name: dense(seed=seed).model() for seed, name in enumerate("abc")}, (6,))
    spaces, members = selected(tasks[0], tasks[1:], [1.0, 1.0, 1.0])
    for space in spaces:
        taken = [member.partner.maps[space.name].forward for member in members]
        np.testing.assert_array_equal(np.concatenate(taken, axis=1).sum(axis=1), 1)
        assert all(rows.sum(axis=0).max(initial=0) <= 1 for rows in taken)  # and none is taken twice
    assert all(any(member.partner.maps[s.name].forward.any() for s in spaces) for member in members)


def test_a_network_without_weight_is_not_heard(tmp_path):
    tasks = loaded(tmp_path, {name: dense(seed=seed).model() for seed, name in enumerate("ab")}, (6,))
    spaces, members = selected(tasks[0], tasks[1:], [1.0, 0.0])
    assert_same_outputs(tasks[0].model, put_together(tasks[0], members, spaces, [1.0, 0.0]), (6,), tolerance=1e-5)
    spaces, members = selected(tasks[0], tasks[1:], [0.0, 1.0])
    assert_same_outputs(tasks[1].model, put_together(tasks[0], members, spaces, [0.0, 1.0]), (6,), tolerance=1e-3)


def test_room_for_both_networks_gives_their_mean(tmp_path):
    """A wide network that computes what the first small one does, and a second: their mean fits in."""
    small = [dense(seed=seed, sizes=(6, 8, 8, 4)).model() for seed in (1, 2)]
    tasks = loaded(tmp_path, {"big": dense(seed=0, sizes=(6, 16, 16, 4)).model(), "a": small[0], "b": small[1]}, (6,))
    big, first, second = tasks
    wide = kept_network(big, first, align_layers(big, first).pairs)
    assert_same_outputs(first.model, wide, (6,), tolerance=1e-5)
    reference = replace(big, model=wide)
    fused = fuse_networks(reference, [second], [align_layers(reference, second).pairs], [1.0, 1.0], OPTIONS, Silent())
    with np.load(tmp_path / "data.npz") as data:
        x = {"x": data["x"]}
    a, b, mean = (next(iter(execute(model, x).values())) for model in (first.model, second.model, fused))
    scales = [float(values.var(0).mean()) for values in (a, b)]  # least squares weighs each by its variance
    wanted = (a / scales[0] + b / scales[1]) / (1 / scales[0] + 1 / scales[1])
    assert relative_error(wanted, mean) < 0.05
    assert relative_error(wanted, a) > 0.3


def test_a_deeper_network_is_selected_from(tmp_path):
    deep, shallow = dense(seed=1, sizes=(6, 12, 10, 8, 4)).model(), dense(seed=2, sizes=(6, 12, 8, 4)).model()
    tasks = loaded(tmp_path, {"shallow": shallow, "deep": deep}, (6,))
    spaces, members = selected(tasks[0], tasks[1:], [1.0, 1.0])
    assert members[1].partner is None
    first = members[0].partner.maps
    assert any(not first[space.name].forward.all(axis=1).any() for space in spaces)
    owned = [members[1].maps[name].any(axis=1) for name in members[1].maps if name in members[0].maps]
    mine = [members[0].maps[name].any(axis=1) for name in members[1].maps if name in members[0].maps]
    assert owned and all((a ^ b).all() for a, b in zip(owned, mine, strict=True))
    assert any(own.any() for own in owned)


def test_heads_are_fitted_and_nothing_else(tmp_path):
    tasks = loaded(tmp_path, {name: dense(seed=seed).model() for seed, name in enumerate("ab")}, (6,))
    model = tasks[0].model.clone()
    spaces = mapped_spaces(model)
    other = find_counterpart(tasks[0], tasks[1], align_layers(*tasks).pairs, spaces, OPTIONS)
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    refit_heads(model, tasks[0], [other], [1.0, 1.0], OPTIONS, Silent())
    hidden = {slots.name for space in spaces_of(model) for slots in space.weights if 0 in slots.axes}
    changed = {
        name
        for name, value in model.graph.initializers.items()
        if not np.array_equal(before[name], value.const_value.numpy())
    }
    assert len(changed) == 2  # the last weight and its bias
    last = [name for name in changed if before[name].ndim == 2]
    assert last and before[last[0]].shape[0] == 4 and not changed & (hidden - set(last))


# --- the ensemble -----------------------------------------------------------------------------------------------------


def test_the_ensemble_is_the_mean_of_logits_in_one_scale(tmp_path):
    tasks = loaded(tmp_path, {name: dense(seed=seed).model() for seed, name in enumerate("abc")}, (6,), labels=4)
    weights = [1.0, 2.0, 0.5]
    found = Ensemble(tasks, weights, tmp_path / "kept", 1).score(tasks[0].model)
    with np.load(tmp_path / "data.npz") as data:
        x, labels = data["test_x"], data["test_labels"]
    logits = [next(iter(execute(task.model, {"x": x}).values())).astype(np.float64) for task in tasks]
    scaled = [z / np.sqrt(((z - z.mean(1, keepdims=True)) ** 2).mean()) for z in logits]
    mean = sum(weight * z for weight, z in zip(weights, scaled, strict=True))
    assert found.agreement == pytest.approx((logits[0].argmax(1) == mean.argmax(1)).mean())
    assert found.original_accuracy == pytest.approx((mean.argmax(1) == labels).mean())
    assert found.accuracy == pytest.approx((logits[0].argmax(1) == labels).mean())
    assert found.relative_error is None


def test_other_outputs_are_averaged_as_they_are(tmp_path):
    build, shape = NETS["products"]  # outputs [N, 5, 4]: no classes
    tasks = loaded(tmp_path, {name: build(seed=seed) for seed, name in enumerate("ab")}, shape)
    ensemble = Ensemble(tasks, [1.0, 3.0], tmp_path / "kept", 1)
    with np.load(tmp_path / "data.npz") as data:
        x = data["test_x"]
    a, b = (next(iter(execute(task.model, {"x": x}).values())) for task in tasks)
    mean = 0.25 * a + 0.75 * b
    score = ensemble.score(tasks[0].model)
    assert score.agreement is None
    assert score.relative_error == pytest.approx(float(np.linalg.norm(a - mean) / np.linalg.norm(mean)), rel=1e-4)
    assert ensemble.score(tasks[1].model).closeness > score.closeness


def test_every_networks_samples_count(tmp_path):
    """Two sources of data: the ensemble looks at the held-out samples of both."""
    tasks = loaded(tmp_path, {name: dense(seed=seed).model() for seed, name in enumerate("ab")}, (6,))
    generator = np.random.default_rng(7)
    far = 100 * generator.standard_normal((300, 6)).astype(np.float32)
    np.savez(tmp_path / "far.npz", x=far[:200], test_x=far[200:])
    both = with_data(tasks, {"a": tmp_path / "data.npz", "b": tmp_path / "far.npz"}, seed=0)
    one = Ensemble(tasks, [1.0, 1.0], tmp_path / "one", 1).score(tasks[0].model)
    two = Ensemble(both, [1.0, 1.0], tmp_path / "two", 1).score(tasks[0].model)
    assert one.agreement != two.agreement
