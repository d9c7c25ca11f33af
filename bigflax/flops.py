"""FLOPs of any function, read off its jaxpr: nothing runs, nothing compiles, and ShapeDtypeStructs do for arguments.

Counted are products of matrices and convolutions, two FLOPs (multiply, add) for each product of two numbers:

    dot_general       2 * (numbers in the left operand) * (free dimensions of the right one); ragged_dot the same, a row meets one group
    convolution       2 * (pairs of an output position and a kernel tap that meet a real input, not padding or a dilation's hole)
                        * (channels in / groups) * (channels out) * batch
    scan, cond, while   length * body; the dearest branch; the number of turns cannot be read, so it must be given
    shard_map         the body of one device times the devices that run it;   pallas_call   its own cost estimate, or body * grid

XLA's `cost_analysis` counts the body of a scan once, whatever its length, so a model of scanned layers seems L times cheaper there. Masked
products count as far as the function computes them: causal attention in full, unless its path leaves out blocks above the diagonal.
Model FLOPs of a training step are by convention 3 * count_flops(forward): on the way back each product's gradient meets both operands
(Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Recomputation is work, not model FLOPs: count the forward function, not the step.
Left out on purpose: element-wise work, and opaque calls into libraries (cuDNN attention counts 0: count the reference path instead).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(fn: Callable[..., Any], *args: Any, while_trips: int | None = None) -> int:
    """FLOPs of `fn(*args)`; arguments are trees of arrays or ShapeDtypeStructs (arguments that are not: close over them).

    Raises ValueError for a while loop that holds products, unless `while_trips` says how often it turns.
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args), while_trips=while_trips)


def count_jaxpr(closed: ClosedJaxpr, *, while_trips: int | None = None) -> int:
    """FLOPs of what was traced already; errors as of `count_flops`."""
    return _jaxpr(closed.jaxpr, while_trips)


def _jaxpr(jaxpr: Jaxpr, trips: int | None) -> int:
    return sum(_equation(eqn, trips) for eqn in jaxpr.eqns)


def _equation(eqn: Any, trips: int | None) -> int:
    params, name = eqn.params, eqn.primitive.name
    if name in COUNTS:
        return COUNTS[name](eqn)
    if name == "pallas_call" and getattr(params.get("cost_estimate"), "flops", 0):
        return int(params["cost_estimate"].flops)
    inner = [_jaxpr(jaxpr, trips) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        if trips is None:
            raise ValueError(f"a while loop with {sum(inner):,} FLOPs a turn has no length to read: pass while_trips, or use lax.scan")
        return trips * sum(inner)
    return sum(inner) * _times(name, params)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often an equation runs its body."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        mesh = params["mesh"]
        return math.prod(mesh.shape[axis] for axis in params.get("manual_axes", mesh.axis_names))
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)


def _dot(eqn: Any) -> int:
    (_, contracting), (_, batch) = eqn.params["dimension_numbers"]
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    return 2 * math.prod(lhs) * math.prod(size for i, size in enumerate(rhs) if i not in {*contracting, *batch})


def _ragged_dot(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    used = {*contracting, *batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(lhs) * math.prod(size for i, size in enumerate(rhs) if i not in used)


def _convolution(eqn: Any) -> int:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    lhs, rhs, out = (v.aval.shape for v in (*eqn.invars[:2], *eqn.outvars))
    meetings = 1
    for i, (low, _) in enumerate(params["padding"]):
        size, kernel, outputs = lhs[numbers.lhs_spec[2 + i]], rhs[numbers.rhs_spec[2 + i]], out[numbers.out_spec[2 + i]]
        stride, holes, spread = params["window_strides"][i], params["lhs_dilation"][i], params["rhs_dilation"][i]
        at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * spread - low
        meetings *= int(((at >= 0) & (at < (size - 1) * holes + 1) & (at % holes == 0)).sum())
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * meetings * rhs[numbers.rhs_spec[1]] * channels * batch


COUNTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
