"""Phi-3 and 3.5: Llama with its projections joined in the file. Abdin et al. 2024 (arXiv 2404.14219).

Arguments are the fields of the Hugging Face config (`model_type` "phi3"), with its defaults.
"""

from typing import Any

from bigflax.models.families import llama
from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import Rope, head_width, normal

SIZES = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "mini-4k": dict(sliding_window=2047),
    "medium-4k": dict(hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=10, sliding_window=2047),
}  # fmt: skip


def build(
    *,
    vocab_size: int = 32064,
    hidden_size: int = 3072,
    intermediate_size: int = 8192,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = None,
    hidden_act: str = "silu",
    resid_pdrop: float = 0.0,
    max_position_embeddings: int = 4096,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: Any = None,
    partial_rotary_factor: float = 1.0,
    sliding_window: int | None = None,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init, norm = normal(initializer_range), lambda: Norm("rms", rms_norm_eps)
    attention = Attention(
        num_attention_heads, head_width(hidden_size, num_attention_heads), num_key_value_heads,
        rope=Rope(rope_theta, partial_rotary_factor, rope_scaling), window=sliding_window, dropout=resid_pdrop, init=init, out_init=init,
    )  # fmt: skip
    block = Block(attention, Mlp(intermediate_size, hidden_act, gated=True, dropout=resid_pdrop, init=init, out_init=init), norm())
    return Transformer(
        embed=Embed(vocab_size, hidden_size, dtype=dtype, init=init), groups=(Group((block,), num_hidden_layers),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


_JOINED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
NAMES = {
    **{name: line for name, line in llama.NAMES.items() if not any(part in name for part in _JOINED)},
    "layers.{l}.self_attn.qkv_proj.weight": ("blocks/attention/q blocks/attention/k blocks/attention/v", "(N H) D -> D N H"),
    "layers.{l}.mlp.gate_up_proj.weight": ("blocks/mlp/gate blocks/mlp/up", "(S F) D -> S D F"),
}
HEADS = llama.heads("Phi3")
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS
IGNORED = ("attention_dropout", "embd_pdrop", "original_max_position_embeddings")
FIXED: dict = {}
