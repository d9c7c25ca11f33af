"""Cut models: channels, heads and layers that are nothing change nothing; what is left is a model as any other; what matters least is found."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import DECODER, PAIR, T5, TOWERS, VISION, VOCAB, drawn, inputs, load_tensors

import bigflax
from bigflax import Mean, data, models, trees, weights
from bigflax.compress import structure

ENCODER = {name: n for name, n in DECODER.items() if name != "num_key_value_heads"}
# family -> fields of its config; gemma2's layers alternate
CASES = {
    "bert": dict(ENCODER, vocab_size=VOCAB),
    "llama": dict(DECODER, vocab_size=VOCAB, num_hidden_layers=4),
    "gemma2": dict(DECODER, vocab_size=VOCAB, head_dim=8, num_hidden_layers=6, sliding_window=4),
    "vit": VISION,
    "t5": dict(T5, vocab_size=VOCAB, scale_decoder_outputs=True),
    "clip": dict(TOWERS),
    "whisper": dict(
        PAIR, vocab_size=VOCAB, num_mel_bins=10, max_source_positions=7, max_target_positions=16, decoder_start_token_id=1, pad_token_id=0
    ),
}  # fmt: skip
HEADS = {"llama": ("heads", "kv_heads"), "gemma2": ("kv_heads",), "t5": ("heads",)}  # where a config can say them
# stack -> the layers that stay
KEPT = {
    "bert": {"blocks": [0, 2]}, "llama": {"blocks": [0, 3]}, "gemma2": {"blocks": [0, 1, 4, 5]}, "vit": {"blocks": [2]},
    "t5": {"encoder/blocks": [0, 2]}, "clip": {"text/blocks": [1, 2], "vision/blocks": [0, 2]}, "whisper": {"decoder/blocks": [1]},
}  # fmt: skip
each_case = pytest.mark.parametrize("family", CASES)
some_slow = lambda *fast: [pytest.param(family, marks=() if family in fast else pytest.mark.slow) for family in CASES]
each_heads = pytest.mark.parametrize(
    "family, axis",
    [
        pytest.param(family, axis, marks=() if (family, axis) in (("llama", "heads"), ("t5", "heads")) else pytest.mark.slow)
        for family, axes in HEADS.items()
        for axis in axes
    ],
)


@functools.cache
def made(family, **more):
    """A model and weights none of which is nothing, drawn by their names."""
    model = models.create(family, size=CASES[family], **more)
    return model, trees.map_named(lambda name, w: jnp.asarray(drawn(f"{name} weight", w.shape)), model.shapes())


@functools.cache
def given(family, seed=0):
    batch, _ = inputs(family, "plain" if family in ("vit", "whisper") else "padded right")
    return {name: jnp.asarray(np.roll(x, seed, 0)) for name, x in batch.items()}


@functools.cache
def compiled(model):
    return jax.jit(lambda params, batch: model.apply(params, **batch))


def same(a, b):
    """Outputs of two models; float32 sums of a few terms more or fewer, through three layers."""
    assert a.keys() == b.keys()
    for name in a:
        assert float(jnp.abs(a[name] - b[name]).max()) <= 2e-5 * max(1, float(jnp.abs(b[name]).max())), name


def planted(model, params, axis, many, factor=0.0, seed=1):
    """(params in which some of an axis count for little, {place: which of them in each layer}): the rows of what reads them times the factor."""
    rng, there = np.random.default_rng(seed), structure.places(model, axis)
    chosen = {}

    def one(name, w):
        if name not in there:
            return w
        stack, sizes = there[name].stack, there[name].sizes
        read = "mlp" if axis == "mlp" else "heads"
        size, group = sizes[axis], sizes[read] // sizes[axis]
        each = lambda: rng.permutation(size)[:many] if axis != "heads" or sizes["kv_heads"] == size else within(sizes)
        gone = np.stack([each() for _ in range(int(np.prod(stack)))]).reshape(*stack, -1)
        if "relative" in str(model.axes):  # one choice for all layers
            gone = np.broadcast_to(np.arange(many), gone.shape)
        gone = (gone[..., None] * group + np.arange(group)).reshape(*stack, -1)
        chosen[name] = np.sort(gone)
        hit = np.any(gone[..., None] == np.arange(sizes[read]), -2).reshape(*stack, sizes[read], *(1,) * (w.ndim - len(stack) - 1))
        return jnp.where(hit, factor * w, w)

    def within(sizes):
        G = sizes["heads"] // sizes["kv_heads"]
        return np.arange(sizes["kv_heads"]) * G + rng.integers(0, G, sizes["kv_heads"])

    return trees.map_named(one, params), chosen


def cut(model, params, axis, rules, scores):
    small, changes = structure.narrow(model, params, axis, rules, scores)
    return models.resized(model, small, changes), small


@pytest.mark.parametrize("family", ["bert", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "t5", "clip"))])
def test_channels_that_are_nothing_are_cut_without_a_trace(family):
    model, params = made(family)
    params, _ = planted(model, params, "mlp", 11)
    less, small = cut(model, params, "mlp", [(".*", 0.75)], structure.magnitude(model, params, "mlp"))
    assert trees.count(small) < trees.count(params)
    same(compiled(less)(small, given(family)), compiled(model)(params, given(family)))


@each_heads
def test_heads_that_are_nothing_are_cut_without_a_trace(family, axis):
    model, params = made(family)
    many = 1 if axis == "kv_heads" else 2
    params, _ = planted(model, params, axis, many)
    less, small = cut(model, params, axis, [(".*", 0.5)], structure.magnitude(model, params, axis))
    fields = {name: n for name, n in less.config.items() if n != model.config[name]}
    want = {
        ("llama", "heads"): {"num_attention_heads": 2, "head_dim": 6},
        ("llama", "kv_heads"): {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6},
        ("gemma2", "kv_heads"): {"num_attention_heads": 2, "num_key_value_heads": 1},
        ("t5", "heads"): {"num_heads": 2},
    }
    assert fields == want[family, axis]
    same(compiled(less)(small, given(family)), compiled(model)(params, given(family)))


def test_heads_that_one_leaf_serves_are_the_same_in_all_layers():
    """T5's relative positions; in each tower the two heads whose scores are the highest over all its layers."""
    model, params = made("t5")
    rng, there = np.random.default_rng(0), structure.places(model, "heads")
    scores = {at: rng.uniform(size=(*place.stack, 4)) for at, place in there.items()}
    small, _ = structure.narrow(model, params, "heads", [(".*", 2)], scores)
    for tower in ("encoder", "decoder"):
        mine = [at for at in there if at.startswith(tower)]
        best = np.sort(np.argsort(sum(scores[at].sum(0) for at in mine))[2:])
        assert any(np.any(np.sort(np.argsort(layer)[2:]) != best) for at in mine for layer in scores[at])  # alone they would choose others
        for name, at in ((f"{tower}/relative/w", (slice(None), best)), *((at, (slice(None), best)) for at in mine)):
            kept, whole = (dict(trees.named_leaves(tree))[name] for tree in (small, params))
            np.testing.assert_array_equal(kept, whole[at], name)


