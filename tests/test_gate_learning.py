"""Learning gates: what is drawn and what is not, where gradients go, and what is kept."""

import math

import numpy as np
import pytest
import torch
from fusing import NETS
from gating import wide, with_gates
from graphs import feeds_for

from onnxmerge.calibration.gates import HardConcrete, growing_weight
from onnxmerge.calibration.gating import GatedModule, Source, fine_tune, learn_gates
from onnxmerge.calibration.settings import Checkpoint, Settings
from onnxmerge.data import Batch, Split
from onnxmerge.ir.weights import get_array

LABELS = Settings(
    steps=20, kl_weight=0, logit_weight=0, label_weight=1, feature_weight=0, norm_statistics="updating", threads=1
)
MEAN = Settings(steps=20, feature_weight=0, norm_statistics="updating", threads=1)


class Samples:
    """Random inputs; with `classes` also labels, which follow from them."""

    def __init__(self, shape, classes=0, seed=0, count=128):
        generator = np.random.default_rng(seed)
        self.x = generator.standard_normal((count, *shape)).astype(np.float32)
        rule = np.random.default_rng(99).standard_normal((self.x[0].size, classes or 1))
        self.labels = (self.x.reshape(count, -1) @ rule).argmax(1) if classes else None
        self.has_labels = bool(classes)

    def __len__(self):
        return len(self.x)

    def read(self, rows):
        return Batch({"x": self.x[rows]}, None if self.labels is None else self.labels[rows])


def source(own, kind, classes=0):
    shape = NETS[kind][1]
    return Source("task", own.model.clone(), Split(Samples(shape, classes)), Split(Samples(shape, classes, seed=1)))


# --- the distribution -------------------------------------------------------------------------------------------------


def test_gates_are_zero_one_and_between_as_often_as_the_formulas_say():
    gates = HardConcrete(4, seed=0)
    with torch.no_grad():
        gates.scaled.copy_(torch.tensor([0.0, 0.5, 1.0, 2.0]))
    torch.manual_seed(0)
    drawn = gates.draw(40_000).detach()
    assert float(drawn.min()) == 0.0 and float(drawn.max()) == 1.0
    assert ((drawn > 0) & (drawn < 1)).any()
    np.testing.assert_allclose((drawn > 0).float().mean(0), gates.probability().detach(), atol=0.01)


def test_fresh_gates_are_mostly_open_and_all_but_equal():
    gates = HardConcrete(1000, seed=0)
    assert 0.9 < float(gates.probability().detach().mean()) < 0.95
    assert 0.005 < float(gates.log_alpha.detach().std()) < 0.015
    assert torch.equal(gates.scaled, HardConcrete(1000, seed=0).scaled)
    assert not torch.equal(gates.scaled, HardConcrete(1000, seed=1).scaled)


def test_the_weight_of_the_half_loss_grows_as_published():
    weight = 0.01
    for epoch in range(150):
        weight += 0.05 * math.sqrt(weight)
        assert growing_weight(epoch / 149) == pytest.approx(weight)


