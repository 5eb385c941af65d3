"""Open models in onnxruntime and run them; nothing else in the package imports onnxruntime.

Providers go by short names: `cpu`, `cuda`, `tensorrt`. A provider asked for is a provider used, or there is an error.
"""

import contextlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from onnxmerge.errors import ModelError, OnnxMergeError, UsageError

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Our name of each execution provider, and onnxruntime's."""

FREE_DIM = 32
"""Size given to a symbolic axis that is not the batch (height, width, tokens) when inputs are made up."""

# The arena grows by what is asked for, so that memory figures mean something; TF32 would round weights to 10 bits.
_CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
_GRAPH_OPTIONS = {"cuda": {"enable_cuda_graph": "1"}, "tensorrt": {"trt_cuda_graph_enable": "1"}}
_GPU = "cuda"
"""Where onnxruntime keeps the arrays of both GPU providers."""


def open_session(
    model: str | Path | bytes,
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    spinning: bool = True,
    cuda_graph: bool = False,
) -> "onnxruntime.InferenceSession":
    """Open `model`, a file or the bytes of one, in onnxruntime.

    Args:
        model: path of an ONNX file, or its serialised bytes (below 2 GB; larger models must be files).
        providers: short names in order of preference; a node that one cannot run goes to the next, and to the CPU last.
        threads: threads inside one operator (`intra_op_num_threads`); None leaves the choice to onnxruntime.
        spinning: onnxruntime's default, whose worker threads keep spinning for a while after a run. False sets
            `session.force_spinning_stop`: they still spin inside a run, and stop when the last concurrent run returns.
        cuda_graph: record what a run launches on the GPU and replay it from then on. The model must hold no control
            flow and compute on the GPU alone, and be run by `prepare_run` with `outputs`.

    Raises:
        UsageError: no onnxruntime is installed, there is no such file, or a provider is unknown or cannot be used.
        ModelError: onnxruntime refuses the model.
    """
    return _open(model, _options(threads, spinning), providers, cuda_graph=cuda_graph)


def run(
    session: "onnxruntime.InferenceSession", feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Run once; the arrays of `outputs` (all when None) by name. Feeds that the model does not take are left out.

    Raises:
        UsageError: an input is missing, or its type or shape does not fit.
        ModelError: a node fails.
    """
    names = [output.name for output in session.get_outputs()] if outputs is None else list(outputs)
    taken = _taken(session, feeds)
    options = _onnxruntime().RunOptions()
    options.log_severity_level = 4  # what fails is told by the exception, not a second time on stderr
    with _run_errors():
        arrays = session.run(names, taken, options)
    return dict(zip(names, arrays, strict=True))


def prepare_run(
    session: "onnxruntime.InferenceSession",
    feeds: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray] | None = None,
) -> Callable[[], None]:
    """A function that runs `session` once on `feeds` and returns when the outputs are there, for timing.

    On a GPU, inputs are copied there beforehand and outputs stay there (IOBinding), so that copies are not timed. The
    function has run once when it is returned: inputs that do not fit are an error here, not in what is timed.

    Args:
        session: open.
        feeds: the inputs.
        outputs: arrays of the outputs' shapes and types: on a GPU each output then has one place from run to run, as a
            CUDA graph needs it. None: onnxruntime finds a place in each run.

    Raises:
        UsageError: an input is missing, or its type or shape does not fit.
        ModelError: a node fails.
    """
    taken = _taken(session, feeds)
    if session.get_providers()[0] == PROVIDERS["cpu"]:
        names = [output.name for output in session.get_outputs()]

        def run_on_cpu() -> None:
            session.run(names, taken)

        with _run_errors():
            run_on_cpu()
        return run_on_cpu

    binding = session.io_binding()
    with _run_errors():
        for name, array in taken.items():
            value = _onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), _GPU, 0)
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            if outputs is None:
                binding.bind_output(output.name, _GPU)
                continue
            like = outputs[output.name]
            place = _onnxruntime().OrtValue.ortvalue_from_shape_and_type(like.shape, like.dtype.type, _GPU, 0)
            binding.bind_ortvalue_output(output.name, place)

    def run_bound() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    with _run_errors():
        run_bound()
    return run_bound


def node_providers(
    model: str | Path | bytes,
    feeds: Mapping[str, np.ndarray],
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
) -> dict[str, dict[str, int]]:
    """How many nodes of each operator each provider really ran, by short name: `{"cuda": {"Conv": 9}, "cpu": {...}}`.

    Nodes are those left after onnxruntime's own optimisations; the busiest provider and operator come first. Raises as
    `open_session` and `run` do.
    """
    options = _options(threads, spinning=True)
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _open(model, options, providers)
        run(session, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = {
        event["name"]: event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    short = {name: ours for ours, name in PROVIDERS.items()}
    found: dict[str, Counter[str]] = {}
    for ran in kernels.values():
        found.setdefault(short.get(ran["provider"], ran["provider"]), Counter())[ran["op_name"]] += 1
    busiest = sorted(found.items(), key=lambda item: -item[1].total())
    return {provider: dict(operators.most_common()) for provider, operators in busiest}


def fixed_batch(session: "onnxruntime.InferenceSession") -> int | None:
    """The only batch size that the model takes: the first axis of its inputs; None where one of these is symbolic."""
    shapes = [value.shape for value in session.get_inputs() if value.shape]
    if not shapes or any(not isinstance(shape[0], int) for shape in shapes):
        return None
    return shapes[0][0]


def random_feeds(
    session: "onnxruntime.InferenceSession",
    batch: int = 1,
    seed: int = 0,
    free_dims: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Made-up inputs: floats from N(0, 1), integers and booleans 0 or 1 (valid as token ids and as masks).

    Args:
        session: whose inputs to make up.
        batch: size of a first axis that is symbolic, and of every axis of the same name.
        seed: of the generator; same seed, same bytes.
        free_dims: sizes of other symbolic axes by name; `FREE_DIM` for those not named.

    Raises:
        UsageError: an input is no tensor of numbers, or too large.
    """
    generator = np.random.default_rng(seed)
    inputs = session.get_inputs()
    sizes = {i.shape[0]: batch for i in inputs if i.shape and isinstance(i.shape[0], str)} | dict(free_dims or {})
    feeds = {}
    for value in inputs:
        shape = [
            dim if isinstance(dim, int) else sizes.get(dim, batch if axis == 0 else FREE_DIM)
            for axis, dim in enumerate(value.shape)
        ]
        dtype = _dtype(value.type)
        if dtype is None:
            raise UsageError(f"random data cannot be made for the input {value.name!r} of type {value.type}")
        try:
            array = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
            feeds[value.name] = array.astype(dtype)
        except MemoryError as error:
            raise UsageError(f"random data for the input {value.name!r} of shape {shape} exceed the memory") from error
    return feeds


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "onnxruntime is not installed: pip install 'onnxmerge[cpu]', or 'onnxmerge[gpu]' for an NVIDIA GPU"
        ) from error
    return onnxruntime


