"""zip on real networks, judged by onnxruntime."""

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest

import onnxmerge
from onnxmerge.methods.task import load_networks
from onnxmerge.methods.zip.alignment import find_sharable
from onnxmerge.methods.zip.stems.stem import Start
from onnxmerge.runtime.session import open_session, run

DEMO = Path(onnxmerge.__file__).parent / "demo"
MODELS = [DEMO / "digits.onnx", DEMO / "fashion.onnx"]
DATA = {"digits": DEMO / "digits.yaml", "fashion": DEMO / "fashion.yaml"}


def settings(**changes: object) -> onnxmerge.ZipSettings:
    quick = {"steps": 0, "samples": 500, "measure": False}
    return onnxmerge.ZipSettings(**(quick | changes))  # type: ignore[arg-type]


def outputs(path: str | None, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    assert path is not None
    session = open_session(Path(path))
    return run(session, feeds, [o.name for o in session.get_outputs()])


def test_sharing_nothing_changes_nothing(tmp_path: Path) -> None:
    result = onnxmerge.zip_models(MODELS, DATA, tmp_path / "out", settings=settings(share="0"))
    images = np.random.default_rng(0).random((8, 1, 28, 28), np.float32)
    merged = outputs(result.candidates[0].path, {"image": images})
    for path in MODELS:
        original = outputs(str(path), {"image": images})["logits"]
        np.testing.assert_allclose(merged[f"{path.stem}/logits"], original, rtol=1e-5, atol=1e-5)


def test_networks_that_are_permuted_copies_are_shared_for_free(tmp_path: Path) -> None:
    """The second network is the first with every channel space permuted: fusing must find that out."""
    from onnxmerge.ir.load import load
    from onnxmerge.ir.save import save
    from onnxmerge.ir.spaces import find_spaces
    from onnxmerge.passes.permute import Permute

    model = load(MODELS[0])
    random = np.random.default_rng(3)
    spaces = {space.name: space for space in find_spaces(model).permutable()}
    Permute({name: random.permutation(space.size) for name, space in spaces.items()}, spaces)(model)
    save(model, tmp_path / "twin.onnx")
    result = onnxmerge.zip_models(
        [MODELS[0], tmp_path / "twin.onnx"],
        DATA["digits"],
        tmp_path / "out",
        settings=settings(share="1.0", start=(Start.AVERAGE,)),
    )
    (candidate,) = result.candidates
    assert candidate.share == 5
    for score in candidate.tasks.values():
        assert score.agreement is not None and score.agreement >= 0.998
        assert score.relative_error is not None and score.relative_error < 0.02
    assert min(record.correlation for record in result.similarity) > 0.999


def test_least_squares_beats_the_aligned_average(tmp_path: Path) -> None:
    agreement = {}
    for start in (Start.AVERAGE, Start.LEAST_SQUARES):
        result = onnxmerge.zip_models(
            MODELS, DATA, tmp_path / start.value, settings=settings(share="3", start=(start,))
        )
        scores = result.candidates[0].tasks.values()
        agreement[start] = min(score.agreement or 0.0 for score in scores)
    assert agreement[Start.LEAST_SQUARES] > agreement[Start.AVERAGE]
    assert agreement[Start.LEAST_SQUARES] > 0.85


def test_keeping_the_first_stem_keeps_the_first_task(tmp_path: Path) -> None:
    result = onnxmerge.zip_models(MODELS, DATA, tmp_path / "out", settings=settings(share="3", start=(Start.KEEP,)))
    first, second = (result.candidates[0].tasks[task] for task in ("digits", "fashion"))
    assert first.agreement == 1.0 and (first.relative_error or 0) < 1e-5
    assert (second.agreement or 0) > 0.7


@pytest.mark.slow
def test_calibration_improves_and_the_written_model_is_what_was_trained(tmp_path: Path) -> None:
    from onnxmerge.calibration.module import GraphModule

    results = [
        onnxmerge.zip_models(MODELS, DATA, tmp_path / str(steps), settings=settings(share="4", steps=steps))
        for steps in (0, 60)
    ]
    before, after = (min(s.agreement or 0 for s in r.candidates[0].tasks.values()) for r in results)
    assert after >= before
    losses = results[1].candidates[0].losses
    assert losses[0][0] == 0 and min(loss for _, loss in losses) <= losses[0][1]
    import torch

    path = results[1].candidates[0].path
    assert path is not None
    images = np.random.default_rng(0).random((16, 1, 28, 28), np.float32)
    module = GraphModule(oir.load(path))
    with torch.no_grad():
        ours = module({"image": torch.from_numpy(images)})
    for name, expected in outputs(path, {"image": images}).items():
        np.testing.assert_allclose(ours[name].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_three_networks(tmp_path: Path) -> None:
    from shutil import copyfile

    third = copyfile(MODELS[1], tmp_path / "third.onnx")
    data = DATA | {"third": DATA["fashion"]}
    result = onnxmerge.zip_models([*MODELS, third], data, tmp_path / "out", settings=settings(share="2"))
    assert set(result.candidates[0].tasks) == {"digits", "fashion", "third"}
    assert min(score.agreement or 0 for score in result.candidates[0].tasks.values()) > 0.7


@pytest.mark.skipif(
    not (Path(__file__).parents[1] / "../shared/models").exists(), reason="the shared models are not here"
)
def test_units_of_a_residual_pair() -> None:
    folder = Path(__file__).parents[1] / "../shared/models"
    networks = load_networks([folder / "resnet20_cifar10.onnx", folder / "resnet20_cifar100.onnx"])
    sharable = find_sharable(networks)
    assert [cut.unit.kind for cut in sharable.cuts] == ["layer"] + ["block"] * 9
    assert sharable.limit == "what follows is each network's head"
    sharable = find_sharable(load_networks([folder / "resnet20_cifar10.onnx", folder / "resnet8_cifar100.onnx"]))
    assert len(sharable.cuts) == 2
    assert "resnet8_cifar100 differs from resnet20_cifar10 at Conv" in sharable.limit
