"""Means weigh by their counts, whatever way they were split; rates are what the clock says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax.metrics import Mean, Meter, as_floats, combine, memory_bytes

VALUES = np.random.default_rng(0).normal(size=24).astype(np.float32)
WEIGHTS = np.r_[np.zeros(7), np.ones(10), np.full(7, 0.5)].astype(np.float32)

SPLITS = {  # how 24 weighed values reach the sum: parts of unequal counts, some of them empty
    "whole": lambda: Mean.of(VALUES, WEIGHTS),
    "added": lambda: sum_of(Mean.of(VALUES[s], WEIGHTS[s]) for s in (slice(0, 5), slice(5, 8), slice(8, 24))),
    "combined on the host": lambda: combine([{"m": Mean.of(VALUES[i : i + 4], WEIGHTS[i : i + 4])} for i in range(0, 24, 4)])["m"],
    "scanned": lambda: scanned(VALUES.reshape(4, 6), WEIGHTS.reshape(4, 6)),
    "sharded": lambda: jax.jit(Mean.of)(*(jax.device_put(x, sharded()) for x in (VALUES, WEIGHTS))),
    "vmapped": lambda: jax.tree.map(jnp.sum, jax.vmap(Mean.of)(VALUES.reshape(4, 6), WEIGHTS.reshape(4, 6))),
}


def sum_of(means):
    first, *rest = means
    for mean in rest:
        first = first + mean
    return first


def scanned(values, weights):
    add = lambda total, vw: (total + Mean.of(*vw), None)
    return jax.jit(lambda v, w: jax.lax.scan(add, Mean(jnp.zeros(()), jnp.zeros(())), (v, w))[0])(values, weights)


def sharded():
    return jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))


@pytest.mark.parametrize("name", SPLITS)
def test_mean_does_not_depend_on_the_split(name):
    want = (VALUES.astype(float) * WEIGHTS).sum() / WEIGHTS.sum()
    np.testing.assert_allclose(as_floats({"m": SPLITS[name]()})["m"], want, rtol=24 * np.finfo(np.float32).eps)  # 24 float32 additions


def test_nothing_counted_is_nan_and_its_gradient_zero():
    loss = lambda x: Mean.of(x, jnp.zeros(3)).value
    value, gradient = jax.value_and_grad(loss)(jnp.array([1.0, jnp.inf, jnp.nan]))
    assert math.isnan(value)
    np.testing.assert_array_equal(gradient, 0)
    assert math.isnan(Mean(0.0, 0.0).value)


def test_weight_zero_keeps_infinity_out():
    assert float(Mean.of(jnp.array([2.0, jnp.inf]), jnp.array([True, False])).value) == 2


def test_bfloat16_values_are_summed_in_float32():
    assert float(Mean.of(jnp.ones(4097, jnp.bfloat16)).value) == 1  # bfloat16 would say 4096 / 4097


def test_combine_keeps_counts_beyond_float32():
    counted = combine([{"m": Mean(jnp.float32(0), jnp.float32(2**24))}, {"m": Mean(jnp.float32(0), jnp.float32(1))}])["m"]
    assert float(counted.count) == 2**24 + 1


def test_combine_counts_scalars_once_a_step_and_keys_where_they_are():
    combined = as_floats(combine([{"lr": 1.0, "only": 5}, {"lr": jnp.float32(3)}]))
    assert combined == {"lr": 2.0, "only": 5.0}
    assert all(type(value) is float for value in combined.values())


RATES = {  # what is known -> what is reported of 10 steps in 2 s, 0.5 s of them waiting, at step 40
    "nothing": (Meter(), {}, {"step_time": 0.2, "data_stall": 0.25}),
    "tokens": (Meter(tokens_per_step=100), {}, {"tokens_per_second": 500}),
    "counted tokens go first": (Meter(tokens_per_step=100), {"tokens": 600}, {"tokens_per_second": 300}),
    "flops": (Meter(flops_per_step=3e9, peak_flops=1e11), {}, {"mfu": 0.15}),
    "end": (Meter(total_steps=100), {"step": 40}, {"eta": 12.0}),
    "past the end": (Meter(total_steps=30), {"step": 40}, {"eta": 0.0}),
}


@pytest.mark.parametrize("name", RATES)
def test_rates(name):
    meter, known, want = RATES[name]
    record = meter.record(10, 2.0, 0.5, **known)
    assert {key: record[key] for key in want} == pytest.approx(want)
    assert set(record) == {"step_time", "data_stall", "memory"} | set(want)


def test_memory_grows_with_what_is_held():
    before = memory_bytes()
    held = np.ones(2**26, np.uint8)  # 64 MiB, written to and so resident
    assert memory_bytes() - before > 0.8 * held.nbytes


def test_memory_of_a_device_that_tells():
    class Device:
        def __init__(self, used):
            self.memory_stats = lambda: used

    assert memory_bytes([Device({"bytes_in_use": 3}), Device({"bytes_in_use": 7}), Device(None)]) == 7
