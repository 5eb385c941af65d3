"""What a result was made with and on: library versions, hardware, and the hashes of the inputs."""

import contextlib
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("onnxmerge", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "torch")
CHUNK = 1 << 20
QUERY_SECONDS = 5.0


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result; none is imported, absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def hardware() -> dict[str, Any]:
    """The machine: `cpu`, `physical_cores`, `logical_cores`, `memory_gb` (1e9 bytes), `platform`, `gpus` (names).

    What cannot be found out is left out.
    """
    model, physical = _processor()
    found = {
        "cpu": model,
        "physical_cores": physical,
        "logical_cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "platform": platform.platform(),
        "gpus": _answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
    }
    return {key: value for key, value in found.items() if value}


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of the file at `path`, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _processor() -> tuple[str | None, int | None]:
    """Model name and number of physical cores."""
    if platform.system() == "Darwin":
        name, cores = _answer("sysctl", "-n", "machdep.cpu.brand_string"), _answer("sysctl", "-n", "hw.physicalcpu")
        return (name[0] if name else None), (int(cores[0]) if cores else None)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None, None
    pairs = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    model = next((value for key, value in pairs if key == "model name"), platform.processor() or None)
    sockets = [value for key, value in pairs if key == "physical id"]
    cores_of = [value for key, value in pairs if key == "core id"]
    return model, len(set(zip(sockets, cores_of, strict=False))) or None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):  # no sysconf on Windows
        return None


def _answer(*command: str) -> list[str]:
    """The non-empty lines a command prints; none when it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
