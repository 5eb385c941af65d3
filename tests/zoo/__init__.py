"""The zoo: the architectures of the field as small torch modules, for the permutation law.

Each keeps the structure of the real one at small widths, which differ from all spatial sizes, so that an axis cannot be
mistaken for another. Weights are random and seeded; nothing is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from zoo.detectors import RetinaNet, Ssd, Yolo
from zoo.image_to_image import DcganGenerator, ProjectedGenerator, StyleNet, SubPixelNet, UNet
from zoo.layers import randomise
from zoo.mobile import EfficientNet, MobileNetV1, MobileNetV2, MobileNetV3, ShuffleNetV2
from zoo.plain import DenseNet, Inception, LeNet, Mlp, SqueezeNet, Vgg
from zoo.recurrent import Crnn, GruClassifier, LstmClassifier
from zoo.residual import ChannelsLastIsland, ConvNext, ResNet
from zoo.swin import Swin
from zoo.transformers import Bert, Gpt, Llama, MlpMixer, Vit
from zoo.unusual import BLOCKS, Around, LearnedQueries

__all__ = ["ZOO", "Entry", "build"]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        make: makes the module, with whatever values torch gives it.
        inputs: name -> shape without the batch of a float input, or (shape, N) for integers below N.
        kind: "cnn", "transformer", "recurrent", "unusual" or "other"; the share that must be permutable depends on it.
        free: axis -> name of the input axes, besides the batch, that may vary.
        oldest: the first opset that has its operators (the legacy exporter knows fused attention from 14 on).
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, tuple[int, ...] | tuple[tuple[int, ...], int]]
    kind: str
    free: dict[int, str] = field(default_factory=dict)
    oldest: int = 11

    def examples(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """One tensor for each input, [batch, ...]; seeded."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for shape in self.inputs.values():
            if isinstance(shape[0], tuple):
                made.append(torch.randint(0, shape[1], (batch, *shape[0]), generator=generator))
            else:
                made.append(torch.rand((batch, *shape), generator=generator))
        return tuple(made)


_SIZES = {2: "height", 3: "width"}
_LENGTH = {1: "length"}


def _fixed_size(make: Callable[[], nn.Module], size: int, channels: int = 3) -> Entry:
    return Entry(make, {"image": (channels, size, size)}, "cnn")


def _any_size(make: Callable[[], nn.Module], size: int, channels: int = 3) -> Entry:
    return Entry(make, {"image": (channels, size, size)}, "cnn", _SIZES)


def _vision(make: Callable[[], nn.Module], oldest: int = 11) -> Entry:
    return Entry(make, {"image": (3, 32, 32)}, "transformer", oldest=oldest)


def _text(make: Callable[[], nn.Module], kind: str = "transformer", oldest: int = 11) -> Entry:
    return Entry(make, {"ids": ((14,), 60)}, kind, _LENGTH, oldest)


_BERT_INPUTS = {"input_ids": ((14,), 60), "attention_mask": ((14,), 2), "token_type_ids": ((14,), 2)}

ZOO: dict[str, Entry] = {
    "mlp": Entry(Mlp, {"image": (1, 28, 28)}, "other"),
    "lenet": _fixed_size(LeNet, 32, channels=1),
    "vgg": _fixed_size(Vgg, 32),
    "resnet_basic": _any_size(ResNet, 48),
    "resnet_bottleneck": _any_size(lambda: ResNet((10, 14, 18), expansion=4), 48),
    "resnext": _any_size(lambda: ResNet((20, 28, 36), expansion=2, groups=4), 48),
    "resnet_se": _any_size(lambda: ResNet(excite=7), 48),
    "resnet_group_norm": _any_size(lambda: ResNet(norm=lambda width: nn.GroupNorm(4, width)), 48),
    "mobilenet_v1": _any_size(MobileNetV1, 32),
    "mobilenet_v2": _any_size(MobileNetV2, 32),
    "mobilenet_v3": _any_size(MobileNetV3, 32),
    "efficientnet": _any_size(EfficientNet, 32),
    "shufflenet_v2": _any_size(ShuffleNetV2, 64),
    "densenet": _any_size(DenseNet, 48),
    "squeezenet": _any_size(SqueezeNet, 48),
    "inception": _any_size(Inception, 32),
    "convnext": _any_size(ConvNext, 32),
    "channels_last_island": _any_size(ChannelsLastIsland, 32),
    "unet": _fixed_size(UNet, 32),
    "unet_bilinear": _any_size(lambda: UNet(bilinear=True), 34),
    "dcgan": Entry(DcganGenerator, {"code": (40, 1, 1)}, "cnn"),
    "projected_generator": Entry(ProjectedGenerator, {"code": (40,)}, "cnn"),
    "style_net": _any_size(StyleNet, 32),
    "sub_pixel": _any_size(SubPixelNet, 16, channels=1),
    "ssd": _any_size(Ssd, 64),
    "retinanet": _any_size(RetinaNet, 64),
    "yolo": _fixed_size(Yolo, 64),
    "vit_fused": _vision(lambda: Vit("fused"), oldest=14),
    "vit_matmul": _vision(lambda: Vit("matmul")),
    "vit_torch": _vision(lambda: Vit("torch"), oldest=14),
    "vit_encoder_layer": _vision(lambda: Vit("layer"), oldest=14),
    "mlp_mixer": _vision(MlpMixer),
    "swin": _vision(Swin),
    "learned_queries": Entry(lambda: Around(LearnedQueries), {"image": (3, 20, 20)}, "transformer", oldest=14),
    "bert": Entry(Bert, _BERT_INPUTS, "transformer", _LENGTH),
    "gpt": _text(Gpt),
    "gpt_flattened": _text(lambda: Gpt(flattened=True)),
    "llama": _text(Llama, oldest=14),
    "lstm": _text(LstmClassifier, "recurrent"),
    "gru": Entry(GruClassifier, {"series": (15, 9)}, "recurrent", _LENGTH),
    "crnn": Entry(Crnn, {"image": (1, 16, 48)}, "recurrent", {3: "width"}),
}


ZOO |= {
    name: Entry(partial(Around, block), {"image": (3, 20, 20)}, "unusual", oldest=12 if name == "einsum" else 11)
    for name, block in BLOCKS.items()
}


def build(name: str) -> nn.Module:
    """The network `name` in evaluation mode, with seeded random values everywhere."""
    model = ZOO[name].make()
    randomise(model, seed=sum(name.encode()))
    return model.eval()
