"""Convolutional networks by composition: a stem, stages of blocks of which alike ones are stacked and scanned, a pooling, a head.

    ResNet      ConvNet(Chain(Parts((Unit(Conv(64, 7, 2)), MaxPool(3, 2, 1)))), stages of Residual(...))
    ConvNeXt    ConvNet(Patches(...), stages of ConvNextBlock(...), norm=Norm("layer"))

`pixel_values` [B, C, H, W] come in as the processors of transformers give them and are transposed once; within, images lie as [B, H, W, C] and
kernels as [kernel, kernel, channels in / groups, channels out] ("HWIO"). `last_hidden_state` and `hidden_states` go out as [B, C, H, W].

Batch norm keeps running statistics by a pure contract (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1). The statistics are leaves of the
tree whose axes are named "statistic", so that `train.init_state(..., axes=model.axes)` freezes them. Without `rng`, `apply` normalizes by
them; with `rng` by the batch's own, and its outputs have `updates`, {leaf name: new value}, which a loss hands on to the step:

    def loss_fn(params, batch, rng):
        out = model.apply(params, rng=rng, pixel_values=batch["pixel_values"])
        return cross_entropy(out["logits"], batch["labels"]), {}, out.get("updates", {})

On a mesh the batch is the global one. Every module here returns (x, updates), the latter by names below its own; nothing is mutated.

Typed weights: convolutions multiply by `dense(w)`, so that every type works and none saves anything there but memory at rest.
Left out on purpose: batch norm frozen apart from its network, deformable and transposed convolutions.
Legend: B batch, H height, W width, C channels, L layers.
"""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigflax import ops
from bigflax.models.transformer import Group, Inputs
from bigflax.nn import ACTIVATIONS, NORMAL, Initializer, Linear, Mlp, Norm, dropout, ones, pick, stack, weight, zeros
from bigflax.sharding import constrain
from bigflax.weights import dense

