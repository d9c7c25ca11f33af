"""Parameter-efficient fine-tuning: functions from params to params, after which little trains and the rest is frozen.

    params = lora(params, [("blocks/attention/(q|v)", 8)], axes=model.axes, rng=key)             typed weights in the place of arrays (weights.py)
    tuned = create("lora", model, params, rng=key, rules=[("blocks/attention/(q|v)", 8)])        the same by its name, and what it freezes
    state = init_state(tuned.params, tx, mesh=mesh, axes=tuned.model.axes, freeze=tuned.freeze)  gradients and moments of what trains alone

    METHOD        what trains                                                 source
    lora, dora    a b beside a matrix, DoRA its length too                    Hu et al. 2021, 2106.09685; Liu et al. 2024, 2402.09353
      base=       the same over int8, int4 or nf4 weights: QLoRA              Dettmers et al. 2023, 2305.14314
    ia3           a factor for each key, value and mlp channel                Liu et al. 2022, 2205.05638
    adapters      a bottleneck behind each branch of a layer                  Houlsby et al. 2019, 1902.00751; Pfeiffer et al. 2020, 2005.00247
    prompt        rows in front of the text's                                 Lester et al. 2021, 2104.08691
    prefix        keys and values before the text's, in each layer            Li and Liang 2021, 2101.00190
    bitfit        biases                                                      Ben Zaken et al. 2021, 2106.10199
    last_layers   the last k layers                                           Lee et al. 2019, 1911.03090
    head_only     the head

Rules are ordered (regex, value) over the names of weights, first match wins, None is for nothing; one that reaches no matrix raises. Nothing in a
model changes: it multiplies by what stands in a weight's place, and `prompt` and `prefix` wrap its `apply`.

What is trained is an adapter, {name: weight without its base}: `split` takes it off, `attach` puts it upon another copy of its base, so that a dict of
adapters over one base is switched by name; `combine` adds adapters of LoRA up, and `merge` makes arrays of all of it.

Left out on purpose: the network that makes a prefix while it trains (Li and Liang, section 4.3; `words` begins with what real words leave instead),
adapters inside of a branch, and rank schedules. Legend: B batch, T time, P tokens of a prompt, K kv heads, H head width, L layers.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bigflax import trees, weights
from bigflax.nn import Model
from bigflax.peft.composing import attach, combine, merge, split
from bigflax.peft.matrices import ADAPTER_RULES, IA3_RULES, adapters, dora, dropout, ia3, lora, quantized
from bigflax.peft.models import Tuned, bitfit, head_only, last_layers, prefix, prompt
from bigflax.weights import Adapted, named_weights

__all__ = [
    "ADAPTER_RULES", "IA3_RULES", "METHODS", "Tuned", "adapters", "attach", "bitfit", "combine", "create", "dora", "dropout", "head_only", "ia3", "last_layers",
    "lora", "merge", "method", "prefix", "prompt", "quantized", "split",
]  # fmt: skip


METHODS: dict[str, Callable[..., Any]] = {
    "lora": lora, "dora": dora, "ia3": ia3, "adapters": adapters, "prompt": prompt, "prefix": prefix, "bitfit": bitfit, "head_only": head_only,
    "last_layers": last_layers,
}  # fmt: skip


def method(name: str) -> Callable[..., Any]:
    """METHODS[name]. Raises ValueError that lists the methods."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {trees.did_you_mean(name, METHODS, 'the methods are')}")
    return METHODS[name]


def create(name: str, model: Model, params: Any, *, rng: jax.Array, also: Sequence[str] | None = None, **options: Any) -> Tuned:
    """The method of a recipe by its name, over a model and its params. Raises ValueError that lists the methods.

    `also` are regexes of further leaves that train: by default those of a head that gives scores, which is new for every task, and none of another.
    """
    taken = inspect.signature(method(name)).parameters
    given = {key: value for key, value in {"model": model, "axes": model.axes, "rng": rng}.items() if key in taken}
    made = method(name)(params=params, **given, **options)
    if not isinstance(made, Tuned):
        before = dict(named_weights(params))
        own = {leaf: w for leaf, w in named_weights(made) if isinstance(w, Adapted) and before.get(leaf) is not w}
        parts = lambda w: "|".join(part for part in weights.parts(w) if part != "bias")
        made = Tuned(model, made, tuple(f"{re.escape(leaf)}/({parts(w)})" for leaf, w in own.items()))
    scores = ("head/.*",) if "scores" in made.params.get("head", {}) and name != "head_only" else ()
    return made._replace(trained=(*made.trained, *(scores if also is None else also)))