def renumbered(tensors, stack, kept):
    """Published tensors with those layers alone, numbered anew."""
    side = stack.rpartition("/")[0]
    found = {}
    for name, w in tensors.items():
        layer = re.search(r"\.(\d+)\.", name)
        if layer and side in name and "relative_attention_bias" not in name:
            if int(layer[1]) not in kept:
                continue
            name = f"{name[: layer.start(1)]}{kept.index(int(layer[1]))}{name[layer.end(1) :]}"
        found[name] = w
    return found


@pytest.mark.parametrize("family", some_slow("bert", "llama", "gemma2", "t5", "clip"))
def test_layers_left_out_leave_the_model_of_the_others(family, tmp_path):
    model, params = made(family)
    small, changes = structure.layers(model, params, [*KEPT[family].items()])
    less = models.resized(model, small, changes)
    bigflax.save(model, params, str(tmp_path / "whole"))
    bigflax.save(less, small, str(tmp_path / "less"))
    want = load_tensors(tmp_path / "whole")
    for stack, kept in KEPT[family].items():
        want = renumbered(want, stack, kept)
    got = load_tensors(tmp_path / "less")
    assert got.keys() == want.keys()
    for name, w in got.items():
        np.testing.assert_array_equal(w, want[name], name)


def smaller(family):
    """A model with fewer of all that it can have fewer of."""
    model, params = made(family)
    params, changes = structure.layers(model, params, [*KEPT[family].items()])
    model = models.resized(model, params, changes)
    for axis in ("mlp", *HEADS.get(family, ())[-1:]):
        model, params = cut(model, params, axis, [(".*", 0.5)], structure.magnitude(model, params, axis))
    return model, params


