"""Typed weights in the place of matrices, by rules over their names: functions from params to params."""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from bigflax import nn, trees, weights
from bigflax.weights import DoRA, LoRA, Weight, is_typed, named_weights, parse_axes, shape

Array = jax.Array


def lora(
    params: Any, rules: trees.Rules, *, axes: Any, rng: Array, alpha: float | None = None, rs: bool = False,
    base: str | trees.Rules | None = None, group: int = 64,
) -> Any:  # fmt: skip
    """LoRA over the matrices that the rules match, of the rank that they say, or (rank, alpha); it begins as what it stands upon.

    `alpha` is that of the other rules, by default their rank; with `rs` the update's scale is alpha / sqrt(rank) (rsLoRA). `base` "int8", "int4"
    or "nf4" quantizes those matrices, rules the ones that they match, in groups of `group` inputs or what of it divides them.
    """
    return _low_rank(weights.lora, params, rules, axes, rng, alpha, rs, base, group)


def dora(
    params: Any, rules: trees.Rules, *, axes: Any, rng: Array, alpha: float | None = None, rs: bool = False,
    base: str | trees.Rules | None = None, group: int = 64,
) -> Any:  # fmt: skip
    """DoRA, as `lora`; it begins as what it stands upon but for the rounding of |w| / |w|."""
    return _low_rank(weights.dora, params, rules, axes, rng, alpha, rs, base, group)


def _low_rank(make, params, rules, axes, rng, alpha, rs, base, group):
    if base is not None:
        kinds = [(pattern, None if value is None else base) for pattern, value in trees.checked(rules)] if isinstance(base, str) else base
        params = quantized(params, kinds, axes=axes, group=group)

    def one(name, w, text, value):
        rank, its = value if isinstance(value, Sequence) else (value, alpha)
        return make(w, rank, axes=text, rng=key_of(rng, name), alpha=its, rs=rs)

    return _adapted(one, params, rules, axes)


def quantized(params: Any, rules: trees.Rules, *, axes: Any, group: int = 64) -> Any:
    """The matrices that the rules match, rounded to "int8", "int4" or "nf4": one scale for each output and `group` inputs of the last input axis, or
    what of it divides that."""

    def one(name, w, text, kind):
        if kind not in ("int8", "int4", "nf4"):
            raise ValueError(f"a base cannot be quantized to {kind!r}; there are 'int8', 'int4' and 'nf4'")
        if is_typed(w):
            raise ValueError(f"{name} is a {type(w).__name__} already; quantize the arrays of a model before they are adapted")
        return weights.quantize(w, kind, axes=text, group=math.gcd(group, shape(w)[parse_axes(text).contracted[-1]]))

    return _adapted(one, params, rules, axes)


IA3_RULES = ((".*/(attention|cross)/(k|v)", "outputs"), (".*/mlp/down", "inputs"))


def ia3(params: Any, rules: trees.Rules = IA3_RULES, *, axes: Any) -> Any:
    """IA3 over the matrices that the rules match, of their "outputs" or their "inputs"; it begins as what it stands upon.

    What scales outputs scales the bias that the module adds to them too, by a copy of it that does not train: let not both train.
    """

    def one(name, w, text, which):
        if which not in ("outputs", "inputs"):
            raise ValueError(f"IA3 scales the 'outputs' or the 'inputs' of a matrix, not {which!r}")
        return weights.ia3(w, axes=text, inputs=which == "inputs", bias=_bias(name, w, text, leaves))

    leaves = dict(named_weights(params))
    return _adapted(one, params, rules, axes)


ADAPTER_RULES = ((".*/(attention/out|mlp/down)", 64),)


def adapters(params: Any, rules: trees.Rules = ADAPTER_RULES, *, axes: Any, rng: Array, act: str = "relu") -> Any:
    """Bottleneck adapters, of the sizes that the rules say, behind the matrices that end a branch; they do nothing at the start.

    After the attention and the mlp as Houlsby et al. have it; after the mlp alone, [(".*/mlp/down", 64)], as Pfeiffer et al. do.
    """
    if act not in nn.ACTIVATIONS or not hasattr(jax.nn, act):
        known = sorted(name for name in nn.ACTIVATIONS if hasattr(jax.nn, name))
        raise ValueError(f"an adapter has no activation {act!r}; {trees.did_you_mean(act, known, 'there are')}")
    leaves = dict(named_weights(params))

    def one(name, w, text, size):
        return weights.adapter(w, size, axes=text, rng=key_of(rng, name), act=act, bias=_bias(name, w, text, leaves))

    return _adapted(one, params, rules, axes)


def _adapted(make: Callable[..., Weight], params: Any, rules: trees.Rules, axes: Any) -> Any:
    """The tree with `make(name, w, axes, value)` in the place of each matrix for which the rules have a value."""
    matrices, rules = [name for name, text in trees.named_leaves(axes) if parse_axes(text).first], trees.checked(rules)
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in matrices):
            raise ValueError(
                f"rule {pattern!r} matches no matrix; {trees.did_you_mean(pattern, matrices, 'those that can be adapted are')}"
            )

    def one(name, w, text):
        value = trees.match(rules, name) if parse_axes(text).first else None
        return w if value is None else make(name, w, text, value)

    return trees.map_named(one, params, axes, is_leaf=is_typed)


def _bias(name: str, w: Weight, axes: str, leaves: Mapping[str, Any]) -> Array | None:
    """What the module adds to the outputs of this matrix."""
    contracted, bias = parse_axes(axes).contracted, leaves.get(bias_name(name))
    outputs = tuple(size for i, size in enumerate(shape(w)) if i not in contracted)
    return bias if bias is not None and shape(bias) == outputs else None


def bias_name(name: str) -> str:
    """`q_bias` beside `q`, `b` beside `w`."""
    return f"{name[:-1]}b" if name.endswith("/w") else f"{name}_bias"


def key_of(rng: Array, name: str) -> Array:
    """The randomness of this leaf, whatever other leaves there are."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def dropout(loss_fn: Callable[..., Any], rate: float) -> Callable[..., Any]:
    """The loss with dropout in front of every LoRA's and DoRA's `a`, where it is given an rng: entries of their inputs are zero with probability `rate`,
    for each layer others. The experts of a mixture and rows that are looked up have none."""
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout of {rate} is no probability below 1")

    def dropped(params, batch, rng=None):
        def one(name, w):
            if rng is None or not isinstance(w, LoRA | DoRA):
                return w
            return dataclasses.replace(w, key=jax.random.split(key_of(rng, name), w.a.shape[: w.stacked]), rate=rate)

        return loss_fn(trees.map_named(one, params, is_leaf=is_typed), batch, rng)

    return dropped
