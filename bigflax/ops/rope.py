"""Rotary position embeddings: a rotation of pairs of channels by an angle proportional to the position.

    y[i], y[i + R] = x[i] cos(a) - x[i + R] sin(a),  x[i + R] cos(a) + x[i] sin(a),      a = position * inv_freq[i],  i < R

Half-split pairs (i, i + R), Hugging Face's `rotate_half`. Rotations keep norms, and q . k then depends on the difference of positions only.
A plain inv_freq is theta^(-2 i / D); `scaling`, in the form of a Hugging Face `rope_scaling`, stretches it for longer contexts:

    default   as trained
    linear    inv_freq / factor                                                                     (Chen et al. 2023, arXiv 2306.15595)
    dynamic   theta grows with the length of the run, once it passes the trained length                 ("NTK-aware", Peng et al. 2023)
    yarn      long wavelengths as linear, short ones as trained, a ramp between; logits warmed by a factor on sin and cos   (2309.00071)
    llama3    the same idea with the ramp over wavelengths                                                     (Llama 3.1, 2407.21783)

Left out on purpose: interleaved pairs (importers permute the weights instead), LongRoPE's searched tables, three-axis positions.

Shapes: B batch, T time, N heads, H head width, R rotated pairs.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rope_frequencies(
    head_dim: int, *, theta: float = 10000.0, fraction: float = 1.0, scaling: Mapping[str, Any] | None = None,
    length: int | jax.Array | None = None,
) -> tuple[np.ndarray | jax.Array, float]:  # fmt: skip
    """Returns (inv_freq [R] float32, attention factor for `rope(factor=)`); R = int(head_dim * fraction) / 2.

    The factor is 1 but for yarn. `length` is that of the run, its last position and one; dynamic scaling alone looks at it.
    Raises ValueError for an unknown kind of scaling, and for one that lacks a key it needs.
    """
    dim = int(head_dim * fraction)
    if dim < 2 or dim % 2:
        raise ValueError(f"rope rotates pairs, and {fraction:g} of head_dim {head_dim} is {dim} channels; make it even and at least 2")
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"rope has no scaling {kind!r}; take one of {', '.join(KINDS)}")
    try:
        inv_freq, factor = KINDS[kind](dim, float(theta), scaling | ({} if length is None else {"length": length}))
    except KeyError as missing:
        raise ValueError(f"rope scaling {kind!r} lacks {missing}; it has {', '.join(scaling)}") from None
    return inv_freq.astype(np.float32), factor


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, inv_freq: np.ndarray | jax.Array, *, factor: float = 1.0) -> jax.Array:
    """Returns x rotated, in its dtype; channels from 2 R on pass unchanged. Positions are [B, T], or [T] for all rows alike.

    Angles are float32: exact integers up to 2^24, where bfloat16 stops telling positions apart at 256.
    """
    inv_freq, R = jnp.asarray(inv_freq, jnp.float32), len(inv_freq)
    angle_BT1R = jnp.atleast_2d(positions_BT)[..., None, None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angle_BT1R) * factor, jnp.sin(angle_BT1R) * factor
    x32 = x_BTNH[..., : 2 * R].astype(jnp.float32)
    swapped = jnp.roll(x32, R, axis=-1)  # a roll by half is the swap of halves; on the CPU, split and concatenate take five times as long
    y = x32 * jnp.concatenate([cos, cos], axis=-1) + swapped * jnp.concatenate([-sin, sin], axis=-1)
    return jnp.concatenate([y.astype(x_BTNH.dtype), x_BTNH[..., 2 * R :]], axis=-1)


def _plain(dim: int, theta: Any) -> Any:
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _default(dim: int, theta: float, scaling: dict) -> tuple[np.ndarray, float]:
    return _plain(dim, theta), 1.0


def _linear(dim: int, theta: float, scaling: dict) -> tuple[np.ndarray, float]:
    return _plain(dim, theta) / scaling["factor"], 1.0


def _dynamic(dim: int, theta: float, scaling: dict) -> tuple[Any, float]:
    """theta * (factor * length / trained - (factor - 1))^(D / (D - 2)); up to the trained length, as trained."""
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]
    length = scaling.get("length", trained)
    longer = (jnp.maximum if isinstance(length, jax.Array) else max)(length / trained, 1.0)
    return _plain(dim, theta * (factor * longer - (factor - 1)) ** (dim / (dim - 2))), 1.0


def _yarn(dim: int, theta: float, scaling: dict) -> tuple[np.ndarray, float]:
    """The ramp goes from the channel that turns `beta_fast` times in the trained length to the one that turns `beta_slow` times."""
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = (
        dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
    )
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    plain = _plain(dim, theta)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_factor(factor, scaling)


def _yarn_factor(factor: float, scaling: dict) -> float:
    """0.1 ln(factor) + 1 (the paper's equation 22, on q and on k), or what the model states: DeepSeek's quotient of two such."""
    warmth = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return warmth(scaling["mscale"]) / warmth(scaling["mscale_all_dim"])
    return warmth(1.0)


def _llama3(dim: int, theta: float, scaling: dict) -> tuple[np.ndarray, float]:
    """smooth = 0 keeps plain / factor (wavelengths beyond trained / low), 1 keeps plain (shorter than trained / high)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    plain = _plain(dim, theta)
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain, 1.0


KINDS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3}
