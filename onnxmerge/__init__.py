"""onnxmerge: merge trained ONNX networks of different tasks into one that does all their jobs.

    import onnxmerge
    result = onnxmerge.zip_models(["a.onnx", "b.onnx"], data="samples.npz", output="zipped")
    print(result.chosen, result.candidate(result.chosen).latency_ms.speedup)

The functions are imported when they are first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxmerge.calibration.settings import Settings
    from onnxmerge.methods.align import align_models
    from onnxmerge.methods.apply import apply_model
    from onnxmerge.methods.bench import bench_models
    from onnxmerge.methods.bounds import Bounds
    from onnxmerge.methods.calibrate import calibrate_model
    from onnxmerge.methods.extract import extract_task
    from onnxmerge.methods.fuse.fuse import fuse_models, plan_fuse
    from onnxmerge.methods.fuse.settings import FuseSettings
    from onnxmerge.methods.gate.gate import gate_models, plan_gate
    from onnxmerge.methods.gate.settings import GateSettings
    from onnxmerge.methods.inspect import inspect_model
    from onnxmerge.methods.pack.pack import pack_models
    from onnxmerge.methods.quantize import quantize_model
    from onnxmerge.methods.triton import place_model
    from onnxmerge.methods.validate import validate_model
    from onnxmerge.methods.zip.settings import ZipSettings
    from onnxmerge.methods.zip.zip import plan_zip, zip_models

    __version__: str

_HOMES = {
    "Bounds": "onnxmerge.methods.bounds",
    "FuseSettings": "onnxmerge.methods.fuse.settings",
    "GateSettings": "onnxmerge.methods.gate.settings",
    "Settings": "onnxmerge.calibration.settings",
    "ZipSettings": "onnxmerge.methods.zip.settings",
    "align_models": "onnxmerge.methods.align",
    "apply_model": "onnxmerge.methods.apply",
    "bench_models": "onnxmerge.methods.bench",
    "calibrate_model": "onnxmerge.methods.calibrate",
    "extract_task": "onnxmerge.methods.extract",
    "fuse_models": "onnxmerge.methods.fuse.fuse",
    "gate_models": "onnxmerge.methods.gate.gate",
    "inspect_model": "onnxmerge.methods.inspect",
    "pack_models": "onnxmerge.methods.pack.pack",
    "place_model": "onnxmerge.methods.triton",
    "plan_fuse": "onnxmerge.methods.fuse.fuse",
    "plan_gate": "onnxmerge.methods.gate.gate",
    "plan_zip": "onnxmerge.methods.zip.zip",
    "quantize_model": "onnxmerge.methods.quantize",
    "validate_model": "onnxmerge.methods.validate",
    "zip_models": "onnxmerge.methods.zip.zip",
}

__all__ = [
    "Bounds",
    "FuseSettings",
    "GateSettings",
    "Settings",
    "ZipSettings",
    "__version__",
    "align_models",
    "apply_model",
    "bench_models",
    "calibrate_model",
    "extract_task",
    "fuse_models",
    "gate_models",
    "inspect_model",
    "pack_models",
    "place_model",
    "plan_fuse",
    "plan_gate",
    "plan_zip",
    "quantize_model",
    "validate_model",
    "zip_models",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("onnxmerge")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'onnxmerge' has no attribute {name!r}")
