"""Networks that are no classifiers: what they are judged by, calibrated with, and how the report shows their images."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
import torch
from graphs import Net, execute
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto
from PIL import Image
from reports import Page, make_result

import onnxmerge
from onnxmerge.calibration.objective import Objective
from onnxmerge.calibration.settings import Settings
from onnxmerge.data import Batch
from onnxmerge.ir.normalise import normalise
from onnxmerge.ir.outputs import is_class_shape, may_name_classes
from onnxmerge.methods.pictures import held_out_pictures
from onnxmerge.methods.scoring import MANY, Tally
from onnxmerge.methods.task import load_networks, with_data
from onnxmerge.report.page import render_page
from onnxmerge.report.panels import WIDEST, black_and_white, is_image, to_png
from onnxmerge.report.schema import Result, TaskScore

SIZE = 40
"""Pixels on a side of the images here."""


def style_net(seed: int, depth: int = 3) -> Net:
    """An image of an image: reflect Pad, InstanceNormalization, a residual block, Resize; batch fixed at 1."""
    net = Net(seed)
    x = net.input([1, 3, SIZE, SIZE])
    x = _styled(net, x, 8)
    x = net.relu(_styled(net, x, 12, strides=[2, 2]))
    for _ in range(depth - 2):
        branch = _styled(net, net.relu(_styled(net, x, 12)), 12)
        x = net.op("Add", branch, x)
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    net.output(_padded_conv(net, net.op("Resize", x, "", scales, mode="nearest"), 3))
    return net


def _padded_conv(net: Net, x: str, out: int, **attributes: list[int]) -> str:
    padded = net.op("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 1, 1), channels=net.channels[x], mode="reflect")
    return net.conv(padded, out, pads=[0, 0, 0, 0], **attributes)


def _styled(net: Net, x: str, out: int, **attributes: list[int]) -> str:
    return net.norm(_padded_conv(net, x, out, **attributes), "InstanceNormalization")


def detector(seed: int) -> Net:
    """Scores in 0..1 and boxes in pixels, reshaped into rows as detectors do; batch fixed at 1."""
    net = Net(seed)
    x = net.input([1, 3, SIZE, SIZE])
    x = net.relu(net.norm(net.conv(x, 8, strides=[2, 2])))
    x = net.relu(net.norm(net.conv(x, 12, strides=[2, 2])))
    for channels, name in ((2, "scores"), (4, "boxes")):
        rows = net.op("Transpose", net.conv(x, 3 * channels), perm=[0, 2, 3, 1])
        rows = net.reshape(rows, 1, -1, channels)
        last = net.op("Softmax", rows, axis=2, name=name)
        net.output(last if name == "scores" else net.op("Mul", rows, net.constant(np.float32(100)), name="boxes_px"))
    return net


def regressor(seed: int) -> Net:
    """Three numbers between -1 and 1 for each image."""
    net = Net(seed)
    x = net.relu(net.conv(net.input(["N", 3, SIZE, SIZE]), 8, strides=[2, 2]))
    x = net.relu(net.conv(x, 12, strides=[2, 2]))
    pooled = net.op("GlobalAveragePool", x)
    net.output(net.op("Tanh", net.gemm(net.flatten(pooled, 12), 3)))
    return net


def write(folder: Path, **nets: Net) -> list[Path]:
    paths = []
    for name, net in nets.items():
        proto: ModelProto = net.proto()
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
        paths.append(folder / f"{name}.onnx")
    return paths


def images(folder: Path, count: int = 12, high: float = 255.0) -> Path:
    """Smooth random images, a third of them held out."""
    coarse = np.random.default_rng(0).uniform(0, high, (count, 3, 5, 5)).astype(np.float32)
    smooth = coarse.repeat(SIZE // 5, axis=2).repeat(SIZE // 5, axis=3)
    np.savez(folder / "images.npz", x=smooth[count // 3 :], test_x=smooth[: count // 3])
    return folder / "images.npz"


def zipped(folder: Path, models: list[Path], data: Path, steps: int = 0, **changes: object) -> Result:
    settings = {"share": "1", "samples": 8, "measure": False, "max_drop": None, "threads": 1} | changes
    return onnxmerge.zip_models(
        models,
        data,
        folder / "out",
        settings=onnxmerge.ZipSettings(steps=steps, **settings),  # type: ignore[arg-type]
    )


# ---- what is judged as a classifier ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 1), (4, 6, 5), (4,), (4, 3, 1, 2), (4, 1, 1, 1)])
def test_an_output_of_another_shape_names_no_class(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    original, merged = random.standard_normal((2, *shape))
    assert not is_class_shape(shape)
    tally = Tally()
    tally.update([merged], [original], None)
    score = tally.score()
    assert score.agreement is None and score.accuracy is None
    wanted = np.linalg.norm(merged - original) / np.linalg.norm(original)
    assert score.relative_error == pytest.approx(wanted) == score.drop


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1, 1)])
def test_classes_may_have_one_pixel(shape: tuple[int, ...]) -> None:
    original = np.eye(6, 5).reshape(shape)
    merged = original.copy()
    merged[0], merged[1] = original[1], original[0]
    tally = Tally()
    tally.update([merged], [original], np.array([0, 0, 2, 3, 4, 0]))
    assert tally.score().agreement == pytest.approx(4 / 6)
    assert tally.score().accuracy == pytest.approx(5 / 6)
    assert tally.score().original_accuracy == pytest.approx(5 / 6)


def test_an_original_that_names_one_class_on_many_samples_is_judged_by_its_numbers() -> None:
    original = np.tile([[1.0, 5.0], [2.0, 4.0]], (MANY // 2, 1))
    tally = Tally()
    tally.update([original[1:] + 0.1], [original[1:]], None)
    assert tally.score().agreement == 1.0  # too few to tell
    tally.update([original[:1] + 0.1], [original[:1]], None)
    assert tally.score().agreement is None and tally.score().drop == tally.score().relative_error
    tally.update([original], [original[:, ::-1]], None)
    assert tally.score().agreement == 0.5
    labelled = Tally()
    labelled.update([original], [original], np.tile([1, 0], MANY // 2))
    assert labelled.score().agreement == 1.0 and labelled.score().accuracy == 0.5


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        (["Softmax"], True),
        (["LogSoftmax"], True),
        ([], True),
        (["Identity", "Softmax", "Identity"], True),
        (["scale"], True),
        (["Tanh"], False),
        (["Sigmoid"], False),
        (["Sigmoid", "scale"], False),
        (["LpNormalization"], False),
        (["norm"], False),
        (["exponents"], True),
    ],
    ids=str,
)
def test_the_end_of_a_network_says_whether_it_may_name_classes(ends: list[str], named: bool) -> None:
    net = Net()
    x = net.gemm(net.input(["N", 4]), 3)
    for end in ends:
        if end == "scale":
            x = net.op("Mul", x, net.constant(np.float32(30)))
        elif end == "norm":
            x = net.op("Div", x, net.op("ReduceL2", x, net.ints(1)))
        elif end == "exponents":
            powers = net.op("Exp", x)
            x = net.op("Div", powers, net.op("ReduceSum", powers, net.ints(1)))
        else:
            x = net.op(end, x)
    net.output(x)
    assert may_name_classes(oir.from_proto(net.proto()), x) is named


def test_labels_settle_that_a_network_is_a_classifier() -> None:
    outputs = np.eye(3)
    for labels, agreement in ((None, None), (np.arange(3), 1.0)):
        tally = Tally(may_classify=False)
        tally.update([outputs], [outputs], labels)
        assert tally.score().agreement == agreement


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4), st.integers(0, 3))
def test_no_output_hides_behind_a_larger_one(sizes: list[float], worst: int) -> None:
    random = np.random.default_rng(0)
    originals = [size * random.standard_normal((5, 4, 6)) for size in sizes]
    factors = [1.3 if place == worst % len(sizes) else 1.1 for place in range(len(sizes))]
    merged = [factor * original for factor, original in zip(factors, originals, strict=True)]
    tally = Tally()
    for half in (slice(0, 2), slice(2, 5)):
        tally.update([array[half] for array in merged], [array[half] for array in originals], None)
    assert tally.score().relative_error == pytest.approx(0.3)


def test_outputs_that_are_zero_have_no_relative_error() -> None:
    tally = Tally()
    tally.update([np.ones((2, 3, 4))], [np.zeros((2, 3, 4))], None)
    assert tally.score() == TaskScore()


# ---- what calibration asks for --------------------------------------------------------------------------------------


def objective(net: Net, **weights: float) -> tuple[Objective, oir.Model]:
    model = normalise(oir.from_proto(net.proto()))
    (value, *_) = model.graph.outputs
    name = value.name or ""
    return Objective("task", model, model, {name: name}, {"x": "x"}, [], Settings(steps=1, **weights)), model


@pytest.mark.parametrize("net", [style_net(0), regressor(0), detector(0)], ids=["image", "regression", "detector"])
def test_the_loss_of_numbers_is_their_error_over_their_variance(net: Net) -> None:
    """KL, which is for classes, takes no part; the variance is that of all samples, whatever their batches."""
    found, model = objective(net, kl_weight=7.0, logit_weight=2.0)
    random = np.random.default_rng(1)
    feed = random.uniform(0, 1, (1, 3, SIZE, SIZE)).astype(np.float32)
    batches = [Batch({"x": feed}, None), Batch({"x": feed * 0.5}, None)]
    targets = [found.output_targets(batch) for batch in batches]
    found.scale(targets)
    (student,) = found.outputs
    z = targets[0][0] + 0.1 * torch.from_numpy(random.standard_normal(targets[0][0].shape)).float()
    everything = np.concatenate([z_t.numpy().ravel() for (z_t,) in targets]).astype(np.float64)
    wanted = 2 * float(((z - targets[0][0]).double() ** 2).mean()) / everything.var()
    assert not (may_name_classes(model, student) and is_class_shape(z.shape))
    assert float(found.output_loss({student: z}, targets[0], batches[0])) == pytest.approx(wanted, rel=1e-4)


def test_classes_of_one_pixel_are_distilled_and_learnt() -> None:
    def pixel(ending: str) -> Objective:
        net = Net(3)
        x = net.op("GlobalAveragePool", net.conv(net.input(["N", 3, 8, 8]), 4))
        net.output(net.flatten(x, 4) if ending == "flat" else x)
        return objective(net, label_weight=1.0)[0]

    feed = np.random.default_rng(1).uniform(-1, 1, (6, 3, 8, 8)).astype(np.float32)
    batch, losses = Batch({"x": feed}, np.array([0, 1, 2, 3, 0, 1])), {}
    for ending in ("flat", "pixel"):
        found = pixel(ending)
        targets = found.output_targets(batch)
        moved = targets[0] + torch.linspace(0, 1, 4).reshape(1, 4, *[1] * (targets[0].dim() - 2))
        losses[ending] = float(found.output_loss({found.outputs[0]: moved}, targets, batch))
    assert losses["pixel"] == pytest.approx(losses["flat"], rel=1e-6)


# ---- zip ------------------------------------------------------------------------------------------------------------


def test_style_nets_are_zipped_by_their_relative_error(tmp_path: Path) -> None:
    models = write(tmp_path, ours=style_net(1), theirs=style_net(2))
    result = zipped(tmp_path, models, images(tmp_path), steps=2)
    (candidate,) = result.candidates
    for score in candidate.tasks.values():
        assert score.agreement is None and score.accuracy is None and score.drop == score.relative_error
        assert 0 < (score.relative_error or 0) < 1
    assert candidate.losses[0][0] == 0 and candidate.losses[-1][0] == 2


def test_the_allowed_drop_bounds_the_relative_error(tmp_path: Path) -> None:
    models, data = write(tmp_path, ours=style_net(1), theirs=style_net(2)), images(tmp_path)
    for folder in ("tight", "loose"):
        (tmp_path / folder).mkdir()
    assert zipped(tmp_path / "tight", models, data, max_drop=1e-3).chosen is None
    assert zipped(tmp_path / "loose", models, data, max_drop=1.0).chosen == "k01"


def test_detectors_and_regressors_are_zipped(tmp_path: Path) -> None:
    for name, made in (("detector", detector), ("regressor", regressor)):
        models = write(tmp_path, **{f"{name}_1": made(1), f"{name}_2": made(2)})
        (tmp_path / name).mkdir()
        result = zipped(tmp_path / name, models, images(tmp_path, high=1.0), share="1")
        for score in result.candidates[0].tasks.values():
            assert score.agreement is None and 0 < (score.relative_error or 0) < 1


# ---- images in the report -------------------------------------------------------------------------------------------


def test_what_is_an_image() -> None:
    for shape in ((2, 3, 32, 40), (1, 1, 64, 32)):
        assert is_image(np.zeros(shape, np.float32))
    for shape in ((2, 3, 31, 40), (2, 2, 64, 64), (2, 3, 64), (2, 64, 64, 3), (2, 10)):
        assert not is_image(np.zeros(shape, np.float32))
    assert not is_image(np.zeros((2, 3, 64, 64), np.int64))


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, (0, 1)),
        (0.2, 0.7, (0, 1)),
        (-1, 1, (-1, 1)),
        (3, 250, (0, 255)),
        (-30, 290, (0, 255)),
        (-2.1, 2.6, (-2.1, 2.6)),
    ],
)
def test_the_scale_of_an_image_is_told_from_its_pixels(low: float, high: float, wanted: tuple[float, float]) -> None:
    pixels = np.linspace(low, high, 3 * 64 * 64).reshape(1, 3, 64, 64).astype(np.float32)
    assert black_and_white(pixels) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_shows_the_pixels(channels: int, mode: str) -> None:
    coarse = np.random.default_rng(0).uniform(-20, 280, (channels, 4, 6))
    image = coarse.repeat(10, 1).repeat(10, 2).astype(np.float32)
    shown = np.asarray(Image.open(io.BytesIO(to_png(image, 0, 255))).convert(mode), np.float64)
    wanted = image.clip(0, 255).transpose(1, 2, 0).squeeze()
    assert np.abs(shown - wanted).mean() < 2
    image[:, 0] = np.nan
    assert np.asarray(Image.open(io.BytesIO(to_png(image, 0, 255))).convert(mode))[0].max() == 0
    large = Image.open(io.BytesIO(to_png(np.zeros((channels, 500, 1000), np.float32), 0, 1)))
    assert large.size == (WIDEST, WIDEST // 2)


def test_a_constant_image_is_drawn() -> None:
    flat = np.full((1, 3, 32, 32), -7.0, np.float32)
    assert to_png(flat[0], *black_and_white(flat))


def test_pictures_are_what_the_files_make(tmp_path: Path) -> None:
    models = write(tmp_path, ours=style_net(1), theirs=style_net(2))
    data = images(tmp_path)
    result = zipped(tmp_path, models, data)
    merged = Path(result.candidates[0].path or "")
    tasks = with_data(load_networks(models), {"ours": data, "theirs": data}, seed=0)
    rows = held_out_pictures(tasks, merged, threads=1)
    assert [row.title for row in rows] == [f"Held-out sample {number}" for number in (1, 2, 3)]
    with np.load(data) as arrays:
        feed = {"x": arrays["test_x"][1:2]}
    whole = execute(oir.to_proto(oir.load(merged)), feed)
    for picture, path in zip(rows[1].tasks, models, strict=True):
        (original,) = execute(oir.to_proto(oir.load(path)), feed).values()
        (ours,) = (array for name, array in whole.items() if name.startswith(f"{path.stem}/"))
        wanted = np.linalg.norm(ours - original) / np.linalg.norm(original)
        assert picture.task == path.stem
        assert picture.relative_error == pytest.approx(wanted, rel=1e-3)
        assert picture.original != picture.merged
    first = Image.open(io.BytesIO(rows[0].sample or b"")).convert("RGB")
    with np.load(data) as arrays:
        wanted = arrays["test_x"][0].transpose(1, 2, 0)
    assert np.abs(np.asarray(first, np.float64) - wanted).mean() < 4
    assert held_out_pictures(tasks, merged, threads=1) == rows


def test_tasks_with_data_of_their_own_have_rows_of_their_own(tmp_path: Path) -> None:
    models = write(tmp_path, ours=style_net(1), theirs=style_net(2))
    (tmp_path / "other").mkdir()
    sources = {"ours": images(tmp_path), "theirs": images(tmp_path / "other", count=6)}
    merged = Path(zipped(tmp_path, models, sources["ours"]).candidates[0].path or "")
    rows = held_out_pictures(with_data(load_networks(models), sources, seed=0), merged, threads=1)
    assert [[picture.task for picture in row.tasks] for row in rows] == [["ours"]] * 3 + [["theirs"]] * 2
    assert rows[4].title == "Held-out sample 2 of theirs"


def test_no_pictures_of_what_is_no_image(tmp_path: Path) -> None:
    models = write(tmp_path, one=detector(1), two=detector(2))
    data = images(tmp_path, high=1.0)
    merged = Path(zipped(tmp_path, models, data).candidates[0].path or "")
    tasks = with_data(load_networks(models), {"one": data, "two": data}, seed=0)
    assert held_out_pictures(tasks, merged, threads=1) == []


def test_the_page_shows_pictures_and_the_json_does_not(tmp_path: Path) -> None:
    result = make_result(["candy", "<b>mosaic</b>"], number=1, labels=False)
    models = write(tmp_path, candy=style_net(1), mosaic=style_net(2))
    data = images(tmp_path)
    merged = Path(zipped(tmp_path, models, data).candidates[0].path or "")
    rows = held_out_pictures(with_data(load_networks(models), {"candy": data, "mosaic": data}, seed=0), merged)
    rows[0].tasks[1].task = "<b>mosaic</b>"
    rows[1].sample = rows[1].tasks[0].relative_error = None
    plain = render_page(result)
    result.pictures = rows
    page = Page(render_page(result))
    assert "img" not in Page(plain).tags and "b" not in page.tags
    sources = [value for name, value in page.attributes if name == "src"]
    shown = [png for row in rows for png in (row.sample, *(p for t in row.tasks for p in (t.original, t.merged)))]
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources)
    assert [base64.b64decode(source.removeprefix(prefix)) for source in sources] == [png for png in shown if png]
    assert "<b>mosaic</b>: original and merged, relative error" in page.text
    assert "pictures" not in json.loads(result.to_json())
    assert Result.model_validate_json(result.to_json()).pictures == []
