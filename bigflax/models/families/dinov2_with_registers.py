"""DINOv2 with registers: four learned tokens more, without positions, that keep artefacts out of the patches. Darcet et al. 2024 (2309.16588).

Arguments are the fields of the Hugging Face config (`model_type` "dinov2_with_registers"), with its defaults.
"""

from bigflax.models.families import dinov2
from bigflax.models.families.bert import layer
from bigflax.models.families.dinov2 import dino_block, dino_head
from bigflax.models.transformer import Group, Norm, Transformer
from bigflax.models.vision import PatchEmbed, pair
from bigflax.nn import normal

SIZES = {name: {"patch_size": 14, **config} for name, config in dinov2.SIZES.items()}


def build(
    *,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    mlp_ratio: float = 4,
    hidden_act: str = "gelu",
    hidden_dropout_prob: float = 0.0,
    initializer_range: float = 0.02,
    layer_norm_eps: float = 1e-6,
    image_size: int | tuple[int, int] = 224,
    patch_size: int | tuple[int, int] = 16,
    num_channels: int = 3,
    qkv_bias: bool = True,
    layerscale_value: float = 1.0,
    drop_path_rate: float = 0.0,
    use_swiglu_ffn: bool = False,
    num_register_tokens: int = 4,
    head: str | None = None,
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    embed = PatchEmbed(
        hidden_size, pair(image_size), pair(patch_size), num_channels, registers=num_register_tokens, mask=True, resize="antialiased",
        dropout=hidden_dropout_prob, dtype=dtype, init=normal(initializer_range),
    )  # fmt: skip
    block = dino_block(
        hidden_size, num_attention_heads, mlp_ratio, hidden_act, qkv_bias, use_swiglu_ffn, layerscale_value, drop_path_rate,
        Norm("layer", layer_norm_eps), initializer_range,
    )  # fmt: skip
    return Transformer(
        embed=embed, groups=(Group((block,), num_hidden_layers),), norm=Norm("layer", layer_norm_eps), norm_states=False,
        head=dino_head(head, num_labels, 1 + num_register_tokens, initializer_range), remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "dinov2_with_registers."


def names(config) -> dict:
    return {**dinov2.names(config), "embeddings.register_tokens": ("embed/registers", "1 T D -> T D")}


HEADS = {
    None: ("Dinov2WithRegistersModel", {}),
    "image_classification": ("Dinov2WithRegistersForImageClassification", layer("classifier", "head/scores")),
}
MODULES, BUFFERS, IGNORED, FIXED = dinov2.MODULES, dinov2.BUFFERS, dinov2.IGNORED, dinov2.FIXED
