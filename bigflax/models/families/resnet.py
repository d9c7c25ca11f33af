"""ResNet v1.5: bottlenecks whose 3 x 3 convolution has the stride, or pairs of 3 x 3 ("basic"); batch norm. He et al. 2015 (arXiv 1512.03385).

Arguments are the fields of the Hugging Face config (`model_type` "resnet"), with its defaults.
"""

from collections.abc import Sequence

from flax.linen.initializers import variance_scaling

from bigflax.models.convnet import Chain, Conv, ConvNet, ImageHead, Layers, MaxPool, Parts, Residual, Stage, Unit, groups
from bigflax.nn import pick

_IMAGENET = dict(num_labels=1000)
_BASIC = dict(**_IMAGENET, hidden_sizes=(64, 128, 256, 512), layer_type="basic")
SIZES = {
    "tiny": dict(embedding_size=8, hidden_sizes=(16, 32), depths=(2, 3), image_size=32),
    "18": dict(**_BASIC, depths=(2, 2, 2, 2)),
    "34": dict(**_BASIC, depths=(3, 4, 6, 3)),
    "50": dict(**_IMAGENET),
    "101": dict(**_IMAGENET, depths=(3, 4, 23, 3)),
    "152": dict(**_IMAGENET, depths=(3, 8, 36, 3)),
}
STAGES = 8  # twice as many as anyone has published


def build(
    *,
    num_channels: int = 3,
    embedding_size: int = 64,
    hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
    depths: Sequence[int] = (3, 4, 6, 3),
    layer_type: str = "bottleneck",
    hidden_act: str = "relu",
    downsample_in_first_stage: bool = False,
    downsample_in_bottleneck: bool = False,
    head: str | None = "image_classification",
    num_labels: int = 2,
    image_size: int = 224,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> ConvNet:
    check_stages(hidden_sizes, depths)
    init = variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015 (arXiv 1502.01852)

    def unit(features: int, kernel: int, stride: int = 1, act: str | None = "relu", axes: str = "embed -> mlp") -> Unit:
        return Unit(Conv(features, kernel, stride, axes=axes, init=init), act=act)

    def basic(features: int, stride: int) -> tuple[Unit, ...]:
        return unit(features, 3, stride), unit(features, 3, act=None, axes="mlp -> embed")

    def bottleneck(features: int, stride: int) -> tuple[Unit, ...]:
        early, late = (stride, 1) if downsample_in_bottleneck else (1, stride)
        return unit(features // 4, 1, early), unit(features // 4, 3, late), unit(features, 1, act=None, axes="mlp -> embed")

    body = pick({"basic": basic, "bottleneck": bottleneck}, layer_type, "layer_type")

    def stage(before: int, features: int, depth: int, stride: int) -> Stage:
        shortcut = unit(features, 1, stride, None, "embed -> _") if before != features or stride != 1 else None
        first = Residual(Chain(Parts(body(features, stride))), shortcut, hidden_act)
        rest = Residual(Chain(Parts(body(features, 1))), None, hidden_act)
        return Stage(Layers(groups(first, rest, depth)), remat, unroll)

    strides = [2 if downsample_in_first_stage else 1, *[2] * (len(depths) - 1)]
    stages = map(stage, (embedding_size, *hidden_sizes), hidden_sizes, depths, strides)
    heads = {None: None, "image_classification": ImageHead(num_labels, init=variance_scaling(1 / 3, "fan_in", "uniform"))}
    return ConvNet(
        stem=Chain(Parts((unit(embedding_size, 7, 2, hidden_act, "_ -> embed"), MaxPool(3, 2, 1)))), stages=Parts(tuple(stages)),
        pooler_shape=(1, 1), head=pick(heads, head, "head"), channels=num_channels, image_size=image_size, dtype=dtype,
    )  # fmt: skip


def check_stages(hidden_sizes: Sequence[int], depths: Sequence[int]) -> None:
    """Raises ValueError where the two lists cannot be of one network."""
    if len(hidden_sizes) != len(depths) or not 0 < len(depths) <= STAGES or min(depths) < 1:
        raise ValueError(f"hidden_sizes {list(hidden_sizes)} and depths {list(depths)} must list the same stages, 1 to {STAGES} of them")


def unit_lines(name: str, leaf: str, conv: str = "convolution", norm: str = "normalization") -> dict:
    """The lines of a convolution without bias and its batch norm, as PyTorch stores them."""
    return {
        f"{name}.{conv}.weight": (f"{leaf}/conv/w", "O I H W -> H W I O"),
        f"{name}.{norm}.weight": (f"{leaf}/norm/scale", "C"),
        f"{name}.{norm}.bias": (f"{leaf}/norm/bias", "C"),
        f"{name}.{norm}.running_mean": (f"{leaf}/norm/mean", "C"),
        f"{name}.{norm}.running_var": (f"{leaf}/norm/var", "C"),
        f"{name}.{norm}.num_batches_tracked": (f"{leaf}/norm/count", ""),
    }


PREFIX = "resnet."
NAMES = unit_lines("embedder.embedder", "stem/0")
for _s in range(STAGES):
    _theirs, _ours = f"encoder.stages.{_s}.layers.{{l}}", f"stages_{_s}/blocks"
    for _i in range(3):
        NAMES |= unit_lines(f"{_theirs}.layer.{_i}", f"{_ours}/body/{_i}")
    NAMES |= unit_lines(f"{_theirs}.shortcut", f"{_ours}/shortcut")
_SCORES = {"classifier.1.weight": ("head/scores/w", "F D -> D F"), "classifier.1.bias": ("head/scores/b", "F")}
HEADS = {None: ("ResNetModel", {}), "image_classification": ("ResNetForImageClassification", _SCORES)}
BUFFERS = ()
IGNORED = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "num_hidden_layers")
FIXED = {}
