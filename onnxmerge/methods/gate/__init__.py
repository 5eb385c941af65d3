"""gate: networks of one task and architecture become one of the same size, put together from their best channels."""

from onnxmerge.methods.gate.gate import gate_models, plan_gate
from onnxmerge.methods.gate.plan import GatePlan
from onnxmerge.methods.gate.settings import GateSettings

__all__ = ["GatePlan", "GateSettings", "gate_models", "plan_gate"]