@pytest.mark.parametrize("family", some_slow("bert", "llama", "gemma2", "t5", "clip"))
def test_it_is_saved_and_loaded_as_any_other(family, tmp_path):
    """With the same numbers, of the same config but for what has no place in a file: so the outputs are the same."""
    model, params = smaller(family)
    bigflax.save(model, params, str(tmp_path))
    again, loaded = bigflax.load(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert again.axes == model.axes and trees.count(params) < 0.8 * trees.count(made(family)[1])
    differ = {name for name in model.config if again.config[name] != model.config[name] and name != "num_labels"}
    assert not differ or (family, differ) == ("vit", {"image_size"})  # a list there


def test_what_was_loaded_keeps_its_tokenizer(tmp_path):
    bigflax.save(*made("llama"), str(tmp_path / "whole"), tokenizer=data.byte_tokenizer())
    model, params = bigflax.load(str(tmp_path / "whole"))
    small, changes = structure.layers(model, params, [("blocks", [0])])
    bigflax.save(models.resized(model, small, changes), small, str(tmp_path / "less"))
    assert data.load_tokenizer(tmp_path / "less").fingerprint == data.byte_tokenizer().fingerprint
    assert bigflax.load(str(tmp_path / "less"))[0].config["num_hidden_layers"] == 1


@pytest.mark.slow
@each_case
def test_transformers_reads_it(family, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install 'bigflax[parity]'")
    transformers = pytest.importorskip("transformers")
    model, params = smaller(family)
    bigflax.save(model, params, str(tmp_path))
    kind = models.family(family).HEADS[model.config["head"]][0]
    theirs, info = getattr(transformers, kind).from_pretrained(str(tmp_path), output_loading_info=True)
    assert not info["mismatched_keys"] and not info["missing_keys"]
    with torch.no_grad():
        want = dict(theirs.eval()(**{name: torch.from_numpy(np.array(x)) for name, x in given(family).items()}))
    got = compiled(model)(params, given(family))
    names = [name for name in ("logits", "logits_per_text", "last_hidden_state") if name in got and name in want]
    assert names
    real = given(family).get("decoder_attention_mask", given(family).get("attention_mask"))
    for name in names:
        ours, wanted = np.asarray(got[name]), want[name].numpy()
        if real is not None and ours.shape[:2] == real.shape:
            ours, wanted = (x * np.asarray(real)[..., None] for x in (ours, wanted))
        assert np.abs(ours - wanted).max() <= 1e-4 * np.abs(wanted).max()  # as tests/models/test_parity.py has it


# -- what matters ----------------------------------------------------------------------------------------------------------


def loss_of(model):
    def loss_fn(params, batch, rng=None):
        out = model.apply(params, **batch)
        return Mean(jnp.sum(out["logits"].astype(jnp.float32) ** 3), jnp.float32(7)), {}

    return loss_fn


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_taylor_is_the_gradient_of_a_factor(family):
    """Of z in front of what reads a channel or head, which is the same as behind what writes it."""
    model, params = made(family)
    there, batches = {axis: structure.places(model, axis) for axis in ("mlp", "heads")}, [given(family, seed) for seed in (0, 1)]

    def total(factors, batch):
        times = lambda name, w: (
            w * factors[name].reshape(*factors[name].shape, *(1,) * (w.ndim - factors[name].ndim)) if name in factors else w
        )
        return loss_of(model)(trees.map_named(times, params), batch)[0].total

    ones = {at: jnp.ones((*place.stack, place.sizes[axis])) for axis, places in there.items() for at, place in places.items()}
    slope = jax.jit(jax.grad(total))
    slopes = [slope(ones, batch) for batch in batches]
    for axis, places in there.items():
        got = structure.taylor(model, params, axis, loss_of(model), batches)
        assert got.keys() == places.keys()
        for at in places:
            want = sum(np.abs(np.asarray(slope[at])) for slope in slopes)
            # float32: both are sums over the same tokens and outputs, in another order
            np.testing.assert_allclose(got[at], want, rtol=1e-3, atol=1e-4 * want.max())


def test_activation_is_the_norm_of_what_is_added():
    model, params = made("llama")
    rng, found = np.random.default_rng(0), {}
    sizes = {"blocks/mlp/down": 44, "blocks/attention/out": 24}
    held = {at: rng.normal(size=(4, 30, n)) for at, n in sizes.items()}
    squares = {at: (h**2).sum(1) for at, h in held.items()}
    for axis in ("mlp", "heads"):
        found |= structure.activation(model, params, axis, squares)
    down, out = (np.asarray(params["blocks"][part][name], np.float64) for part, name in (("mlp", "down"), ("attention", "out")))
    channels = np.linalg.norm(held["blocks/mlp/down"][..., None] * down[:, None], axis=(1, 3))
    np.testing.assert_allclose(found["blocks/mlp/down"], channels, rtol=1e-5)
    each = (held["blocks/attention/out"].reshape(4, 30, 4, 6)[..., None] * out[:, None]).transpose(0, 2, 1, 3, 4)
    np.testing.assert_allclose(found["blocks/attention/out"], np.sqrt((each**2).sum((2, 3, 4))), rtol=1e-5)


SCORES = {
    "magnitude": lambda model, params, axis, batches: structure.magnitude(model, params, axis),
    "taylor": lambda model, params, axis, batches: structure.taylor(model, params, axis, loss_of(model), batches),
    "activation": lambda model, params, axis, batches: structure.activation(
        model, params, axis, {at: np.ones((*p.stack, p.sizes["mlp" if axis == "mlp" else "heads"] * p.sizes.get("head_dim", 1)))
                              for at, p in structure.places(model, axis).items()}),
}  # fmt: skip


@pytest.mark.parametrize("axis, left, many", [("mlp", 37, 7), ("kv_heads", 1, 1)])
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_what_counts_for_little_is_found(score, axis, left, many):
    model, base = made("llama")
    params, gone = planted(model, base, axis, many, factor=1e-4)
    small, _ = structure.narrow(model, params, axis, [(".*", left)], score(model, params, axis, [given("llama")]))
    for at, those in gone.items():
        kept, whole = (dict(trees.named_leaves(tree))[at] for tree in (small, base))
        for layer in range(4):
            np.testing.assert_array_equal(kept[layer], np.delete(np.asarray(whole[layer]), those[layer], 0))


def without(params, layers):
    """Llama whose layers of these numbers add nothing."""
    gone = np.isin(np.arange(4), layers).reshape(4, 1, 1)
    blank = lambda name, w: (
        jnp.where(gone.reshape(4, *(1,) * (w.ndim - 1)), 0, w) if re.fullmatch(r"blocks/(attention/out|mlp/down)", name) else w
    )
    return trees.map_named(blank, params)


def test_layers_that_do_nothing_are_found():
    model, base = made("llama")
    params = without(base, [0, 2])
    taylor = structure.taylor(model, params, "layers", loss_of(model), [given("llama")])
    influence = structure.influence(structure.distances(model, params, [given("llama"), given("llama", 1)]))
    for scores in (influence, taylor):
        assert structure.best_layers(model, scores, [("blocks", 2)]) == [("blocks", [1, 3])]
        assert structure.best_layers(model, scores, [("blocks", 3)]) != [("blocks", [0, 2, 3])]


def test_the_run_that_does_nothing_is_found():
    model, base = made("llama")
    params = without(base, [1, 2])
    apart = structure.distances(model, params, [given("llama")], angle=True)
    np.testing.assert_allclose(apart["blocks"][1, 3], 0, atol=1e-3)  # the angle of a cosine that is one but for float32
    rules = structure.best_run(model, apart, [("blocks", 0.5)])
    assert rules == [("blocks", [0, 3])]
    small, changes = structure.layers(model, params, rules)
    less = models.resized(model, small, changes)
    same(compiled(less)(small, given("llama")), compiled(model)(params, given("llama")))


@pytest.mark.parametrize("family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("t5", "clip"))])
def test_distances_are_those_of_states_over_real_tokens(family):
    """Of llama and t5 without the norm behind the last layer: what that multiplies by is nothing to them."""
    model, params = made(family)
    batches = [given(family), {**given(family, 1), "labels": jnp.ones(3)}]
    got = structure.distances(model, params, batches)
    out = jax.jit(functools.partial(model.apply, hidden_states=True))(params, **given(family))
    bare = model.module.clone(norm=None) if family == "llama" else None
    last = None if bare is None else jax.jit(bare.apply)({"params": params}, **given(family))["last_hidden_state"]
    for stack, apart in got.items():
        side = stack.rpartition("/")[0]
        states = [*out[f"{side}_hidden_states" if side else "hidden_states"]]
        states = states if last is None else [*states[:-1], last]
        h = np.stack(states).astype(np.float64)
        mask = given(family).get("decoder_attention_mask" if side == "decoder" else "attention_mask")
        real = np.ones(h.shape[1:3], bool) if side == "vision" else np.asarray(mask) > 0
        h = (h / np.linalg.norm(h, axis=-1, keepdims=True))[:, real]
        inner = slice(0, len(h) - (family == "t5"))
        np.testing.assert_allclose(apart[inner, inner], (1 - np.einsum("itd,jtd->ij", h, h) / real.sum())[inner, inner], atol=1e-5)


def test_alternating_layers_go_by_periods():
    model, _ = made("gemma2")
    scores = {"blocks": np.array([5, 4, 0, 0.5, 3, 3])}
    assert structure.best_layers(model, scores, [("blocks", 4)]) == [("blocks", [0, 1, 4, 5])]
    assert structure.best_layers(model, {"blocks": np.array([0, 4, 1, 1, 3, 3])}, [("blocks", 4)]) == [("blocks", [0, 1, 4, 5])]
    apart = np.ones((7, 7))
    apart[2, 4], apart[3, 5], apart[4, 5] = 0.2, 0.1, 0.1
    assert structure.best_run(model, {"blocks": apart}, [("blocks", 4)]) == [("blocks", [0, 1, 4, 5])]


def test_a_stack_whose_size_followed_that_of_another_keeps_it():
    model, params = made("t5", num_decoder_layers=None)
    assert structure.layers(model, params, [("encoder/blocks", [0, 2])])[1] == {"num_layers": 2, "num_decoder_layers": 3}
    assert structure.layers(model, params, [("decoder/blocks", [1])])[1] == {"num_decoder_layers": 1}


def test_layers_of_any_weights_are_left_out():
    model, params = made("llama")
    typed = lambda w, text: weights.quantize(w, axes=text) if "mlp" in text else w
    params = jax.tree.map(typed, params, model.axes)
    small, changes = structure.layers(model, params, [("blocks", [1, 3])])
    less = models.resized(model, small, changes)
    np.testing.assert_array_equal(
        weights.dense(small["blocks"]["mlp"]["up"]), weights.dense(params["blocks"]["mlp"]["up"])[np.array([1, 3])]
    )
    assert compiled(less)(small, given("llama"))["logits"].shape == (3, 9, VOCAB)


def mistake(family, call):
    return lambda: call(*made(family))


ONES = {"blocks/mlp/down": np.ones((4, 44)), "blocks/attention/out": np.ones((4, 4))}
narrow = lambda axis, rules, scores=ONES: lambda model, params: structure.narrow(model, params, axis, rules, scores)
MISTAKES = {
    "no such axis": (mistake("llama", narrow("embed", [(".*", 2)])), "'embed' cannot be narrowed; 'mlp', 'heads'"),
    "no such place": (mistake("llama", narrow("mlp", [("blocks/ml", 2)])), "'blocks/ml' matches no place; .*'blocks/mlp/down'"),
    "none left": (mistake("llama", narrow("mlp", [(".*", 0)])), "has 44 of 'mlp', of which 0 cannot be kept; keep 1 to 44"),
    "uneven groups": (
        mistake("llama", narrow("heads", [(".*", 3)])),
        "of which 3 cannot be kept; keep 1 to 4 in multiples of its 2 groups",
    ),
    "no number": (mistake("llama", narrow("mlp", [(".*", "half")])), "of which 'half' cannot be kept"),
    "no scores": (mistake("llama", narrow("mlp", [(".*", 2)], {})), "no scores of blocks/mlp/down"),
    "scores of another shape": (
        mistake("llama", narrow("mlp", [(".*", 2)], {"blocks/mlp/down": np.ones((4, 43))})),
        r"have shape \(4, 43\), not \(4, 44\)",
    ),
    "heads that bert cannot say": (
        mistake("bert", narrow("heads", [(".*", 2)])),
        "heads of bert cannot be left out, for the width of a head follows .*; narrow 'mlp', or leave layers out",
    ),
    "sizes that one field says": (
        mistake("t5", narrow("mlp", [("encoder/.*", 2)], {"encoder/blocks/mlp/down": np.ones((3, 44))})),
        "d_ff says the size of encoder/blocks/mlp/down and of|d_ff says the size of decoder/blocks/mlp/down and of",
    ),
    "half a period": (mistake("gemma2", lambda m, p: structure.layers(m, p, [("blocks", [0, 1, 2])])), "2 to 3 of blocks are a period"),
    "no such layer": (
        mistake("bert", lambda m, p: structure.layers(m, p, [("blocks", [0, 3])])),
        r"layers 0 to 2, and \[0, 3\] is no list",
    ),
    "a number of layers": (mistake("bert", lambda m, p: structure.layers(m, p, [("blocks", 2)])), "2 is no list .*; best_layers makes one"),
    "no such stack": (mistake("bert", lambda m, p: structure.layers(m, p, [("encoder", [0])])), "'encoder' matches no stack; .*'blocks'"),
    "odd layers of periods": (
        mistake("gemma2", lambda m, p: structure.best_layers(m, {"blocks": np.ones(6)}, [("blocks", 3)])),
        "of the 6 layers of blocks, 3 cannot be kept; .* no part of periods of 2",
    ),
    "no batches": (mistake("bert", lambda m, p: structure.distances(m, p, [])), "no batches with a real token"),
    "no gradients": (mistake("bert", lambda m, p: structure.taylor(m, p, "mlp", loss_of(m), [])), "no batches to take gradients of"),
    "a typed weight": (
        mistake("llama", lambda m, p: structure.magnitude(m, jax.tree.map(lambda w: weights.Masked(w, w > 0), p), "mlp")),
        "is a Masked; score arrays",
    ),
    "weights of another model": (
        mistake("llama", lambda m, p: models.resized(m, p, {"intermediate_size": 40})),
        r"llama with {'intermediate_size': 40} has blocks/mlp/down of shape \(4, 40, 24\), and these weights have \(4, 44, 24\)",
    ),
    "no family": (lambda: models.resized(dataclasses.replace(made("bert")[0], family=""), {}, {}), "this one is of no family"),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
