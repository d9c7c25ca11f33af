"""GPT-2: learned positions, pre-norm with biases, GELU (tanh), tied head. Radford et al. 2019.

Arguments are the fields of the Hugging Face config (`model_type` "gpt2"), with its defaults.
"""

from bigflax.models.heads import decoder_head
from bigflax.models.transformer import Attention, Block, Embed, Group, Mlp, Norm, Transformer
from bigflax.nn import head_width, normal

SIZES = {
    "tiny": dict(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4),
    "124m": dict(n_embd=768, n_layer=12, n_head=12),
    "355m": dict(n_embd=1024, n_layer=24, n_head=16),
    "774m": dict(n_embd=1280, n_layer=36, n_head=20),
    "1.5b": dict(n_embd=1600, n_layer=48, n_head=25),
}


def build(
    *,
    vocab_size: int = 50257,
    n_positions: int = 1024,
    n_embd: int = 768,
    n_layer: int = 12,
    n_head: int = 12,
    n_inner: int | None = None,
    activation_function: str = "gelu_new",
    resid_pdrop: float = 0.1,
    embd_pdrop: float = 0.1,
    layer_norm_epsilon: float = 1e-5,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = True,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    init = normal(initializer_range)
    out_init = normal(initializer_range / (2 * n_layer) ** 0.5)  # section 2.3 of the paper: the residual path adds 2 L terms
    norm = lambda: Norm("layer", layer_norm_epsilon)
    attention = Attention(n_head, head_width(n_embd, n_head), bias=True, dropout=resid_pdrop, init=init, out_init=out_init)
    mlp = Mlp(n_inner or 4 * n_embd, activation_function, bias=True, dropout=resid_pdrop, init=init, out_init=out_init)
    return Transformer(
        embed=Embed(vocab_size, n_embd, positions=n_positions, dropout=embd_pdrop, dtype=dtype, init=init),
        groups=(Group((Block(attention, mlp, norm()),), n_layer),), norm=norm(),
        head=decoder_head(head, vocab=vocab_size, tied=tie_word_embeddings, labels=num_labels, init=init), remat=remat, unroll=unroll,
    )  # fmt: skip


_QKV = "blocks/attention/q{0} blocks/attention/k{0} blocks/attention/v{0}"
PREFIX = "transformer."
NAMES = {
    "wte.weight": ("embed/tokens", "V D"),
    "wpe.weight": ("embed/positions", "P D"),
    "h.{l}.ln_1.weight": ("blocks/norm1/scale", "D"),
    "h.{l}.ln_1.bias": ("blocks/norm1/bias", "D"),
    "h.{l}.attn.c_attn.weight": (_QKV.format(""), "D (S N H) -> S D N H"),
    "h.{l}.attn.c_attn.bias": (_QKV.format("_bias"), "(S N H) -> S N H"),
    "h.{l}.attn.c_proj.weight": ("blocks/attention/out", "(N H) D -> N H D"),
    "h.{l}.attn.c_proj.bias": ("blocks/attention/out_bias", "D"),
    "h.{l}.ln_2.weight": ("blocks/norm2/scale", "D"),
    "h.{l}.ln_2.bias": ("blocks/norm2/bias", "D"),
    "h.{l}.mlp.c_fc.weight": ("blocks/mlp/up", "D F"),
    "h.{l}.mlp.c_fc.bias": ("blocks/mlp/up_bias", "F"),
    "h.{l}.mlp.c_proj.weight": ("blocks/mlp/down", "F D"),
    "h.{l}.mlp.c_proj.bias": ("blocks/mlp/down_bias", "D"),
    "ln_f.weight": ("norm/scale", "D"),
    "ln_f.bias": ("norm/bias", "D"),
}
HEADS = {
    None: ("GPT2Model", {}),
    "causal_lm": ("GPT2LMHeadModel", {"lm_head.weight": ("head/w", "V D")}),
    "sequence_classification": ("GPT2ForSequenceClassification", {"score.weight": ("head/scores/w", "C D -> D C")}),
}
BUFFERS = (r"h\.\d+\.attn\.(bias|masked_bias)",)
# What the config may say without changing the function; and what it may say only with this value.
IGNORED = ("attn_pdrop", "reorder_and_upcast_attn", "n_ctx", r"summary_.*")
FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
