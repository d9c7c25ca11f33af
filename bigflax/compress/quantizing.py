"""Fewer bits for each number: one matrix at a time, by rounding alone or so that its products with what goes into it stay.

    rtn           round to nearest, each group's range clipped where that errs less
    gptq          one input after the other; what its rounding did wrong is made good by the inputs that are not rounded yet: Frantar et al. 2022,
                  arXiv 2210.17323, algorithm 1, with the inputs of the largest activations first and groups that lie still
    awq           inputs that are large on average are multiplied before rounding, and divided after: Lin et al. 2023, 2306.00978, equations 4 and 5
    smoothquant   W8A8: what goes in is rounded to 8 bits too, after its outliers moved into the weights: Xiao et al. 2022, 2211.10438, equation 4
    w8a8          the same without moving anything
    hadamard      rounded after a random rotation of its inputs, which spreads outliers over all: Ashkboos et al. 2024 (QuaRot), 2404.00456, section 4;
                  where there are statistics, by gptq

A format is one string, "int4:128" or "int4:128:asym": the type, how many inputs share a scale (none: all of them), whether a zero point stands beside it.
Types: int8 to int2, nf4 (Dettmers et al. 2023, 2305.14314, appendix E), fp8 (e4m3), mxfp4 (OCP Microscaling 1.0: e2m1, scales that are powers of two).
All are `Quantized`, arrays of the Qwix library, which multiplies them. Qwix's own GPTQ and AWQ are bare calls that know no nf4, unroll a Python loop over
all inputs when compiled, take no order, and weigh errors by the mean activation instead of the products'; so these are ours.

Legend: K inputs, N outputs, G groups of inputs, P points of a search.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from bigflax import trees
from bigflax.compress.matrices import as_matrix, as_written, compensated, one_output, prepared, product_error
from bigflax.compress.observing import Seen
from bigflax.weights import W8A8, Quantized, Scaled, Weight, hadamard, parse_axes, rotated

Array = jax.Array

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#         the type as Qwix calls it, of its codes as they are stored, the largest code
FLOATS = {"fp8": ("float8_e4m3fn", "float8_e4m3fn", 448.0), "mxfp4": ("mxfp4", "float4_e2m1fn", 6.0)}
BLOCK = 256  # inputs of a group whose errors are weighed together, by their block of the hessian; of larger ones its diagonal does
TYPES = ("int8", "int7", "int6", "int5", "int4", "int3", "int2", "nf4", *FLOATS)


@dataclasses.dataclass(frozen=True)
class Format:
    """A type of codes, how many inputs share a scale (None: all), and whether a zero point stands beside it."""

    qtype: str
    group: int | None = None
    zero: bool = False

    @property
    def bits(self) -> int:
        return int(self.qtype[3:]) if self.whole else {"nf4": 4, "fp8": 8, "mxfp4": 4}[self.qtype]

    @property
    def whole(self) -> bool:
        return self.qtype.startswith("int")

    def __str__(self) -> str:
        return ":".join([self.qtype, *([str(self.group)] if self.group else []), *(["asym"] if self.zero else [])])


def read_format(text: str) -> Format:
    """Reads "int4:128:asym". Raises ValueError for what is none."""
    said = re.fullmatch(r"(\w+?)(?::(\d+))?(:asym)?", text) if isinstance(text, str) else None
    if said is None or said[1] not in TYPES:
        word = text if said is None else said[1]
        raise ValueError(f"{text!r} is no format such as 'int4:128'; {trees.did_you_mean(str(word), TYPES, 'there are the types')}")
    made = Format(said[1], int(said[2]) if said[2] else None, said[3] is not None)
    if made.zero and not made.whole:
        raise ValueError(f"{text!r}: only whole numbers have a zero point; leave out ':asym'")
    if made.group == 0 or (made.qtype == "mxfp4" and made.group not in (None, 32)):
        raise ValueError(f"{text!r}: {'mxfp4 has a scale for 32 inputs' if made.qtype == 'mxfp4' else 'a group has at least one input'}")
    return dataclasses.replace(made, group=32) if made.qtype == "mxfp4" else made


# -- a matrix [K, N] and its codes -----------------------------------------------------------------------------------------


def to_groups(w_KN: Array, fmt: Format) -> Array:
    """[K, N] -> [G, K / G, N]. Raises ValueError where the group does not divide K."""
    K = w_KN.shape[0]
    group = fmt.group or K
    if K % group:
        raise ValueError(f"a group of {group} does not divide {K} inputs; nearest is {math.gcd(group, K)}")
    return w_KN.reshape(K // group, group, -1)


def grid(w_KN: Array, fmt: Format, hessian: Array | None = None, *, clip: bool = True) -> tuple[Array, Array | None]:
    """(scale [G, N], zero [G, N] or None) of each group: by its largest number, or with `clip` by the part of it, of 1, 0.98 ... 0.5, that makes the
    sum of squares of its errors least; with a `hessian`, [K, K] or its diagonal [K], that of the products of its errors."""
    w = to_groups(w_KN.astype(jnp.float32), fmt)
    G, g, _ = w.shape
    if hessian is None:
        squares = lambda off: (off**2).sum(1)
    elif hessian.ndim == 1 or g > BLOCK:
        weight = to_groups((jnp.diag(hessian) if hessian.ndim == 2 else hessian)[:, None], fmt)
        squares = lambda off: (weight * off**2).sum(1)
    else:
        within = hessian.reshape(G, g, G, g)[jnp.arange(G), :, jnp.arange(G)]
        squares = lambda off: (jnp.einsum("gkj,gkn->gjn", within, off) * off).sum(1)

    def at(part):
        if fmt.zero:
            low, high = jnp.minimum(w.min(1), 0) * part, jnp.maximum(w.max(1), 0) * part
            lowest, highest = -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1
            scale = _above_zero((high - low) / (highest - lowest))
            return scale, jnp.clip(jnp.round(lowest - low / scale), lowest, highest)
        bound = 1.0 if fmt.qtype == "nf4" else FLOATS[fmt.qtype][2] if fmt.qtype in FLOATS else 2 ** (fmt.bits - 1) - 0.5
        scale = _above_zero(jnp.abs(w).max(1) * part / bound)
        return (2.0 ** jnp.ceil(jnp.log2(scale)) if fmt.qtype == "mxfp4" else scale), None

    if not clip:
        return at(1.0)

    def error(part):
        scale, zero = at(part)
        return squares(decode(encode(w, scale[:, None], _beside(zero), fmt), scale[:, None], _beside(zero), fmt) - w)

    parts = jnp.linspace(1.0, 0.5, 26)
    best = parts[jnp.argmin(jax.lax.map(error, parts), 0)]
    return at(best)


def _above_zero(scale: Array) -> Array:
    return jnp.where(scale < 1e-20, 1.0, scale)


def _beside(zero: Array | None) -> Array | None:
    return None if zero is None else zero[:, None]


def encode(w: Array, scale: Array, zero: Array | None, fmt: Format) -> Array:
    """The nearest codes, as float32 numbers (of nf4 the positions in its table)."""
    x = w / scale
    if fmt.qtype == "nf4":
        table = jnp.asarray(NF4)
        return jnp.searchsorted((table[1:] + table[:-1]) / 2, x).astype(jnp.float32)
    if fmt.qtype in FLOATS:
        _, dtype, most = FLOATS[fmt.qtype]
        return jnp.clip(x, -most, most).astype(dtype).astype(jnp.float32)
    return jnp.clip(jnp.round(x + (0 if zero is None else zero)), -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)


def decode(codes: Array, scale: Array, zero: Array | None, fmt: Format) -> Array:
    """What the codes stand for."""
    values = jnp.asarray(NF4)[codes.astype(jnp.int32)] if fmt.qtype == "nf4" else codes
    return (values if zero is None else values - zero) * scale


def quantized_of(
    codes_KN: Array, scale_GN: Array, zero_GN: Array | None, fmt: Format, axes: str, full: tuple[int, ...], dtype: Any
) -> Quantized:
    """The typed weight of a matrix's codes: its parts in the order and shape of the weight's own axes."""
    stored = {"nf4": "uint4", **{name: row[1] for name, row in FLOATS.items()}}.get(fmt.qtype, "int8" if fmt.bits > 4 else "int4")
    qtype = FLOATS[fmt.qtype][0] if fmt.qtype in FLOATS else fmt.qtype
    put = lambda part: as_written(part, axes, full)
    zero = None if zero_GN is None else put(zero_GN).astype(stored)
    return Quantized(put(codes_KN).astype(stored), put(scale_GN).astype(dtype), zero, qtype)


# -- the methods: one matrix ------------------------------------------------------------------------------------------------


def rtn(w: Array, fmt: Format, *, axes: str, seen: Seen | None = None, clip: bool = True) -> Quantized:
    """Round to nearest; with statistics the clipping weighs errors by what goes in."""
    return _rounded(as_matrix(w, axes), fmt, axes, w, None if seen is None else seen.hessian, clip)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _codes(w_KN, fmt, hessian, clip):
    scale, zero = grid(w_KN, fmt, hessian, clip=clip)
    codes = encode(to_groups(w_KN, fmt), scale[:, None], _beside(zero), fmt)
    return codes.reshape(w_KN.shape), scale, zero


def _rounded(w_KN, fmt, axes, like, hessian=None, clip=True) -> Quantized:
    codes, scale, zero = _codes(w_KN, fmt, hessian, clip)
    return quantized_of(codes, scale, zero, fmt, axes, like.shape, like.dtype)


def gptq(
    w: Array, fmt: Format, *, axes: str, seen: Seen, damp: float = 0.01, order: bool = True, clip: bool = True, block: int = 128
) -> Quantized:
    """GPTQ. `damp` times the mean of the hessian's diagonal is added to it; with `order` inputs are rounded in the order of their diagonal, the
    largest first (the authors' `act_order`, with `static_groups`)."""
    w_KN = as_matrix(w, axes)
    codes, scale, zero = _gptq(w_KN, seen.hessian, fmt, damp, order, clip, block)
    return quantized_of(codes, scale, zero, fmt, axes, w.shape, w.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _gptq(w_KN, hessian_KK, fmt, damp, order, clip, block):
    K = len(w_KN)
    inverse_KK, order_K, w = prepared(w_KN, hessian_KK, damp, order)
    scale, zero = grid(w_KN, fmt, jnp.diag(hessian_KK) if clip else None, clip=clip)
    group_K = order_K // (K // scale.shape[0])

    def of_row(rows, factor, i, at, state):
        s, z = scale[group_K[at]], None if zero is None else zero[group_K[at]]
        codes = encode(rows[i], s, z, fmt)
        return codes, decode(codes, s, z, fmt), state

    codes, _ = compensated(w, inverse_KK, of_row, block)
    return jnp.zeros_like(codes).at[order_K].set(codes), scale, zero


def awq(w: Array, fmt: Format, *, axes: str, seen: Seen, points: int = 20, clip: bool = True) -> Weight:
    """AWQ: Scaled(Quantized(s w), 1 / s) with s = (mean |x|)^a, or (mean |x|)^a (mean |w|)^(a - 1) of each input, a of `points` in 0..1: whichever changes the
    matrix's products least, by the hessian exactly and not by the outputs of the module that it is in, each matrix with scales of its own. Then, as the
    authors do, each group is clipped where its products err less; of the five best s that which errs least with it is taken."""
    w_KN = as_matrix(w, axes)
    s_K = _awq(w_KN, seen.hessian, seen.size / seen.count, fmt, points, clip)
    made = _rounded(w_KN * s_K[:, None], fmt, axes, w, seen.hessian / jnp.outer(s_K, s_K), clip)
    return Scaled(made, as_written((1 / s_K)[:, None], *one_output(axes, w.shape)).astype(w.dtype))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _awq(w_KN, hessian_KK, size_K, fmt, points, clip):
    own_K = jnp.abs(w_KN).mean(1)
    base_K, own_K = (jnp.maximum(x, 1e-4 * x.max() + 1e-20) for x in (size_K, own_K))

    def scales(power, by_own):
        s_K = base_K**power * own_K ** (by_own * (power - 1))
        return s_K / jnp.sqrt(s_K.max() * s_K.min())

    def error(s_K, clip):
        codes, scale, zero = _codes(w_KN * s_K[:, None], fmt, hessian_KK / jnp.outer(s_K, s_K) if clip else None, clip)
        found = decode(to_groups(codes, fmt), scale[:, None], _beside(zero), fmt).reshape(w_KN.shape) / s_K[:, None]
        return product_error(found - w_KN, hessian_KK)

    s_PK = jax.vmap(scales)(jnp.tile(jnp.arange(points) / points, 2), jnp.repeat(jnp.arange(2.0), points))
    errors_P = jax.lax.map(lambda s_K: error(s_K, False), s_PK)
    if not clip:
        return s_PK[jnp.argmin(errors_P)]
    s_PK = s_PK[jnp.argsort(errors_P)[:5]]  # clipping costs twenty times as much: of the best alone
    return s_PK[jnp.argmin(jax.lax.map(lambda s_K: error(s_K, True), s_PK))]


def smoothquant(w: Array, fmt: Format, *, axes: str, seen: Seen, alpha: float = 0.5) -> Weight:
    """SmoothQuant: Scaled(W8A8(s w), 1 / s) with s = max |x|^alpha / max |w|^(1 - alpha) for each input."""
    if (fmt.qtype, fmt.zero) != ("int8", False):
        raise ValueError(f"products of 8 bits need weights of int8, not {fmt}")
    w_KN = as_matrix(w, axes)
    s_K = jnp.maximum(seen.peak, 1e-5) ** alpha / jnp.maximum(jnp.abs(w_KN).max(1), 1e-5) ** (1 - alpha)
    made = _rounded(w_KN * s_K[:, None], fmt, axes, w, None, False)
    return Scaled(W8A8(made), as_written((1 / s_K)[:, None], *one_output(axes, w.shape)).astype(w.dtype))


def w8a8(w: Array, fmt: Format, *, axes: str, seen: Seen | None = None) -> W8A8:
    """Weights rounded to nearest, and what they multiply too, row by row as it comes."""
    if (fmt.qtype, fmt.zero) != ("int8", False):
        raise ValueError(f"products of 8 bits need weights of int8, not {fmt}")
    return W8A8(_rounded(as_matrix(w, axes), fmt, axes, w, None, False))


def turned(w: Array, fmt: Format, *, axes: str, seen: Seen | None = None, rng: Array | None = None, **options: Any) -> Weight:
    """Rotated(Quantized): by gptq where there are statistics, which are turned too."""
    made = rotated(w, jax.random.key(0) if rng is None else rng, axes=axes)
    if seen is None:
        return dataclasses.replace(made, base=rtn(made.base, fmt, axes=axes, **options))
    ax = parse_axes(axes)
    inputs = [w.shape[i] for i in ax.contracted]
    K, last = math.prod(inputs), inputs[-1]
    signs_K = made.signs.reshape(K).astype(jnp.float32)
    turn = lambda h: hadamard((h * signs_K).reshape(-1, last), -1).reshape(K, K)
    hessian = turn(turn(seen.hessian).T)
    return dataclasses.replace(made, base=gptq(made.base, fmt, axes=axes, seen=dataclasses.replace(seen, hessian=hessian), **options))
