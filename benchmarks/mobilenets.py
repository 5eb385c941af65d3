"""Train the two MobileNets that `zip_mobilenets.py` starts from, at one core's scale, and cache them as ONNX files.

Zippering (Chou et al. 2019), section 4, zips MobileNetV1s of full width on 224x224 images (ImageNet, 71.02 %, and
DeepFashion, 66.21 %). Here: the same 13 blocks and strides on 32x32 images with a quarter of the width, the first
convolution with a stride of 1 (otherwise the last maps were one pixel), trained on CIFAR-10 and on Fashion-MNIST;
0.22 million parameters. Batch norms stay in the file. The recipe is that of `five_tasks.py`, without bfloat16, which is
slower for depthwise convolutions. Run as a script it trains one seed; on one quiet core that takes about ten minutes.
"""

from pathlib import Path

from datasets import CACHE
from five_tasks import COLOURS, train_all, trained
from torch import nn

FOLDER = CACHE / "mobilenets"
EPOCHS = {"cifar10": 12, "fashion": 4}
"""The tasks, the first of which gives the stem its channel order, and how long each network trains."""
FIRST = 8
BLOCKS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1))
"""Width and stride of each block; the first convolution has FIRST channels."""


def mobilenet(task: str, seed: int = 0) -> Path:
    """The ONNX file of a trained network, called after its task."""
    return trained(mobile_network, task, seed, EPOCHS[task], FOLDER / f"seed{seed}" / f"{task}.onnx", bfloat16=False)


def mobile_network(classes: int) -> nn.Sequential:
    parts = [*_layer(COLOURS, FIRST, 3)]
    width = FIRST
    for wider, stride in BLOCKS:
        parts += [*_layer(width, width, 3, stride, groups=width), *_layer(width, wider, 1)]
        width = wider
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _layer(inside: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU()


if __name__ == "__main__":
    train_all(__doc__, EPOCHS, mobilenet)
