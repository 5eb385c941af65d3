"""`noise`: samples made from input shapes alone, seeded one by one, with the statistics of natural images."""

import io
import json
import tracemalloc
from itertools import islice
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import dense
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import onnxmerge
from onnxmerge.cli.app import app
from onnxmerge.data import InputSpec, load_dataset
from onnxmerge.data.stand_in import CALIBRATION, COLOUR, CONTRAST, HELD_OUT
from onnxmerge.errors import UsageError

FLOAT = np.dtype(np.float32)
COLOURED = InputSpec("image", (None, 3, 32, 32), FLOAT)
GRAY = InputSpec("image", (None, 1, 28, 28), FLOAT)
VECTOR = InputSpec("x", (None, 784), FLOAT)
TOKENS = InputSpec("tokens", (None, 16), np.dtype(np.int64))
CIFAR = Path(__file__).parents[1] / "../shared/data/cifar10_jpeg.npz"


def drawn(word: str, spec: InputSpec, count: int = 600, seed: int = 0) -> np.ndarray:
    split = load_dataset(word, [spec], seed=seed).calibration
    return next(split.batches(count)).inputs[spec.name]


def planes(images: np.ndarray) -> np.ndarray:
    """(images, height, width) of zero mean and unit variance, from (images, height, width, channels)."""
    gray = images.mean(3, dtype=np.float64)
    return (gray - gray.mean()) / gray.std()


