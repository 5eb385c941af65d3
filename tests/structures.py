"""Small graphs under the permutation law: what each should give, and rules that are broken on purpose."""

from collections.abc import Callable

import onnx_ir as oir
import pytest
from graphs import Net

from onnxmerge.ir.labels import Trace
from onnxmerge.ir.rules import RULES
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.methods.check import TOLERANCE, Check, check_spaces

Build = Callable[[], Net]


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


def without(original: Callable, forgotten: str) -> Callable:
    """The rule `original` that forgets one thing it should say of the trace."""

    def rule(node: oir.Node, trace: Trace) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trace, forgotten, lambda *_: None)
            original(node, trace)

    return rule


def assert_law_catches(build: Build, op_type: str, wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law holds for the graph, and fails once `wrong` is the rule of `op_type`."""
    model = build().model()
    assert law(model).passed
    monkeypatch.setitem(RULES, op_type, wrong)
    result = law(model)
    assert not result.passed
    assert result.max_relative_error > 100 * TOLERANCE
    assert result.worst_space in {space.name for space in find_spaces(model).permutable()}
