"""A recurrent network over tokens: an embedding, LSTM or GRU layers in one direction or both, a head (models/recurrent.py has the equations).

Ours alone (`model_type` "rnn"). In the file, tensors are named and lie as in a PyTorch module of `embedding` (nn.Embedding), `rnn` (nn.LSTM or
nn.GRU) and `classifier` or `lm_head`. `dropout` is that between layers, as there. A sequence is scored by the "mean" of its real tokens'
states, or by the "last" one's, where the backward direction has seen a single token.
"""

import math

from bigflax.models.families.bert import layer
from bigflax.models.heads import LmHead, SequenceHead
from bigflax.models.recurrent import CELLS, Recurrent
from bigflax.models.transformer import Embed, Group, Transformer
from bigflax.nn import Initializer, pick

SIZES = {"tiny": dict(vocab_size=256, embedding_size=32, hidden_size=64)}


def uniform(bound: float) -> Initializer:
    import jax

    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


def build(
    *,
    vocab_size: int = 30522,
    embedding_size: int = 256,
    hidden_size: int = 512,
    num_hidden_layers: int = 2,
    cell: str = "lstm",
    bidirectional: bool = False,
    dropout: float = 0.0,
    pooling: str = "mean",
    tie_word_embeddings: bool = False,
    head: str | None = "causal_lm",
    num_labels: int = 2,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int | bool = 1,
) -> Transformer:
    pick(CELLS, cell, "cell")
    if head == "causal_lm" and bidirectional:
        raise ValueError("a bidirectional network sees the token that it is to predict; causal_lm needs bidirectional=False")
    if tie_word_embeddings and hidden_size != embedding_size:
        raise ValueError(f"states of {hidden_size} do not fit embeddings of {embedding_size}; tie_word_embeddings needs the two alike")
    init = uniform(1 / math.sqrt(hidden_size))  # as torch.nn draws them, biases included
    block = lambda rate: Recurrent(cell, hidden_size, init, bidirectional, rate)
    rest = num_hidden_layers - 1
    heads = {
        None: None,
        "causal_lm": LmHead(vocab_size, tie_word_embeddings, init=init),
        "sequence_classification": SequenceHead(num_labels, pooling, init=init),
    }
    return Transformer(
        embed=Embed(vocab_size, embedding_size, dtype=dtype, init=uniform(1.0)),
        groups=(Group((block(0.0),), 0), *([Group((block(dropout),), rest)] if rest else [])),
        head=pick(heads, head, "head"), remat=remat, unroll=unroll,
    )  # fmt: skip


PREFIX = ""
NAMES = {"embedding.weight": ("embed/tokens", "V D")}
for _side, _suffix in (("forward", ""), ("backward", "_reverse")):
    for _theirs, _ours in (("ih", "w"), ("hh", "u")):
        NAMES |= {
            f"rnn.weight_{_theirs}_l{{l}}{_suffix}": (f"blocks/{_side}/{_ours}", "(G F) D -> D G F"),
            f"rnn.bias_{_theirs}_l{{l}}{_suffix}": (f"blocks/{_side}/{_ours}_bias", "(G F) -> G F"),
        }
HEADS = {
    None: ("RnnModel", {}),
    "causal_lm": ("RnnForCausalLM", {"lm_head.weight": ("head/w", "V D")}),
    "sequence_classification": ("RnnForSequenceClassification", layer("classifier", "head/scores")),
}
BUFFERS = ()
IGNORED = ()
FIXED = {}
