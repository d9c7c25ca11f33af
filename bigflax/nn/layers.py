"""The parts of a layer but attention: a product, a norm, the two kinds of mlp.

Legend: B batch, T time, D width, F mlp width, E experts, C chosen ones.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigflax import ops
from bigflax.nn.fence import NORMAL, Initializer, dropout, ones, pick, weight, zeros
from bigflax.sharding import constrain

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
