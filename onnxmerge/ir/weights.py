"""Read and replace the arrays of a model."""

import numpy as np
import onnx_ir as oir


def get_array(value: oir.Value) -> np.ndarray:
    """The constant array of an initializer; read-only."""
    assert value.const_value is not None, f"{value.name} is not constant"
    return value.const_value.numpy()


def set_array(value: oir.Value, array: np.ndarray) -> None:
    """Replace the array of an initializer, keeping its element type; shape and type of the value follow."""
    dtype = get_array(value).dtype
    tensor = oir.tensor(np.asarray(array, dtype=dtype, order="C"), name=value.name)
    value.const_value = tensor
    value.shape = oir.Shape(array.shape)
    value.type = oir.TensorType(tensor.dtype)


def add_initializer(graph: oir.Graph, name: str, array: np.ndarray) -> oir.Value:
    """Register `array` in `graph` under `name`, or under the first free `name__i`."""
    free, number = name, 0
    while free in graph.initializers:
        number += 1
        free = f"{name}__{number}"
    tensor = oir.tensor(np.asarray(array, order="C"), name=free)
    value = oir.Value(name=free, shape=oir.Shape(array.shape), type=oir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def is_float(value: oir.Value) -> bool:
    """Whether the value's elements are floating-point numbers."""
    return value.dtype is not None and value.dtype.is_floating_point()
