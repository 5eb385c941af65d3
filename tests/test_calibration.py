"""The trainer: it learns, keeps the best weights, and is the same each time."""

import numpy as np
import onnx_ir
import pytest
import torch
from calibrating import INPUTS, OUTPUTS, PIXELS, TASKS, TEACHERS, Memory, merge, network, noise, train, weights
from onnx import TensorProto, helper

from onnxmerge.calibration.distillation import calibrate
from onnxmerge.calibration.engine import Done
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import FeatureTap
from onnxmerge.calibration.settings import Settings
from onnxmerge.calibration.sparsity import is_sparse
from onnxmerge.data import Split
from onnxmerge.errors import ModelError


@pytest.mark.parametrize("one_split", [True, False], ids=["same data", "own data"])
def test_training_lowers_the_held_out_loss(one_split: bool) -> None:
    merged = merge()
    outcome, _ = train(merged, one_split=one_split)
    assert [step for step, _ in outcome.losses] == [0, 20, 40, 60]
    assert min(loss for _, loss in outcome.losses) < 0.5 * outcome.losses[0][1]
    assert outcome.best_step == min(outcome.losses, key=lambda pair: pair[1])[0]
    again, _ = train(merged, one_split=one_split, steps=0)
    # The model holds what was judged best.
    assert again.losses[0][1] == pytest.approx(min(loss for _, loss in outcome.losses), rel=1e-4)


def test_the_very_same_split_is_read_once_for_both_tasks() -> None:
    _, (together,) = train(merge(), steps=7)
    assert together.reads == 7
    _, apart = train(merge(), steps=7, one_split=False)
    assert [samples.reads for samples in apart] == [7, 7]


def test_the_start_is_a_candidate() -> None:
    merged = merge()
    before = weights(merged)
    outcome, _ = train(merged, rate=1e4, steps=12)
    assert outcome.best_step == 0 and weights(merged) == before


def test_no_steps_change_nothing() -> None:
    merged = merge()
    before = weights(merged)
    outcome, _ = train(merged, steps=0)
    assert outcome.best_step == 0 and len(outcome.losses) == 1 and weights(merged) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_one_seed_gives_the_same_bytes(precision: str) -> None:
    first, second, other = merge(), merge(), merge()
    how = {"precision": precision, "steps": 20}
    runs = [train(model, seed=seed, **how)[0] for model, seed in ((first, 3), (second, 3), (other, 4))]
    assert runs[0] == runs[1] and weights(first) == weights(second)
    assert weights(first) != weights(other)


def test_running_statistics_stay() -> None:
    merged = merge(batch_norm=True)
    before = weights(merged)
    outcome, _ = train(merged)
    changed = {name for name, data in weights(merged).items() if data != before[name]}
    assert outcome.best_step > 0 and changed == set(before) - {"mean", "variance"}


def test_interruption_keeps_the_best_so_far() -> None:
    def interrupt(done: Done) -> None:
        if done.step == 33:
            raise KeyboardInterrupt

    merged = merge()
    before = weights(merged)
    outcome, _ = train(merged, progress=interrupt)
    assert outcome.interrupted and outcome.best_step == 20 and weights(merged) != before
    again, _ = train(merged, steps=0)
    assert again.losses[0][1] == pytest.approx(outcome.losses[1][1], rel=1e-4)


def test_taps_pull_features_towards_the_permuted_original() -> None:
    order = np.array([2, 0, 3, 1])
    tap = FeatureTap("b", "r", "r", order)
    target = GraphModule(TEACHERS["b"], ["r"])({"x": torch.tensor(PIXELS)})["r"][:, order]

    def distance(model: onnx_ir.Model) -> float:
        return float((GraphModule(model, ["r"])({"x": torch.tensor(PIXELS)})["r"] - target).detach().square().mean())

    def near_the_permuted_original() -> onnx_ir.Model:
        model = merge()
        for number, name in enumerate(("conv.weight", "conv.bias")):
            value, original = model.graph.initializers[name], TEACHERS["b"].graph.initializers[name].const_value
            assert original is not None
            array = original.numpy()[order]
            value.const_value = onnx_ir.tensor(array + noise(*array.shape, seed=number) / 10, name=name)
        return model

    with_taps, without, ignored = (near_the_permuted_original() for _ in range(3))
    train(with_taps, taps=[tap], feature_weight=100.0)
    train(without)
    train(ignored, taps=[tap], feature_weight=0.0)
    assert distance(with_taps) < 0.5 * distance(without)
    assert weights(ignored) == weights(without)


def test_a_final_softmax_is_left_out() -> None:
    plain, soft = merge(), merge(softmax=True)
    train(plain)
    train(soft, teachers={"a": network(10, softmax=True), "b": network(20, softmax=True)})
    assert weights(plain) == weights(soft)


def test_inputs_of_another_name_are_found_when_there_is_one() -> None:
    merged = merge()
    splits = {task: Split(Memory(64, 1, name="pixels")) for task in TASKS}
    outcome = calibrate(merged, TEACHERS, OUTPUTS, INPUTS, [], splits, splits, Settings(steps=5, threads=1))
    assert outcome.losses[-1][1] < outcome.losses[0][1]


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    train(merge(), steps=1, threads=before + 1)
    assert torch.get_num_threads() == before


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ModelError, match=r"task 'b'.*\[64, 3\].*\[64, 5\]"):
        train(merge(), teachers={"a": TEACHERS["a"], "b": network(20, classes=5)})


