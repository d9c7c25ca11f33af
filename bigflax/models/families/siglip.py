"""SigLIP: two towers whose pairs are told apart one by one, by a sigmoid. Zhai et al. 2023 (arXiv 2303.15343).

Arguments are the fields of the Hugging Face config (`model_type` "siglip"), with its defaults; `text_config` and `vision_config` are those of
`text` and `vision`. A text is read at its last token, padding or not: the models were trained on texts padded to their full length, without
a mask. Fresh matrices have the deviation of Glorot & Bengio 2010; scale and bias begin at 10 and -10, as in the paper.
"""

import math
from collections.abc import Mapping
from typing import Any

from bigflax.models.families import clip
from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.models.two_tower import TwoTower
from bigflax.models.vision import AttentionPool, PatchEmbed, pair
from bigflax.nn import Linear, head_width, normal, pick

_SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
_SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
SIZES = {
    "tiny": dict(
        text_config=dict(_SMALL, vocab_size=256, max_position_embeddings=64), vision_config=dict(_SMALL, image_size=32, patch_size=8),
    ),
    "base-patch16-224": dict(),
    "large-patch16-256": dict(text_config=_LARGE, vision_config=dict(_LARGE, image_size=256)),
    "so400m-patch14-384": dict(text_config=_SO400M, vision_config=dict(_SO400M, image_size=384, patch_size=14)),
}  # fmt: skip


def build(
    *,
    text_config: Mapping[str, Any] = {},
    vision_config: Mapping[str, Any] = {},
    head: str | None = None,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> TwoTower:
    pick({None: None}, head, "head")
    ours: Any = dict(dtype=dtype, remat=remat, unroll=unroll)
    text_tower, vision_tower = text(**{**text_config, **ours}), vision(**{**vision_config, **ours})
    width, meets = text_tower.embed.features, text_config.get("projection_size") or text_tower.embed.features
    if meets != vision_tower.embed.features:
        raise ValueError(
            f"texts are projected to a width of {meets} (text_config.projection_size), and images have {vision_tower.embed.features}"
        )
    project = Linear(meets, "embed -> _", init=normal(width**-0.5))
    return TwoTower(text_tower, vision_tower, "last", project, scale=math.log(10), bias=-10.0)


def text(
    *,
    vocab_size: int = 32000,
    hidden_size: int = 768,
    intermediate_size: int = 3072,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    max_position_embeddings: int = 64,
    hidden_act: str = "gelu_pytorch_tanh",
    layer_norm_eps: float = 1e-6,
    projection_size: int | None = None,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    attention, mlp = _parts(hidden_size, intermediate_size, num_attention_heads, hidden_act)
    return Transformer(
        embed=Embed(vocab_size, hidden_size, positions=max_position_embeddings, dtype=dtype, init=normal(hidden_size**-0.5)),
        groups=(Group((Block(attention, mlp, Norm("layer", layer_norm_eps)),), num_hidden_layers),),
        norm=Norm("layer", layer_norm_eps), norm_states=False, remat=remat, unroll=unroll,
    )  # fmt: skip


def vision(
    *,
    hidden_size: int = 768,
    intermediate_size: int = 3072,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    num_channels: int = 3,
    image_size: int = 224,
    patch_size: int = 16,
    hidden_act: str = "gelu_pytorch_tanh",
    layer_norm_eps: float = 1e-6,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    attention, mlp = _parts(hidden_size, intermediate_size, num_attention_heads, hidden_act)
    init, norm = normal(hidden_size**-0.5), lambda: Norm("layer", layer_norm_eps)
    return Transformer(
        embed=PatchEmbed(hidden_size, pair(image_size), pair(patch_size), num_channels, tokens=(), dtype=dtype, init=init),
        groups=(Group((Block(attention, mlp, norm()),), num_hidden_layers),), norm=norm(), norm_states=False,
        head=AttentionPool(attention.clone(cross=True), mlp.clone(), norm(), init), remat=remat, unroll=unroll,
    )  # fmt: skip


def _parts(width, mlp_width, heads, act):
    init, glorot = normal(width**-0.5), normal((2 / (width + mlp_width)) ** 0.5)
    attention = Attention(heads, head_width(width, heads), causal=False, bias=True, init=init, out_init=init)
    return attention, Mlp(mlp_width, act, bias=True, init=glorot, out_init=glorot)


PARTS = {"text_config": text, "vision_config": vision}
PREFIX = ""
_PACKED = "vision/head/attention/q{0} vision/head/attention/k{0} vision/head/attention/v{0}"
NAMES = {
    **clip.EMBEDDINGS,
    "vision_model.embeddings.patch_embedding.bias": ("vision/embed/patches_bias", "D"),
    **norm_lines("vision_model.post_layernorm", "vision/norm"),
    "vision_model.head.probe": ("vision/head/probe", "1 1 D -> D"),
    "vision_model.head.attention.in_proj_weight": (_PACKED.format(""), "(S N H) D -> S D N H"),
    "vision_model.head.attention.in_proj_bias": (_PACKED.format("_bias"), "(S N H) -> S N H"),
    "vision_model.head.attention.out_proj.weight": ("vision/head/attention/out", "D (N H) -> N H D"),
    "vision_model.head.attention.out_proj.bias": ("vision/head/attention/out_bias", "D"),
    **norm_lines("vision_model.head.layernorm", "vision/head/norm"),
    "vision_model.head.mlp.fc1.weight": ("vision/head/mlp/up", "F D -> D F"),
    "vision_model.head.mlp.fc1.bias": ("vision/head/mlp/up_bias", "F"),
    "vision_model.head.mlp.fc2.weight": ("vision/head/mlp/down", "D F -> F D"),
    "vision_model.head.mlp.fc2.bias": ("vision/head/mlp/down_bias", "D"),
    **layer("text_model.head", "text_project"),
    "logit_scale": ("logit_scale", "1"),
    "logit_bias": ("logit_bias", "1"),
}
HEADS = {None: ("SiglipModel", {})}
MODULES = (
    (r"(head\.attention\.out_proj\.weight)", r"\1 of no module"),
)  # PyTorch's own attention multiplies by it without calling its module
BUFFERS = clip.BUFFERS
IGNORED = clip.IGNORED
FIXED = {"vision_config.vision_use_head": True}
