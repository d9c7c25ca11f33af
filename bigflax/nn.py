"""Modules: Flax Linen, fenced.

Of Linen we use `nn.Module`, our `weight()` and our `stack()`, and nothing else: only the "params" collection, every name explicit,
intermediates returned and never sown. `model()` is the fence: beyond it a model is two pure functions over a tree of plain arrays,
and a tree of axis strings beside them.

Whatever already stands in a weight's place (int8, LoRA ...) is used as it is: modules multiply through `ops.einsum` and cannot tell.
Dropout is on when `apply` is given `rng` and off when not; there is no other switch. The activations carry the dtype of computation:
the embedding casts once, and every product follows its operand. Running statistics are leaves of the tree like all others, and their new
values come back among the outputs (models/convnet.py).

Legend: B batch, T time, S key time, D width, F mlp width, N heads, K kv heads, H head width, V vocabulary, L layers.
Left out on purpose: mutable collections and lazily inferred shapes of outputs (a shape is written or follows from the input).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from bigflax import ops, pipeline, trees
from bigflax.sharding import constrain
from bigflax.weights import Axes, parse_axes, write_axes

Initializer = Callable[..., jax.Array]
normal = nn.initializers.normal
NORMAL = normal(0.02)
zeros, ones = nn.initializers.zeros, nn.initializers.ones

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # three names of one function
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "tanh": jnp.tanh,
}

# What of a layer is kept for its backward pass; the rest is computed again, so all of them give one loss and gradient. The names are put on in this
# file: "layer" what goes into a layer, "product" what comes out of a product with a weight, "attention" out of the attention.
_policies = jax.checkpoint_policies
REMAT = {
    "none": None,  # all of it
    "minimal": _policies.save_only_these_names("product", "attention"),  # what is dear: norms, activations and rotations are done again
    "dots": _policies.dots_with_no_batch_dims_saveable,  # the products, not the attention: its memory grows with the sequence too
    "full": _policies.nothing_saveable,  # the layers' inputs alone
    "offload": _policies.save_and_offload_only_these_names(  # those too, but in the memory of the host, fetched back layer by layer
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer"], offload_src="device", offload_dst="pinned_host"
    ),
}


def pick(table: Mapping[Any, Any], name: str | None, what: str) -> Any:
    """`table[name]`. Raises ValueError that names what there is."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; {trees.did_you_mean(str(name), map(str, table), 'there are')}")
    return table[name]


def head_width(features: int, heads: int) -> int:
    """The width of a head where `heads` share `features` evenly. Raises ValueError where they cannot."""
    if features % heads:
        near = max(heads, features - features % heads)
        raise ValueError(f"a width of {features} does not divide over {heads} heads; nearest is {near}")
    return features // heads


KEY = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)  # what a key looks like, made without a device