def slope(gray: np.ndarray) -> float:
    """The exponent of the amplitude over frequency."""
    power = (np.abs(np.fft.fft2(gray)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(gray.shape[1])[:, None], np.fft.fftfreq(gray.shape[2]))
    return np.polyfit(np.log(frequency[frequency > 0]), np.log(power[frequency > 0]), 1)[0] / 2


# --- the stream -------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    word=st.sampled_from(["noise", "noise:0..1", "noise:28x28:-1..1"]),
    spec=st.sampled_from([GRAY, VECTOR]),
    size=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_a_sample_depends_on_the_seed_and_its_number_alone(word, spec, size, seed):
    dataset = load_dataset(word, [spec], seed=seed)
    for split in (dataset.calibration, dataset.held_out):
        batches = list(islice(split.batches(size), -(-40 // size)))
        together = np.concatenate([batch.inputs[spec.name] for batch in batches])[:40]
        assert together.tobytes() == next(split.batches(40)).inputs[spec.name].tobytes()
        assert len(np.unique(together.reshape(40, -1)[:, 0])) > 20
    assert drawn(word, spec, 3, seed).tobytes() == drawn(word, spec, 3, seed).tobytes()
    assert drawn(word, spec, 3, seed).tobytes() != drawn(word, spec, 3, seed + 1).tobytes()


def test_calibration_and_held_out_samples_are_others_and_say_what_they_are():
    dataset = load_dataset("noise", [GRAY])
    assert (len(dataset.calibration), len(dataset.held_out)) == (CALIBRATION, HELD_OUT) == (10_000, 1_000)
    assert dataset.stand_in and dataset.source == "noise (a stand-in for data)"
    first, held_out = (next(split.batches(50)) for split in (dataset.calibration, dataset.held_out))
    assert first.labels is None and not dataset.calibration.has_labels
    alike = np.corrcoef(*(batch.inputs["image"].reshape(50, -1) for batch in (first, held_out)))
    assert np.abs(alike - np.eye(100)).max() < 0.99


def test_inputs_of_one_sample_differ_and_keep_their_names():
    second = InputSpec("more", GRAY.shape, FLOAT)
    batch = next(load_dataset("noise", [GRAY, second]).calibration.batches(5)).inputs
    assert list(batch) == ["image", "more"]
    assert np.abs(np.corrcoef(batch["image"].ravel(), batch["more"].ravel())[0, 1]) < 0.5


def test_samples_are_never_all_in_memory():
    spec = InputSpec("image", (None, 3, 64, 64), FLOAT)
    tracemalloc.start()
    try:
        split = load_dataset("noise", [spec]).calibration
        assert sum(len(batch.inputs["image"]) for batch in islice(split.batches(64), 8)) == 512
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 512 * 3 * 64 * 64 * 4 / 2


def test_the_word_is_not_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "noise.npz", x=np.ones((10, 784), np.float32))
    (tmp_path / "noise.npz").rename(tmp_path / "noise")
    (tmp_path / "noise.py").write_text("import numpy as np\ndef make():\n    yield {'x': np.ones((10, 784))}\n")
    assert load_dataset("noise", [VECTOR]).stand_in
    for other in ("./noise", tmp_path / "noise", Path("noise"), "noise:make"):
        dataset = load_dataset(other, [VECTOR])
        assert not dataset.stand_in
        assert next(dataset.calibration.batches(3)).inputs["x"].min() == 1


# --- what the samples are like ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [COLOURED, GRAY, VECTOR, InputSpec("x", (None, 16, 9, 7), FLOAT)])
def test_zero_mean_and_unit_variance(spec):
    values = drawn("noise", spec, 2000)
    assert values.dtype == FLOAT
    assert abs(values.mean()) < 0.03
    assert values.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shape", [(None, 3, 32, 32), (None, 33, 20, 3)])
def test_images_have_amplitudes_of_one_over_frequency_and_colours_that_agree(shape):
    images = drawn("noise", InputSpec("image", shape, FLOAT), 2000)
    images = images.transpose(0, 2, 3, 1) if shape[1] == 3 else images
    assert slope(images[..., 0]) == pytest.approx(-1, abs=0.03)
    np.testing.assert_allclose(np.corrcoef(images.reshape(-1, 3).T), COLOUR, atol=0.01)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=0.03)


def test_brightness_varies_from_image_to_image():
    brightness = planes(drawn("noise", COLOURED, 2000).transpose(0, 2, 3, 1)).mean((1, 2))
    assert brightness.var() == pytest.approx(0.18, abs=0.03)  # of the variance of all values, which is 1


def test_contrast_varies_from_image_to_image():
    images = drawn("noise", COLOURED, 2000)
    spread = np.log(images.std((1, 2, 3))).std()
    assert CONTRAST < spread < CONTRAST + 0.05


def test_a_fourth_channel_agrees_with_none():
    images = drawn("noise", InputSpec("image", (None, 4, 16, 16), FLOAT), 2000).transpose(0, 2, 3, 1).reshape(-1, 4)
    found = np.corrcoef(images.T)
    np.testing.assert_allclose(found[:3, :3], COLOUR, atol=0.02)
    np.testing.assert_allclose(found[3, :3], 0, atol=0.05)


def test_what_is_no_image_is_white():
    values = drawn("noise", VECTOR, 2000).astype(np.float64)
    assert abs(np.corrcoef(values.T) - np.eye(784)).max() < 0.15
    assert slope(values.reshape(-1, 28, 28)) == pytest.approx(0, abs=0.02)


def test_colours_brightness_and_contrast_are_those_of_cifar():
    if not CIFAR.is_file():
        pytest.skip(f"{CIFAR.name} is not at hand")
    with np.load(CIFAR) as raw:
        jpeg, offsets = raw["jpeg_train"], raw["offset_train"]
    rows = np.random.default_rng(0).choice(len(offsets) - 1, 2000, replace=False)
    pieces = (jpeg[offsets[row] : offsets[row + 1]].tobytes() for row in rows)
    real = np.stack([np.asarray(Image.open(io.BytesIO(piece)).convert("RGB"), np.float64) for piece in pieces])
    made = drawn("noise", COLOURED, 2000).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.corrcoef(made.reshape(-1, 3).T), np.corrcoef(real.reshape(-1, 3).T), atol=0.02)
    brightness = [(planes(images).mean((1, 2)) ** 2).mean() for images in (made, real)]
    assert brightness[0] == pytest.approx(brightness[1], abs=0.12)
    contrast = [np.log(planes(images).std((1, 2))).std() for images in (made, real)]
    assert contrast[0] == pytest.approx(contrast[1], abs=0.05)


# --- options of the word ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "low", "high"), [("noise:0..1", 0, 1), ("noise:-2.5..255", -2.5, 255)])
@pytest.mark.parametrize("spec", [COLOURED, VECTOR])
def test_values_stay_in_the_range_and_fill_it(word, low, high, spec):
    values = drawn(word, spec)
    assert values.min() == low and values.max() == high
    assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    assert values.std() == pytest.approx((high - low) / 4, rel=0.1)


@pytest.mark.parametrize("spec", [VECTOR, InputSpec("x", (None, 28, 28), FLOAT)])
def test_a_size_makes_images_of_flat_inputs(spec):
    values = drawn("noise:28x28", spec, 2000)
    assert values.tobytes() == drawn("noise", GRAY, 2000).tobytes()


def test_a_size_fills_axes_that_the_model_leaves_open():
    assert drawn("noise:20x12", InputSpec("x", (None, 3, None, None), FLOAT), 2).shape == (2, 3, 20, 12)
    assert drawn("noise:20x12", InputSpec("x", (None, None, None, 3), FLOAT), 2).shape == (2, 20, 12, 3)


def test_integers_are_even_in_the_range_or_images():
    tokens = drawn("noise:5..14", TOKENS, 2000)
    assert tokens.dtype == np.int64
    counts = np.bincount(tokens.ravel(), minlength=15)
    assert not counts[:5].any() and counts[5:].min() > 0.9 * tokens.size / 10
    pixels = drawn("noise:0..255", InputSpec("image", (None, 32, 32, 3), np.dtype(np.uint8)))
    assert pixels.dtype == np.uint8 and (pixels.min(), pixels.max()) == (0, 255)
    assert slope(planes(pixels)) == pytest.approx(-1, abs=0.1)
    coarse = drawn("noise:0..1", InputSpec("image", (None, 32, 32, 3), np.dtype(np.uint8)))
    assert coarse.mean() == pytest.approx(0.5, abs=0.03)  # rounded, not cut off


@pytest.mark.parametrize("kind", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_any_floating_type(kind):
    values = drawn("noise", InputSpec("x", (None, 1, 8, 8), np.dtype(kind)), 5)
    assert values.dtype == kind
    assert np.isfinite(values.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("word", "spec", "expected"),
    [
        ("noise", InputSpec("x", (None, 3, None, None), FLOAT), "input 'x' (N, 3, ?, ?) has an axis of open size"),
        ("noise", InputSpec("x", (None, None, 80), FLOAT), "input 'x' (N, ?, 80) has an axis of open size"),
        ("noise:0..9", InputSpec("t", (None, None), TOKENS.dtype), "input 't' (N, ?) has an axis of open size"),
        ("noise:8x10", InputSpec("x", (None, None, 80), FLOAT), "does not hold images of 8x10"),
        ("noise:28x28", COLOURED, "input 'image' (N, 3, 32, 32) does not hold images of 28x28"),
        ("noise:28x28", InputSpec("x", (None, 785), FLOAT), "does not hold images of 28x28"),
        ("noise:28x14", VECTOR, "does not hold images of 28x14 with 1, 3 or 4 channels"),
        ("noise", TOKENS, "input 'tokens' (N, 16) takes integers (int64): say which in a range"),
        ("noise:0..0.5", TOKENS, "is int64, which does not hold the range 0..0.5"),
        ("noise:0..256", InputSpec("x", (None, 3), np.dtype(np.uint8)), "uint8, which does not hold the range 0..256"),
        ("noise:0..1", InputSpec("x", (None, 3), np.dtype(bool)), "takes bool, which noise does not make"),
        ("noise:1..0", VECTOR, "the range is empty"),
        ("noise:1..1", VECTOR, "the range is empty"),
        ("noise:", VECTOR, "write noise, noise:LOW..HIGH"),
        ("noise:0-1", VECTOR, "write noise, noise:LOW..HIGH"),
        ("noise:0x28", VECTOR, "write noise, noise:LOW..HIGH"),
        ("noise:0..1:28x28", VECTOR, "write noise, noise:LOW..HIGH"),
        ("noise", InputSpec("x", (), FLOAT), "a scalar without a batch axis"),
    ],
)
def test_words_that_do_not_fit(word, spec, expected):
    with pytest.raises(UsageError) as caught:
        load_dataset(word, [spec])
    sentence = str(caught.value)
    assert sentence.startswith(f"{word}: ") and "\n" not in sentence
    assert expected in sentence


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def networks(tmp_path):
    for seed, name in enumerate("ab"):
        onnx.save(dense(seed=seed).proto(), tmp_path / f"{name}.onnx")
    return [str(tmp_path / f"{name}.onnx") for name in "ab"]


def test_fuse_takes_the_word_and_gives_the_same_bytes_again(networks, tmp_path):
    settings = onnxmerge.FuseSettings(samples=200, threads=1, measure=False)
    made = []
    for folder in ("one", "two"):
        result = onnxmerge.fuse_models(networks, "noise", tmp_path / folder, settings=settings)
        assert result.recipe["steps"][0]["fuse"]["data"]["a"] == "noise"
        assert result.candidates[0].tasks["a"].accuracy is None
        made.append((tmp_path / folder / "merged.onnx").read_bytes())
    assert made[0] == made[1]


def test_the_command_line_takes_the_word(networks):
    result = CliRunner().invoke(app, ["align", *networks, "--data", "noise:0..1", "--json", "-q"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipe"]["steps"][0]["align"]["data"] == "noise:0..1"
    result = CliRunner().invoke(app, ["align", *networks, "--data", "noise:28x28", "-q"])
    assert result.exit_code == 2
    assert result.stderr.startswith("onnxmerge: error: noise:28x28: the model's input 'x' (N, 6) does not hold images")