# --- the gated network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "residual", "depthwise", "convolutions and a flatten"])
def test_in_evaluation_torch_and_onnxruntime_agree_and_nothing_is_drawn(kind):
    own = wide(kind)
    module = GatedModule(own.model, own.places, seed=0).eval()
    with torch.no_grad():
        module.gates.scaled.normal_(1, 0.5, generator=torch.Generator().manual_seed(3))
    feeds = feeds_for(own.model, batch=3)
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
    first, second = (next(iter(module(inputs).values())).detach().numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    alpha = module.gates.log_alpha.detach().numpy()
    gates = np.where(own.places.closed(own.places.kept(alpha)), 0, module.gates.settled().detach().numpy())
    (wanted,) = with_gates(own, gates).values()
    assert np.abs(first - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_in_training_each_sample_has_gates_of_its_own_and_a_stream_one_for_all_who_read_it():
    own = wide("residual")
    module = GatedModule(own.model, own.places, seed=0)
    x = torch.ones(1, 3, 10, 10).repeat(4, 1, 1, 1)
    products = [f"gate/{value.name}/product" for value in own.places.values]
    values = [value.name for value in own.places.values]
    torch.manual_seed(0)
    found = module({"x": x}, products + values)
    factors = []
    for product, value in zip(products, values, strict=True):
        made, read = (
            found[name].flatten(2).sum(2) if found[name].dim() > 2 else found[name] for name in (product, value)
        )
        factors.append(torch.where(read != 0, made / read, torch.nan))
    assert len({tuple(row.nan_to_num().tolist()) for row in factors[1]}) == 4
    stream, after = factors[0], factors[2]  # behind the stem, and behind the first sum
    seen = ~(stream.isnan() | after.isnan())
    assert seen.any()
    torch.testing.assert_close(stream[seen], after[seen])


# --- learning ---------------------------------------------------------------------------------------------------------


def zero_blocks(own) -> dict[str, np.ndarray]:
    """For each weight that is block-diagonal which of its entries join two networks."""
    arrays = {name: get_array(value) for name, value in own.model.graph.initializers.items()}
    return {name: array == 0 for name, array in arrays.items() if array.ndim > 1 and (array == 0).mean() > 0.4}


@pytest.mark.parametrize("settings", [LABELS, MEAN], ids=["labels", "mean"])
def test_what_joins_the_networks_is_learned(settings):
    own = wide("convolutions and a flatten")
    blocks = zero_blocks(own)
    assert len(blocks) == 2
    learn_gates(own.model, own.places, [source(own, "convolutions and a flatten", 4)], settings)
    for name, between in blocks.items():
        assert (get_array(own.model.graph.initializers[name])[between] != 0).mean() > 0.5  # some channels do not speak


def test_gates_approach_the_share_that_stays_and_the_loss_falls():
    own = wide("dense", width=0.25)
    settings = Settings(
        steps=400, kl_weight=0, logit_weight=0, label_weight=1, feature_weight=0, threads=1, evaluations=4
    )
    learned = learn_gates(own.model, own.places, [source(own, "dense", 4)], settings)
    losses = [loss for _, loss in learned.outcome.losses]
    assert min(losses) < losses[0]
    for space in own.places.spaces:
        assert learned.probability[space.gates].mean() < 0.6  # from 0.93


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    def arrays(seed):
        own = wide("residual")
        settings = Settings(**{**LABELS.__dict__, "seed": seed, "steps": 6})
        learned = learn_gates(own.model, own.places, [source(own, "residual", 5)], settings)
        return [learned.log_alpha, *(get_array(v) for v in own.model.graph.initializers.values())]

    first, second, other = arrays(0), arrays(0), arrays(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path):
    settings = Settings(**{**LABELS.__dict__, "evaluations": 4})

    def run(name, *, stop=None, resume=False):
        own = wide("residual")

        def progress(done):
            if done.step == stop:
                raise KeyboardInterrupt

        checkpoint = Checkpoint(tmp_path / name, resume=resume)
        learned = learn_gates(own.model, own.places, [source(own, "residual", 5)], settings, progress, checkpoint)
        assert learned.outcome.interrupted == (stop is not None)
        return [learned.log_alpha, *(get_array(v) for v in own.model.graph.initializers.values())]

    whole = run("whole")
    run("stopped", stop=13)
    for a, b in zip(whole, run("stopped", resume=True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fine_tuning_that_was_stopped_goes_on_to_the_same_bytes(tmp_path):
    settings = Settings(**{**LABELS.__dict__, "evaluations": 4})

    def run(name, *, stop=None, resume=False):
        own, steps = wide("residual"), []

        def progress(done):
            steps.append(done.step)
            if done.step == stop:
                raise KeyboardInterrupt

        checkpoint = Checkpoint(tmp_path / name, resume=resume)
        fine_tune(own.model, [source(own, "residual", 5)], settings, progress, checkpoint)
        return steps, [get_array(v) for v in own.model.graph.initializers.values()]

    _, whole = run("whole")
    run("stopped", stop=13)
    steps, resumed = run("stopped", resume=True)
    assert steps[0] > 1
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batch_norms_follow_what_they_see():
    own = wide("residual")
    names = [n.inputs[3].name for n in own.model.graph if n.op_type == "BatchNormalization"]
    before = {name: get_array(own.model.graph.initializers[name]).copy() for name in names}
    settings = Settings(**{**LABELS.__dict__, "steps": 60, "evaluations": 1})
    learned = learn_gates(own.model, own.places, [source(own, "residual", 5)], settings)
    assert learned.outcome.best_step == 60
    assert all((get_array(own.model.graph.initializers[name]) != before[name]).all() for name in names)


def test_a_student_with_many_zeros_learns_all_of_its_weights():
    own = wide("dense")  # block-diagonal, so that calibration would take it for pruned
    blocks = zero_blocks(own)
    outcome = fine_tune(own.model, [source(own, "dense", 4)], Settings(**{**LABELS.__dict__, "steps": 30}))
    assert outcome.best_step > 0
    for name, between in blocks.items():
        assert (get_array(own.model.graph.initializers[name])[between] != 0).any()


def test_without_labels_the_mean_of_the_networks_is_the_target():
    own = wide("dense")
    teacher = source(own, "dense")
    outcome = fine_tune(own.model.clone(), [teacher], Settings(**{**MEAN.__dict__, "steps": 1}))
    assert outcome.losses[0][1] < 1e-6  # it is its own target at the start