# -- weights and the fence -------------------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Named(meta.AxisMetadata):
    """A fresh weight and its axis string, on the way from `init` to the fence; a scan writes its axis name in front."""

    value: Any
    axes: str

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Named":
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict) -> "_Named":
        ax = parse_axes(self.axes)
        return dataclasses.replace(
            self, axes=write_axes(Axes((params[nn.PARTITION_NAME], *ax.stack), ax.first, ax.second, ax.outputs_first))
        )

    def remove_axis(self, index: int, params: dict) -> "_Named":
        ax = parse_axes(self.axes)
        return dataclasses.replace(self, axes=write_axes(Axes(ax.stack[1:], ax.first, ax.second, ax.outputs_first)))

    def tree_flatten(self):
        return (self.value,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: str, init: Initializer = NORMAL) -> Any:
    """One weight of `module`, float32 unless `init` makes a number of another kind, and the names of its axes (weights.py explains the string).
    What is already there passes untouched."""
    if module.has_variable("params", name):  # `param` would check the shape, and refuse a typed weight
        there = module.get_variable("params", name)
        return there.value if isinstance(there, _Named) else there  # a stack of tied layers looks again while it is being made
    return module.param(name, lambda rng: _Named(init(rng, shape, jnp.float32), axes))


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that it may be a static argument of jit
class Model:
    """A model, as the rest of the library sees it: two pure functions over a tree of weights, and the axes of each weight.

    `init(rng) -> params`; `apply(params, rng=None, **inputs) -> dict of outputs`; `axes` is shaped like `params`, a string a weight.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., dict[str, Any]]
    axes: Any
    module: Any = None
    family: str = ""  # of models.create, with the config it was built from: what hub.save writes
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str | None = None  # the folder it was loaded from
    shaped: Any = None
    begin: Callable[[Any, int, int], Any] | None = (
        None  # (params, batch, length) -> the cache that decoding begins with; None: an empty one
    )

    def shapes(self) -> Any:
        """The tree of ShapeDtypeStructs that `init` would make."""
        return jax.eval_shape(self.init, KEY) if self.shaped is None else self.shaped

    def summary(self) -> str:
        """The tree as a table: name, shape, dtype, axes, parameters, bytes."""
        return trees.summary(self.shapes(), self.axes)


def model(module: nn.Module, **example: Any) -> Model:
    """Fences a Linen module in; `example` are its inputs as arrays or ShapeDtypeStructs of any small size."""
    zeros = lambda: {name: jnp.zeros(x.shape, x.dtype) for name, x in example.items()}
    # nn.init, not module.init: many of our modules have a field of that name, their initializer.
    boxed = lambda rng: nn.init(lambda module: module(**zeros()), module)({"params": rng})["params"]
    is_named = lambda x: isinstance(x, _Named)
    named = jax.eval_shape(boxed, KEY)
    axes, shaped = (jax.tree.map(lambda box, part=part: getattr(box, part), named, is_leaf=is_named) for part in ("axes", "value"))

    def init(rng: jax.Array) -> Any:
        return jax.tree.map(lambda box: box.value, boxed(rng), is_leaf=is_named)

    def apply(params: Any, *, rng: jax.Array | None = None, **inputs: Any) -> dict[str, Any]:
        return module.apply({"params": params}, rngs=None if rng is None else {"dropout": rng}, **inputs)  # type: ignore[return-value]

    begin = (lambda params, batch, length: module.empty_cache(batch, length)) if hasattr(module, "empty_cache") else None
    return Model(init, apply, axes, module, shaped=shaped, begin=begin)


_walk: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar("bigflax_walk", default=None)


@contextlib.contextmanager
def walking(walk: Callable[..., Any]) -> Iterator[None]:
    """Whatever is stacked inside is not scanned: `walk(path, layer, weights, x, shared, layers, tied)` gets the layers' path, `layer(weights, x, shared)`
    -> (x, seen), and what `stack` would run, and returns what it would return. For whoever looks at a model layer by layer, outside of a trace."""
    token = _walk.set(walk)
    try:
        yield
    finally:
        _walk.reset(token)


def stack(
    block: nn.Module,
    layers: int | None,
    x: jax.Array,
    each: Any = None,
    *,
    remat: str = "none",
    unroll: int | bool = 1,
    tied: bool = False,
    joint: bool = False,
    **shared: Any,
) -> tuple[jax.Array, Any]:
    """Runs `layers` copies of `block` one after another as one scan: `(x, seen)`, where `seen` stacks what each returned beside x.

    `each` is a tree with a leading layer axis, of which each layer gets its slice (a cache); `shared` reaches all of them. The block's
    weights gain a leading "layers" axis, unless all copies are `tied` to one set of them. Compile time does not grow with the number of
    layers. With `layers` None the block runs once as it is, which may change the shape of x: its weights gain no axis, and neither does what
    it returns.

    Where the layout of the step gives the layers' axis to stages, the layers run as a pipeline (pipeline.run says which of `shared` goes with
    the rows, and what becomes of what they return): not while there is something for `each` of them, nor where they are `joint`, which
    compute over all rows together (batch norm).
    """
    walk = _walk.get()
    if walk is not None and each is None and not block.is_initializing():
        free = block.clone(parent=None)
        layer = lambda weights, x, shared: free.apply({"params": weights}, x, None, **shared)
        return walk("/".join(block.path), layer, block.variables["params"], x, shared, layers, tied)
    policy = pick(REMAT, remat, "remat")
    if layers is not None and each is None and not joint and not block.is_initializing():
        plan = pipeline.plan(layers, len(x))
        if plan is not None:
            return _pipeline(block, plan, x, policy, tied, shared)

    def body(block, x, number_each):
        number, each = number_each
        with ops.casting(number):
            return block(checkpoint_name(x, "layer"), each, **shared)

    if policy is not None:
        body = nn.remat(body, prevent_cse=layers is None, policy=policy)
    if layers is None:
        return body(block, x, (None, each))
    scan = nn.scan(
        body, variable_axes={} if tied else {"params": 0}, variable_broadcast="params" if tied else False,
        split_rngs={"params": not tied, "dropout": True}, length=layers, unroll=unroll, metadata_params={nn.PARTITION_NAME: "layers"},
    )  # fmt: skip
    return scan(block, x, (jnp.arange(layers), each))


def _pipeline(
    block: nn.Module, plan: pipeline.Plan, x: jax.Array, policy: Any, tied: bool, shared: dict[str, Any]
) -> tuple[jax.Array, Any]:
    free = block.clone(parent=None)

    def layer(weights, x, shared, key):
        x = checkpoint_name(x, "layer")
        return free.apply({"params": weights}, x, None, rngs=None if key is None else {"dropout": key}, **shared)

    key = block.make_rng("dropout") if block.has_rng("dropout") else None
    return pipeline.run(
        layer, block.variables["params"], x, shared, plan, tied=tied, key=key, policy=policy, keep=policy is not REMAT["full"]
    )  # fmt: skip


def dropout(module: nn.Module, x: jax.Array, rate: float, *, rows: bool = False) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the rest, when `apply` was given `rng`; with `rows`, all of x[i] or nothing of it
    (stochastic depth: Huang et al. 2016, 1603.09382)."""
    if rate == 0.0 or not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, (len(x), *[1] * (x.ndim - 1)) if rows else x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


