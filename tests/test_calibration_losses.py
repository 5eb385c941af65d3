"""What calibration minimises: by hand in numpy, with onnxruntime for what networks and originals compute."""

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from calibrating import Memory, merge, network, noise, run_onnx, train
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.calibration import losses
from onnxmerge.calibration.distillation import calibrate
from onnxmerge.calibration.engine import Outcome
from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import FeatureTap
from onnxmerge.calibration.settings import Settings
from onnxmerge.data import Split
from onnxmerge.errors import UsageError
from onnxmerge.ir.weights import get_array

LABELS_ONLY = {"kl_weight": 0.0, "logit_weight": 0.0, "label_weight": 1.0, "feature_weight": 0.0}


def test_losses_by_hand() -> None:
    z, z_t = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0 * math.log(3.0), 0.0]])
    # Softened by T = 2 the teacher says 3/4 to 1/4 and the student 1/2 to 1/2.
    assert losses.kl(z, z_t, 2.0).item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert losses.kl(z_t, z_t, 2.0).item() == pytest.approx(0.0, abs=1e-7)
    f, f_t = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([2.0, -2.0, 2.0])
    assert losses.logit_error(f, f_t, variance=2.0).item() == pytest.approx(0.5)
    assert losses.feature_l1(f, f_t, f_t.abs().mean()).item() == pytest.approx(0.5)
    assert losses.feature_l2(f, f_t, f_t.square().mean()).item() == pytest.approx(0.25)
    assert losses.cross_entropy(z, torch.tensor([1])).item() == pytest.approx(math.log(2.0))


# ---- networks of one task: several teachers of the same outputs -----------------------------------------------------


