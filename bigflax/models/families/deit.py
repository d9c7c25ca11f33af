"""DeiT: ViT with a distillation token, which learns from a teacher. Touvron et al. 2021 (arXiv 2012.12877).

Arguments are the fields of the Hugging Face config (`model_type` "deit"), with its defaults. Published sizes have the two heads of
"image_classification_with_teacher"; those without distillation are of the family "vit".
"""

from bigflax.models.families import vit
from bigflax.models.families.bert import layer
from bigflax.models.families.vit import block, pooler
from bigflax.models.heads import SequenceHead
from bigflax.models.transformer import Group, Norm, Transformer
from bigflax.models.vision import PatchEmbed, TeacherHead, pair
from bigflax.nn import normal, pick

SIZES = {
    "tiny": vit.SIZES["tiny"],
    "tiny-patch16": dict(hidden_size=192, num_attention_heads=3, intermediate_size=768),
    "small-patch16": dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "base-patch16": dict(),
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
    head: str | None = "image_classification_with_teacher",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, drop, norm = normal(initializer_range), hidden_dropout_prob, lambda: Norm("layer", layer_norm_eps)
    heads = {
        None: pooler(pooler_output_size, hidden_size, pooler_act, init),
        "image_classification": SequenceHead(num_labels, init=init),
        "image_classification_with_teacher": TeacherHead(num_labels, init),
    }
    return Transformer(
        embed=PatchEmbed(
            hidden_size, pair(image_size), pair(patch_size), num_channels, ("class", "distillation"), dropout=drop, dtype=dtype, init=init,
        ),
        groups=(Group((block(hidden_size, num_attention_heads, intermediate_size, hidden_act, qkv_bias, drop, norm, init),), num_hidden_layers),),
        norm=norm(), norm_states=False, head=pick(heads, head, "head"), remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = "deit."
NAMES = {**vit.NAMES, "embeddings.distillation_token": ("embed/distillation", "1 T D -> T D")}
HEADS = {
    None: ("DeiTModel", layer("deit.pooler.dense", "head/dense")),
    "image_classification": ("DeiTForImageClassification", layer("classifier", "head/scores")),
    "image_classification_with_teacher": (
        "DeiTForImageClassificationWithTeacher",
        {**layer("cls_classifier", "head/scores"), **layer("distillation_classifier", "head/taught")},
    ),
}
MODULES, BUFFERS, IGNORED, FIXED = vit.MODULES, vit.BUFFERS, vit.IGNORED, vit.FIXED