# -- the parts of a layer --------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = x w (+ b) over the last axis; `axes` names input and output: "embed -> mlp"."""

    features: int
    axes: str
    bias: bool = True
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ops.einsum("...d,df->...f", x, weight(self, "w", (x.shape[-1], self.features), self.axes, self.init))
        y = checkpoint_name(y, "product")
        return y + weight(self, "b", (self.features,), self.axes.split()[-1], zeros).astype(y.dtype) if self.bias else y


class Norm(nn.Module):
    """RMS ("rms") or mean-and-variance ("layer") normalization over the last axis; statistics in float32."""

    kind: str = "rms"
    eps: float = 1e-6
    bias: bool = True
    around_one: bool = False  # the stored scale is what is added to one (Gemma)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = weight(self, "scale", x.shape[-1:], "norm", zeros if self.around_one else ones)
        scale = scale + 1 if self.around_one else scale
        if self.kind == "rms":
            return ops.rms_norm(x, scale, eps=self.eps)
        return ops.layer_norm(x, scale, weight(self, "bias", x.shape[-1:], "norm", zeros) if self.bias else None, eps=self.eps)


class Rope(nn.Module):
    """Rotary positions: no weights, only how to turn q and k at given positions."""

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Any = None

    def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        inv_freq, factor = ops.rope_frequencies(
            x_BTNH.shape[-1], theta=self.theta, fraction=self.fraction, scaling=self.scaling, length=jnp.max(positions_BT) + 1
        )
        return ops.rope(x_BTNH, positions_BT, inv_freq, factor=factor)


