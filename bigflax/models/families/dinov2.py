"""DINOv2: ViT with layer scale, trained without labels; positions for any size of image. Oquab et al. 2023 (arXiv 2304.07193).

Arguments are the fields of the Hugging Face config (`model_type` "dinov2"), with its defaults. The published models were trained on images
of 518 pixels and are mostly used with 224: their positions are interpolated.
"""

from bigflax.models.families import vit
from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.families.vit import ATTENTION, EMBEDDINGS
from bigflax.models.heads import SequenceHead
from bigflax.models.transformer import Attention, Block, Group, Mlp, Norm, Transformer
from bigflax.models.vision import PatchEmbed, TwoPartHead, pair
from bigflax.nn import head_width, normal, pick

SIZES = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8),
    "small": dict(hidden_size=384, num_attention_heads=6, image_size=518),
    "base": dict(image_size=518),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518),
    "giant": dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518, use_swiglu_ffn=True),
}


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
    patch_size: int | tuple[int, int] = 14,
    num_channels: int = 3,
    qkv_bias: bool = True,
    layerscale_value: float = 1.0,
    drop_path_rate: float = 0.0,
    use_swiglu_ffn: bool = False,
    use_mask_token: bool = True,
    head: str | None = None,
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    embed = PatchEmbed(
        hidden_size, pair(image_size), pair(patch_size), num_channels, mask=use_mask_token, resize="cubic", dropout=hidden_dropout_prob,
        dtype=dtype, init=normal(initializer_range),
    )  # fmt: skip
    block = dino_block(
        hidden_size, num_attention_heads, mlp_ratio, hidden_act, qkv_bias, use_swiglu_ffn, layerscale_value, drop_path_rate,
        Norm("layer", layer_norm_eps), initializer_range,
    )  # fmt: skip
    return Transformer(
        embed=embed, groups=(Group((block,), num_hidden_layers),), norm=Norm("layer", layer_norm_eps), norm_states=False,
        head=dino_head(head, num_labels, 1, initializer_range), remat=remat, unroll=unroll,
    )  # fmt: skip


def dino_block(width, heads, mlp_ratio, act, qkv_bias, swiglu, layer_scale, drop_path, norm, deviation) -> Block:
    init, F = normal(deviation), int(width * mlp_ratio)
    attention = Attention(heads, head_width(width, heads), causal=False, bias=qkv_bias, out_bias=True, init=init, out_init=init)
    narrow = (int(F * 2 / 3) + 7) // 8 * 8  # SwiGLU has three matrices where the plain one has two
    mlp = Mlp(narrow if swiglu else F, "silu" if swiglu else act, gated=swiglu, bias=True, init=init, out_init=init)
    return Block(attention, mlp, norm, layer_scale=layer_scale, drop_path=drop_path)


def dino_head(head, labels, front, deviation):
    made = {None: SequenceHead(0), "image_classification": TwoPartHead(labels, front, normal(deviation))}
    return pick(made, head, "head")


PREFIX = "dinov2."
_ALWAYS = {
    **EMBEDDINGS,
    "embeddings.mask_token": ("embed/mask", "1 D -> D"),
    **ATTENTION,
    **norm_lines("encoder.layer.{l}.norm1", "blocks/norm1"),
    **norm_lines("encoder.layer.{l}.norm2", "blocks/norm2"),
    "encoder.layer.{l}.layer_scale1.lambda1": ("blocks/scale1", "D"),
    "encoder.layer.{l}.layer_scale2.lambda1": ("blocks/scale2", "D"),
    **norm_lines("layernorm", "norm"),
}
_PLAIN = {
    "encoder.layer.{l}.mlp.fc1.weight": ("blocks/mlp/up", "F D -> D F"),
    "encoder.layer.{l}.mlp.fc1.bias": ("blocks/mlp/up_bias", "F"),
    "encoder.layer.{l}.mlp.fc2.weight": ("blocks/mlp/down", "D F -> F D"),
    "encoder.layer.{l}.mlp.fc2.bias": ("blocks/mlp/down_bias", "D"),
}
_SWIGLU = {
    "encoder.layer.{l}.mlp.weights_in.weight": ("blocks/mlp/gate blocks/mlp/up", "(S F) D -> S D F"),
    "encoder.layer.{l}.mlp.weights_in.bias": ("blocks/mlp/gate_bias blocks/mlp/up_bias", "(S F) -> S F"),
    "encoder.layer.{l}.mlp.weights_out.weight": ("blocks/mlp/down", "D F -> F D"),
    "encoder.layer.{l}.mlp.weights_out.bias": ("blocks/mlp/down_bias", "D"),
}


def names(config) -> dict:
    """One leaf has other names where the mlp is gated."""
    return {**_ALWAYS, **(_SWIGLU if config["use_swiglu_ffn"] else _PLAIN)}


HEADS = {
    None: ("Dinov2Model", {}),
    "image_classification": ("Dinov2ForImageClassification", layer("classifier", "head/scores")),
}
MODULES = (*vit.MODULES[:2], (r"(mlp\.weights_in\.weight)", r"\1 of no module"), (r"mlp\.weights_out", "mlp.down_proj"))
BUFFERS = ()
# the last are of the same weights as a detector's backbone
IGNORED = ("attention_probs_dropout_prob", "apply_layernorm", "reshape_hidden_states", "stage_names", "_?out_(features|indices)")
FIXED = {}
