"""What running a model tells: sessions, activation statistics, latency and memory, all through onnxruntime."""
