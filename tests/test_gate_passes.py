"""Gates in the graph: where they stand, what they do, and that what they close can go; onnxruntime is the judge."""

import numpy as np
import pytest
from fusing import NETS, grouped
from gating import GATED, Wide, wide, with_gates
from graphs import Net, assert_same_outputs, execute, feeds_for, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxmerge.errors import ModelError
from onnxmerge.ir.layers import parameter_count
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.check import check_spaces
from onnxmerge.passes import gate_places
from onnxmerge.passes.fold_gates import FoldGates
from onnxmerge.passes.gate_places import find_gate_places
from onnxmerge.passes.insert_gates import InsertGates
from onnxmerge.passes.prune import Prune


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", GATED)
def test_with_all_gates_open_it_is_the_mean_of_the_networks(kind, count):
    own = wide(kind, count)
    feeds = feeds_for(own.model, batch=3)
    (got,) = with_gates(own, np.ones(own.places.count)).values()
    wanted = np.mean([next(iter(execute(network, feeds).values())) for network in own.networks], axis=0)
    assert relative_error(wanted, got) < 1e-5


@settings(max_examples=40)
@given(kind=st.sampled_from(GATED), count=st.integers(2, 3), seed=st.integers(0, 99), width=st.floats(0.1, 1.0))
def test_the_pruned_network_is_the_widened_one_with_closed_gates(kind, count, seed, width):
    own = wide(kind, count, width)
    importance = np.random.default_rng(seed).uniform(0.1, 1.0, own.places.count)
    kept = own.places.kept(importance)
    gates = np.where(own.places.closed(kept), 0, importance)
    (wanted,) = with_gates(own, gates).values()
    folded = FoldGates(own.places, gates)(own.model).model
    pruned = Prune(kept, own.places.all_spaces)(folded).model
    (whole,) = execute(own.model, feeds_for(own.model, batch=3)).values()
    for model in (folded, pruned):
        (got,) = execute(model, feeds_for(own.model, batch=3)).values()
        assert np.abs(wanted - got).max() < 1e-5 * np.abs(whole).max()  # few channels may make nothing at all


@pytest.mark.parametrize("kind", [kind for kind in GATED if kind != "transposed, in groups"])
def test_half_of_the_channels_make_a_network_of_the_architecture_of_one(kind):
    own = wide(kind)
    pruned = Prune(own.places.kept(np.arange(own.places.count)), own.places.all_spaces)(own.model).model
    assert not own.places.whole
    shapes = [
        {name: tuple(v.const_value.shape) for name, v in model.graph.initializers.items() if v.const_value.size > 4}
        for model in (pruned, own.networks[0])
    ]
    assert shapes[0] == shapes[1]
    assert parameter_count(pruned) == parameter_count(own.networks[0])


def test_all_that_read_one_residual_stream_read_through_one_vector():
    own = wide("residual")
    stream = own.places.spaces[0]
    through = [value for value in own.places.values if set(value.gate) <= set(range(*stream.gates.indices(10**6)))]
    assert len(through) == 2  # the block's first convolution, and after the sum the next block and its shortcut
    assert len(through[1].readers) == 2
    np.testing.assert_array_equal(through[0].gate, through[1].gate)


def test_gates_stand_behind_activations_and_never_before_a_norm():
    own = wide("residual")
    nodes = list(own.model.graph)
    for value in own.places.values:
        assert {nodes[number].op_type for number in value.readers} <= {"Conv", "Gemm"}
    gated = InsertGates(own.places)(own.model).model
    products = [node for node in gated.graph if node.op_type == "Mul"]
    assert len(products) == len(own.places.values)
    readers = {user.op_type for node in products for user, _ in node.outputs[0].uses()}
    assert readers == {"Conv", "Gemm"}


