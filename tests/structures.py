"""Small graphs under the permutation law: what each should give, and rules that are broken on purpose."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as oir
import pytest
from graphs import Net
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxmerge.ir.coverage import permutable_share
from onnxmerge.ir.labels import Trace, carries, dims
from onnxmerge.ir.rules import RULES, Rule
from onnxmerge.ir.rules.registry import required
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods import check
from onnxmerge.methods.check import TOLERANCE, Check, check_spaces

Build = Callable[[], Net]
IMAGE = ("N", 3, 10, 10)
PAIR = (2, 3, 10, 10)
TOKENS = ("N", 7, 6)


class Structures:
    """Graphs by name, each with the sizes of its permutable spaces, of its spaces of blocks, and what freezes."""

    def __init__(self) -> None:
        self._graphs: dict[str, tuple[Build, list[int], list[int], list[str]]] = {}

    def __call__(self, *sizes: int, blocks: tuple[int, ...] = (), frozen: tuple[str, ...] = ()) -> Callable:
        """Register the decorated builder."""

        def register(build: Build) -> Build:
            self._graphs[build.__name__] = (build, sorted(sizes), sorted(blocks), sorted(frozen))
            return build

        return register

    def names(self) -> list[str]:
        return list(self._graphs)

    def check(self, name: str) -> None:
        """The law holds, and the analysis finds what the graph says."""
        build, sizes, blocks, frozen = self._graphs[name]
        model = build().model()
        spaces = find_spaces(model)
        result = law(model)
        assert result.passed, result
        assert sorted(space.size for space in spaces.permutable() if not space.blocks) == sizes
        assert sorted(space.size for space in spaces.permutable() if space.blocks) == blocks
        assert sorted(node.op for node in spaces.frozen) == frozen
        assert len({space.name for space in spaces.spaces}) == len(spaces.spaces)


def law(model: oir.Model) -> Check:
    return check_spaces(model, find_spaces(model), seed=0, threads=1)


# --- parts of graphs --------------------------------------------------------------------------------------------------


def several(net: Net, op_type: str, inputs: Sequence[str], channels: Sequence[int], **attributes: Any) -> list[str]:
    """A node with one output for each entry of `channels`."""
    first = net.op(op_type, *inputs, channels=channels[0], **attributes)
    outputs = [first, *(f"{first}_{number}" for number in range(1, len(channels)))]
    net.nodes[-1].output.extend(outputs[1:])
    net.channels |= dict(zip(outputs, channels, strict=True))
    return outputs


def end(net: Net, x: str, out: int = 5) -> Net:
    """A dense layer on the mean over tokens of [N, T, C]."""
    net.output(net.matmul(net.op("ReduceMean", x, net.ints(1), keepdims=0), out))
    return net


# --- rules that are wrong ---------------------------------------------------------------------------------------------


def says_nothing(node: oir.Node, trace: Trace) -> None:
    """Lets all channels go, as if the result were the same in any order."""


def passes_label(node: oir.Node, trace: Trace) -> None:
    """Forgets all but the channels of the first input."""
    trace.set_label(node.outputs[0], trace.label(required(node, 0)))


def repeats_each(node: oir.Node, trace: Trace) -> None:
    """Lays the repetitions of a channel of axis 1 beside it, not all channels beside themselves."""
    label = trace.label(required(node, 0))
    count = int(dims(node.outputs[0])[1] or 0) // label.size
    trace.set_label(node.outputs[0], np.repeat(label, count, axis=1))


def two_swapped(original: Rule) -> Rule:
    """The rule `original` that then mixes up the first two channels of each output."""

    def rule_with_two_swapped(node: oir.Node, trace: Trace) -> None:
        original(node, trace)
        for output in node.outputs:
            label = trace.label(output)
            if carries(label):
                first, second = list(dict.fromkeys(label.ravel().tolist()))[:2]
                swapped = np.where(label == second, first, label)
                trace.set_label(output, np.where(label == first, second, swapped))

    return rule_with_two_swapped


def without(original: Rule, forgotten: str) -> Rule:
    """The rule `original` that forgets one thing it should say of the trace."""

    def rule(node: oir.Node, trace: Trace) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trace, forgotten, lambda *_: None)
            original(node, trace)

    rule.__name__ = f"without_{forgotten}"
    return rule


def without_moves(original: Rule) -> Rule:
    """The rule `original` that takes slots to stay where they are."""

    def rule_without_moves(node: oir.Node, trace: Trace) -> None:
        before = len(trace.moves)
        original(node, trace)
        del trace.moves[before:]

    return rule_without_moves


def without_rows(original: Rule) -> Rule:
    """The rule `original` that takes the slots of all rows to belong to the channels of one group or direction."""
    use = Trace.use

    def rule_without_rows(node: oir.Node, trace: Trace) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trace, "use", lambda self, constant, axes, atoms, _=None: use(self, constant, axes, atoms))
            original(node, trace)

    return rule_without_rows


def each_wrong_rule(*wrong: tuple[Build, str, Rule]) -> pytest.MarkDecorator:
    """Run a test with each `build`, `op_type` and `wrong` rule of that operator."""
    names = [f"{build.__name__}-{op_type}-{rule.__name__}" for build, op_type, rule in wrong]
    return pytest.mark.parametrize(("build", "op_type", "wrong"), wrong, ids=names)


def assert_law_catches(build: Build, op_type: str, wrong: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law holds for the graph, and fails once `wrong` is the rule of `op_type`."""
    model = build().model()
    assert law(model).passed
    monkeypatch.setitem(RULES, op_type, wrong)
    result = law(model)
    assert not result.passed
    assert result.max_relative_error > 100 * TOLERANCE
    assert result.worst_space in {space.name for space in find_spaces(model).permutable()}


def hold_over(nets: st.SearchStrategy[Net], examples: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, bool]]:
    """Hold the law over random graphs, each space alone too.

    Returns:
        For each graph the share of its parameters in permutable spaces, and whether it has spaces of blocks.
    """
    monkeypatch.setattr(check, "ALONE_LIMIT", 0)
    seen = []

    @settings(max_examples=examples)
    @given(nets)
    def holds(net: Net) -> None:
        model = net.model()
        spaces = find_spaces(model)
        result = check_spaces(model, spaces, seed=1, threads=1)
        assert result.passed, result
        seen.append((permutable_share(model, spaces), any(space.blocks for space in spaces.permutable())))

    holds()
    assert len(seen) >= 0.6 * examples
    return seen
