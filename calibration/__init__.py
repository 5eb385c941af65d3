"""Fine-tune a merged network with the originals as teachers; the only part of the tool that imports torch."""

from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.objective import FeatureTap
from onnxmerge.calibration.settings import Settings
from onnxmerge.calibration.trainer import Outcome, calibrate

__all__ = ["FeatureTap", "GraphModule", "Outcome", "Settings", "calibrate"]
