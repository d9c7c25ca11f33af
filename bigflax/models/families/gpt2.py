"""GPT-2: learned positions, pre-norm with biases, GELU (tanh), tied head. Radford et al. 2019.

Arguments are the fields of the Hugging Face config (`model_type` "gpt2"), with its defaults.
"""

from bigflax.models.transformer import Attention, Block, Embed, LmHead, Mlp, Norm, Transformer
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
        blocks=Block(attention, mlp, norm()), layers=n_layer, norm=norm(), head=LmHead(vocab_size, tie_word_embeddings, init=init),
        remat=remat, unroll=unroll,
    )  # fmt: skip
