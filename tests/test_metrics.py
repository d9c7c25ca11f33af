"""Sums come out as over all rows, whatever way they were split; rates are what the clock says. A new kind of Sums joins SUMS and gets every law."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import make_mesh, sharding, train
from bigflax.metrics import F1, Correlation, Matthews, Mean, Meter, Sums, as_floats, combine, memory_bytes, span_f1

VALUES = np.random.default_rng(0).normal(size=24).astype(np.float32)
WEIGHTS = np.r_[np.zeros(7), np.ones(10), np.full(7, 0.5)].astype(np.float32)

X, Y = VALUES, (0.5 * VALUES + np.random.default_rng(1).normal(size=24)).astype(np.float32)
CLASSES = np.random.default_rng(2).choice(5, (2, 24), p=[0.4, 0.3, 0.2, 0.1, 0.0])  # nobody says or is the fifth
CLASSES[0] = np.where(np.random.default_rng(3).random(24) < 0.5, CLASSES[1], CLASSES[0])
LABELS = np.where(WEIGHTS == 0, -100, CLASSES[1])
REAL = WEIGHTS > 0


def f1_by_hand(average):
    said, true = (np.eye(5)[classes][REAL] for classes in CLASSES)
    hit = (said * true).sum(0)
    precision, recall = (np.divide(hit, n, np.zeros(5), where=n > 0) for n in (said.sum(0), true.sum(0)))
    each = np.divide(2 * precision * recall, precision + recall, np.zeros(5), where=precision + recall > 0)
    return each[(said + true).sum(0) > 0].mean() if average == "macro" else np.mean(CLASSES[0][REAL] == CLASSES[1][REAL])


def matthews_by_hand():
    """The covariance of one-hot rows, summed over classes, over the square root of the product of their variances."""
    said, true = (np.eye(5)[classes][REAL] for classes in CLASSES)
    cov = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()
    return cov(said, true) / np.sqrt(cov(said, said) * cov(true, true))


BIO = ("O", "B-who", "I-who", "B-where", "I-where")
TAGS = np.random.default_rng(4).integers(0, 5, (2, 24, 12))
TAGS[0] = np.where(np.random.default_rng(5).random((24, 12)) < 0.8, TAGS[1], TAGS[0])
TAGS[1][np.random.default_rng(6).random((24, 12)) < 0.3] = -100  # pieces of words and marks, here and there
TAGS[1][3] = -100


def spans_of(tags):
    """{(begin, end, name)}, by going through the words."""
    found, begin, name = set(), None, None
    for i, tag in enumerate([*(BIO[t] for t in tags), "O"]):
        if begin is not None and not (tag[0] == "I" and tag[2:] == name):
            found.add((begin, i, name))
            begin = None
        if tag != "O" and begin is None:
            begin, name = i, tag[2:]
    return found


def span_f1_by_hand():
    pairs = [(spans_of(said[true != -100]), spans_of(true[true != -100])) for said, true in zip(*TAGS, strict=True)]
    hit, said, true = (sum(map(len, part)) for part in zip(*((a & b, a, b) for a, b in pairs), strict=True))
    assert 0 < hit < said and hit < true
    return 2 * hit / (said + true)


# name -> of rows, the rows, the value by its definition over all of them in float64
SUMS = {
    "mean": (Mean.of, (VALUES, WEIGHTS), (VALUES.astype(float) * WEIGHTS).sum() / WEIGHTS.sum()),
    "macro f1": (lambda p, t: F1.of(p, t, 5), (CLASSES[0], LABELS), f1_by_hand("macro")),
    "micro f1": (lambda p, t, m: F1.of(p, t, 5, m, average="micro"), (CLASSES[0], CLASSES[1], REAL), f1_by_hand("micro")),
    "span f1": (lambda p, t: span_f1(p, t, BIO), (TAGS[0], TAGS[1]), span_f1_by_hand()),
    "matthews": (lambda p, t: Matthews.of(p, t, 5), (CLASSES[0], LABELS), matthews_by_hand()),
    "correlation": (Correlation.of, (X, Y, REAL), np.corrcoef(X[REAL], Y[REAL])[0, 1]),
}
SPLITS = {  # how 24 rows reach the sum: parts of unequal counts, some of them empty
    "whole": lambda of, rows: of(*rows),
    "added": lambda of, rows: sum_of(of(*(r[s] for r in rows)) for s in (slice(0, 5), slice(5, 8), slice(8, 24))),
    "combined on the host": lambda of, rows: combine([{"m": of(*(r[i : i + 4] for r in rows))} for i in range(0, 24, 4)])["m"],
    "scanned": lambda of, rows: scanned(of, [r.reshape(4, 6, *r.shape[1:]) for r in rows]),
    "sharded": lambda of, rows: jax.jit(of)(*(jax.device_put(r, sharded()) for r in rows)),
    "vmapped": lambda of, rows: jax.tree.map(lambda x: jnp.sum(x, 0), jax.vmap(of)(*(r.reshape(4, 6, *r.shape[1:]) for r in rows))),
    "accumulated": lambda of, rows: stepped(of, rows, trains=True),
    "evaluated": lambda of, rows: stepped(of, rows, trains=False),
}


def sum_of(sums):
    first, *rest = sums
    for one in rest:
        first = first + one
    return first


def scanned(of, rows):
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of, *(r[0] for r in rows)))
    add = lambda total, parts: (total + of(*parts), None)
    return jax.jit(lambda *rows: jax.lax.scan(add, start, rows)[0])(*map(jnp.asarray, rows))


def sharded():
    return jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))


def stepped(of, rows, *, trains):
    """Among the metrics of a step of three micro-batches over eight devices, or of an evaluation on them in two batches."""
    mesh = make_mesh(data=8)
    loss_fn = lambda params, batch, rng: (jnp.sum(params["w"]), {"m": of(*batch)})
    state = train.init_state({"w": jnp.ones(3)}, optax.sgd(0.1), mesh=mesh)
    put = lambda part: jax.device_put(tuple(r[part] for r in rows), sharding.batch_sharding(mesh))
    if trains:
        return train.train_step(loss_fn, optax.sgd(0.1), state, accumulate=3)(state, put(slice(None)))[1]["m"]
    return train.evaluate(train.eval_step(loss_fn, mesh), state.weights, [put(slice(0, 8)), put(slice(8, 24))])["m"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", SUMS)
def test_sums_do_not_depend_on_the_split(kind, split):
    of, rows, want = SUMS[kind]
    got = SPLITS[split](of, tuple(map(jnp.asarray, rows)))
    np.testing.assert_allclose(as_floats({"m": got})["m"], want, rtol=24 * np.finfo(np.float32).eps)  # 24 float32 additions
    if isinstance(got, Sums):  # a loop of your own may ask on the device
        np.testing.assert_allclose(float(got.value), want, rtol=4 * 24 * np.finfo(np.float32).eps)  # then products of them too


@pytest.mark.parametrize("kind", SUMS)
def test_nothing_counted_is_nan(kind):
    of, rows, _ = SUMS[kind]
    none = of(*(jnp.full_like(r, -100 if kind in ("macro f1", "matthews", "span f1") else 0) for r in map(jnp.asarray, rows)))
    assert math.isnan(none.value) and math.isnan(as_floats({"m": none})["m"])


def test_classes_that_do_not_vary():
    """Where everybody is of one class, the correlation is 0 and the F1 that class's alone."""
    same = jnp.zeros(4, jnp.int32)
    assert (float(Matthews.of(same, same, 3).value), float(F1.of(same, same, 3).value)) == (0.0, 1.0)
    assert math.isnan(Correlation.of(jnp.ones(4), jnp.arange(4.0)).value)
    with pytest.raises(ValueError, match="no average 'weighted'; there are 'macro' and 'micro'"):
        F1.of(same, same, 3, average="weighted")


def test_counts_of_several_labels_and_of_one_class():
    said, true = jnp.array([[1, 1, 0], [0, 1, 0]]), jnp.array([[1, 0, 0], [0, 1, 1]])
    several = F1((said & true).sum(0), said.sum(0), true.sum(0))
    np.testing.assert_allclose(float(several.value), np.mean([1, 2 / 3, 0]), rtol=1e-6)
    assert float(F1(jnp.int32(3), jnp.int32(4), jnp.int32(5)).value) == pytest.approx(6 / 9)


def test_counts_beyond_what_an_integer_squares():
    for xp in (np, jnp):
        n = xp.array([2**30, 2**29], xp.int32)
        assert float(Matthews(n, n, n).value) == float(F1(n, n, n).value) == pytest.approx(1.0)


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
    "tokens": (Meter(), {"counted": 600}, {"tokens_per_second": 300}),
    "examples": (Meter(counts="examples"), {"counted": 600}, {"examples_per_second": 300}),
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
