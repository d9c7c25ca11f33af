"""ConvNeXt: depthwise 7 x 7 convolutions, layer norms over channels, an MLP four times as wide, layer scale. Liu et al. 2022 (2201.03545).

Arguments are the fields of the Hugging Face config (`model_type` "convnext"), with its defaults. `drop_path_rate` is stochastic depth: of
the last layer, that of the others rising to it evenly, as in transformers.
"""

from collections.abc import Sequence

import numpy as np

from bigflax.models.convnet import Conv, ConvNet, ConvNextBlock, Group, ImageHead, Layers, Parts, Patches, Stage
from bigflax.models.families import resnet
from bigflax.models.families.bert import layer, norm_lines
from bigflax.nn import Mlp, Norm, normal, pick

_IMAGENET = dict(num_labels=1000)
SIZES = {
    "tiny": dict(hidden_sizes=(16, 32), depths=(2, 3), num_stages=2, image_size=32),
    "tiny-224": dict(**_IMAGENET),
    "small-224": dict(**_IMAGENET, depths=(3, 3, 27, 3)),
    "base-224": dict(**_IMAGENET, depths=(3, 3, 27, 3), hidden_sizes=(128, 256, 512, 1024)),
    "large-224": dict(**_IMAGENET, depths=(3, 3, 27, 3), hidden_sizes=(192, 384, 768, 1536)),
}


def build(
    *,
    num_channels: int = 3,
    patch_size: int = 4,
    num_stages: int = 4,
    hidden_sizes: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (3, 3, 9, 3),
    hidden_act: str = "gelu",
    initializer_range: float = 0.02,
    layer_norm_eps: float = 1e-12,
    layer_scale_init_value: float = 1e-6,
    drop_path_rate: float = 0.0,
    image_size: int = 224,
    head: str | None = "image_classification",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> ConvNet:
    resnet.check_stages(hidden_sizes, depths)
    if num_stages != len(depths):
        raise ValueError(f"num_stages {num_stages} is not the number of depths {list(depths)}")
    init = normal(initializer_range)
    norm = lambda: Norm("layer", 1e-6)
    rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())

    def stage(i: int, features: int, depth: int) -> Stage:
        conv = lambda kernel, **how: Conv(features, kernel, bias=True, init=init, **how)
        block = ConvNextBlock(
            conv(7, groups=-1, axes="_ -> _"), norm(), Mlp(4 * features, hidden_act, bias=True, init=init, out_init=init),
            layer_scale_init_value,
        )  # fmt: skip
        down = Patches(conv(2, stride=2, padding="valid", axes="embed -> _"), norm(), norm_first=True) if i else None
        mine = tuple(next(rates) for _ in range(depth)) if drop_path_rate else None
        return Stage(Layers((Group((block,), depth),), down, mine), remat, unroll)

    stem = Conv(hidden_sizes[0], patch_size, patch_size, "valid", bias=True, axes="_ -> embed", init=init)
    heads = {None: None, "image_classification": ImageHead(num_labels, init=init)}
    return ConvNet(
        stem=Patches(stem, norm()), stages=Parts(tuple(map(stage, range(num_stages), hidden_sizes, depths))), norm=Norm("layer", layer_norm_eps),
        head=pick(heads, head, "head"), channels=num_channels, image_size=image_size, dtype=dtype,
    )  # fmt: skip


def _conv(name: str, leaf: str) -> dict:
    return {f"{name}.weight": (f"{leaf}/w", "O I H W -> H W I O"), f"{name}.bias": (f"{leaf}/b", "O")}


PREFIX = "convnext."
NAMES = {
    **_conv("embeddings.patch_embeddings", "stem/conv"), **norm_lines("embeddings.layernorm", "stem/norm"), **norm_lines("layernorm", "norm"),
}  # fmt: skip
for _s in range(resnet.STAGES):
    _theirs, _ours = f"encoder.stages.{_s}.layers.{{l}}", f"stages_{_s}/blocks"
    NAMES |= {
        **norm_lines(f"encoder.stages.{_s}.downsampling_layer.0", f"stages_{_s}/before/norm"),
        **_conv(f"encoder.stages.{_s}.downsampling_layer.1", f"stages_{_s}/before/conv"),
        f"{_theirs}.layer_scale_parameter": (f"{_ours}/scale", "C"),
        **_conv(f"{_theirs}.dwconv", f"{_ours}/conv"),
        **norm_lines(f"{_theirs}.layernorm", f"{_ours}/norm"),
        **{f"{_theirs}.pwconv{i}.weight": (f"{_ours}/mlp/{x}", "F D -> D F") for i, x in ((1, "up"), (2, "down"))},
        **{f"{_theirs}.pwconv{i}.bias": (f"{_ours}/mlp/{x}_bias", "F") for i, x in ((1, "up"), (2, "down"))},
    }
HEADS = {None: ("ConvNextModel", {}), "image_classification": ("ConvNextForImageClassification", layer("classifier", "head/scores"))}
BUFFERS = ()
IGNORED = resnet.IGNORED
FIXED = {}
