"""MobileNetV2: inverted residuals with linear bottlenecks, depthwise 3 x 3 convolutions. Sandler et al. 2018 (arXiv 1801.04381), table 2.

Arguments are the fields of the Hugging Face config (`model_type` "mobilenet_v2"), with its defaults. Batch norm's momentum is 0.997 as in
transformers: there the share of the new batch, so that the running statistics are about those of the last batch trained on (in
TensorFlow, where the number comes from, it is the share of the old ones).
"""

import itertools

from bigflax.models.convnet import Chain, Conv, ConvNet, Group, ImageHead, Layers, Parts, Residual, Stage, Unit
from bigflax.models.families.bert import layer
from bigflax.models.families.resnet import unit_lines
from bigflax.nn import normal, pick

_IMAGENET = dict(num_labels=1001)  # and one for none of them
SIZES = {
    "tiny": dict(depth_multiplier=0.25, image_size=32),
    "1.0-224": dict(**_IMAGENET),
    "0.75-160": dict(**_IMAGENET, depth_multiplier=0.75, image_size=160),
    "0.35-96": dict(**_IMAGENET, depth_multiplier=0.35, image_size=96),
}
WIDTHS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


def build(
    *,
    num_channels: int = 3,
    image_size: int = 224,
    depth_multiplier: float = 1.0,
    depth_divisible_by: int = 8,
    min_depth: int = 8,
    expand_ratio: float = 6.0,
    output_stride: int = 32,
    finegrained_output: bool = True,
    hidden_act: str = "relu6",
    tf_padding: bool = True,
    classifier_dropout_prob: float = 0.8,
    initializer_range: float = 0.02,
    layer_norm_eps: float = 0.001,
    head: str | None = "image_classification",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> ConvNet:
    init = normal(initializer_range)

    def width(channels: float) -> int:
        """Rounded to a multiple, but by no more than a tenth downwards."""
        near = max(min_depth, int(round(channels) + depth_divisible_by / 2) // depth_divisible_by * depth_divisible_by)
        return near + depth_divisible_by if near < 0.9 * round(channels) else near

    def unit(
        features: int, kernel: int, stride: int = 1, dilation: int = 1, *, deep: bool = False, act: str | None = hidden_act, axes: str
    ):
        conv = Conv(
            features, kernel, stride, "same" if tf_padding else "torch", -1 if deep else 1, dilation, axes="_ -> mlp" if deep else axes, init=init,
        )  # fmt: skip
        return Unit(conv, act, layer_norm_eps, 0.997)

    def inverted(before: int, features: int, stride: int, dilation: int) -> Residual:
        wide = width(before * expand_ratio)
        units = (
            unit(wide, 1, axes="embed -> mlp"), unit(wide, 3, stride, dilation, deep=True, axes=""), unit(features, 1, act=None, axes="mlp -> embed"),
        )  # fmt: skip
        return Residual(Chain(Parts(units)), adds=stride == 1 and before == features)

    widths, layers, reached, dilation = [width(n * depth_multiplier) for n in WIDTHS], [], 2, 1
    for before, after, stride in zip(widths, widths[1:], STRIDES, strict=False):
        if reached == output_stride:  # no smaller: the kernels spread instead, from the next layer on
            layers.append((before, after, 1, dilation))
            dilation *= stride
        else:
            layers.append((before, after, stride, 1))
            reached *= stride
    alike = [(kind, len(list(group))) for kind, group in itertools.groupby(layers)]
    groups = tuple(Group((inverted(*kind),), number if number > 1 else 0) for kind, number in alike)
    narrow = width(32 * depth_multiplier)
    stem = (
        unit(narrow, 3, 2, axes="_ -> mlp"), unit(narrow, 3, deep=True, axes=""), unit(widths[0], 1, act=None, axes="mlp -> embed"),
    )  # fmt: skip
    last = 1280 if finegrained_output and depth_multiplier < 1 else width(1280 * depth_multiplier)
    heads = {None: None, "image_classification": ImageHead(num_labels, dropout=classifier_dropout_prob, init=init)}
    return ConvNet(
        stem=Chain(Parts(stem)), stages=Parts((Stage(Layers(groups), remat, unroll),)), last=unit(last, 1, axes="embed -> mlp"), states="layers",
        head=pick(heads, head, "head"), channels=num_channels, image_size=image_size, dtype=dtype,
    )  # fmt: skip


PREFIX = "mobilenet_v2."
_STEM, _LAYER = ("first_conv", "conv_3x3", "reduce_1x1"), ("expand_1x1", "conv_3x3", "reduce_1x1")
NAMES = unit_lines("conv_1x1", "last")
for _i in range(3):
    NAMES |= unit_lines(f"conv_stem.{_STEM[_i]}", f"stem/{_i}") | unit_lines(f"layer.{{l}}.{_LAYER[_i]}", f"stages_0/blocks/body/{_i}")
HEADS = {
    None: ("MobileNetV2Model", {}),
    "image_classification": ("MobileNetV2ForImageClassification", layer("classifier", "head/scores")),
}
BUFFERS = ()
IGNORED = ("semantic_loss_ignore_index",)
FIXED = {"first_layer_is_expansion": True}
