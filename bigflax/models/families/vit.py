"""ViT: images as rows of patches, learned positions, pre-norm, a class token. Dosovitskiy et al. 2021 (arXiv 2010.11929).

Arguments are the fields of the Hugging Face config (`model_type` "vit"), with its defaults.
"""

from bigflax.models.families.bert import layer, norm_lines
from bigflax.models.heads import SequenceHead
from bigflax.models.transformer import Attention, Block, Group, Mlp, Norm, Transformer
from bigflax.models.vision import PatchEmbed, pair
from bigflax.nn import Initializer, head_width, normal, pick

SIZES = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8),
    "base-patch16": dict(),
    "large-patch16": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


def build(
    *,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int = 3072,
    hidden_act: str = "gelu",
    hidden_dropout_prob: float = 0.0,
    initializer_range: float = 0.02,
    layer_norm_eps: float = 1e-12,
    image_size: int | tuple[int, int] = 224,
    patch_size: int | tuple[int, int] = 16,
    num_channels: int = 3,
    qkv_bias: bool = True,
    pooler_output_size: int | None = None,
    pooler_act: str = "tanh",
    head: str | None = "image_classification",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, drop, norm = normal(initializer_range), hidden_dropout_prob, lambda: Norm("layer", layer_norm_eps)
    heads = {
        None: pooler(pooler_output_size, hidden_size, pooler_act, init),
        "image_classification": SequenceHead(num_labels, init=init),
    }
    return Transformer(
        embed=PatchEmbed(hidden_size, pair(image_size), pair(patch_size), num_channels, dropout=drop, dtype=dtype, init=init),
        groups=(Group((block(hidden_size, num_attention_heads, intermediate_size, hidden_act, qkv_bias, drop, norm, init),), num_hidden_layers),),
        norm=norm(), norm_states=False, head=pick(heads, head, "head"), remat=remat, unroll=unroll,
    )  # fmt: skip


def block(width, heads, mlp_width, act, qkv_bias, drop, norm, init) -> Block:
    attention = Attention(
        heads, head_width(width, heads), causal=False, bias=qkv_bias, out_bias=True, dropout=drop, init=init, out_init=init
    )
    return Block(attention, Mlp(mlp_width, act, bias=True, dropout=drop, init=init, out_init=init), norm())


def pooler(size: int | None, width: int, act: str, init: Initializer) -> SequenceHead:
    if size not in (None, width):
        raise ValueError(f"pooler_output_size {size} is not hidden_size {width}: a pooler of another width is not supported")
    return SequenceHead(0, act=act, init=init)


PREFIX = "vit."
EMBEDDINGS = {
    "embeddings.cls_token": ("embed/class", "1 T D -> T D"),
    "embeddings.position_embeddings": ("embed/positions", "1 T D -> T D"),
    "embeddings.patch_embeddings.projection.weight": ("embed/patches", "D C P Q -> C P Q D"),
    "embeddings.patch_embeddings.projection.bias": ("embed/patches_bias", "D"),
}
ATTENTION = {
    **{f"encoder.layer.{{l}}.attention.attention.{n}.weight": (f"blocks/attention/{n[0]}", "(N H) D -> D N H") for n in ("query", "key", "value")},
    **{f"encoder.layer.{{l}}.attention.attention.{n}.bias": (f"blocks/attention/{n[0]}_bias", "(N H) -> N H") for n in ("query", "key", "value")},
    "encoder.layer.{l}.attention.output.dense.weight": ("blocks/attention/out", "D (N H) -> N H D"),
    "encoder.layer.{l}.attention.output.dense.bias": ("blocks/attention/out_bias", "D"),
}  # fmt: skip
NAMES = {
    **EMBEDDINGS,
    **ATTENTION,
    **norm_lines("encoder.layer.{l}.layernorm_before", "blocks/norm1"),
    **norm_lines("encoder.layer.{l}.layernorm_after", "blocks/norm2"),
    "encoder.layer.{l}.intermediate.dense.weight": ("blocks/mlp/up", "F D -> D F"),
    "encoder.layer.{l}.intermediate.dense.bias": ("blocks/mlp/up_bias", "F"),
    "encoder.layer.{l}.output.dense.weight": ("blocks/mlp/down", "D F -> F D"),
    "encoder.layer.{l}.output.dense.bias": ("blocks/mlp/down_bias", "D"),
    **norm_lines("layernorm", "norm"),
}
HEADS = {
    None: ("ViTModel", layer("vit.pooler.dense", "head/dense")),
    "image_classification": ("ViTForImageClassification", layer("classifier", "head/scores")),
}
# transformers reads its files into modules of newer names, which are those of adapters; some weights become no module of their own (adapters/modules.py)
MODULES = (
    (r"attention\.attention\.([qkv])\w+", r"attention.\1_proj"), (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"), (r"output\.dense", "mlp.fc2"), (r"encoder\.layer\.", "layers."),
)  # fmt: skip
BUFFERS = (r"pooler\..*", r"embeddings\.mask_token")
IGNORED = ("attention_probs_dropout_prob", "encoder_stride")
FIXED = {}
