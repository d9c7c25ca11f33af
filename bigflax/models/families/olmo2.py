"""OLMo 2: norms behind attention and mlp, and over all of the queries and of the keys. OLMo team 2024 (arXiv 2501.00656).

Arguments are the fields of the Hugging Face config (`model_type` "olmo2"), with its defaults.
"""

import re
from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import Rope, head_width, normal

_OLMO = dict(vocab_size=100352, max_position_embeddings=4096, rope_theta=500000.0, rms_norm_eps=1e-6)
SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "1b": dict(**_OLMO, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16),
    "7b": dict(**_OLMO),
    "13b": dict(**_OLMO, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}


def build(
    *,
    vocab_size: int = 50304,
    hidden_size: int = 4096,
    intermediate_size: int = 11008,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = None,
    hidden_act: str = "silu",
    max_position_embeddings: int = 2048,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    attention_bias: bool = False,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps)
    attention = Attention(
        num_attention_heads, head_width(hidden_size, num_attention_heads), num_key_value_heads, rope=Rope(rope_theta, scaling=rope_scaling),
        norm=norm(), norm_heads=True, bias=attention_bias, init=init, out_init=init,
    )  # fmt: skip
    block = Block(attention, Mlp(intermediate_size, hidden_act, gated=True, init=init, out_init=init), norm(), order="output")
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=(Group((block,), num_hidden_layers),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


_BEHIND = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "post_feedforward_layernorm"}  # Llama's -> OLMo 2's
NAMES = {
    **{re.sub("|".join(_BEHIND), lambda m: _BEHIND[m.group()], name): line for name, line in llama.NAMES.items()},
    **{f"layers.{{l}}.self_attn.{x}_norm.weight": (f"blocks/attention/{x}_norm/scale", "D") for x in "qk"},
}
HEADS = llama.heads("Olmo2")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout",)
FIXED: dict = {}
