"""A device that is not the CPU, for machines without a GPU: its tensors have values, and never meet those of the CPU.

Within `Elsewhere`, a tensor that is made on "meta" or moved there keeps its numbers, and whatever torch computes with
it is there too, bit for bit what a CPU computes. As on a GPU, only `.cpu()`, `.item()`, `.tolist()` and `copy_` bring
it back, and only a number (a CPU tensor without axes) may be combined with it. Anything else is a fault: a tensor that
was made on the CPU for lack of `device=`, or `.numpy()` of what is not there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

ELSEWHERE = torch.device("meta")
_BOTH_PLACES = ("aten::copy_", "aten::_to_copy")


class _Away(Tensor):
    """A tensor on that device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "_Away":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.here.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_Away({self.here!r})"


class Elsewhere(TorchDispatchMode):
    """The device exists for as long as this lasts."""

    def __enter__(self) -> "Elsewhere":
        self._numbers = _Numbers()
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """`torch.tensor` makes a "meta" tensor before anybody is asked."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") == ELSEWHERE:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(ELSEWHERE)
        return function(*args, **kwargs)


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function._schema.name
    tensors = [own for own in tree_iter((args, kwargs)) if isinstance(own, Tensor)]
    away = any(isinstance(own, _Away) for own in tensors)
    wanted = kwargs.get("device")
    if away and name not in _BOTH_PLACES:
        strange = next((own for own in tensors if not isinstance(own, _Away) and own.dim()), None)
        if strange is not None:
            raise RuntimeError(f"{name}: a CPU tensor of shape {list(strange.shape)} meets tensors that are elsewhere")
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    there = (away if name != "aten::copy_" else isinstance(args[0], _Away)) if wanted is None else wanted == ELSEWHERE
    values = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name == "aten::copy_":
        return args[0]
    if not there:
        return values
    made = tree_map(lambda own: _Away(own) if isinstance(own, Tensor) else own, values)
    return return_and_correct_aliasing(function, args, kwargs, made) if away and wanted is None else made


def _here(own: Any) -> Any:
    return own.here if isinstance(own, _Away) else own
