"""Turn the raw data of `../shared/data` into `.npz` files ready to feed, cached under `benchmarks/cache`."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CACHE = ROOT / "benchmarks" / "cache"

CIFAR_MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)[:, None, None]
CIFAR_STD = np.array([0.2023, 0.1994, 0.2010], np.float32)[:, None, None]


def digits(name: str, input_name: str = "input", samples: int = 10_000) -> Path:
    """`mnist` or `fashion_mnist`: `samples` seeded training images and the whole test set, [N, 1, 28, 28] in 0..1."""
    path = CACHE / f"{name}_{samples}.npz"
    if not path.exists():
        with np.load(SHARED / "data" / f"{name}.npz") as raw:
            chosen = np.sort(np.random.default_rng(0).choice(len(raw["x_train"]), samples, replace=False))
            arrays = {
                input_name: _unit(raw["x_train"][chosen]),
                "labels": raw["y_train"][chosen].astype(np.int64),
                f"test_{input_name}": _unit(raw["x_test"]),
                "test_labels": raw["y_test"].astype(np.int64),
            }
        _save(path, arrays)
    return path


def cifar(labels: bool, input_name: str = "input", samples: int = 10_000) -> Path:
    """CIFAR-10 images normalised as the CIFAR networks expect, [N, 3, 32, 32]; with or without their labels."""
    path = CACHE / f"cifar_{samples}{'_labels' if labels else ''}.npz"
    if not path.exists():
        with np.load(SHARED / "data" / "cifar10_jpeg.npz") as raw:
            count = len(raw["label_train"])
            chosen = np.sort(np.random.default_rng(0).choice(count, samples, replace=False))
            arrays = {
                input_name: _decode(raw["jpeg_train"], raw["offset_train"], chosen),
                f"test_{input_name}": _decode(raw["jpeg_test"], raw["offset_test"], np.arange(len(raw["label_test"]))),
            }
            if labels:
                arrays["labels"] = raw["label_train"][chosen].astype(np.int64)
                arrays["test_labels"] = raw["label_test"].astype(np.int64)
        _save(path, arrays)
    return path


def moved_cifar() -> Path:
    """All 50 000 training images of CIFAR-10 four times: as they are, mirrored, and twice moved by up to 3 pixels.

    Seeded; those of the last time are mirrored as well. 2.5 GB.
    """
    path = CACHE / "cifar_moved.npz"
    if not path.exists():
        random = np.random.default_rng(0)
        with np.load(cifar(labels=True, samples=50_000)) as data:
            images, others = data["input"], {name: data[name] for name in ("test_input", "test_labels")}
            labels = np.tile(data["labels"], 4)
        padded = np.pad(images, ((0, 0), (0, 0), (3, 3), (3, 3)), mode="reflect")
        parts = [images, images[..., ::-1]]
        for step in (1, -1):
            corners = random.integers(0, 7, (len(images), 2))
            cut = [padded[n, :, top : top + 32, left : left + 32] for n, (top, left) in enumerate(corners)]
            parts.append(np.stack(cut)[..., ::step])
        _save(path, {"input": np.concatenate(parts), "labels": labels, **others})
    return path


def _unit(images: np.ndarray) -> np.ndarray:
    return (images[:, None] / np.float32(255)).astype(np.float32)


def _decode(jpeg: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    images = np.empty((len(rows), 3, 32, 32), np.float32)
    for place, row in enumerate(rows):
        data = jpeg[offsets[row] : offsets[row + 1]].tobytes()
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255
        images[place] = (pixels.transpose(2, 0, 1) - CIFAR_MEAN) / CIFAR_STD
    return images


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial.npz")
    np.savez(temporary, **arrays)  # not compressed, so that it is memory-mapped in place
    temporary.rename(path)