Updates = dict[str, jax.Array]
PADDINGS = {
    "torch": lambda kernel, dilation: [((kernel - 1) // 2 * dilation,) * 2] * 2,  # the same on every side, whatever the stride
    "same": lambda kernel, dilation: "SAME",  # TensorFlow's: what the stride asks for, the odd one at the end
    "valid": lambda kernel, dilation: "VALID",
}


def below(name: str, updates: Updates) -> Updates:
    """The updates of a part that is itself called `name`."""
    return {f"{name}/{leaf}": value for leaf, value in updates.items()}


class Conv(nn.Module):
    """A convolution over [B, H, W, C]; `axes` names its channels, "embed -> mlp"; `groups` -1: one a channel (depthwise)."""

    features: int
    kernel: int
    stride: int = 1
    padding: str = "torch"
    groups: int = 1
    dilation: int = 1
    bias: bool = False
    axes: str = "embed -> mlp"
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        channels, kernel = x_BHWC.shape[-1], (self.kernel, self.kernel)
        groups = channels if self.groups == -1 else self.groups
        if channels % groups or self.features % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels in and {self.features} out")
        w = weight(self, "w", (*kernel, channels // groups, self.features), f"_ _ {self.axes}", self.init)
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC, dense(w).astype(x_BHWC.dtype), (self.stride,) * 2, pick(PADDINGS, self.padding, "padding")(self.kernel, self.dilation),
            rhs_dilation=(self.dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip
        if not self.bias:
            return y_BHWC
        return y_BHWC + weight(self, "b", (self.features,), self.axes.split()[-1], zeros).astype(y_BHWC.dtype)


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias for each channel, in float32; `momentum` is the new batch's share, as in PyTorch.

    In training, mean and variance (of n values, over n) are the batch's, and the running ones move towards them, the variance over n - 1.
    """

    eps: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> tuple[jax.Array, Updates]:
        C = x_BHWC.shape[-1:]
        scale_C, bias_C = weight(self, "scale", C, "norm", ones), weight(self, "bias", C, "norm", zeros)
        mean_C, var_C = weight(self, "mean", C, "statistic", zeros), weight(self, "var", C, "statistic", ones)
        count = weight(self, "count", (), "", lambda rng, shape, dtype: jnp.zeros(shape, jnp.int32))
        x32_BHWC, updates = x_BHWC.astype(jnp.float32), {}
        if self.has_rng("dropout"):
            n = x_BHWC.size // C[0]
            if n < 2:
                raise ValueError("batch norm in training needs more than one value a channel: a larger batch, or larger images")
            old, axes = (mean_C, var_C), tuple(range(x_BHWC.ndim - 1))
            mean_C = jnp.mean(x32_BHWC, axes)
            var_C = jnp.mean(jnp.square(x32_BHWC - mean_C), axes)
            moved = lambda old, new: (1 - self.momentum) * old + self.momentum * jax.lax.stop_gradient(new)
            updates = {"mean": moved(old[0], mean_C), "var": moved(old[1], var_C * (n / (n - 1))), "count": count + 1}
        y_BHWC = (x32_BHWC - mean_C) * (jax.lax.rsqrt(var_C + self.eps) * scale_C) + bias_C
        return y_BHWC.astype(x_BHWC.dtype), updates


class MaxPool(nn.Module):
    """The largest value in each window; what lies outside of the image is smaller than all."""

    window: int
    stride: int
    padding: int = 0

    def __call__(self, x_BHWC: jax.Array) -> tuple[jax.Array, Updates]:
        edge, each = (self.padding, self.padding), lambda n: (1, n, n, 1)
        around = ((0, 0), edge, edge, (0, 0))
        return jax.lax.reduce_window(x_BHWC, -jnp.inf, jax.lax.max, each(self.window), each(self.stride), around), {}


class Unit(nn.Module):
    """A convolution, batch norm (of this `eps` and `momentum`; None for none), an activation if there is one."""

    conv: Conv
    act: str | None = None
    eps: float | None = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> tuple[jax.Array, Updates]:
        x_BHWC, updates = self.conv(x_BHWC), {}
        if self.eps is not None:
            x_BHWC, updates = BatchNorm(self.eps, self.momentum, name="norm")(x_BHWC)
        x_BHWC = constrain(x_BHWC, "batch", None, None, "mlp" if self.conv.axes.endswith("mlp") else None)
        return x_BHWC if self.act is None else pick(ACTIVATIONS, self.act, "activation")(x_BHWC), below("norm", updates)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Modules that follow one another. No tuple: Linen would name them before the module does that they are part of."""

    modules: tuple[nn.Module, ...]


class Chain(nn.Module):
    """One part after the other, named "0", "1" ..."""

    parts: Parts

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> tuple[jax.Array, Updates]:
        updates: Updates = {}
        for i, part in enumerate(self.parts.modules):
            x_BHWC, new = part.clone(parent=self, name=str(i))(x_BHWC)
            updates |= below(str(i), new)
        return x_BHWC, updates


class Residual(nn.Module):
    """act(body(x) + shortcut(x)), He et al. 2015 (arXiv 1512.03385): without a `shortcut` x itself, and nothing where `adds` is false."""

    body: Chain
    shortcut: Unit | None = None
    act: str | None = None
    adds: bool = True

    @nn.compact
    def __call__(self, x_BHWC, each=None, *, keep=False):
        y_BHWC, new = self.body(x_BHWC)
        updates = below("body", new)
        if self.shortcut is not None:
            x_BHWC, new = self.shortcut(x_BHWC)
            updates |= below("shortcut", new)
        y_BHWC = constrain(y_BHWC + x_BHWC if self.adds else y_BHWC, "batch", None, None, None)
        y_BHWC = y_BHWC if self.act is None else pick(ACTIVATIONS, self.act, "activation")(y_BHWC)
        return y_BHWC, {"updates": updates, "hidden": y_BHWC if keep else None}


class Patches(nn.Module):
    """A norm and a convolution with a bias, in either order: ConvNeXt's stem (the norm behind) and what goes before its later stages."""

    conv: Conv
    norm: Norm
    norm_first: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> tuple[jax.Array, Updates]:
        x_BHWC = self.conv(self.norm(x_BHWC)) if self.norm_first else self.norm(self.conv(x_BHWC))
        return constrain(x_BHWC, "batch", None, None, None), {}


class ConvNextBlock(nn.Module):
    """x + scale * mlp(norm(depthwise(x))), Liu et al. 2022 (arXiv 2201.03545); `each` is the probability that training leaves a sample out."""

    conv: Conv
    norm: Norm
    mlp: Mlp
    scale: float = 0.0  # at the start; 0 for none

    @nn.compact
    def __call__(self, x_BHWC, each=None, *, keep=False):
        h_BHWC = self.norm(self.conv(x_BHWC))
        y_BHWC = self.mlp(h_BHWC.reshape(h_BHWC.shape[0], -1, h_BHWC.shape[-1])).reshape(h_BHWC.shape)
        if self.scale:
            start = nn.initializers.constant(self.scale)
            y_BHWC *= weight(self, "scale", x_BHWC.shape[-1:], "norm", start).astype(y_BHWC.dtype)
        x_BHWC = constrain(x_BHWC + (y_BHWC if each is None else drop_path(self, y_BHWC, each)), "batch", None, None, None)
        return x_BHWC, {"updates": {}, "hidden": x_BHWC if keep else None}


def drop_path(module: nn.Module, y_BHWC: jax.Array, rate: jax.Array) -> jax.Array:
    """Zeroes whole samples with probability `rate` and scales the rest, when `apply` was given `rng` (Huang et al. 2016, arXiv 1603.09382)."""
    if not module.has_rng("dropout"):
        return y_BHWC
    keep_B = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, y_BHWC.shape[:1])
    return jnp.where(keep_B[:, None, None, None], y_BHWC / (1.0 - rate).astype(y_BHWC.dtype), jnp.zeros((), y_BHWC.dtype))


@dataclasses.dataclass(frozen=True)
class Layers:
    """The blocks of a stage: groups of alike ones, what goes before them, and the rate of `drop_path` of each layer."""

    groups: tuple[Group, ...]
    before: Patches | None = None
    rates: tuple[float, ...] | None = None

    def places(self) -> list[tuple[str, int, int, int]]:
        starts = itertools.accumulate((group.layers for group in self.groups), initial=0)
        names = ["blocks"] if len(self.groups) == 1 else [f"blocks_{i}" for i in range(len(self.groups))]
        return [(name, start, 1, group.repeats) for name, start, group in zip(names, starts, self.groups, strict=False)]


def groups(first: nn.Module, rest: nn.Module, layers: int) -> tuple[Group, ...]:
    """A first layer, and those behind it that are alike."""
    return (Group((first,), 0), *([Group((rest,), layers - 1)] if layers > 1 else []))


class Stage(nn.Module):
    """The layers of a stage, group after group: (x, updates, the states after each layer where they are to be kept)."""

    layers: Layers
    remat: str = "none"
    unroll: int | bool = 1

    @nn.compact
    def __call__(self, x_BHWC, *, keep=False):
        updates: Updates = {}
        states: list[jax.Array] = []
        if self.layers.before is not None:
            x_BHWC, updates = self.layers.before.clone(parent=self, name="before")(x_BHWC)
            updates = below("before", updates)
        unroll = 1 if self.is_initializing() else self.unroll
        for (name, start, _, repeats), group in zip(self.layers.places(), self.layers.groups, strict=True):
            rates = None if self.layers.rates is None else jnp.asarray(self.layers.rates[start : start + group.layers], jnp.float32)
            rates = rates if rates is None or repeats else rates[0]
            block = group.blocks[0].clone(parent=self, name=name)
            x_BHWC, seen = stack(block, repeats or None, x_BHWC, rates, remat=self.remat, unroll=unroll, joint=True, keep=keep)
            updates |= below(name, seen["updates"])
            if keep:
                states += [*seen["hidden"]] if repeats else [seen["hidden"]]
        return x_BHWC, updates, states


class ImageHead(nn.Module):
    """Scores of an image, [B, labels], from its pooled state [B, C] or its whole last state [B, H, W, C]; `hidden` is the width of a layer
    between, 0 for none."""

    labels: int
    hidden: int = 0
    act: str = "relu"
    dropout: float = 0.0
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x):
        if self.hidden:
            name, shape = "bhwc"[-x.ndim + 1 :], (*x.shape[1:], self.hidden)
            w = weight(self, "w", shape, f"{'_ ' * (x.ndim - 2)}embed -> mlp", self.init)
            if w.shape != shape:
                raise ValueError(
                    f"a last state of {list(x.shape[1:])} does not fit a head made for {list(w.shape[:-1])}: other images are needed"
                )
            x_BF = ops.einsum(f"b{name},{name}f->bf", x, w)
            x = pick(ACTIVATIONS, self.act, "activation")(x_BF + weight(self, "b", (self.hidden,), "mlp", zeros).astype(x_BF.dtype))
        x = dropout(self, x, self.dropout)
        return {"logits": Linear(self.labels, "embed -> _", init=self.init, name="scores")(x)}


class ConvNet(nn.Module):
    """A network over images; `states` says what `hidden_states` lists, the stem and each of the "stages", or each of the "layers".

    The leaves of stage i are below "stages_i/blocks", or "stages_i/blocks_0" and "stages_i/blocks_1" where its first layer is another.
    """

    stem: nn.Module
    stages: Parts = Parts(())
    last: Unit | None = None
    pooled: bool = True  # the head sees the mean over the image
    pooler_shape: tuple[int, ...] = ()  # what follows [B, C] in the shape of `pooler_output`
    norm: Norm | None = None  # of the pooled state
    head: ImageHead | None = None
    states: str = "stages"
    channels: int = 3
    image_size: int = 224
    dtype: str = "float32"

    def example(self) -> Inputs:
        """The inputs of a small call, as ShapeDtypeStructs by name."""
        return {"pixel_values": jax.ShapeDtypeStruct((1, self.channels, self.image_size, self.image_size), jnp.float32)}

    def places(self) -> dict[str, list[tuple[str, int, int, int]]]:
        """Where names.py finds the layers, as in transformer.py."""
        return {
            f"stages_{i}/blocks": [(f"stages_{i}/{name}", *counts) for name, *counts in stage.layers.places()]  # type: ignore[attr-defined]
            for i, stage in enumerate(self.stages.modules)
        }  # type: ignore[return-value]

    @nn.compact
    def __call__(self, pixel_values, *, hidden_states=False):
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.channels:
            raise ValueError(f"pixel_values are [B, {self.channels}, H, W] here, not {list(pixel_values.shape)}")
        x_BHWC = constrain(jnp.transpose(pixel_values, (0, 2, 3, 1)).astype(self.dtype), "batch", None, None, None)
        x_BHWC, updates = self.stem(x_BHWC)
        updates, seen, stages = below("stem", updates), [], [x_BHWC]
        for i, stage in enumerate(self.stages.modules):
            x_BHWC, new, states = stage.clone(parent=self, name=f"stages_{i}")(x_BHWC, keep=hidden_states and self.states == "layers")
            updates |= below(f"stages_{i}", new)
            seen, stages = seen + states, [*stages, x_BHWC]
        if self.last is not None:
            x_BHWC, new = self.last(x_BHWC)
            updates |= below("last", new)
        outside = lambda x_BHWC: jnp.transpose(x_BHWC, (0, 3, 1, 2))
        out: dict[str, Any] = {"last_hidden_state": outside(x_BHWC)} | ({"updates": updates} if updates else {})
        if hidden_states:
            out["hidden_states"] = tuple(map(outside, seen if self.states == "layers" else stages))
        x = jnp.mean(x_BHWC, (1, 2)) if self.pooled else x_BHWC
        x = x if self.norm is None else self.norm(x)
        if self.head is not None:
            return out | self.head(x)
        return out | ({"pooler_output": x.reshape(*x.shape, *self.pooler_shape)} if self.pooled else {})
