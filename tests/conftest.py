"""What all tests share: the real models beside the repository, and how Hypothesis draws."""

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Examples are drawn from the test's own name: every run tries the same ones, and a busy machine fails nothing.
settings.register_profile("onnxmerge", deadline=None, derandomize=True, database=None)
settings.load_profile("onnxmerge")

MODELS = Path(__file__).parents[1] / "../shared/models"


@pytest.fixture(autouse=True)
def no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests expect what a CPU computes, to the last bit; only those marked gpu see a GPU where there is one."""
    if shutil.which("nvidia-smi") and request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that a test starts
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`real_model`: the path of every real model that onnxruntime loads; one skip where none is at hand."""
    if "real_model" in metafunc.fixturenames:
        paths = [path for path in sorted(MODELS.glob("*.onnx")) if path.stem != "super_resolution"]
        absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no models in {MODELS}"))
        metafunc.parametrize("real_model", paths or [absent], ids=[path.stem for path in paths] or ["none"])


@pytest.fixture
def shared():
    """`shared("resnet8_cifar10")` is the path of that real model; skips where it is not at hand."""

    def path(name: str) -> Path:
        file = MODELS / f"{name}.onnx"
        if not file.is_file():
            pytest.skip(f"{file.name} is not at hand")
        return file

    return path


@pytest.fixture
def one_thread():
    """torch uses one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