class RelativeBias(nn.Module):
    """What is added to the logits for the distance between query and key, a number a head and bucket (T5; Raffel et al. 2020, 1910.10683).

    Half of the buckets are distances 0, 1, 2 ...; the others grow by equal factors up to `farthest`, beyond which all are one. With `both_ways`
    the first half of them all is for keys at or before the query and the second for those behind it; else those behind count as distance 0.
    """

    heads: int
    buckets: int = 32
    farthest: int = 128
    both_ways: bool = True
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, queries: int, keys: int, start: jax.Array | int = 0) -> jax.Array:
        """[1, N, T, S] for queries at `start`, `start` + 1 ... and keys at 0, 1 ..."""
        w_PN = weight(self, "w", (self.buckets, self.heads), "_ heads", self.init)
        distance_TS = jnp.arange(keys)[None, :] - (start + jnp.arange(queries))[:, None]
        row_TS = jnp.asarray(self._rows())[jnp.clip(distance_TS, -self.farthest, self.farthest) + self.farthest]
        return constrain(w_PN[row_TS].transpose(2, 0, 1)[None], None, "heads", "seq", None)

    def _rows(self) -> np.ndarray:
        """The bucket of each distance key - query from -farthest to farthest. On the host: a compiled logarithm may fall short of a whole number."""
        signed = np.arange(-self.farthest, self.farthest + 1)
        buckets = self.buckets // 2 if self.both_ways else self.buckets
        exact, far = buckets // 2, np.abs(signed) if self.both_ways else np.maximum(-signed, 0)
        steps = np.log(np.maximum(far, exact).astype(np.float32) / exact) / np.float32(math.log(self.farthest / exact)) * (buckets - exact)
        near_or_far = np.where(far < exact, far, np.minimum(exact + steps.astype(int), buckets - 1))
        return near_or_far + (buckets * (signed > 0) if self.both_ways else 0)


