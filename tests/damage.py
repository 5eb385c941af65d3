"""Damage models at random, and see in a process of its own what reading them does.

Run as a program with the name of a folder, it reads every model there and prints one line of JSON for each: the exit
code that the command line would give. A crash ends the program before its last line.
"""

import json
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import onnx

SECONDS = 20
MEMORY = 6 << 30
NUMBERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 5, 64, 1000, 2**31, 2**40, 2**62, 2**63 - 1)
"""Integers at the edges; sizes that a large machine could still run are left out."""


def truncated(whole: bytes, generator: np.random.Generator) -> bytes:
    return whole[: generator.integers(len(whole))]


def flipped(whole: bytes, generator: np.random.Generator) -> bytes:
    """1 to 8 bits are wrong."""
    damaged = bytearray(whole)
    for place in generator.integers(len(whole), size=generator.integers(1, 9)):
        damaged[place] ^= 1 << int(generator.integers(8))
    return bytes(damaged)


def overwritten(whole: bytes, generator: np.random.Generator) -> bytes:
    """A stretch of bytes is random, or stands there twice."""
    start = int(generator.integers(len(whole)))
    length = int(generator.integers(1, 40))
    if generator.integers(2):
        return whole[:start] + generator.bytes(length) + whole[start + length :]
    return whole[: start + length] + whole[start:]


def rewritten(whole: bytes, generator: np.random.Generator) -> bytes:
    """Up to three fields hold another value of their type."""
    proto = onnx.ModelProto.FromString(whole)
    for _ in range(generator.integers(1, 4)):
        places = list(_places(proto))
        message, field = places[generator.integers(len(places))]
        _rewrite(message, field, generator)
    return proto.SerializeToString()


def distorted(whole: bytes, generator: np.random.Generator) -> bytes:
    """Up to three integers are others: attributes, sizes of inputs, shapes and axes in initializers."""
    proto = onnx.ModelProto.FromString(whole)
    for _ in range(generator.integers(1, 4)):
        tensors = [tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT64]
        numbers = [(m, f) for m, f in _places(proto) if f.name in ("i", "ints", "dim_value")]
        place = generator.integers(len(numbers) + len(tensors))
        if place < len(numbers):
            _rewrite(*numbers[place], generator)
        else:
            tensor = tensors[place - len(numbers)]
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.ravel()[generator.integers(max(array.size, 1)) :][:1] = NUMBERS[generator.integers(len(NUMBERS))]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return proto.SerializeToString()


def _places(message):
    """Every set field of `message` and of the messages in it."""
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            if field.name not in ("raw_data", "float_data"):
                yield message, field
            continue
        if field.is_repeated:
            yield message, field
        for inner in value if field.is_repeated else [value]:
            yield from _places(inner)


def _rewrite(message, field, generator):
    values = getattr(message, field.name)
    if field.is_repeated:
        index = int(generator.integers(len(values)))
        action = generator.integers(3)
        if action == 0 or field.type == field.TYPE_MESSAGE:
            if generator.integers(2):
                del values[index]
            else:
                values.append(values[index])
        else:
            values[index] = _other(field, values[index], message, generator)
    else:
        setattr(message, field.name, _other(field, values, message, generator))


def _other(field, value, message, generator):
    if field.type == field.TYPE_STRING:
        names = [
            "",
            "x",
            "y",
            "v1",
            "v3",
            "c0",
            "Conv",
            "Reshape",
            "Slice",
            "Loop",
            "Gemm",
            "Concat",
            "MatMul",
            "Split",
        ]
        return names[generator.integers(len(names))]
    if field.type == field.TYPE_BYTES:
        return [b"", b"x", b"\xff\xfe"][generator.integers(3)]
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return [0.0, -1.0, float("nan"), float("inf"), 1e30][generator.integers(5)]
    if field.type == field.TYPE_ENUM:
        options = [option.number for option in field.enum_type.values]
        return options[generator.integers(len(options))]
    number = NUMBERS[generator.integers(len(NUMBERS))]
    return int(number) if field.type == field.TYPE_INT64 else max(-(2**31), min(int(number), 2**31 - 1))


DAMAGES = (truncated, flipped, overwritten, rewritten, distorted)


def judge(path: Path, check: bool) -> int:
    """The exit code of `inspect`, in this process."""
    from onnxmerge.errors import OnnxMergeError
    from onnxmerge.ir.load import load
    from onnxmerge.methods.inspect import inspect_model

    try:
        load(path)
        if check:
            inspect_model(path, check=True, threads=1)
    except OnnxMergeError as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        return error.exit_code
    return 0


def main(folder: str, check: str) -> None:
    import traceback

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for path in sorted(Path(folder).glob("*.onnx")):
        signal.alarm(SECONDS)  # ends the program
        print(json.dumps({"file": path.name}), flush=True)
        fault = None
        try:
            code = judge(path, check == "check")
        except Exception:
            code, fault = 4, traceback.format_exc()
        print(json.dumps({"file": path.name, "code": code, "fault": fault}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
