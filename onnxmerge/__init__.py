"""onnxmerge: merge trained ONNX networks of different tasks into one."""