class Attention(nn.Module):
    """Multi-head or grouped-query attention, with optional rotary positions, QK-norm, window and soft cap.

    `__call__(x, cache, positions=, q_segments=, kv_segments=, bias=)` returns `(y, cache)`. A cache is `{"k", "v": [B, S, K, H], "index": [],
    "segments": [B, S]}` for one layer: new keys and values are written at `index`, and attention runs over all that is written. `bias`
    [1 or B, N, T, S] is added to the logits.

    A `cross` attention looks at `memory` [B, S, D'], another sequence's states; its cache, `{"k", "v", "segments"}`, keeps what was made of
    the memory, and where `memory` is None serves instead of it. `kv_segments` are then those of the memory; without `q_segments` each
    query sees all of it that is 1.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    causal: bool = True
    cross: bool = False
    rope: Rope | None = None
    norm: Norm | None = None  # of q and k before the rotation: over the width of each head,
    norm_heads: bool = False  # or over all heads together
    bias: bool = False
    k_bias: bool | None = None
    out_bias: bool | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    init: Initializer = NORMAL
    q_init: Initializer | None = None
    out_init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD, cache=None, *, memory=None, positions=None, q_segments=None, kv_segments=None, bias=None):
        D, N, H, T, places = x_BTD.shape[-1], self.heads, self.head_dim, x_BTD.shape[1], {}
        q_BTNH = self._normed("q_norm", self._project(x_BTD, "q", N, "heads", self.bias, self.q_init or self.init))
        if self.cross:
            k_BSKH, v_BSKH, kv_segments, cache = self._recall(memory, kv_segments, cache)
            if kv_segments is None or q_segments is None:  # all of the memory that is real may be seen
                q_segments = None if kv_segments is None else jnp.ones(x_BTD.shape[:2], jnp.int32)
        else:
            k_BSKH, v_BSKH = self._keys(x_BTD)
            if self.rope is not None:
                at = jnp.arange(T)[None] if positions is None else positions
                q_BTNH, k_BSKH = self.rope(q_BTNH, at), self.rope(k_BSKH, at)
            if cache is not None:
                cache = write_cache(cache, k_BSKH, v_BSKH, kv_segments)
                k_BSKH, v_BSKH, kv_segments = cache["k"], cache["v"], cache["segments"]
                # Order, not position, decides what is past: a prompt padded on the left starts at position 0 behind its padding.
                places = {"q_positions": (cache["index"] - T + jnp.arange(T))[None], "kv_positions": jnp.arange(k_BSKH.shape[1])[None]}
        q_BTNH, k_BSKH, v_BSKH = constrain(q_BTNH, "batch", "seq", "heads", None), k_BSKH.astype(x_BTD.dtype), v_BSKH.astype(x_BTD.dtype)
        y_BTNH = ops.attention(
            q_BTNH, k_BSKH, v_BSKH, causal=self.causal, window=self.window, q_segments=q_segments, kv_segments=kv_segments,
            scale=self.scale, softcap=self.softcap, bias=bias, **places,
        )  # fmt: skip
        y_BTD = ops.einsum("btnh,nhd->btd", y_BTNH, weight(self, "out", (N, H, D), "heads head_dim -> embed", self.out_init))
        y_BTD = checkpoint_name(y_BTD, "product")
        if self.bias if self.out_bias is None else self.out_bias:
            y_BTD += weight(self, "out_bias", (D,), "norm", zeros).astype(y_BTD.dtype)
        return dropout(self, y_BTD, self.dropout), cache

    def _keys(self, x_BSD):
        """Keys, normed where asked for but not yet rotated, and values: both [B, S, K, H]."""
        K = self.kv_heads or self.heads
        k_BSKH = self._project(x_BSD, "k", K, "kv_heads", self.bias if self.k_bias is None else self.k_bias, self.init)
        return self._normed("k_norm", k_BSKH), self._project(x_BSD, "v", K, "kv_heads", self.bias, self.init)

    def _recall(self, memory, segments, cache):
        """Keys, values and segments of the memory, or of the cache that was made of it, and the cache."""
        if memory is None:
            if cache is None:
                raise ValueError("a decoder that looks at an encoder's states was given none: pass the encoder's inputs too")
            return cache["k"], cache["v"], cache["segments"], cache
        k_BSKH, v_BSKH = self._keys(memory)
        if cache is not None:
            segments = jnp.ones(memory.shape[:2], jnp.int32) if segments is None else segments
            cache = {"k": k_BSKH.astype(cache["k"].dtype), "v": v_BSKH.astype(cache["v"].dtype), "segments": segments}
        return k_BSKH, v_BSKH, segments, cache

    def _normed(self, name, x_BTNH):
        if self.norm is None:
            return x_BTNH
        norm = self.norm.clone(parent=self, name=name)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape) if self.norm_heads else norm(x_BTNH)

    def _project(self, x_BTD, name, heads, axis, bias, init):
        w = weight(self, name, (x_BTD.shape[-1], heads, self.head_dim), f"embed -> {axis} head_dim", init)
        y_BTNH = checkpoint_name(ops.einsum("btd,dnh->btnh", x_BTD, w), "product")
        if not bias:
            return y_BTNH
        return y_BTNH + weight(self, f"{name}_bias", (heads, self.head_dim), f"{axis} head_dim", zeros).astype(y_BTNH.dtype)


def write_cache(cache: dict[str, jax.Array], k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None) -> dict[str, jax.Array]:
    """The cache with T more keys and values at `index`. Segment 0 marks what is not to be attended to: padding, and what is not written yet."""
    at = cache["index"]
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=1)
    segments = jnp.ones(k_BTKH.shape[:2], jnp.int32) if segments_BT is None else segments_BT
    return {
        "k": put(cache["k"], k_BTKH),
        "v": put(cache["v"], v_BTKH),
        "segments": put(cache["segments"], segments),
        "index": at + k_BTKH.shape[1],
    }


class Mlp(nn.Module):
    """Plain: down(act(up(x))); gated (SwiGLU, GeGLU): down(act(gate(x)) * up(x))."""

    features: int
    act: str = "gelu"
    gated: bool = False
    bias: bool = False
    dropout: float = 0.0
    init: Initializer = NORMAL
    out_init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F, act = x_BTD.shape[-1], self.features, pick(ACTIVATIONS, self.act, "activation")
        h_BTF = self._up(x_BTD, "up")
        h_BTF = act(self._up(x_BTD, "gate")) * h_BTF if self.gated else act(h_BTF)
        h_BTF = constrain(h_BTF, "batch", "seq", "mlp")
        y_BTD = ops.einsum("btf,fd->btd", h_BTF, weight(self, "down", (F, D), "mlp -> embed", self.out_init))
        y_BTD = checkpoint_name(y_BTD, "product")
        if self.bias:
            y_BTD += weight(self, "down_bias", (D,), "norm", zeros).astype(y_BTD.dtype)
        return dropout(self, y_BTD, self.dropout)

    def _up(self, x_BTD, name):
        h_BTF = ops.einsum("btd,df->btf", x_BTD, weight(self, name, (x_BTD.shape[-1], self.features), "embed -> mlp", self.init))
        h_BTF = checkpoint_name(h_BTF, "product")
        return h_BTF + weight(self, f"{name}_bias", (self.features,), "mlp", zeros).astype(h_BTF.dtype) if self.bias else h_BTF


class Moe(nn.Module):
    """`experts` gated Mlps of width `features`, of which each token passes through the `choices` that a router chooses (ops/moe.py).

    Returns `(y, {"chosen", "probs", "tokens"})`, the sums over the tokens of `real_BT` that the load-balance loss is made of, and where a
    capacity may leave some out, how many choices were "dropped". A `shared` expert takes every token, behind a sigmoid gate of its own.
    """

    experts: int
    choices: int
    features: int
    act: str = "silu"
    normalize: bool = True  # the chosen gates sum to one
    shared: Mlp | None = None
    implementation: str | None = None
    capacity_factor: float | None = None
    init: Initializer = NORMAL
    out_init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        D, E, F, act = x_BTD.shape[-1], self.experts, self.features, pick(ACTIVATIONS, self.act, "activation")
        logits_BTE = Linear(E, "embed -> _", bias=False, init=self.init, name="router")(x_BTD)
        probs_BTE, gates_BTC, chosen_BTC = ops.route(logits_BTE, self.choices, normalize=self.normalize)
        axes = {"gate": "experts | embed -> mlp", "up": "experts | embed -> mlp", "down": "experts | mlp -> embed"}
        w = {name: weight(self, name, (E, D, F), text, self.init) for name, text in axes.items() if name != "down"}
        w["down"] = weight(self, "down", (E, F, D), axes["down"], self.out_init)

        def expert(x, w, product):
            by = lambda x, w: checkpoint_name(product(x, w), "product")
            return by(act(by(x, w["gate"])) * by(x, w["up"]), w["down"])

        y_BTD, dropped = ops.mixture(
            expert, x_BTD, gates_BTC, chosen_BTC, w, axes, implementation=self.implementation, capacity_factor=self.capacity_factor,
            real_BT=real_BT,
        )  # fmt: skip
        if self.shared is not None:
            gate_BT1 = jax.nn.sigmoid(Linear(1, "embed -> _", bias=False, init=self.init, name="shared_gate")(x_BTD))
            y_BTD += gate_BT1 * self.shared(x_BTD)
        return y_BTD, ops.router_sums(probs_BTE, chosen_BTC, real_BT, dropped)
