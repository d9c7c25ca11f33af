"""CLIP: a causal text tower and a ViT, learned from pairs of images and texts. Radford et al. 2021 (arXiv 2103.00020).

Arguments are the fields of the Hugging Face config (`model_type` "clip"), with its defaults; `text_config` and `vision_config` are those of
`text` and `vision`. Fresh weights are drawn as in OpenAI's code, by the width and depth of each tower.
"""

from collections.abc import Mapping
from typing import Any

from bigflax.models.families.bert import norm_lines
from bigflax.models.heads import SequenceHead
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.models.two_tower import TwoTower
from bigflax.models.vision import PatchEmbed, pair
from bigflax.nn import Linear, head_width, normal, pick

_SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SIZES = {
    "tiny": dict(
        text_config=dict(_SMALL, vocab_size=256, max_position_embeddings=64, eos_token_id=255),
        vision_config=dict(_SMALL, image_size=32, patch_size=8), projection_dim=32,
    ),
    "base-patch32": dict(),
    "base-patch16": dict(vision_config=dict(patch_size=16)),
    "large-patch14": dict(
        text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14),
        projection_dim=768,
    ),
}  # fmt: skip


def build(
    *,
    text_config: Mapping[str, Any] = {},
    vision_config: Mapping[str, Any] = {},
    projection_dim: int = 512,
    logit_scale_init_value: float = 2.6592,
    head: str | None = None,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> TwoTower:
    pick({None: None}, head, "head")
    ours: Any = dict(dtype=dtype, remat=remat, unroll=unroll)
    text_tower, vision_tower = text(**{**text_config, **ours}), vision(**{**vision_config, **ours})
    end = text_config.get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise ValueError(f"text_config.eos_token_id is {end!r}, and a text is read at one token: it must be a number")
    projection = lambda tower: Linear(projection_dim, "embed -> _", bias=False, init=normal(tower.embed.features**-0.5))
    return TwoTower(
        text_tower, vision_tower, "highest" if end == 2 else end,  # 2: configs of before 2023, where it is not the tokenizer's
        projection(text_tower), projection(vision_tower), scale=logit_scale_init_value,
    )  # fmt: skip


def text(
    *,
    vocab_size: int = 49408,
    hidden_size: int = 512,
    intermediate_size: int = 2048,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 8,
    max_position_embeddings: int = 77,
    hidden_act: str = "quick_gelu",
    layer_norm_eps: float = 1e-5,
    initializer_range: float = 0.02,
    eos_token_id: int = 49407,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    return Transformer(
        embed=Embed(vocab_size, hidden_size, positions=max_position_embeddings, dtype=dtype, init=normal(initializer_range)),
        groups=_layers(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps, causal=True),
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
    patch_size: int = 32,
    hidden_act: str = "quick_gelu",
    layer_norm_eps: float = 1e-5,
    initializer_range: float = 0.02,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    return Transformer(
        embed=PatchEmbed(
            hidden_size, pair(image_size), pair(patch_size), num_channels, bias=False, norm=Norm("layer", layer_norm_eps), dtype=dtype,
            init=normal(initializer_range),
        ),
        groups=_layers(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps, causal=False),
        head=SequenceHead(0, norm=Norm("layer", layer_norm_eps)), remat=remat, unroll=unroll,
    )  # fmt: skip


def _layers(width, mlp_width, layers, heads, act, eps, *, causal):
    init, up, out = normal(width**-0.5), normal((2 * width) ** -0.5), normal(width**-0.5 * (2 * layers) ** -0.5)
    attention = Attention(heads, head_width(width, heads), causal=causal, bias=True, init=init, out_init=out)
    return (Group((Block(attention, Mlp(mlp_width, act, bias=True, init=up, out_init=out), Norm("layer", eps)),), layers),)


def tower(name: str, leaf: str) -> dict:
    """The lines of a tower's layers."""
    at, ours = f"{name}.encoder.layers.{{l}}", f"{leaf}/blocks"
    return {
        **{f"{at}.self_attn.{x}_proj.weight": (f"{ours}/attention/{x}", "(N H) D -> D N H") for x in "qkv"},
        **{f"{at}.self_attn.{x}_proj.bias": (f"{ours}/attention/{x}_bias", "(N H) -> N H") for x in "qkv"},
        f"{at}.self_attn.out_proj.weight": (f"{ours}/attention/out", "D (N H) -> N H D"),
        f"{at}.self_attn.out_proj.bias": (f"{ours}/attention/out_bias", "D"),
        **norm_lines(f"{at}.layer_norm1", f"{ours}/norm1"),
        **norm_lines(f"{at}.layer_norm2", f"{ours}/norm2"),
        f"{at}.mlp.fc1.weight": (f"{ours}/mlp/up", "F D -> D F"),
        f"{at}.mlp.fc1.bias": (f"{ours}/mlp/up_bias", "F"),
        f"{at}.mlp.fc2.weight": (f"{ours}/mlp/down", "D F -> F D"),
        f"{at}.mlp.fc2.bias": (f"{ours}/mlp/down_bias", "D"),
    }


PARTS = {"text_config": text, "vision_config": vision}
PREFIX = ""
EMBEDDINGS = {
    "text_model.embeddings.token_embedding.weight": ("text/embed/tokens", "V D"),
    "text_model.embeddings.position_embedding.weight": ("text/embed/positions", "P D"),
    **tower("text_model", "text"),
    **norm_lines("text_model.final_layer_norm", "text/norm"),
    "vision_model.embeddings.patch_embedding.weight": ("vision/embed/patches", "D C P Q -> C P Q D"),
    "vision_model.embeddings.position_embedding.weight": ("vision/embed/positions", "P D"),
    **tower("vision_model", "vision"),
}
NAMES = {
    **EMBEDDINGS,
    "vision_model.embeddings.class_embedding": ("vision/embed/class", "(T D) -> T D"),
    **norm_lines("vision_model.pre_layrnorm", "vision/embed/norm"),
    **norm_lines("vision_model.post_layernorm", "vision/head/norm"),
    "text_projection.weight": ("text_project/w", "F D -> D F"),
    "visual_projection.weight": ("image_project/w", "F D -> D F"),
    "logit_scale": ("logit_scale", ""),
}
HEADS = {None: ("CLIPModel", {})}
BUFFERS = (r"(text|vision)_model\.embeddings\.position_ids",)
# a tower's projection_dim is that of its published form alone, without the other
IGNORED = (r"(.*\.)?initializer_factor", r".*\.(attention_dropout|dropout|projection_dim)", r"(.*\.)?tie_word_embeddings")
FIXED = {}