def _options(threads: int | None, spinning: bool) -> "onnxruntime.SessionOptions":
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = 3  # errors only
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _open(
    model: str | Path | bytes,
    options: "onnxruntime.SessionOptions",
    providers: Sequence[str],
    *,
    cuda_graph: bool = False,
) -> "onnxruntime.InferenceSession":
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise UsageError(f"{model}: no such file")
    wanted = _usable(providers)
    extra = _GRAPH_OPTIONS if cuda_graph else {}
    pairs = [(PROVIDERS[name], (_CUDA_OPTIONS if name == "cuda" else {}) | extra.get(name, {})) for name in wanted]
    source = model if isinstance(model, bytes) else str(model)
    try:
        # enable_fallback=0: otherwise onnxruntime retries on the CPU and says so on stdout only.
        session = _onnxruntime().InferenceSession(source, options, providers=pairs, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        if set(wanted) - {"cpu"} and type(error).__name__ in ("RuntimeError", "RuntimeException", "EPFail"):
            raise UsageError(f"the provider {wanted[0]!r} could not start: {_reason(error)}") from error
        where = "the model" if isinstance(model, bytes) else str(model)
        raise ModelError(f"{where}: onnxruntime refuses it: {_reason(error)}") from error
    running = session.get_providers()
    for name in wanted:
        if PROVIDERS[name] not in running:
            raise UsageError(
                f"the provider {name!r} did not start (its libraries or driver are missing) and "
                f"onnxruntime would run on {running[0]} instead"
            )
    return session


def _usable(providers: Sequence[str]) -> list[str]:
    """The short names asked for, checked against what the installed onnxruntime was built with."""
    runtime = _onnxruntime()
    for name in providers:
        if name not in PROVIDERS:
            raise UsageError(f"unknown provider {name!r}: choose from {', '.join(PROVIDERS)}")
        if PROVIDERS[name] not in runtime.get_available_providers():
            raise UsageError(
                f"the provider {name!r} is not in the installed onnxruntime {runtime.__version__}: "
                "replace it with pip install 'onnxmerge[gpu]'"
            )
    if not providers:
        raise UsageError("no provider was named")
    if set(providers) - {"cpu"} and hasattr(runtime, "preload_dlls"):  # since onnxruntime 1.21
        with contextlib.redirect_stdout(sys.stderr):
            runtime.preload_dlls()
    return list(providers)


def _taken(session: "onnxruntime.InferenceSession", feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds that the model takes, each checked to be there and of the right type."""
    for value in session.get_inputs():
        if value.name not in feeds:
            raise UsageError(f"no data for the input {value.name!r}; there is data for {', '.join(feeds) or 'nothing'}")
        dtype = _dtype(value.type)
        if dtype is not None and feeds[value.name].dtype != dtype:
            raise UsageError(f"the input {value.name!r} takes {dtype}, the data are {feeds[value.name].dtype}")
    return {value.name: feeds[value.name] for value in session.get_inputs()}


@contextlib.contextmanager
def _run_errors() -> Iterator[None]:
    """Turn what onnxruntime raises during a run into one sentence."""
    try:
        yield
    except Exception as error:
        kind: type[OnnxMergeError] = UsageError if type(error).__name__ == "InvalidArgument" else ModelError
        raise kind(f"onnxruntime could not run the model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The heart of onnxruntime's message: one line, without its codes, source lines and C++ signatures."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    text = re.sub(r"\S+\.(cc|h):\d+ .*?\) (?=[A-Z])", "", text)
    return text if len(text) <= 300 else text[:300] + "..."


def _dtype(kind: str) -> np.dtype | None:
    """numpy's type for onnxruntime's, e.g. `tensor(float)`; None for what numpy has no numbers for."""
    match = re.fullmatch(r"tensor\((\w+)\)", kind)
    names = {"float": "float32", "double": "float64"}
    try:
        return np.dtype(names.get(match[1], match[1])) if match and match[1] != "string" else None
    except TypeError:
        return None
