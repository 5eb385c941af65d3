"""Where operators register themselves.

An operator is a function `f(attributes, *inputs) -> Tensor | tuple of Tensors`. Its inputs come in the order of the
ONNX specification (opset 13 to 20), an omitted optional one as None. What it cannot do it refuses with
NotImplementedError; the caller adds the node's name.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor


class Attributes(dict[str, Any]):
    """A node's attributes as Python values; `outputs` is the number of outputs the node has."""

    def __init__(self, values: dict[str, Any], outputs: int = 1):
        super().__init__(values)
        self.outputs = outputs


Operator = Callable[..., "Tensor | tuple[Tensor, ...]"]
_Function = TypeVar("_Function", bound=Operator)

OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[_Function], _Function]:
    """Register the decorated function under each of `names`."""

    def register(function: _Function) -> _Function:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


def register_plain(functions: dict[str, Callable[..., Tensor]]) -> None:
    """Register functions that need no attributes."""
    for name, function in functions.items():
        OPERATORS[name] = _without_attributes(function)


def _without_attributes(function: Callable[..., Tensor]) -> Operator:
    return lambda attributes, *inputs: function(*inputs)


def integers(tensor: Tensor) -> list[int]:
    """The entries of a 1-D (or scalar) integer tensor."""
    return [int(entry) for entry in tensor.reshape(-1).tolist()]
