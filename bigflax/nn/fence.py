"""The fence: how a weight is declared, how a Linen module becomes a `Model`, and how layers are stacked."""

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from bigflax import ops, pipeline, trees
from bigflax.weights import Axes, parse_axes, write_axes

Initializer = Callable[..., jax.Array]
normal = nn.initializers.normal
NORMAL = normal(0.02)
zeros, ones = nn.initializers.zeros, nn.initializers.ones

# What of a layer is kept for its backward pass; the rest is computed again, so all of them give one loss and gradient. The names are put on in this
# package: "layer" what goes into a layer, "product" what comes out of a product with a weight, "attention" out of the attention.
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


KEY = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)  # what a key looks like, made without a device


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
    begin: Callable[..., Any] | None = None  # (params, batch, length, dtype=None) -> the cache that decoding begins with (nn.CACHES)

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

    known = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    taken, any_name = [p.name for p in known], any(p.kind is p.VAR_KEYWORD for p in known)

    def apply(params: Any, *, rng: jax.Array | None = None, **inputs: Any) -> dict[str, Any]:
        if not any_name and (unknown := sorted(inputs.keys() - {*taken})):
            raise ValueError(f"a {type(module).__name__} takes no {unknown[0]!r}; {trees.did_you_mean(unknown[0], taken, 'it takes')}")
        return module.apply({"params": params}, rngs=None if rng is None else {"dropout": rng}, **inputs)  # type: ignore[return-value]

    begin = (lambda params, *given, **how: module.empty_cache(*given, **how)) if hasattr(module, "empty_cache") else None
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