def distil(
    student: onnx_ir.Model,
    teachers: Sequence[onnx_ir.Model],
    samples: Sequence[Memory],
    held_out: Memory | None = None,
    tapped: Sequence[str] = (),
    **given: Any,
) -> Outcome:
    """Calibrate `student` towards teachers with its outputs, each on samples of its own or all on one.

    Values called `tapped` are compared with those of the same name in each teacher.
    """
    names = [f"teacher{number}" for number in range(len(teachers))]
    splits = [Split(s) for s in samples] * (len(teachers) // len(samples))
    held = Split(samples[0] if held_out is None else held_out)
    return calibrate(
        student,
        dict(zip(names, teachers, strict=True)),
        {name: {"y": "y"} for name in names},
        {name: {"x": "x"} for name in names},
        [FeatureTap(name, value, value) for name in names for value in tapped],
        dict(zip(names, splits, strict=True)),
        dict.fromkeys(names, held),
        Settings(**{"steps": 0, "threads": 1, "evaluations": 1, "precision": "float32"} | given),
    )


def assert_weights_are_close(found: onnx_ir.Model, wanted: onnx_ir.Model) -> None:
    for name, value in wanted.graph.initializers.items():
        np.testing.assert_allclose(get_array(found.graph.initializers[name]), get_array(value), atol=1e-6)


def outputs(model: onnx_ir.Model, x: np.ndarray) -> np.ndarray:
    (array,) = run_onnx(onnx_ir.to_proto(model), {"x": x})
    return array.astype(np.float64)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@settings(max_examples=15)
@given(
    kl=st.sampled_from([0.0, 0.05, 1.0]),
    logit=st.sampled_from([0.0, 2.0]),
    label=st.sampled_from([0.95, 0.0]),
    temperature=st.sampled_from([1.0, 4.0, 20.0]),
    count=st.integers(1, 3),
)
def test_the_loss_is_the_mean_over_teachers_and_counts_labels_once(
    kl: float, logit: float, label: float, temperature: float, count: int
) -> None:
    if not (kl or logit or label):
        return
    student, teachers, samples = network(3), [network(10 * n) for n in range(1, count + 1)], Memory(70, 9)
    assert samples.labels is not None
    z, targets = outputs(student, samples.x), [outputs(teacher, samples.x) for teacher in teachers]
    wanted = -label * log_softmax(z)[np.arange(70), samples.labels].mean()
    for z_t in targets:
        soft, soft_t = log_softmax(z / temperature), log_softmax(z_t / temperature)
        divergence = temperature**2 * (np.exp(soft_t) * (soft_t - soft)).sum(1).mean()
        wanted += (kl * divergence + logit * ((z - z_t) ** 2).mean() / z_t.var()) / count
    chosen = {"kl_weight": kl, "logit_weight": logit, "label_weight": label, "temperature": temperature}
    assert distil(student, teachers, [samples], **chosen).losses == [(0, pytest.approx(wanted, rel=1e-4))]


def test_training_minimises_the_loss_that_judges() -> None:
    """Two teachers count half each while training too: two copies of a teacher do to the weights what one does."""
    one, two, apart = network(3), network(3), network(3)
    chosen = {"tapped": ["r"], "steps": 6, "kl_weight": 0.3, "label_weight": 0.7, "optimiser": "sgd"}
    outcome = distil(one, [network(10)], [Memory(64, 1)], **chosen)
    distil(two, [network(10)] * 2, [Memory(64, 1)], **chosen)
    distil(apart, [network(10)] * 2, [Memory(64, 1), Memory(64, 1)], **chosen)
    assert outcome.best_step == 6
    assert_weights_are_close(two, one)
    assert_weights_are_close(apart, one)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    ("chosen", "by_teacher"),
    [
        ({}, 1),
        ({"kl_weight": 0.5, "logit_weight": 0.0, "label_weight": 0.5}, 1),
        (LABELS_ONLY, 0),
    ],
    ids=["default", "distillation", "labels"],
)
def test_a_step_runs_the_student_once_and_each_teacher_once_if_it_is_needed(
    count: int, chosen: dict[str, Any], by_teacher: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = GraphModule.forward, []

    def counted(module: GraphModule, *arguments: Any) -> Any:
        calls.append(module)
        return forward(module, *arguments)

    monkeypatch.setattr(GraphModule, "forward", counted)
    numbers = []
    for steps in (3, 4):  # the start and the end are judged: the difference is one step
        calls.clear()
        distil(network(3), [network(10)] * count, [Memory(64, 1)], steps=steps, **chosen)
        numbers.append(len(calls))
    assert numbers[1] - numbers[0] == 1 + count * by_teacher
    assert len(set(calls)) == 1 + count * by_teacher


# ---- labels ---------------------------------------------------------------------------------------------------------


def taught(count: int, seed: int) -> Memory:
    """Samples with labels that can be learnt."""
    samples = Memory(count, seed)
    samples.labels = outputs(network(10), samples.x).argmax(1)
    return samples


def test_labels_alone_train_a_network() -> None:
    """Whatever the teacher computes is not asked for, be it an operator without gradients."""
    student, teacher, held_out = network(3), network(20), taught(200, 9)
    hardmax = onnx_ir.node("Hardmax", [teacher.graph.outputs[0]])
    teacher.graph.append(hardmax)
    hardmax.outputs[0].name, teacher.graph.outputs[0].name = "y", "logits"
    teacher.graph.outputs[0] = hardmax.outputs[0]

    def accuracy() -> float:
        return float((outputs(student, held_out.x).argmax(1) == held_out.labels).mean())

    before = accuracy()
    distil(student, [teacher], [taught(1000, 1)], held_out, steps=300, rate=0.03, evaluations=5, **LABELS_ONLY)
    assert accuracy() > before + 0.25


def test_cross_entropy_sees_what_goes_into_a_softmax() -> None:
    """Whether the teacher ends in one or not."""
    plain = train(merge(), steps=0, **LABELS_ONLY)[0]
    soft = train(merge(softmax=True), steps=0, **LABELS_ONLY)[0]
    assert soft.losses[0][1] == pytest.approx(plain.losses[0][1], rel=1e-6)


def unlabelled(count: int) -> Memory:
    samples = Memory(count, 1)
    samples.labels = None
    return samples


def test_labels_are_needed_only_with_a_weight() -> None:
    distil(network(3), [network(10)], [unlabelled(64)], steps=1)
    with pytest.raises(UsageError, match=r"'teacher0' has no labels"):
        distil(network(3), [network(10)], [unlabelled(64)], Memory(64, 2), steps=1, label_weight=0.1)


def test_a_label_that_is_no_class() -> None:
    samples = Memory(64, 1)
    assert samples.labels is not None
    samples.labels[7] = 3
    with pytest.raises(UsageError, match=r"'teacher0' have the label 3.* 0 to 2"):
        distil(network(3), [network(10)], [samples], label_weight=0.1)


# ---- what is no classifier ------------------------------------------------------------------------------------------


def picture(seed: int) -> onnx_ir.Model:
    """One convolution that makes an image of an image."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "picture",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2, 4, 4])],
        [numpy_helper.from_array(noise(2, 1, 3, 3, seed=seed), "w")],
    )
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def test_the_divergence_is_left_out_of_what_is_no_classifier() -> None:
    runs = [distil(picture(1), [picture(2)], [Memory(64, 1)], kl_weight=weight) for weight in (0.0, 5.0)]
    assert runs[0].losses == runs[1].losses and runs[0].losses[0][1] > 0


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"logit_weight": 0.0}, r"'teacher0' is no classifier \(output \[64, 2, 4, 4\]\).*KL.*logit error"),
        ({"label_weight": 1.0}, r"'teacher0' is no classifier .*without labels"),
    ],
    ids=["divergence alone", "labels"],
)
def test_losses_that_need_a_classifier(chosen: dict[str, float], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        distil(picture(1), [picture(2)], [Memory(64, 1)], **chosen)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_sgd_has_an_absolute_rate_that_is_halved_after_each_sixth() -> None:
    student, samples = network(3), taught(256, 1)
    module, batches = GraphModule(student), Split(samples).shuffled(32, 0)
    optimiser = torch.optim.SGD(module.trainable(), momentum=0.9, weight_decay=5e-4)
    for step in range(18):
        optimiser.param_groups[0]["lr"] = 0.02 * 0.5 ** (step // 3)
        batch = next(batches)
        optimiser.zero_grad()
        z = module({"x": torch.tensor(batch.inputs["x"])})["y"]
        torch.nn.functional.cross_entropy(z, torch.tensor(batch.labels)).backward()
        optimiser.step()
    outcome = distil(student, [network(3)], [samples], steps=18, batch=32, optimiser="sgd", rate=0.02, **LABELS_ONLY)
    assert outcome.best_step == 18
    by_hand = network(3)
    module.write_back(by_hand)
    assert_weights_are_close(student, by_hand)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": -1}, {"batch": 0}, {"rate": 0.0}, {"threads": 0}, {"evaluations": 0}, {"temperature": math.inf}),
        *({"label_weight": -0.1}, {"kl_weight": math.nan}, {"logit_weight": -1.0}, {"feature_weight": math.inf}),
        *({"optimiser": "adam"}, {"feature_norm": "l3"}, {"kl_weight": 0.0, "logit_weight": 0.0}),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**{"steps": 1} | wrong)


def test_settings_do_not_load_torch() -> None:
    script = "import sys; import onnxmerge.calibration.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
