"""Timing on a GPU, with sessions on the CPU that say they were there: what is bound, and what is a CUDA graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from test_runtime import dense

import onnxmerge.runtime.memory as memory
import onnxmerge.runtime.session as session
from onnxmerge.errors import UsageError
from onnxmerge.methods.measure import graph_note
from onnxmerge.runtime.latency import latency
from onnxmerge.runtime.session import random_feeds
from onnxmerge.runtime.timed_run import timed_run

real = ort.InferenceSession


class Elsewhere:
    """A session on the CPU under another provider's name, which keeps what was bound."""

    made: list["Elsewhere"] = []  # noqa: RUF012 (emptied by the fixture)
    refuses = False

    def __init__(self, model: Any, options: Any, providers: list[tuple[str, dict[str, str]]], **more: Any):
        ((self.provider, self.options),) = providers
        self.wants_graph = "1" in (self.options.get("enable_cuda_graph"), self.options.get("trt_cuda_graph_enable"))
        if self.wants_graph and self.refuses:
            raise RuntimeError("This session cannot use the graph capture feature")
        self.session = real(model, options, providers=["CPUExecutionProvider"])
        self.bound: list[str] = []
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def get_providers(self) -> list[str]:
        return [self.provider]

    def io_binding(self) -> Any:
        binding, bound = self.session.io_binding(), self.bound

        class Watched:
            def __getattr__(self, name: str) -> Callable[..., Any]:
                if name.startswith("bind_"):
                    bound.append(name)
                return getattr(binding, name)

        self.binding = binding
        return Watched()

    def run_with_iobinding(self, binding: Any) -> None:
        self.session.run_with_iobinding(self.binding)


@pytest.fixture(params=["cuda", "tensorrt"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*session.PROVIDERS.values()])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", Elsewhere)
    monkeypatch.setattr(session, "_GPU", "cpu")
    monkeypatch.setattr(Elsewhere, "made", [])
    return request.param


def test_a_run_is_a_cuda_graph_whose_outputs_stay_in_one_place(provider: str) -> None:
    model, _ = dense()
    feeds = random_feeds(real(model), batch=3)
    ready = timed_run(model, feeds, providers=[provider])
    assert ready.cuda_graph is True
    plain, captured = Elsewhere.made
    assert captured.wants_graph and not plain.wants_graph
    assert set(captured.bound) == {"bind_ortvalue_input", "bind_ortvalue_output"}
    place = captured.binding.get_outputs()[0].data_ptr()
    expected = real(model).run(None, feeds)[0]
    for _ in range(3):
        captured.binding.get_outputs()[0].update_inplace(np.zeros_like(expected))
        ready()
        output = captured.binding.get_outputs()[0]
        assert output.data_ptr() == place
        np.testing.assert_array_equal(output.numpy(), expected)


def test_a_model_that_is_no_cuda_graph_is_timed_without(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elsewhere, "refuses", True)
    model, _ = dense()
    ready = timed_run(model, random_feeds(real(model)), providers=[provider])
    assert ready.cuda_graph is False
    ready()
    (plain,) = Elsewhere.made
    assert "bind_output" in plain.bound


def test_wrong_inputs_are_an_error_all_the_same(provider: str) -> None:
    with pytest.raises(UsageError, match="no data for the input"):
        timed_run(dense()[0], {}, providers=[provider])


def test_a_latency_says_whether_all_were_cuda_graphs(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = dense()
    feeds = random_feeds(real(model))
    quick = {"runs": 5, "min_seconds": 0.0}
    assert latency(model, [model], feeds, [feeds], providers=[provider], **quick).cuda_graphs is True
    monkeypatch.setattr(Elsewhere, "refuses", True)
    assert latency(model, [model], feeds, [feeds], providers=[provider], **quick).cuda_graphs is False
    monkeypatch.setattr(ort, "InferenceSession", real)
    assert latency(model, [model], feeds, [feeds], **quick).cuda_graphs is None


def test_how_a_gpu_was_timed_is_told() -> None:
    path = Path("m.onnx")
    assert graph_note(path, None) == []
    (note,) = graph_note(path, True, "batch 8")
    assert note.startswith("m.onnx at batch 8") and "as CUDA graphs" in note
    assert "cannot be a CUDA graph" in graph_note(path, False)[0]


@pytest.mark.parametrize(
    ("told", "expected"), [("1000", 1000 * 2**20 / 1e6), ("[N/A]", None), ("", None), (None, None)]
)
def test_memory_on_the_gpu_is_what_nvidia_smi_says(
    told: str | None, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    if told is not None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\n[ "$1" = --id=3 ] || exit 1\necho "{told}"\n')
        script.chmod(0o755)
    assert memory._on_device(["cuda"]) == expected
    assert memory._on_device(["cpu"]) is None
