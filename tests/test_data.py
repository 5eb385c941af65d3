import itertools
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from onnxmerge.data import Batch, InputSpec, Split, load_dataset, parse_data_option
from onnxmerge.errors import UsageError

FLOAT = np.dtype(np.float32)
IMAGE = InputSpec("image", (None, 1, 4, 4), FLOAT)
VECTOR = InputSpec("x", (None, 3), FLOAT)
DEMO = Path(__file__).parents[1] / "onnxmerge/demo"
SHARED = Path(__file__).parents[1] / "../shared/data"

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def numbered(count: int) -> np.ndarray:
    """Samples (count, 3) whose first value is their number."""
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def rows_of(batches: list[Batch]) -> list[int]:
    return [int(value) // 3 for batch in batches for value in batch.inputs["x"][:, 0]]


def in_split(split: Split, size: int = 7) -> list[int]:
    return rows_of(list(split.batches(size)))


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(source: str | Path, *specs: InputSpec) -> str:
    """The one sentence a bad source ends in, found at loading or while reading."""
    with pytest.raises(UsageError) as caught:
        dataset = load_dataset(source, specs or [VECTOR])
        for split in (dataset.calibration, dataset.held_out):
            list(split.batches(4))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# Splits


@same_folder
@given(count=st.integers(2, 70), seed=st.integers(0, 9), size=st.integers(1, 80))
def test_held_out_tenth_is_disjoint_complete_and_seeded(tmp_path, count, seed, size):
    path = save(tmp_path / "d.npz", x=numbered(count), labels=np.arange(count))
    dataset = load_dataset(path, [VECTOR], seed=seed)
    calibration, held_out = in_split(dataset.calibration, size), in_split(dataset.held_out, size)
    assert sorted(calibration + held_out) == list(range(count))
    assert len(held_out) == len(dataset.held_out) == max(1, count // 10)
    assert calibration == sorted(calibration) and held_out == sorted(held_out)
    again = load_dataset(path, [VECTOR], seed=seed)
    assert in_split(again.held_out) == held_out
    for batch in dataset.calibration.batches(size):
        np.testing.assert_array_equal(batch.labels, batch.inputs["x"][:, 0] // 3)


def test_the_held_out_tenth_depends_on_the_seed_and_is_not_the_last(tmp_path):
    path = save(tmp_path / "d.npz", x=numbered(200))
    chosen = {tuple(in_split(load_dataset(path, [VECTOR], seed=seed).held_out)) for seed in range(5)}
    assert len(chosen) == 5
    assert tuple(range(180, 200)) not in chosen


@same_folder
@given(count=st.integers(2, 60), size=st.integers(1, 80), seed=st.integers(0, 9))
def test_shuffled_gives_full_batches_without_repeats_within_an_epoch(tmp_path, count, size, seed):
    path = save(tmp_path / "d.npz", x=numbered(count), test_x=numbered(1))
    split = load_dataset(path, [VECTOR]).calibration
    clipped = min(size, count)
    for_epoch = count // clipped
    two_epochs = list(itertools.islice(split.shuffled(size, seed), 2 * for_epoch))
    assert all(len(batch.inputs["x"]) == clipped for batch in two_epochs)
    for epoch in (two_epochs[:for_epoch], two_epochs[for_epoch:]):
        rows = rows_of(epoch)
        assert len(set(rows)) == len(rows) == for_epoch * clipped
    assert rows_of(two_epochs) == rows_of(list(itertools.islice(split.shuffled(size, seed), 2 * for_epoch)))


def test_shuffled_reshuffles_each_epoch(tmp_path):
    split = load_dataset(save(tmp_path / "d.npz", x=numbered(50), test_x=numbered(1)), [VECTOR]).calibration
    first, second = (rows_of([batch]) for batch in itertools.islice(split.shuffled(50, seed=0), 2))
    assert first != second and sorted(first) == sorted(second) == list(range(50))
    assert rows_of([next(split.shuffled(50, seed=1))]) != first


@same_folder
@given(count=st.integers(2, 60), wanted=st.integers(1, 80), seed=st.integers(0, 9))
def test_take_is_a_seeded_subset_and_smaller_ones_are_nested(tmp_path, count, wanted, seed):
    split = load_dataset(save(tmp_path / "d.npz", x=numbered(count), test_x=numbered(1)), [VECTOR]).calibration
    rows = in_split(split.take(wanted, seed))
    assert len(rows) == min(wanted, count)
    assert len(set(rows)) == len(rows) and rows == sorted(rows)
    assert rows == in_split(split.take(wanted, seed))
    assert set(in_split(split.take(max(1, wanted // 2), seed))) <= set(rows)


def test_take_from_a_class_sorted_file_keeps_the_classes_balanced(tmp_path):
    labels = np.repeat(np.arange(10), 100)
    path = save(tmp_path / "d.npz", x=numbered(1000), labels=labels, test_x=numbered(1))
    subset = load_dataset(path, [VECTOR]).calibration.take(200, seed=3)
    counts = np.bincount(next(subset.batches(200)).labels, minlength=10)
    assert counts.min() >= 8  # 20 expected of each; a prefix would hold two classes only


def test_take_of_nothing_is_refused(tmp_path):
    split = load_dataset(save(tmp_path / "d.npz", x=numbered(5)), [VECTOR]).calibration
    with pytest.raises(UsageError, match="must be at least 1, not 0"):
        split.take(0, seed=0)


def test_a_batch_size_of_zero_is_a_programming_error(tmp_path):
    split = load_dataset(save(tmp_path / "d.npz", x=numbered(5)), [VECTOR]).calibration
    with pytest.raises(ValueError, match="at least 1 sample"):
        next(split.batches(0))
    with pytest.raises(ValueError, match="at least 1 sample"):
        next(split.shuffled(0, seed=0))


# Archives


@pytest.mark.parametrize("save_archive", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_archive_feeds_arrays_by_input_name(tmp_path, save_archive, order):
    images = np.random.default_rng(0).random((9, 1, 4, 4))  # float64, which becomes float32
    ids = np.arange(18, dtype=np.int32).reshape(9, 2)
    test_images, test_ids = images[:3] + 1, ids[:3] + 5
    save_archive(
        tmp_path / "d.npz",
        image=np.asarray(images, order=order),
        ids=np.asarray(ids, order=order),
        test_image=test_images,
        test_ids=test_ids,
        test_labels=np.array([2, 0, 1], np.uint8),
    )
    specs = [IMAGE, InputSpec("ids", (1, 2), np.dtype(np.int64))]  # a batch axis fixed to 1 bounds nothing
    dataset = load_dataset(tmp_path / "d.npz", specs)
    assert dataset.source == str(tmp_path / "d.npz")
    assert not dataset.calibration.has_labels and dataset.held_out.has_labels
    (batch,) = dataset.calibration.batches(100)
    np.testing.assert_array_equal(batch.inputs["image"], images.astype(np.float32))
    np.testing.assert_array_equal(batch.inputs["ids"], ids)
    assert batch.inputs["image"].dtype == np.float32 and batch.inputs["ids"].dtype == np.int64
    assert batch.inputs["image"].flags.c_contiguous and type(batch.inputs["image"]) is np.ndarray
    assert batch.labels is None
    first, second = dataset.held_out.batches(2)
    np.testing.assert_array_equal(first.inputs["image"], test_images[:2].astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([first.labels, second.labels]), [2, 0, 1])
    assert first.labels.dtype == np.int64


def test_an_input_called_labels_is_an_input(tmp_path):
    spec = InputSpec("labels", (None, 3), FLOAT)
    dataset = load_dataset(save(tmp_path / "d.npz", labels=numbered(20)), [spec])
    assert not dataset.calibration.has_labels
    assert next(dataset.calibration.batches(5)).inputs["labels"].shape == (5, 3)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_large_archive_is_never_loaded(tmp_path, compressed):
    size = 64 << 20  # bytes
    values = np.zeros((size // 4096, 1024), np.float32)
    values[:, 0] = np.arange(len(values))
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", x=values)
    del values
    tracemalloc.start()
    try:
        dataset = load_dataset(tmp_path / "d.npz", [InputSpec("x", (None, 1024), FLOAT)])
        total = sum(float(batch.inputs["x"][:, 0].sum()) for batch in dataset.calibration.take(8000, 0).batches(64))
        shuffled = next(dataset.calibration.shuffled(64, seed=0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total > 0 and shuffled.inputs["x"].shape == (64, 1024)
    assert peak < size / 10


def test_an_uncompressed_archive_is_mapped_where_it_lies(tmp_path, monkeypatch):
    path = save(tmp_path / "d.npz", x=numbered(20))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: pytest.fail("a temporary file was made"))
    assert len(load_dataset(path, [VECTOR]).calibration) == 18


def test_a_file_that_is_not_there():
    assert refusal("missing/d.npz") == "missing/d.npz: no such file"


def test_a_file_that_is_no_archive(tmp_path):
    np.save(tmp_path / "d.npy", numbered(5))
    assert "is not a whole .npz archive" in refusal(tmp_path / "d.npy")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.98])
@pytest.mark.parametrize("save_archive", [np.savez, np.savez_compressed])
def test_an_archive_that_is_cut_off(tmp_path, save_archive, keep):
    path = tmp_path / "d.npz"
    save_archive(path, x=np.random.default_rng(0).random((200, 3)))
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert refusal(path).startswith(f"{path}: is not a whole .npz archive")


@settings(same_folder, max_examples=150)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), compressed=st.booleans(), data=st.data())
def test_a_damaged_archive_is_refused_or_read_but_never_crashes(tmp_path, position, value, compressed, data):
    path = tmp_path / "d.npz"
    (np.savez_compressed if compressed else np.savez)(path, x=numbered(20), labels=np.arange(20))
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = value
    path.write_bytes(content)
    try:
        dataset = load_dataset(path, [VECTOR])
        list(dataset.calibration.batches(7))
    except UsageError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_a_damaged_compressed_array_is_named(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((200, 3)))
    content = bytearray(path.read_bytes())
    content[1000] ^= 0xFF
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: array 'x' is damaged: ")


def test_an_encrypted_array(tmp_path):
    path = save(tmp_path / "d.npz", x=numbered(20))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the encryption bit in the table of contents
    path.write_bytes(content)
    assert refusal(path) == f"{path}: array 'x' is encrypted"


def test_an_array_with_less_data_than_its_header_says(tmp_path):
    np.save(tmp_path / "x.npy", numbered(20))
    content = (tmp_path / "x.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", content[:-8])
    assert "array 'x' is cut off: its data is not the 240 bytes of (20, 3)" in refusal(tmp_path / "d.npz")


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", b"not an array")
    assert "array 'x' has no header of the .npy format" in refusal(tmp_path / "d.npz")


def test_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path = save(tmp_path / "d.npz", x=np.array([Trap()] * 5, dtype=object))
    assert "array 'x' holds Python objects, which are never unpickled" in refusal(path)
    assert not (tmp_path / "sprung").exists()


def test_no_room_to_unpack(tmp_path, monkeypatch):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=numbered(20))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    assert "array 'x' cannot be unpacked into" in refusal(path)
    assert "No space left on device" in refusal(path)


def test_no_array_of_the_input_s_name(tmp_path):
    path = save(tmp_path / "d.npz", a=numbered(5), b=numbered(5), labels=np.arange(5))
    sentence = refusal(path)
    assert sentence == f"{path}: has no array 'x' for the model's input 'x' (N, 3); it has 'a', 'b', 'labels'"


def test_the_one_array_that_fits_is_suggested(tmp_path):
    path = save(tmp_path / "d.npz", data=numbered(5), other=np.zeros((5, 9)), labels=np.arange(5))
    assert refusal(path).endswith(
        "it has 'data', 'other', 'labels', of which 'data' fits: "
        "rename it, or map it in a data card (inputs: {x: data})"
    )


def test_an_archive_without_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w"):
        pass
    assert "it has no arrays at all" in refusal(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((5, 4)), "array 'x' has shape (N, 4), but the model's input 'x' expects (N, 3)"),
        (np.zeros((5, 3, 1)), "array 'x' has shape (N, 3, 1), but the model's input 'x' expects (N, 3)"),
        (np.zeros(5), "array 'x' has shape (N,), but the model's input 'x' expects (N, 3)"),
        (np.zeros(()), "array 'x' for the model's input 'x' holds no samples"),
        (np.zeros((0, 3)), "array 'x' for the model's input 'x' holds no samples"),
        (np.zeros((1, 3)), "holds 1 sample, but at least 2 are needed: one to calibrate with and one to hold out"),
        (
            np.zeros((5, 3), np.uint8),
            "array 'x' is uint8, but the model's input 'x' expects float32; "
            "say how to scale it in a data card (for example scale: 1/255)",
        ),
        (np.zeros((5, 3), bool), "array 'x' is bool, but the model's input 'x' expects float32"),
        (np.zeros((5, 3), complex), "array 'x' is complex128, but the model's input 'x' expects float32"),
        (np.full((5, 3), "a"), "array 'x' is <U1, but the model's input 'x' expects float32"),
        (np.where(numbered(5) == 7, np.nan, 0), "array 'x' holds NaN or infinity as float32 in sample 2"),
        (np.where(numbered(5) == 9, -np.inf, 0), "array 'x' holds NaN or infinity as float32 in sample 3"),
        (np.where(numbered(5) < 3, 1e300, 0), "array 'x' holds NaN or infinity as float32 in sample 0"),
    ],
)
def test_an_array_that_does_not_fit(tmp_path, array, expected):
    path = save(tmp_path / "d.npz", x=array)
    assert refusal(path) == f"{path}: {expected}"


def test_sizes_the_model_leaves_open_are_free(tmp_path):
    spec = InputSpec("x", (None, None), FLOAT)
    assert len(load_dataset(save(tmp_path / "d.npz", x=np.zeros((20, 11))), [spec]).calibration) == 18
    path = save(tmp_path / "e.npz", x=np.zeros((20, 11, 1)))
    assert refusal(path, spec).endswith("has shape (N, 11, 1), but the model's input 'x' expects (N, ?)")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.arange(4), "array 'labels' has shape (4,), but the 5 samples of 'x' need labels of shape (5,)"),
        (np.zeros((5, 1), int), "array 'labels' has shape (5, 1), but the 5 samples of 'x' need labels of shape (5,)"),
        (
            np.zeros(5, bool),
            "array 'labels' is bool, but labels are integers, a class number each, or floats, "
            "what the model's first output should be",
        ),
        (np.zeros((4, 2)), "array 'labels' has shape (4, 2), but the 5 samples of 'x' need labels of shape (5, ...)"),
        (np.array([0, 1, -1, 2, 3]), "array 'labels' holds the class number -1, but they start from 0"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels, expected):
    path = save(tmp_path / "d.npz", x=numbered(5), labels=labels)
    assert refusal(path) == f"{path}: {expected}"


def test_inputs_of_different_length(tmp_path):
    path = save(tmp_path / "d.npz", x=numbered(5), y=numbered(6))
    assert "array 'y' holds 6 samples, but 'x' holds 5" in refusal(path, VECTOR, InputSpec("y", (None, 3), FLOAT))


def test_test_arrays_that_do_not_fit(tmp_path):
    path = save(tmp_path / "d.npz", x=numbered(5), test_x=np.zeros((2, 4)))
    assert "array 'test_x' has shape (N, 4), but the model's input 'x' expects (N, 3)" in refusal(path)
    path = save(tmp_path / "e.npz", x=np.zeros((5, 7)), test_x=np.zeros((2, 8)))
    sentence = refusal(path, InputSpec("x", (None, None), FLOAT))
    assert sentence == f"{path}: array 'test_x' has shape (N, 8), but 'x' has (N, 7)"


def test_test_arrays_that_are_incomplete(tmp_path):
    path = save(tmp_path / "d.npz", x=numbered(5), y=numbered(5), test_x=numbered(2))
    sentence = refusal(path, VECTOR, InputSpec("y", (None, 3), FLOAT))
    assert "has no array 'test_y' for the model's input 'y'" in sentence
    path = save(tmp_path / "e.npz", x=numbered(5), test_labels=np.arange(5))
    assert "has no array 'test_x' for the model's input 'x'" in refusal(path)


def test_integers_that_a_narrower_input_cannot_hold(tmp_path):
    spec = InputSpec("x", (None, 3), np.dtype(np.int8))
    path = save(tmp_path / "d.npz", x=np.arange(15).reshape(5, 3) * 20)
    assert "array 'x' holds values from" in refusal(path, spec)
    fine = save(tmp_path / "e.npz", x=np.arange(15).reshape(5, 3))
    (batch,) = load_dataset(fine, [spec]).calibration.batches(9)
    assert batch.inputs["x"].dtype == np.int8


def test_a_scalar_input_cannot_be_fed(tmp_path):
    path = save(tmp_path / "d.npz", x=numbered(5))
    assert "a scalar without a batch axis" in refusal(path, InputSpec("x", (), FLOAT))


# Data cards


def test_a_card_maps_names_scales_and_lays_out(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
    (tmp_path / "files").mkdir()
    save(tmp_path / "files/d.npz", x_train=stored, y=np.arange(6), x_test=stored[:2], y_test=np.array([4, 5]))
    card = write(
        tmp_path / "card.yaml",
        "file: files/d.npz\ninputs: {image: x_train, of_another_model: x_train}\nlabels: y\n"
        "test_inputs: {image: x_test}\ntest_labels: y_test\n"
        "layout: NHWC\nscale: 1/255\nmean: [0.5, 0.25, 0.125]\nstd: [0.5, 1, 2]\n",
    )
    dataset = load_dataset(card, [InputSpec("image", (None, 3, 4, 5), FLOAT)])
    (batch,) = dataset.calibration.batches(10)
    expected = ((stored / 255 - [0.5, 0.25, 0.125]) / [0.5, 1, 2]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(batch.inputs["image"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.labels, np.arange(6))
    (held_out,) = dataset.held_out.batches(10)
    np.testing.assert_allclose(held_out.inputs["image"], expected[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(held_out.labels, [4, 5])
    assert dataset.source == str(card)


@pytest.mark.parametrize(
    ("layout", "stored_shape", "model_shape", "axes"),
    [
        ("NHW", (5, 4, 6), (None, 1, 4, 6), None),
        ("NHW", (5, 4, 6), (None, 4, 6, 1), None),
        ("NCHW", (5, 3, 4, 6), (None, 4, 6, 3), (0, 2, 3, 1)),
        ("NHWC", (5, 4, 6, 3), (None, 3, 4, 6), (0, 3, 1, 2)),
        ("NHWC", (5, 4, 6, 3), (None, 4, 6, 3), (0, 1, 2, 3)),
    ],
)
def test_layouts(tmp_path, layout, stored_shape, model_shape, axes):
    stored = np.random.default_rng(0).random(stored_shape).astype(np.float32)
    save(tmp_path / "d.npz", image=stored, test_image=stored)
    card = write(tmp_path / "c.yml", f"file: d.npz\nlayout: {layout}\n")
    (batch,) = load_dataset(card, [InputSpec("image", model_shape, FLOAT)]).calibration.batches(9)
    expected = stored.transpose(axes) if axes else stored.reshape(batch.inputs["image"].shape)
    np.testing.assert_array_equal(batch.inputs["image"], expected)


@pytest.mark.parametrize(("resize", "model_size"), [("true", 6), ("[6, 6]", None)])
def test_resize_keeps_constant_images_constant_and_gradients_monotonous(tmp_path, resize, model_size):
    flat = np.full((2, 1, 12, 12), 100, np.uint8)
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8) * 20, (2, 1, 12, 12))
    save(tmp_path / "d.npz", image=np.concatenate([flat, ramp]), test_image=flat)
    card = write(tmp_path / "c.yaml", f"file: d.npz\nscale: 1\nresize: {resize}\n")
    spec = InputSpec("image", (None, 1, model_size, model_size), FLOAT)
    (batch,) = load_dataset(card, [spec]).calibration.batches(9)
    images = batch.inputs["image"]
    assert images.shape == (4, 1, 6, 6)
    np.testing.assert_array_equal(images[:2], 100)
    assert (np.diff(images[2:], axis=3) > 0).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file: [", "is not YAML: "),
        ("hello", "is not a data card: it must name at least a file (file: data.npz)"),
        ("scale: 1", "file: Field required"),
        ("file: d.npz\nscales: 1", "Extra inputs are not permitted"),
        ("file: d.npz\nscale: one", "scale: 'one' is not a number"),
        ("file: d.npz\nscale: 1/0", "scale: '1/0' is not a number"),
        ("file: d.npz\nscale: .nan", "scale: Input should be a finite number"),
        ("file: d.npz\nstd: [1, 0]", "std.1: Input should be greater than 0"),
        ("file: d.npz\nlayout: NWH", "layout: Input should be 'NCHW', 'NHWC' or 'NHW'"),
        ("file: d.npz\nresize: [0, 3]", "resize: must be true, false or [height, width] in pixels"),
        ("file: other.yaml", "file names another data card (other.yaml), not an .npz or a folder of images"),
        ("file: folder\nlabels: y", "folder is a folder of images, which has no arrays to name"),
        ("file: gone.npz", "no such file"),
        ("file: d.npz", "array 'image' is uint8, but the model's input 'image' expects float32"),
        ("file: d.npz\nlabels: y\nscale: 1", "has no array 'y' for the labels; it has 'image'"),
        ("file: d.npz\ninputs: {image: x}\nscale: 1", "has no array 'x' for the model's input 'image' (N, 1, 4, 4)"),
        ("file: d.npz\ntest_inputs: {image: x}\nscale: 1", "has no array 'x' for the model's input 'image'"),
        ("file: d.npz\nscale: 1\nlayout: NHW", "array 'image' has shape (N, 1, 4, 4), which is not of layout NHW"),
        ("file: d.npz\nmean: [1, 2]", "array 'image': mean has 2 numbers, one for each channel"),
        ("file: d.npz\nscale: 1\nresize: [5, 5]", "has shape (N, 1, 4, 4), once prepared (N, 1, 5, 5), but the"),
    ],
)
def test_a_card_that_does_not_fit(tmp_path, text, expected):
    save(tmp_path / "d.npz", image=np.zeros((5, 1, 4, 4), np.uint8))
    (tmp_path / "folder").mkdir()
    sentence = refusal(write(tmp_path / "card.yaml", text), IMAGE)
    assert expected in sentence and str(tmp_path) in sentence


def test_layout_needs_an_image_input(tmp_path):
    save(tmp_path / "d.npz", x=numbered(5))
    card = write(tmp_path / "c.yaml", "file: d.npz\nlayout: NHWC\n")
    assert "the model's input 'x' (N, 3) does not take images" in refusal(card)


# Folders of images


@pytest.fixture
def photos(tmp_path):
    """Two classes of ten RGB images each, 8 x 6 pixels: red ones and blue ones."""
    for folder, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 6), colour).save(tmp_path / "photos" / folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("channels_first", [True, False])
def test_class_folders_give_images_and_labels(photos, channels_first):
    shape = (None, 3, 4, 5) if channels_first else (None, 4, 5, 3)
    dataset = load_dataset(photos, [InputSpec("image", shape, FLOAT)], seed=1)
    assert len(dataset.calibration) == 18 and len(dataset.held_out) == 2
    seen = 0
    for batch in dataset.calibration.batches(4):
        images = batch.inputs["image"] if channels_first else batch.inputs["image"].transpose(0, 3, 1, 2)
        assert images.shape[1:] == (3, 4, 5) and images.dtype == np.float32
        for image, label in zip(images, batch.labels, strict=True):
            colour = (0, 0, 1) if label == 0 else (1, 0, 0)  # blue comes first by name
            np.testing.assert_array_equal(image, np.broadcast_to(np.reshape(colour, (3, 1, 1)), image.shape))
            seen += 1
    assert seen == 18


def test_loose_images_have_no_labels_and_become_gray_where_the_model_wants_it(photos):
    dataset = load_dataset(photos / "red", [InputSpec("image", (None, 1, 4, 4), FLOAT)])
    assert not dataset.calibration.has_labels
    (batch,) = dataset.calibration.batches(20)
    np.testing.assert_allclose(batch.inputs["image"], 76 / 255, atol=1e-6)  # ITU-R 601: 0.299 of red


def test_a_card_normalises_a_folder(photos):
    card = write(photos.parent / "c.yaml", "file: photos\nmean: [0.5, 0, 0]\nstd: [0.5, 1, 0.25]\nresize: [4, 4]\n")
    dataset = load_dataset(card, [InputSpec("image", (None, 3, None, None), FLOAT)])
    (batch,) = dataset.calibration.batches(20)
    expected = np.where(batch.labels[:, None] == 0, [-1, 0, 4], [1, 0, 0])
    np.testing.assert_allclose(batch.inputs["image"].mean(axis=(2, 3)), expected, atol=1e-6)
    raw = load_dataset(
        write(photos.parent / "r.yaml", "file: photos\nscale: 1\n"), [InputSpec("image", (None, 3, 4, 4), FLOAT)]
    )
    assert next(raw.calibration.batches(20)).inputs["image"].max() == 255


def test_images_are_decoded_batch_by_batch(tmp_path):
    for number in range(40):
        Image.new("L", (256, 256), number).save(tmp_path / f"{number}.png")
    tracemalloc.start()
    try:
        split = load_dataset(tmp_path, [InputSpec("image", (None, 1, 256, 256), FLOAT)]).calibration
        count = sum(len(batch.inputs["image"]) for batch in split.batches(2))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 36
    assert peak < 36 * 256 * 256 * 4 / 3


def test_folders_that_do_not_fit(photos):
    rgb = InputSpec("image", (None, 3, 4, 4), FLOAT)
    assert "feeds one input, but the model has image, x" in refusal(photos, rgb, VECTOR)
    assert "does not take images" in refusal(photos, VECTOR)
    open_size = InputSpec("image", (None, 3, None, None), FLOAT)
    assert "takes images of any size; name one in a data card (resize: [height, width])" in refusal(photos, open_size)
    layout = write(photos.parent / "l.yaml", "file: photos\nlayout: NHWC\n")
    assert "layout (NHWC) is for arrays" in refusal(layout, rgb)
    size = write(photos.parent / "s.yaml", "file: photos\nresize: [9, 9]\n")
    assert "resize gives images of shape (N, 3, 9, 9), but the model's input 'image' expects" in refusal(size, rgb)
    (photos / "green").mkdir()
    assert "the class folder 'green' holds no images" in refusal(photos, rgb)
    assert "holds no images (.bmp, " in refusal(photos / "green", rgb)
    Image.new("RGB", (8, 6)).save(photos / "loose.png")
    assert "has images both in sub-folders and beside them (such as loose.png)" in refusal(photos, rgb)


def test_files_that_are_no_images(photos):
    rgb = InputSpec("image", (None, 3, 4, 4), FLOAT)
    whole = (photos / "red/3.png").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (photos / "red/3.png").write_bytes(content)
        assert f"{photos}/red/3.png: cannot be read as an image" in refusal(photos, rgb)
    Image.fromarray(np.full((6, 8), 40000, np.uint16)).save(photos / "red/3.png")
    assert "red/3.png: has more than 8 bits a channel (mode I;16)" in refusal(photos, rgb)


# module:function


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write Python text as a module in the current folder; gives back its name."""
    names = []

    def make(text: str) -> str:
        names.append(f"batches_{tmp_path.name}_{len(names)}".replace("-", "_"))
        write(tmp_path / f"{names[-1]}.py", f"import numpy as np\n{text}")
        return names[-1]

    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield make
    assert sys.path == before
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_s_batches_are_read(module):
    name = module(
        "def batches():\n"
        "    for start in (0, 8, 16):\n"
        "        numbers = np.arange(start, start + (8 if start < 16 else 4))\n"
        "        yield {'x': np.stack([numbers * 3.0] * 3, 1), 'labels': numbers % 4, 'unused': None}\n"
    )
    dataset = load_dataset(f"{name}:batches", [VECTOR])
    assert dataset.source == f"{name}:batches"
    assert sorted(in_split(dataset.calibration) + in_split(dataset.held_out)) == list(range(20))
    (batch,) = dataset.calibration.batches(50)
    assert batch.inputs["x"].dtype == np.float32
    np.testing.assert_array_equal(batch.labels, batch.inputs["x"][:, 0] // 3 % 4)


def test_a_function_s_batches_are_not_kept_in_memory(module):
    name = module("def f():\n    for n in range(64):\n        yield {'x': np.full((64, 1024), n, np.float32)}\n")
    tracemalloc.start()
    try:
        split = load_dataset(f"{name}:f", [InputSpec("x", (None, 1024), FLOAT)]).calibration
        count = sum(len(batch.inputs["x"]) for batch in split.batches(64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4096 - 409
    assert peak < 64 * 64 * 4096 / 8


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return []", "yields no batches"),
        ("return [3]", "batch 0 is a int, not a dictionary from input name to array"),
        ("return [{'y': np.ones((2, 3))}]", "batch 0 has no array 'x'; it has 'y'"),
        ("return [{'x': np.ones((2, 3))}, {'x': np.ones((2, 4))}]", "batch 1: array 'x' has samples of shape (4,)"),
        ("return [{'x': np.ones((2, 3))}, {'x': np.ones((2, 3), 'f')}]", "and type float32, but in the first batch"),
        ("return [{'x': np.ones((2, 3))}, {'x': np.ones((2, 3)), 'labels': [0, 1]}]", "batch 1 has labels, unlike"),
        ("return [{'x': np.ones((2, 3)), 'labels': [0, 1]}, {'x': np.ones((2, 3))}]", "batch 1 lacks labels, unlike"),
        ("return [{'x': np.ones((2, 3)), 'labels': [0]}]", "holds arrays of different lengths: {'x': 2, 'labels': 1}"),
        ("return [{'x': np.array([None, 1])}]", "batch 0: 'x' is not an array of numbers"),
        ("return [{'x': np.ones((2, 4))}]", "array 'x' has shape (N, 4), but the model's input 'x' expects (N, 3)"),
        ("return [{'x': np.full((9, 3), np.nan)}]", "array 'x' holds NaN or infinity"),
        ("raise KeyError('oops')", "failed with KeyError: 'oops'"),
        ("return [{'x': [[1.0], [1.0, 2.0]]}]", "batch 0: 'x' is not an array of numbers"),
    ],
)
def test_a_function_that_does_not_fit(module, body, expected):
    source = f"{module('def f():' + chr(10) + '    ' + body)}:f"
    sentence = refusal(source)
    assert sentence.startswith(source) and expected in sentence


def test_a_function_that_is_not_there(module):
    name = module("f = 3")
    assert "failed with AttributeError" in refusal(f"{name}:g")
    assert "is not a function" in refusal(f"{name}:f")
    assert "failed with ModuleNotFoundError" in refusal("no_such_module_of_ours:f")


# The command line's --data


def test_data_for_all_tasks_and_for_one():
    assert parse_data_option(["all.npz"], ["a", "b"]) == {"a": "all.npz", "b": "all.npz"}
    assert parse_data_option(["b=b.npz", "all.npz"], ["a", "b"]) == {"a": "all.npz", "b": "b.npz"}
    assert parse_data_option(["a=x=1.npz", "b=m:f"], ["a", "b"]) == {"a": "x=1.npz", "b": "m:f"}


def test_a_path_with_an_equals_sign_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.npz").touch()
    assert parse_data_option(["a=b.npz"], ["a", "c"]) == {"a": "a=b.npz", "c": "a=b.npz"}
    assert parse_data_option(["a=c.npz", "c=a=b.npz"], ["a", "c"]) == {"a": "c.npz", "c": "a=b.npz"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "--data: the task 'a' has no data; give --data D for all tasks or --data a=D"),
        ([""], "the task 'a' has no data"),
        (["a=x.npz"], "the task 'b' has no data"),
        (["a=", "all.npz"], "the task 'a' has no data"),
        (["c=x.npz"], "--data c=x.npz: there is no task 'c'; the tasks are a, b"),
        (["x.npz", "y.npz"], "--data: both x.npz and y.npz are given for all tasks"),
        (["a=x.npz", "a=y.npz", "z.npz"], "--data: both x.npz and y.npz are given for the task 'a'"),
    ],
)
def test_data_options_that_do_not_fit(values, expected):
    with pytest.raises(UsageError) as caught:
        parse_data_option(values, ["a", "b"])
    assert expected in str(caught.value)


# Real data


@pytest.mark.parametrize(("task", "at_least"), [("digits", 0.975), ("fashion", 0.87)])
def test_the_demo_s_network_names_the_demo_s_images(task, at_least):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(DEMO / f"{task}.onnx", providers=["CPUExecutionProvider"])
    (feed,) = session.get_inputs()
    spec = InputSpec(feed.name, (None, *feed.shape[1:]), FLOAT)
    dataset = load_dataset(DEMO / f"{task}.yaml", [spec])
    assert not dataset.calibration.has_labels
    right = 0
    for batch in dataset.held_out.batches(256):
        (logits,) = session.run(None, batch.inputs)
        right += int((logits.argmax(axis=1) == batch.labels).sum())
    assert right / len(dataset.held_out) >= at_least


def test_the_demo_stays_small():
    assert sum(path.stat().st_size for path in DEMO.glob("*.npz")) <= 2e6
    assert all(path.stat().st_size <= 4e5 for path in DEMO.glob("*.onnx"))


@pytest.mark.parametrize("task", ["digits", "fashion"])
def test_the_demo_s_networks_keep_their_batch_norms_and_batch_axis(task):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(DEMO / f"{task}.onnx").graph
    assert [node.op_type for node in graph.node].count("BatchNormalization") == 4
    assert (graph.input[0].name, graph.output[0].name) == ("image", "logits")
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


@pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not beside this checkout")
def test_mnist_as_it_is_distributed_is_read_through_a_card(tmp_path):
    card = write(
        tmp_path / "mnist.yaml",
        f"file: {(SHARED / 'mnist.npz').resolve()}\ninputs: {{image: x_train}}\nlabels: y_train\n"
        "test_inputs: {image: x_test}\ntest_labels: y_test\nlayout: NHW\nscale: 1/255\n",
    )
    dataset = load_dataset(card, [InputSpec("image", (None, 1, 28, 28), FLOAT)])
    assert (len(dataset.calibration), len(dataset.held_out)) == (60000, 10000)
    with np.load(SHARED / "mnist.npz") as archive:
        images, labels = archive["x_test"][:100, None] / 255, archive["y_test"][:100]
    first = next(dataset.held_out.batches(100))
    np.testing.assert_allclose(first.inputs["image"], images, atol=1e-7)
    np.testing.assert_array_equal(first.labels, labels)
