"""A small network for small images, as for MNIST's digits: convolution, batch norm, activation and pooling, some times over; a dense head.

Ours alone (`model_type` "cnn"): LeCun et al. 1998's design with what came later. Each layer halves height and width, or divides them by its
number in `pools`, 1 for not at all; the dense head reads the last state whole, so images must have the size that it was built for. In the
file, tensors are named and lie as in a PyTorch module of `layers[i].conv`, `layers[i].norm`, `dense`, which reads the flattened [C, H, W],
and `classifier`.
"""

import math
from collections.abc import Sequence

from bigflax.models.convnet import Chain, Conv, ConvNet, ImageHead, MaxPool, Parts, Unit
from bigflax.models.families.bert import layer
from bigflax.models.families.resnet import unit_lines
from bigflax.nn import normal, pick

SIZES = {"tiny": dict(hidden_sizes=(8, 16), dense_size=32), "mnist": dict(num_labels=10)}
LAYERS = 8  # an image of 256 x 256 has one pixel behind them


def build(
    *,
    num_channels: int = 1,
    image_size: int = 28,
    hidden_sizes: Sequence[int] = (32, 64),
    pools: Sequence[int] | None = None,
    kernel_size: int = 3,
    dense_size: int = 128,
    batch_norm: bool = True,
    hidden_act: str = "relu",
    dropout: float = 0.25,
    layer_norm_eps: float = 1e-5,
    initializer_range: float = 0.05,
    head: str | None = "image_classification",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> ConvNet:
    windows = [2] * len(hidden_sizes) if pools is None else list(pools)
    if not 0 < len(hidden_sizes) <= LAYERS or len(windows) != len(hidden_sizes) or min(windows) < 1 or image_size < math.prod(windows):
        raise ValueError(
            f"hidden_sizes {list(hidden_sizes)} are not 1 to {LAYERS} layers, after which pooling by {windows} leaves something of an image "
            f"of {image_size} pixels"
        )
    init, parts = normal(initializer_range), []
    for i, (features, window) in enumerate(zip(hidden_sizes, windows, strict=True)):
        axes = "embed -> _" if i else "_ -> embed"
        conv = Conv(features, kernel_size, bias=not batch_norm, axes=axes, init=init)
        parts += [Unit(conv, hidden_act, layer_norm_eps if batch_norm else None), MaxPool(window, window)]
    heads = {None: None, "image_classification": ImageHead(num_labels, dense_size, hidden_act, dropout, init)}
    return ConvNet(
        stem=Chain(Parts(tuple(parts))), pooled=False, head=pick(heads, head, "head"), channels=num_channels, image_size=image_size, dtype=dtype,
    )  # fmt: skip


PREFIX = ""
NAMES = {f"layers.{i}.conv.bias": (f"stem/{2 * i}/conv/b", "O") for i in range(LAYERS)}
for _i in range(LAYERS):
    NAMES |= unit_lines(f"layers.{_i}", f"stem/{2 * _i}", "conv", "norm")
_DENSE = {"dense.weight": ("head/w", "F (C H W) -> H W C F"), "dense.bias": ("head/b", "F")}
HEADS = {None: ("CnnModel", {}), "image_classification": ("CnnForImageClassification", _DENSE | layer("classifier", "head/scores"))}
BUFFERS = ()
IGNORED = ()
FIXED = {}
