"""Lower precision by onnxruntime's own tools: 8-bit integers (static, QDQ) and float16."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.scratch import scratch

Ranges = dict[str, tuple[np.ndarray, np.ndarray]]
"""The least and the greatest number that each value took."""


def measure_ranges(model: Path, batches: Iterable[Mapping[str, np.ndarray]], *, everywhere: bool = False) -> Ranges:
    """The ranges of the values of `model`, a file, over `batches` of feeds.

    Those of values that operators in 8 bits read or make; of all float values `everywhere`.

    One batch is in memory at a time.

    Raises:
        UsageError: there are no batches, or one does not fit.
        ModelError: onnxruntime cannot calibrate the model.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    found: Ranges = {}
    with scratch() as folder, _telling("calibrate"):
        calibrator = create_calibrator(
            model,
            None if everywhere else _operators(),
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=_is_large(model),
        )
        for batch in batches:
            calibrator.collect_data(_One(batch))
        data = calibrator.compute_data()
        for name in data or ():
            found[name] = data[name].range_value
    return found


def join_ranges(ranges: Sequence[Ranges]) -> Ranges:
    """The ranges over all."""
    names = dict.fromkeys(name for own in ranges for name in own)
    joined = {}
    for name in names:
        lowest, highest = zip(*(own[name] for own in ranges if name in own), strict=True)
        joined[name] = (np.minimum.reduce(lowest), np.maximum.reduce(highest))
    return joined


def quantize_int8(model: Path, target: Path, ranges: Ranges, keep: Sequence[str]) -> None:
    """Write `model` in 8-bit integers to `target`.

    Weights have one scale for each output channel, activations one for the whole array; both are signed. Between
    QuantizeLinear and DequantizeLinear the graph stays in float, and runtimes run what stands there in integers.

    Args:
        model: a file, at least of opset 13.
        target: the file to write.
        ranges: of its values.
        keep: names of nodes that stay in float32.

    Raises:
        ModelError: onnxruntime's tool cannot do it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    with _telling("quantize"):
        quantizer = QDQQuantizer(
            load_model_with_shape_infer(model),
            True,  # weights by channel
            False,  # the whole range of 8 bits
            QuantType.QInt8,
            QuantType.QInt8,
            TensorsData(CalibrationMethod.MinMax, ranges),
            [],
            list(keep),
            _operators(),
            {},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(target), _is_large(model))


def to_float16(model: Path, target: Path, keep: Sequence[str]) -> None:
    """Write `model` in float16 to `target`; inputs and outputs stay float32, with a Cast behind or before.

    Args:
        model: a file.
        target: the file to write.
        keep: names of nodes that stay in float32.

    Raises:
        ModelError: onnxruntime's tool cannot do it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _telling("convert to float16"):
        made = convert_float_to_float16(str(model), keep_io_types=True, node_block_list=list(keep))
        onnx.save(made, target, save_as_external_data=_is_large(model), location=f"{target.name}.data")


class _One:
    """A calibration data reader of one batch."""

    def __init__(self, batch: Mapping[str, np.ndarray]):
        self._left: list[Mapping[str, np.ndarray]] = [batch]

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


def _operators() -> list[str]:
    """All operators that the tool knows, in one order."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def _is_large(model: Path) -> bool:
    data = model.with_name(f"{model.name}.data")
    return data.exists()


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turn what the tools raise into one sentence; what they log is left out."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except (ModelError, UsageError):
        raise
    except ImportError as error:
        raise UsageError(f"onnxruntime's tools to {what} cannot be loaded: {error}") from error
    except Exception as error:  # they raise many kinds
        raise ModelError(f"onnxruntime cannot {what} the model: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.disable(before)
