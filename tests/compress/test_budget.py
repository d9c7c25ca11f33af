"""Budgets for all matrices together: what is chosen is the best there is, fits, and pays."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigflax
from bigflax import compress, models, tensors, trees, weights
from bigflax.compress import budget
from bigflax.compress.matrices import as_matrix, product_error
from bigflax.compress.report import divergence

EVERY = "blocks/.*/(q|k|down)"
AMONG = ["int2:16", "int4:16", "int6:16"]


@pytest.fixture(scope="module")
def case():
    """(model, params, forward, batches) of a decoder whose MLPs decide nearly all, and whose attention looks nearly everywhere alike."""
    model = models.create("llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    params = trees.map_named(lambda name, x: 5 * x if "mlp" in name else x, model.init(jax.random.key(0)))
    ids = np.random.default_rng(0).integers(0, 64, (16, 32)).astype(np.int32)
    return model, params, lambda params, batch: model.apply(params, **batch), [{"input_ids": ids[:8]}, {"input_ids": ids[8:]}]


def brute_force(harm, sizes, most):
    """The least (harm, size) of all choices that fit."""
    every = itertools.product(*(range(len(its)) for its in sizes))
    sums = ((sum(h[i] for h, i in zip(harm, way, strict=True)), sum(s[i] for s, i in zip(sizes, way, strict=True))) for way in every)
    return min((total for total in sums if total[1] <= most), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    many = rng.integers(1, 5, 6)
    harm = [rng.choice([0.0, 0.25, 0.5, 1.0, 2.0, np.inf] if seed % 2 else rng.exponential(size=9), n) for n in many]
    sizes = [rng.integers(1, 20, n) for n in many]
    for most in (sum(map(min, sizes)), 30, 50, sum(map(max, sizes))):
        want = brute_force(harm, sizes, most)
        if want is None:
            with pytest.raises(ValueError, match="nothing fits"):
                budget.choose(harm, sizes, most)
            continue
        picked = budget.choose(harm, sizes, most)
        got = [sum(its[i] for its, i in zip(of, picked, strict=True)) for of in (harm, sizes)]
        assert got[0] == pytest.approx(want[0]) and (got[1] == want[1] if np.isfinite(want[0]) else got[1] <= most)


def test_beyond_its_states_a_choice_still_fits_and_is_near(monkeypatch):
    rng = np.random.default_rng(0)
    harm, sizes = rng.exponential(size=(12, 4)), rng.integers(1, 10**6, (12, 4))
    most = int(sizes.mean(1).sum())
    exact = budget.choose(harm, sizes, most)
    monkeypatch.setattr(budget, "STATES", 200)
    near = budget.choose(harm, sizes, most)
    of = lambda what, picked: sum(its[i] for its, i in zip(what, picked, strict=True))
    assert of(sizes, near) <= most and of(harm, exact) <= of(harm, near) < 1.1 * of(harm, exact)


def written(model, params, folder, names):
    """Bytes of these weights in a folder."""
    bigflax.save(model, params, str(folder))
    found = tensors.open_tensors(str(folder), "weights")
    assert os.path.exists(folder / "weights.json")
    width = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1}
    return sum(width[t.kind] * int(np.prod(t.shape)) for name, t in found.items() if name.startswith(tuple(f"{n}/" for n in names)))


@pytest.mark.slow
@pytest.mark.parametrize("method, within", [("rtn", "6 bits"), ("awq", "7 KiB")])
def test_a_budget_is_kept_on_disk(case, tmp_path, within, method):
    model, params, forward, batches = case
    rules = budget.formats(model, params, [(EVERY, AMONG)], within, forward=forward, batches=batches, method=method)
    names = [name for name, _ in trees.named_leaves(params) if trees.match([(EVERY, True)], name)]
    numbers = sum(x.size for name, x in trees.named_leaves(params) if name in names)
    limit = 7 * 1024 if within.endswith("KiB") else 6 * numbers / 8
    assert [pattern.replace("\\", "") for pattern, _ in rules] == names
    small = compress.quantize(model, params, rules, method=method, forward=forward, batches=batches)
    # a matrix may use fewer bits than its format has, so what is written may be a little less
    assert 0.8 * limit < written(model, small, tmp_path / "small", names) <= limit
    assert len({text for _, text in rules}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_mixed_formats_pay_beside_one_of_the_same_size(case, method):
    """Both of 6 bits a number: 4, and a scale of 32 for 16 inputs."""
    model, params, forward, batches = case
    rules = budget.formats(model, params, [(EVERY, AMONG)], "6 bits", forward=forward, batches=batches)
    logits = lambda params, batch: forward(params, batch)["logits"]
    kl = lambda rules: divergence(
        logits, logits, compress.quantize(model, params, rules, method=method, forward=forward, batches=batches), params, batches
    )
    assert kl(rules) < 0.8 * kl([(EVERY, "int4:16")])
    assert dict(rules)["blocks/mlp/down"] == "int6:16"


@pytest.mark.slow
def test_harm_is_the_divergence_of_one_matrix_rounded_alone(case):
    model, params, forward, batches = case
    quiet = jax.tree.map(lambda x: x, params)
    quiet["blocks"]["mlp"]["up"] = 0 * params["blocks"]["mlp"]["up"]
    among = {"blocks/mlp/down": ["int2:16", "int6:16"], "blocks/mlp/up": ["int2:16", "int4:16"], "blocks/attention/q": ["int4:16"]}
    harm = budget.harms(model, quiet, among, forward=forward, batches=batches)
    logits = lambda params, batch: forward(params, batch)["logits"]
    for text, got in zip(among["blocks/mlp/down"], harm["blocks/mlp/down"], strict=True):
        small = compress.quantize(model, params, [("blocks/mlp/down", text)])
        small["blocks"]["mlp"]["up"] = quiet["blocks"]["mlp"]["up"]
        assert got == pytest.approx(divergence(logits, logits, small, quiet, batches), rel=1e-2, abs=1e-9)
    assert harm["blocks/mlp/up"] == [0, 0] and harm["blocks/attention/q"] == [0]  # nothing to lose, nothing to choose
    rules = budget.formats(model, quiet, [("blocks/mlp/up", AMONG)], "8 bits", forward=forward, batches=batches)
    assert rules == [("blocks/mlp/up", "int2:16")]


@pytest.mark.slow
def test_padding_has_no_say_in_a_harm():
    model = models.create("bert", size="tiny", head="masked_lm")
    params = model.init(jax.random.key(0))
    ids = np.random.default_rng(0).integers(4, 40, (3, 8)).astype(np.int32)
    mask = (np.arange(8) < np.array([[8], [5], [2]])).astype(np.int32)
    other = np.where(mask > 0, ids, 7)
    forward = lambda params, batch: model.apply(params, **batch)
    of = lambda ids: budget.harms(
        model, params, {"blocks/mlp/up": ["int2", "int4"]}, forward=forward, batches=[{"input_ids": ids, "attention_mask": mask}]
    )["blocks/mlp/up"]
    assert of(ids) == pytest.approx(of(other), rel=1e-4) and of(ids)[0] > of(ids)[1] > 0


def energy(case, params, rules, method):
    """What factors of these rules lose, summed over matrices and layers, each as a share of its own; and how many numbers there are."""
    model, plain, forward, batches = case
    small = compress.factorize(model, plain, rules, method=method, forward=forward, batches=batches)
    names = [name for name, _ in trees.named_leaves(plain) if trees.match([(EVERY, True)], name)]
    seen = compress.observe(forward, plain, batches, names, axes=model.axes)
    lost, texts = 0.0, dict(trees.named_leaves(model.axes))
    for name, w in weights.named_weights(small):
        if name in names:
            was_all, now_all, axes = dict(trees.named_leaves(plain))[name], weights.dense(w), compress.inner(texts[name])
            for i in range(2):
                was, now = as_matrix(was_all[i], axes), as_matrix(now_all[i], axes)
                hessian = seen[name].hessian[i] if method == "whitened" else jnp.eye(len(was))
                lost += float(product_error(now - was, hessian) / product_error(was, hessian))
    return lost, trees.count(small)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, 0.7])
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_spread_ranks_lose_less_of_as_many_numbers(case, method, share):
    model, params, forward, batches = case
    # matrices of very unequal rank, as trained ones are
    low = lambda w: jnp.einsum("...ij,jk->...ik", w, jnp.diag(0.6 ** jnp.arange(w.shape[-1])))
    params = trees.map_named(lambda name, w: low(w) if name.endswith("down") else w, params)
    case = model, params, forward, batches
    rules = budget.ranks(model, params, [(EVERY, share)], method=method, forward=forward, batches=batches)
    (mixed, fewer), (even, many) = (energy(case, params, its, method) for its in (rules, [(EVERY, share)]))
    assert mixed < 0.9 * even and fewer <= many
    by_name = dict(rules)
    assert by_name["blocks/mlp/down"] < compress.factoring.rank_within(share, 64, 32)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    sides = [(1, 6, 6), (2, 4, 8), (1, 8, 4)]
    squares = [np.sort(rng.exponential(size=min(K, N)) ** 2)[::-1] for _, K, N in sides]
    even = [int(rng.integers(1, (K * N - 1) // (K + N) + 1)) for _, K, N in sides]
    chosen = budget.spread(squares, sides, even)
    options = [[*range(1, (K * N - 1) // (K + N) + 1), None] for _, K, N in sides]
    size = lambda ranks: sum(m * (K * N if r is None else r * (K + N)) for r, (m, K, N) in zip(ranks, sides, strict=True))
    lost = lambda ranks: sum(0.0 if r is None else its[r:].sum() for r, its in zip(ranks, squares, strict=True))
    best = min(lost(way) for way in itertools.product(*options) if size(way) <= size(even))
    assert size(chosen) <= size(even) and lost(chosen) == pytest.approx(best)


def test_a_matrix_that_low_rank_would_spoil_stays_dense():
    flat, steep = np.ones(8), 0.01 ** np.arange(8)
    assert budget.spread([flat, steep, steep], [(1, 8, 8)] * 3, [3, 3, 3])[0] is None


def test_a_coarse_grid_of_ranks_is_never_worse_than_even_ones():
    rng = np.random.default_rng(0)
    squares = [np.sort(rng.exponential(size=300))[::-1] ** power for power in (1, 2, 4)]
    sides, even = [(1, 300, 300), (4, 300, 400), (1, 500, 300)], [101, 103, 107]
    lost = lambda ranks: sum(0.0 if r is None else its[r:].sum() for r, its in zip(ranks, squares, strict=True))
    coarse, fine = (budget.spread(squares, sides, even, grid=grid) for grid in (4, 1000))
    assert lost(fine) <= lost(coarse) <= lost(even)


@pytest.mark.slow
def test_shapes_are_enough_to_see_what_would_come_out(case):
    """Of every verb, one after the other: shapes and dtypes as those of the weights themselves."""
    model, params, forward, batches = case
    given = dict(forward=forward, batches=batches)
    steps = [
        lambda p: compress.factorize(model, p, [("blocks/attention/(q|out)", 0.5)], method="whitened", **given),
        lambda p: compress.prune(model, p, [("blocks/mlp/up", "2:4")], method="magnitude"),
        lambda p: compress.quantize(model, p, [("blocks/mlp/(down|gate)", "int4:16:asym")], method="awq", **given),
        lambda p: compress.quantize(model, p, [("blocks/attention/(q|out)", "int8"), ("embed/tokens", "nf4:16")]),
    ]
    shapes = jax.eval_shape(lambda p: p, params)
    for step in steps:
        params, shapes = step(params), step(shapes)
        assert jax.tree.structure(params) == jax.tree.structure(shapes)
        jax.tree.map(lambda x, s: np.testing.assert_equal((s.shape, s.dtype), (x.shape, x.dtype)), params, shapes)


def chosen(m, p, f, b, rules=((EVERY, ("int4:16", "int8")),), within="6 bits", **more):
    return budget.formats(m, p, rules, within, forward=f, batches=b, **more)


ONE = [{"input_ids": np.zeros((1, 4), np.int32)}]
MISTAKES = {
    "no budget": (lambda *c: chosen(*c, within="6 bit"), "'6 bit' is no budget: give bits of a number"),
    "too little": (lambda *c: chosen(*c, within="3 bits"), "'3 bits' is too little for 3 matrices: their smallest formats take 6.00 bits"),
    "too few bytes": (lambda *c: chosen(*c, within="1 KB"), "their smallest formats take 6144 bytes"),
    "a group": (lambda *c: chosen(*c, rules=[(EVERY, ["int8", "int4:48"])]), "a group of 48 does not divide 32 inputs"),
    "a format": (lambda *c: chosen(*c, rules=[(EVERY, ["int8", "int1"])]), "no format"),
    "nothing": (lambda *c: chosen(*c, rules=[(EVERY, None)]), "nothing to choose from"),
    "a loss": (
        lambda m, p, f, b: chosen(m, p, lambda p, b: f(p, b)["logits"].mean(), b),
        "by a model's outputs, which these batches do not give .a forward that gives a loss",
    ),
    "no batches": (lambda m, p, f, b: chosen(m, p, f, []), "no batches"),
    "another vocabulary": (lambda m, p, f, b: chosen(m, p, f, [{"input_ids": np.full((2, 8), 64)}]), "token id 64 is outside .* vocabulary of 64"),
    "ranks of a norm": (lambda m, p, f, b: budget.ranks(m, p, [("norm/scale", 0.5)], method="svd"), "no array with inputs"),
    "ranks without data": (lambda m, p, f, b: budget.ranks(m, p, [(EVERY, 0.5)]), "give forward and batches"),
    "too little data": (
        lambda m, p, f, b: compress.quantize(m, p, [(EVERY, "int8")], method="gptq", forward=f, batches=ONE),
        "gptq needs as many positions as a matrix has inputs, 64 of blocks/mlp/down, and is given 4, .* 16 batches like the 1 here",
    ),
    "too little data for ranks": (lambda m, p, f, b: budget.ranks(m, p, [(EVERY, 0.5)], forward=f, batches=ONE), "whitened needs as many positions"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message, case):
    with pytest.raises(ValueError, match=message):
        call(*case)


@pytest.mark.slow
def test_padding_is_no_position(case):
    """64 inputs and 64 tokens, of which some are padding: too few. Methods that invert nothing go on."""
    model, params, forward, _ = case
    ids, mask = np.zeros((2, 32), np.int32), np.ones((2, 32), np.int32)
    call = lambda mask, method: compress.quantize(
        model, params, [("blocks/mlp/down", "int8")], method=method, forward=forward, batches=[{"input_ids": ids, "attention_mask": mask}]
    )
    call(mask, "gptq")
    mask[1, 20:] = 0
    with pytest.raises(ValueError, match="is given 52, padding left out"):
        call(mask, "gptq")
    call(mask, "awq")