def stacked() -> onnx_ir.Model:
    """Tasks stacked on the batch axis: the shared conv is run once on both tasks' inputs, so each needs the other's."""
    model = onnx_ir.to_proto(merge())
    graph = model.graph
    del graph.input[:]
    graph.input.extend(helper.make_tensor_value_info(f"{t}/x", TensorProto.FLOAT, ["N", 1, 6, 6]) for t in TASKS)
    graph.node[0].input[0] = "both"
    graph.node.insert(0, helper.make_node("Concat", ["a/x", "b/x"], ["both"], axis=0))
    position = next(i for i, node in enumerate(graph.node) if node.op_type == "Flatten")
    graph.node.insert(position + 1, helper.make_node("Split", ["f"], ["a/f", "b/f"], axis=0, num_outputs=2))
    for node in graph.node:
        if node.op_type == "Gemm":
            node.input[0] = f"{node.name[0]}/f"
    return onnx_ir.from_proto(model)


def test_tasks_stacked_on_the_batch_axis_are_fed_together() -> None:
    merged = stacked()
    outcome, _ = train(merged, one_split=False, inputs={task: {f"{task}/x": "x"} for task in TASKS})
    assert outcome.losses[-1][1] < 0.5 * outcome.losses[0][1]


# --- sparse weights ---------------------------------------------------------------------------------------------------


def pruned(model: onnx_ir.Model, share: float, name: str) -> np.ndarray:
    """Set the smallest entries of an initializer to zero; where it is zero then."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    array[np.abs(array) <= np.quantile(np.abs(array), share)] = 0
    value.const_value = onnx_ir.tensor(array, name=name)
    return array == 0


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_pruned_connections_stay_absent(optimiser: str) -> None:
    merged = merge()
    absent = {name: pruned(merged, 0.7, name) for name in ("conv.weight", "a/w")}
    few = pruned(merged, 0.2, "b/w")
    rate = {"adamw": 1e-2, "sgd": 1e-3}[optimiser]
    outcome, _ = train(merged, optimiser=optimiser, rate=rate)
    assert outcome.best_step > 0 and min(loss for _, loss in outcome.losses) < 0.9 * outcome.losses[0][1]
    for name, zeros in absent.items():
        value = merged.graph.initializers[name].const_value
        assert value is not None and zeros.mean() > 0.5
        np.testing.assert_array_equal(value.numpy() == 0, zeros)
    value = merged.graph.initializers["b/w"].const_value
    assert value is not None and (value.numpy()[few] != 0).all()  # a few zeros are numbers like others


@pytest.mark.parametrize(
    ("weight", "sparse"),
    [
        (noise(8, 8, 3, 3) * (noise(8, 8, 3, 3, seed=1) > 0.5), True),
        (noise(4, 300) * (noise(4, 300, seed=1) > 1.8), True),
        (noise(8, 8, 3, 3) * (noise(8, 8, 3, 3, seed=1) > -1.5), False),
        (np.zeros((8, 8)), False),  # the end of a residual block that was put in
        (np.eye(8), False),
        (np.eye(8, 12), False),
        (np.eye(8)[:, :, None, None] * np.pad(np.ones((1, 1)), 1), False),  # a 3 x 3 convolution that is an identity
        (np.ones((8, 1, 1, 1)) * np.pad(np.ones((1, 1)), 1), False),  # of each channel alone
        (np.eye(8)[[0, 0, 1, 1, 2, 5]], False),  # a selection
        (np.append(np.zeros(9), [1.0, 2.0]), False),  # a bias
        (np.append(np.zeros(9), [1.0, 2.0]).reshape(1, 1, 11), False),
    ],
)
def test_which_weights_are_sparse(weight: np.ndarray, sparse: bool) -> None:
    assert is_sparse(torch.tensor(weight)) == sparse


def test_weights_say_how_much_each_task_counts():
    def start(**given):
        return train(merge(), steps=0, **given)[0].losses[0][1]

    alone = [start(weights={task: float(task == chosen) for task in TASKS}) / 2 for chosen in TASKS]
    assert start() == pytest.approx(sum(alone), rel=1e-6)
    assert start(weights={"a": 2.0, "b": 1.0}) == pytest.approx(4 / 3 * alone[0] + 2 / 3 * alone[1], rel=1e-6)


def test_a_teacher_that_counts_nothing_teaches_nothing():
    both = {"outputs": {task: {"a/y": "y"} for task in TASKS}}
    one = {"teachers": {"b": TEACHERS["b"]}, "outputs": {"b": {"a/y": "y"}}, "inputs": {"b": {"x": "x"}}}
    weighed, alone = merge(), merge()
    losses = dict(train(weighed, weights={"a": 0.0, "b": 1.0}, **both)[0].losses)
    assert losses == pytest.approx(dict(train(alone, **one)[0].losses), rel=1e-3)
    assert losses[60] < 0.6 * losses[0]
