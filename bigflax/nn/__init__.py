"""Modules: Flax Linen, fenced.

Of Linen we use `nn.Module`, our `weight()` and our `stack()`, and nothing else: only the "params" collection, every name explicit,
intermediates returned and never sown. `model()` is the fence: beyond it a model is two pure functions over a tree of plain arrays,
and a tree of axis strings beside them.

Whatever already stands in a weight's place (int8, LoRA ...) is used as it is: modules multiply through `ops.einsum` and cannot tell.
Dropout is on when `apply` is given `rng` and off when not; there is no other switch. The activations carry the dtype of computation:
the embedding casts once, and every product follows its operand. Running statistics are leaves of the tree like all others, and their new
values come back among the outputs (models/convnet.py).

    fence       weight(), Model, model(), stack(), dropout()        layers      Linear, Norm, Mlp, Moe
    attention   Attention, Rope, RelativeBias, the cache

Left out on purpose: mutable collections and lazily inferred shapes of outputs (a shape is written or follows from the input).
"""

from bigflax.nn.attention import CACHES, Attention, RelativeBias, Rope, empty, head_width, held, write_cache
from bigflax.nn.fence import (
    KEY,
    NORMAL,
    REMAT,
    Initializer,
    Model,
    dropout,
    model,
    normal,
    ones,
    pick,
    stack,
    walking,
    weight,
    zeros,
)
from bigflax.nn.layers import ACTIVATIONS, Linear, Mlp, Moe, Norm

__all__ = [
    "ACTIVATIONS", "CACHES", "KEY", "NORMAL", "REMAT", "Attention", "Initializer", "Linear", "Mlp", "Model", "Moe", "Norm", "RelativeBias", "Rope",
    "dropout", "empty", "head_width", "held", "model", "normal", "ones", "pick", "stack", "walking", "weight", "write_cache", "zeros",
]  # fmt: skip