def test_a_skip_reads_what_is_not_gated():
    own = wide("residual")
    gated = InsertGates(own.places)(own.model).model
    for node in gated.graph:
        if node.op_type == "Add":
            assert all(value.producer().op_type != "Mul" for value in node.inputs if value.producer() is not None)


def test_of_equally_important_channels_the_first_stay():
    own = wide("dense")
    assert all((kept == np.arange(len(kept))).all() for kept in own.places.kept(np.zeros(own.places.count)).values())
    twisted = np.tile([0.0, 1.0], own.places.count)[: own.places.count]
    assert all((kept % 2 == 1).all() for kept in own.places.kept(twisted).values())


def test_at_least_one_channel_stays():
    own = wide("dense", width=0.001)
    assert [space.keep for space in own.places.spaces] == [1, 1]


def test_channels_in_groups_are_kept_whole_and_the_reason_is_told():
    own = wide("groups")
    assert not own.places.spaces
    assert set(own.places.whole.values()) == {"its channels lie in the groups of a convolution"}
    rest = wide("transposed, in groups")
    assert [space.space.size for space in rest.places.spaces] == [10]


def test_a_space_that_cannot_become_narrower_is_kept_whole_and_the_others_are_gated(monkeypatch):
    class Refusing(Prune):
        def call(self, model):
            if "c4" in self.keep:
                raise ModelError("this one not")
            return super().call(model)

    monkeypatch.setattr(gate_places, "Prune", Refusing)
    own = wide("dense")
    assert dict(own.places.whole) == {"c4": "this one not"}
    assert [space.space.name for space in own.places.spaces] == ["c0"]
    assert [value.gate.min() for value in own.places.values] == [0]


def test_what_a_product_of_channels_reads_is_kept_whole():
    """Squeeze and excitation may be gated; a product of two feature maps over their channels may not."""

    def build(seed, squeezed):
        net = Net(seed)
        x = net.relu(net.matmul(net.input(["N", 5, 6]), 8))
        y = net.relu(net.matmul(x, 8))
        if squeezed:
            z = net.op("Mul", y, net.op("Sigmoid", net.matmul(x, 8)))
        else:
            z = net.op("ReduceSum", y, net.ints(2), keepdims=1)
        net.output(net.matmul(z, 3) if squeezed else net.op("Add", net.matmul(x, 3), z))
        return net.model()

    squeezed = build(0, True)
    assert not find_gate_places(squeezed, squeezed, 1, 0.5).whole
    summed = build(0, False)
    (reason,) = find_gate_places(summed, summed, 1, 0.5).whole.values()
    assert "ReduceSum" in reason and "over channels" in reason


@pytest.mark.parametrize("kind", GATED)
def test_a_random_permutation_of_every_space_leaves_the_pruned_network_alone(kind):
    own = wide(kind)
    importance = np.random.default_rng(1).uniform(size=own.places.count)
    folded = FoldGates(own.places, importance)(own.model).model
    pruned = Prune(own.places.kept(importance), own.places.all_spaces)(folded).model
    assert check_spaces(pruned, find_spaces(pruned), seed=0, threads=1).passed


def test_folding_into_a_grouped_convolution_scales_what_each_group_reads():
    model = grouped(0).model()
    spaces = find_spaces(model)
    places = find_gate_places(model, model, 1, 1.0)  # groups are gated where they stay in place
    gates = np.random.default_rng(0).uniform(size=places.count)
    feeds = feeds_for(model, batch=2)
    assert len(spaces.spaces) == len(places.spaces)
    (wanted,) = with_gates(Wide([model], model, places), gates, batch=2).values()
    (got,) = execute(FoldGates(places, gates)(model).model, feeds).values()
    assert relative_error(wanted, got) < 1e-5


def test_folding_open_gates_changes_nothing():
    for kind in NETS:
        own = wide(kind)
        folded = FoldGates(own.places, np.ones(own.places.count))(own.model).model
        assert_same_outputs(own.model, folded, feeds_for(own.model))
