"""Every method on every kind of model: where it starts, what it moves, what it becomes when it is merged, saved, split off and laid out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from bigflax import Checkpoints, hub, models, ops, optim, peft, sharding, tasks, train, trees, weights
from bigflax.flops import count_flops
from bigflax.generate import generate

KEY = jax.random.key(0)
B, T, P = 8, 12, 3
FAMILIES = {
    "bert": dict(head="sequence_classification", hidden_dropout_prob=0.0),
    "gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0),
    "llama": {},
}
QV = [(".*/attention/(q|v)", 4)]
# method -> options, how near its outputs are to the base's at the start (None: it begins elsewhere), whether merging keeps its outputs
CASES = {
    "lora": (dict(rules=QV), 0, True),
    "dora": (dict(rules=[(".*/attention/out", (4, 8.0)), (".*/mlp/down", 2)]), 1e-6, True),
    "ia3": ({}, 0, True),
    "adapters": (dict(rules=[(".*/(attention/out|mlp/down)", 8)]), 0, False),
    "prompt": (dict(tokens=P), None, False),
    "prefix": (dict(tokens=P, words=[4, 5, 6]), None, False),
    "bitfit": ({}, 0, True),
    "head_only": ({}, 0, True),
    "last_layers": (dict(layers=1), 1e-6, True),
}
WITHOUT = {("gpt2", "head_only"), ("llama", "bitfit")}  # a tied head, no biases
PAIRS = [(family, method) for family in FAMILIES for method in CASES if (family, method) not in WITHOUT]
FAST = ("bert-lora", "bert-adapters", "gpt2-ia3", "gpt2-last_layers", "llama-prefix")
some_slow = [pytest.param(*pair, marks=() if "-".join(pair) in FAST else pytest.mark.slow, id="-".join(pair)) for pair in PAIRS]


@functools.cache
def made(family):
    model = models.create(family, size="tiny", **FAMILIES[family])
    stir = lambda name, w: w + 0.05 * jax.random.normal(jax.random.fold_in(KEY, len(name)), w.shape)  # biases that are not zero
    return model, jax.jit(lambda key: trees.map_named(stir, model.init(key)))(KEY)


@functools.cache
def batch_of(family):
    ids = jax.random.randint(KEY, (B, T), 1, 250)
    labels = jnp.arange(B) % 2 if family == "bert" else ids
    return {"input_ids": ids, "attention_mask": jnp.ones((B, T), jnp.int32).at[1::2, 9:].set(0), "labels": labels}


@functools.cache
def compiled(model):
    return jax.jit(lambda params, inputs: model.apply(params, **inputs))


def logits_of(model, params, **inputs):
    return compiled(model)(params, inputs)["logits"]


def inputs_of(family):
    return {name: x for name, x in batch_of(family).items() if name != "labels"}


@functools.cache
def step_of(family, method, devices=1):
    """(what was tuned, its first state, the state and metrics after a step)."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if devices == 1 else sharding.make_mesh(fsdp=4, tensor=2)
    tuned = peft.create(method, *made(family), rng=KEY, **CASES[method][0])
    tx = optax.adam(1e-2)
    state = train.init_state(tuned.params, tx, mesh=mesh, axes=tuned.model.axes, freeze=tuned.freeze)
    first = jax.tree.map(jnp.copy, state)
    loss = tasks.create("classification" if family == "bert" else "causal_lm", tuned.model)
    return tuned, first, *train.train_step(loss, tx, state)(state, jax.device_put(batch_of(family), sharding.batch_sharding(mesh)))


@pytest.mark.parametrize("family, method", some_slow)
def test_a_method(family, method, tmp_path):
    (model, base), (_, near, merges) = made(family), CASES[method]
    tuned, first, state, _ = step_of(family, method)
    want, start = logits_of(model, base, **inputs_of(family)), logits_of(tuned.model, tuned.params, **inputs_of(family))
    assert want.shape == start.shape
    off = float(jnp.abs(start - want).max())
    assert off > 0 if near is None else off <= near * float(jnp.abs(want).max())
    # what trains has moved, every leaf of it but a first factor beside a second that was zero; all else is what it was
    for (name, old), (_, new) in zip(trees.named_leaves(first.params), trees.named_leaves(state.params), strict=True):
        stays = name.endswith(("/a", "/down", "/down_bias")) or (family, name.rpartition("/")[2]) == ("bert", "k_bias")
        assert stays or not np.array_equal(old, new), name
    for (name, old), (_, new) in zip(trees.named_leaves(first.frozen), trees.named_leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(old, new, name)
    # Adam has two moments of what trains, and a counter
    trained = trees.nbytes(state.params)
    assert trees.nbytes(state.opt) == 2 * trained + 4
    assert trained < 0.45 * trees.nbytes(state.weights)
    assert f"{trees.count(state.params):,} parameters (" in tuned.summary(optax.adam(1e-2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        again = checkpoints.restore(first).state
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    after = logits_of(tuned.model, state.weights, **inputs_of(family))
    assert float(jnp.abs(after - start).max()) > 1e-4
    if merges:
        merged = peft.merge(state.weights)
        assert not any(weights.is_typed(w) for _, w in weights.named_weights(merged))
        np.testing.assert_allclose(logits_of(tuned.model, merged, **inputs_of(family)), after, atol=1e-5 * float(jnp.abs(after).max()))
    elif method != "adapters":
        with pytest.raises(ValueError, match="keep it"):
            peft.merge(state.weights)
    also = [pattern for pattern in tuned.trained if "head" in pattern]
    left, adapter = peft.split(state.weights, also)
    if method in ("lora", "dora", "ia3", "adapters", "prompt", "prefix"):
        assert jax.tree.structure(left) == jax.tree.structure(base)
        np.testing.assert_array_equal(logits_of(tuned.model, peft.attach(base, adapter), **inputs_of(family)), after)


LAID_OUT = [("bert", "lora"), ("bert", "adapters"), ("gpt2", "ia3"), ("bert", "prompt"), ("llama", "prefix")]


@pytest.mark.slow
@pytest.mark.parametrize("family, method", LAID_OUT)
def test_eight_devices_are_one(family, method):
    *_, its = step_of(family, method)
    _, _, state, theirs = step_of(family, method, devices=8)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.weights))
    np.testing.assert_allclose(theirs["loss"].value, its["loss"].value, rtol=1e-5)
    np.testing.assert_allclose(theirs["grad_norm"], its["grad_norm"], rtol=1e-4)  # sums over 8 devices, in another order


def test_what_trains_is_the_method_and_a_head_that_scores():
    assert peft.create("lora", *made("bert"), rng=KEY, rules=QV).trained[-1] == "head/.*"
    assert not any("head" in pattern for pattern in peft.create("lora", *made("llama"), rng=KEY, rules=QV).trained)
    tuned = peft.create("lora", *made("bert"), rng=KEY, rules=QV, also=[".*norm./.*"])
    kept, _ = trees.partition(tuned.params, weights.trains(tuned.params, tuned.freeze, tuned.model.axes))
    assert {name.rpartition("/")[0] for name, _ in trees.named_leaves(kept)} == {
        f"blocks/{n}" for n in ("attention/q", "attention/v", "norm1", "norm2")
    }


# -- typed weights by rules ------------------------------------------------------------------------------------------------


def test_rank_and_alpha_by_rule():
    model, params = made("llama")
    rules = [(".*/attention/q", (4, 2.0)), (".*/attention/k", None), (".*/(attention|mlp)/.*", 2)]
    tuned = peft.lora(params, rules, axes=model.axes, rng=KEY, alpha=16, rs=True)["blocks"]
    q, v = tuned["attention"]["q"], tuned["attention"]["v"]
    assert (q.a.shape[-1], q.scale) == (4, 1.0)  # 2 / sqrt(4)
    assert (v.a.shape[-1], v.scale) == (2, 16 / 2**0.5)
    assert not weights.is_typed(tuned["attention"]["k"])
    assert isinstance(tuned["mlp"]["down"], weights.LoRA)
    assert not np.array_equal(q.a[0], q.a[1])  # layers begin apart, and so do weights
    again = peft.lora(params, [(".*/attention/q", 4)], axes=model.axes, rng=KEY)["blocks"]["attention"]["q"]
    np.testing.assert_array_equal(q.a, again.a)  # whatever else is adapted


@pytest.mark.parametrize("make", [peft.lora, peft.dora])
@pytest.mark.parametrize("kind, bits", [("int8", 8), ("int4", 4), ("nf4", 4)])
def test_a_quantized_base(make, kind, bits):
    model, params = made("llama")
    tuned = make(params, QV, axes=model.axes, rng=KEY, base=[("blocks/.*", kind)], group=16)
    q, up = tuned["blocks"]["attention"]["q"], tuned["blocks"]["mlp"]["up"]
    assert isinstance(q.base, weights.Quantized) and isinstance(up, weights.Quantized)
    assert trees.itemsize(q.base.qvalue.dtype) == bits / 8
    kept, _ = trees.partition(tuned, weights.trains(tuned, [(".*/(a|b|magnitude)", False), (".*", True)], model.axes))
    assert {name.rpartition("/")[0] for name, _ in trees.named_leaves(kept)} == {"blocks/attention/q", "blocks/attention/v"}
    w = params["blocks"]["attention"]["q"]
    step = {"int8": 1 / 127, "int4": 1 / 7, "nf4": 0.31}[kind]  # of the largest of a group; nf4's widest is from -1 to -0.696
    assert float(jnp.abs(weights.dense(q) - w).max()) <= 0.51 * step * float(jnp.abs(w).max())
    alone = make(params, QV, axes=model.axes, rng=KEY, base=kind)
    assert not weights.is_typed(alone["blocks"]["mlp"]["up"])
    layer = jax.tree.map(lambda part: part[0], q)
    x = jax.random.normal(KEY, (5, 64))
    want = ops.einsum("bd,dnh->bnh", x, layer.base)
    np.testing.assert_allclose(ops.einsum("bd,dnh->bnh", x, layer), want, atol=1e-6 * float(jnp.abs(want).max()))  # DoRA: |w| / |w|


def test_experts_of_a_mixture_are_adapted_too():
    model = models.create("mixtral", size="tiny")
    adapt = lambda key: peft.lora(model.init(key), [("blocks/mlp/(gate|up|down)", 2)], axes=model.axes, rng=KEY)
    tuned = jax.eval_shape(adapt, KEY)
    assert tuned["blocks"]["mlp"]["up"].a.shape == (*model.shapes()["blocks"]["mlp"]["up"].shape[:3], 2)
    out = jax.eval_shape(
        lambda params: model.apply(params, input_ids=jnp.ones((2, 4), int)), tuned
    )  # their products: tests/ops/test_moe.py
    assert out["logits"].shape == (2, 4, 256)


def test_decay_leaves_factors_and_biases_alone():
    """A factor that decays would end at zero, which is not where it began."""
    axes = {name: "layers | embed -> mlp" for name in ("ia3", "adapter", "dora", "array")}
    params = {name: jnp.ones((2, 4, 6)) for name in axes}
    params = peft.ia3(params, [("ia3", "outputs")], axes=axes)
    params = peft.adapters(params, [("adapter", 3)], axes=axes, rng=KEY)
    params = jax.tree.map(lambda part: part + 1.0, peft.dora(params, [("dora", 2)], axes=axes, rng=KEY))
    tx = optim.make(lr=1.0, steps=10, kind="constant", weight_decay=0.5, axes=axes)
    updates, _ = jax.jit(lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params))(params)
    moved = {name for name, u in trees.named_leaves(updates) if float(jnp.abs(u).max()) > 0}
    assert moved == {"array", "ia3/base", "adapter/base", "adapter/down", "adapter/up", "dora/base", "dora/a", "dora/b"}


def test_dropout_is_of_the_step_and_of_a():
    """Entries of a x are those of x, kept and doubled or dropped, of each layer others; the base sees x as it is."""
    w = weights.lora(jnp.zeros((2, 64, 64)), 64, axes="layers | embed -> mlp", rng=KEY)
    params = {"w": dataclasses.replace(w, a=jnp.stack([jnp.eye(64)] * 2), b=jnp.stack([jnp.eye(64)] * 2))}

    def loss(params, x, rng):
        return jax.lax.scan(lambda x0, w: (x0, ops.einsum("bd,df->bf", x0, w)), x, params["w"])[1]

    x, dropped = jnp.ones((128, 64)), peft.dropout(loss, 0.5)
    first, second = dropped(params, x, jax.random.key(1))
    assert {*np.unique(first)} == {0.0, 2.0}
    assert abs(float(first.mean()) - 1) < 5 / 128 / 64**0.5 * 8  # five deviations of the mean of 8192 coins of deviation 1
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(dropped(params, x, jax.random.key(1))[0], first)
    np.testing.assert_array_equal(dropped(params, x, None), loss(params, x, None))
    model, base = made("bert")
    tuned = peft.create("dora", model, base, rng=KEY, rules=QV)
    tuned = tuned._replace(params=jax.tree.map(lambda part: part + 0.05, tuned.params))
    losses = [
        jax.jit(peft.dropout(tasks.create("classification", model), rate))(tuned.params, batch_of("bert"), KEY)[0].value
        for rate in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]


# -- models ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_words_as_a_prompt_are_the_words(family):
    words, inputs = jnp.array([7, 8, 9]), inputs_of(family)
    model, params = made(family)
    if family == "bert":  # whose tokens are all of one kind where nothing is said, and told apart where it is
        inputs["token_type_ids"] = jnp.arange(B * T).reshape(B, T) % 2
    tuned = peft.prompt(model, params, P, rng=KEY, words=words)
    front = {"input_ids": words, "attention_mask": words * 0 + 1, "token_type_ids": words * 0}
    whole = {name: jnp.concatenate([jnp.broadcast_to(front[name], (B, P)), x], 1) for name, x in inputs.items()}
    asked = dict(hidden_states=True, attentions=True, qkv=True)
    run = lambda model, params, inputs: jax.jit(lambda params, inputs: model.apply(params, **asked, **inputs))(params, inputs)
    want, got = run(model, params, whole), run(tuned.model, tuned.params, inputs)
    np.testing.assert_array_equal(got["last_hidden_state"], want["last_hidden_state"][:, P:])
    np.testing.assert_array_equal(got["hidden_states"][1], want["hidden_states"][1][:, P:])
    np.testing.assert_array_equal(got["attentions"][1], want["attentions"][1][:, :, P:])
    np.testing.assert_array_equal(got["qkv"][1]["k"], want["qkv"][1]["k"][:, P:])
    np.testing.assert_array_equal(got["logits"], want["logits"] if family == "bert" else want["logits"][:, P:])
    moved = run(tuned.model, tuned.params, {**inputs, "position_ids": jnp.arange(T)[None]})
    np.testing.assert_array_equal(moved["logits"], got["logits"])


@pytest.mark.parametrize("family, head", [("t5", "seq2seq_lm"), ("bart", "sequence_classification"), ("bart", "question_answering")])
def test_words_as_a_prompt_of_a_pair_are_the_encoders(family, head):
    """A decoder that has no text of its own reads the encoder's again, words and all; what it writes with a cache is what it writes without."""
    model = models.create(family, size="tiny", head=head)
    params, words, inputs = jax.jit(model.init)(KEY), jnp.array([7, 8, 9]), inputs_of("llama")
    own = {"decoder_input_ids": inputs["input_ids"][:, :5]} if head == "seq2seq_lm" else {}
    tuned = peft.prompt(model, params, P, rng=KEY, words=words)
    front = {"input_ids": words, "attention_mask": words * 0 + 1}
    whole = {name: jnp.concatenate([jnp.broadcast_to(front[name], (B, P)), x], 1) for name, x in inputs.items()}
    asked = dict(hidden_states=True, attentions=True, qkv=True)
    run = lambda model, params, inputs: jax.jit(lambda params, inputs: model.apply(params, **asked, **inputs))(params, inputs)
    want, got = run(model, params, whole | own), run(tuned.model, tuned.params, inputs | own)
    cut = lambda x: x if own or x.shape[1] != P + T else x[:, P:]
    np.testing.assert_array_equal(got["encoder_last_hidden_state"], want["encoder_last_hidden_state"][:, P:])
    np.testing.assert_array_equal(got["encoder_hidden_states"][1], want["encoder_hidden_states"][1][:, P:])
    for name in {"last_hidden_state", "logits", "start_logits", "end_logits"} & {*want}:
        np.testing.assert_array_equal(got[name], cut(want[name]))
    np.testing.assert_array_equal(got["decoder_hidden_states"][1], cut(want["decoder_hidden_states"][1]))
    np.testing.assert_array_equal(got["encoder_attentions"][1], want["encoder_attentions"][1][:, :, P:])
    np.testing.assert_array_equal(got["cross_attentions"][1], want["cross_attentions"][1][:, :, 0 if own else P :])
    if own:
        write = lambda model, params, inputs: generate(model, params, **inputs, max_new_tokens=3, temperature=0)
        np.testing.assert_array_equal(write(tuned.model, tuned.params, inputs), write(model, params, whole))


@pytest.mark.parametrize("family", ["gpt2"])  # learned positions, which begin behind it
def test_words_as_a_prefix_are_the_words_of_a_decoder(family):
    words, inputs = jnp.array([7, 8, 9]), inputs_of(family)
    model, params = made(family)
    tuned = peft.prefix(model, params, P, rng=KEY, words=words)
    front = {"input_ids": words, "attention_mask": words * 0 + 1}
    whole = {name: jnp.concatenate([jnp.broadcast_to(front[name], (B, P)), x], 1) for name, x in inputs.items()}
    want, got = logits_of(model, params, **whole)[:, P:], compiled(tuned.model)(tuned.params, inputs)
    assert "cache" not in got
    real = np.asarray(inputs["attention_mask"], bool)
    np.testing.assert_allclose(got["logits"][real], want[real], atol=2e-5 * float(jnp.abs(want).max()))  # attention in another order
    moved = logits_of(tuned.model, tuned.params, position_ids=jnp.arange(T)[None], **inputs)
    np.testing.assert_array_equal(moved, got["logits"])


@pytest.mark.parametrize("family, method", [("gpt2", "prefix"), ("gpt2", "prompt"), ("llama", "prefix")])
def test_what_stands_before_a_text_stands_before_what_is_written(family, method):
    """Decoding with a cache writes what the same model says token by token without one, behind padding too."""
    model, params = made(family)
    tuned = peft.create(method, model, params, rng=KEY, tokens=P)
    params = jax.tree.map(
        lambda leaf, trains: 8 * leaf if trains else leaf, tuned.params, weights.trains(tuned.params, tuned.freeze, tuned.model.axes)
    )
    ids, run = jnp.asarray(inputs_of(family)["input_ids"]), compiled(tuned.model)
    text = ids
    for _ in range(3):
        text = jnp.concatenate([text, run(params, {"input_ids": text})["logits"][:, -1:].argmax(-1)], axis=1)
    got = generate(tuned.model, params, ids, max_new_tokens=3, temperature=0)
    np.testing.assert_array_equal(got, text[:, T:])
    padded, mask = jnp.pad(ids, ((0, 0), (2, 0))), jnp.pad(jnp.ones_like(ids), ((0, 0), (2, 0)))
    np.testing.assert_array_equal(generate(tuned.model, params, padded, attention_mask=mask, max_new_tokens=3, temperature=0), got)
    held = jax.eval_shape(lambda params: tuned.model.begin(params, len(ids), 4, dtype="int8"), params)
    assert held["k"].qvalue.shape[2] == P + 4 and held["k"].scale.shape == (*held["k"].qvalue.shape[:-1], 1)
    generate(tuned.model, params, ids, max_new_tokens=3, temperature=0, cache_dtype="int8")
    plain = generate(model, made(family)[1], ids, max_new_tokens=3, temperature=0)
    assert not np.array_equal(got, plain)  # else nothing of it was there
    if family == "gpt2":
        with pytest.raises(
            ValueError, match=f"tokens behind a {method} of {P} are more than the {model.config['n_positions']} learned positions"
        ):
            generate(tuned.model, params, ids, max_new_tokens=model.config["n_positions"] - T, temperature=0)


def test_an_encoder_sees_a_prefix_and_no_padding():
    model, params = made("bert")
    tuned, inputs = peft.prefix(model, params, P, rng=KEY), inputs_of("bert")
    run = lambda params, **inputs: compiled(tuned.model)(params, inputs)["last_hidden_state"]
    want = run(tuned.params, **inputs)
    other = jnp.where(inputs["attention_mask"] == 1, inputs["input_ids"], 5)
    real = np.asarray(inputs["attention_mask"], bool)
    np.testing.assert_array_equal(run(tuned.params, **{**inputs, "input_ids": other})[real], want[real])
    louder = {**tuned.params, "prefix": jax.tree.map(lambda x: x + 1.0, tuned.params["prefix"])}
    assert bool((jnp.abs(run(louder, **inputs) - want).max(-1) > 0).all())  # from everywhere
    short = {**inputs, "input_ids": jnp.ones((1, 126), int), "attention_mask": jnp.ones((1, 126), int)}
    with pytest.raises(ValueError, match="126 tokens behind a prefix of 3 are more than the 128 learned positions"):
        run(tuned.params, **short)


def test_the_last_layers_are_the_same_file_and_a_part_of_the_backward_pass(tmp_path):
    model, params = made("bert")
    tuned = peft.last_layers(model, params, 1)
    assert {"blocks_0", "blocks_1"} <= tuned.params.keys()
    hub.save(model, params, str(tmp_path / "a"))
    hub.save(tuned.model, tuned.params, str(tmp_path / "b"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)

    def backward(model, params, freeze):
        kept, rest = trees.partition(params, weights.trains(params, freeze, model.axes))
        loss = lambda kept: jnp.sum(model.apply(trees.combine(kept, rest), **inputs_of("bert"))["logits"] ** 2)
        return count_flops(jax.grad(loss), kept) - count_flops(loss, kept)

    # of the two layers' backward passes, each two thirds of its products' three, one is left
    assert 0.4 < backward(tuned.model, tuned.params, tuned.freeze) / backward(model, params, [("embed/.*", True)]) < 0.6
    everything = peft.last_layers(model, params, 2)
    assert everything.trained == ("blocks/.*",)
    periodic = models.create("gemma2", size="tiny", num_hidden_layers=6)
    shapes = periodic.shapes()
    cut = jax.eval_shape(lambda params: peft.last_layers(periodic, params, 4).params, shapes)
    assert [cut[name]["1"]["mlp"]["up"].shape[0] for name in ("blocks_0", "blocks_1")] == [1, 2]
    tuned = peft.last_layers(periodic, jax.tree.map(lambda x: jnp.arange(x.shape[0]), shapes), 4)
    assert tuned.trained == ("blocks_1/.*",)
    assert tuned.params["blocks_1"]["0"]["norm1"]["scale"].tolist() == [1, 2]
    out = jax.eval_shape(lambda params: tuned.model.apply(params, input_ids=jnp.ones((1, 4), int)), cut)
    assert out["logits"].shape == (1, 4, 256)


# -- adapters --------------------------------------------------------------------------------------------------------------


def adapter_of(seed, rank, rules=".*/attention/(q|v)", family="llama"):
    model, params = made(family)
    tuned = peft.lora(params, [(rules, rank)], axes=model.axes, rng=jax.random.key(seed), alpha=3.0 * rank)
    stir = lambda name, w: 0.3 * jax.random.normal(jax.random.fold_in(KEY, seed), w.shape) if name.endswith("/b") else w
    return peft.split(trees.map_named(stir, tuned))[1]


def test_adapters_are_switched_and_added_up():
    model, params = made("llama")
    one, two = adapter_of(1, 2), adapter_of(2, 4, ".*/attention/(v|out)")
    assert {*one} == {"blocks/attention/q", "blocks/attention/v"}
    both = peft.attach(params, peft.combine([(one, 0.5), (two, -2.0)], axes=model.axes))
    for name in ("q", "v", "out", "k"):
        w = params["blocks"]["attention"][name]
        update = lambda adapter, name=name: (
            weights.dense(peft.attach(params, adapter)["blocks"]["attention"][name]) - params["blocks"]["attention"][name]
        )
        want = w + 0.5 * update(one) - 2.0 * update(two)
        np.testing.assert_allclose(weights.dense(both["blocks"]["attention"][name]), want, atol=1e-5)
    assert both["blocks"]["attention"]["v"].a.shape[-1] == 6
    named = {"one": one, "two": two}  # of other weights and another rank
    ids = inputs_of("llama")["input_ids"][:2]
    first, second = (logits_of(model, peft.attach(params, named[name]), input_ids=ids) for name in ("one", "two"))
    assert float(jnp.abs(first - second).max()) > 1e-2
    stacked = peft.lora(peft.attach(params, one), QV, axes=model.axes, rng=KEY)  # one upon another
    base, found = peft.split(stacked)
    jax.tree.map(np.testing.assert_array_equal, base, params)
    jax.tree.map(np.testing.assert_array_equal, peft.attach(params, found), stacked)


def refused(name, **inputs):
    tuned = peft.create(name, *made("bert"), rng=KEY, tokens=P)
    return tuned.model.apply(tuned.params, input_ids=jnp.ones((1, 4), int), **inputs)


def twice_quantized():
    model, params = made("llama")
    for kind in ("int8", "int4"):
        params = peft.quantized(params, [(".*/q", kind)], axes=model.axes)


def other_prefix():
    tuned = peft.create("prefix", *made("bert"), rng=KEY, tokens=P)
    longer = {name: jnp.zeros((5, *x.shape[1:])) for name, x in tuned.params["prefix"].items()}
    return tuned.model.apply({**tuned.params, "prefix": longer}, input_ids=jnp.ones((1, 4), int))


t5 = functools.cache(lambda: (model := models.create("t5", size="tiny"), model.shapes()))
vit = functools.cache(lambda: (model := models.create("vit", size="tiny"), model.shapes()))
rules = lambda method, rules, family="llama", **more: peft.create(method, *made(family), rng=KEY, rules=rules, **more)
MISTAKES = {
    "method": (lambda: peft.create("lorra", *made("bert"), rng=KEY), "unknown method 'lorra'; the methods are 'lora', 'dora'"),
    "a rule for nothing": (lambda: rules("lora", [(".*/qq", 4)]), r"rule '\.\*/qq' matches no matrix; those that can be adapted are 'blocks/"),
    "a rule for vectors": (lambda: rules("lora", [("blocks/norm1/scale", 4)]), "matches no matrix"),
    "rank 0": (lambda: rules("lora", [(".*/q", 0)]), "rank of at least 1"),
    "a base": (lambda: rules("lora", QV, base="int3"), "cannot be quantized to 'int3'"),
    "a base twice": (twice_quantized, "q is a QArray already"),
    "ia3 of what": (lambda: rules("ia3", [(".*/q", "input")]), "the 'outputs' or the 'inputs' of a matrix, not 'input'"),
    "activation": (lambda: rules("adapters", [(".*/mlp/down", 4)], act="reluu"), "no activation 'reluu'; there are 'relu"),
    "dropout": (lambda: peft.dropout(lambda *_: 0.0, 1.0), "no probability below 1"),
    "a prompt of packed rows": (lambda: refused("prompt", segment_ids=jnp.ones((1, 4), int)), "segment_ids cannot be given with it"),
    "a prefix of another model": (other_prefix, r"a prefix \(5, 3, 4, 16\) is for another model: this one has 2 layers"),
    "a prefix for pairs": (lambda: peft.prefix(*t5(), P, rng=KEY), "a model that reads one text, an encoder or a decoder alone"),
    "a prompt for images": (lambda: peft.prompt(*vit(), P, rng=KEY), "a model that reads one text; this is none"),
    "a prefix for images": (lambda: peft.prefix(*vit(), P, rng=KEY), "a model that reads one text"),
    "words": (lambda: peft.prompt(*made("bert"), P, rng=KEY, words=[1, 2, 300]), r"up to id 300 are not 3 ids below 256"),
    "bitfit": (lambda: peft.bitfit(*made("llama")), "this model has none"),
    "head": (lambda: peft.head_only(*made("gpt2")), "this model's head has none"),
    "layers": (lambda: peft.last_layers(*made("bert"), 3), "of a model of 2; give 1 to 2"),
    "layers of two stacks": (lambda: peft.last_layers(*t5(), 1), "one stack of layers, and this one is more"),
    "a period": (lambda: peft.last_layers(model := models.create("gemma2", size="tiny", num_hidden_layers=6), model.shapes(), 3), "in periods of 2; take 4"),
    "layers that are one": (lambda: peft.last_layers(model := models.create("albert", size="tiny"), model.shapes(), 1), "share one set of weights"),
    "another base": (lambda: peft.attach(made("gpt2")[1], adapter_of(1, 2)), r"the adapter's 'blocks/attention/v' is not for \(2, 64, 4, 16\)"),
    "another family": (lambda: peft.attach(made("bert")[1], adapter_of(1, 2, ".*/mlp/gate")), "'blocks/mlp/gate', which this base has not"),
    "a sum of ia3": (lambda: peft.combine([(peft.split(rules("ia3", peft.IA3_RULES).params)[1], 1.0)], axes=made("llama")[0].axes), "no LoRA alone"),
    "an adapter merged": (lambda: peft.merge(rules("adapters", peft.ADAPTER_RULES).params), "a function, not a matrix"),
    "a split by nothing": (lambda: peft.split(made("bert")[1], ["heads/.*"]), "'heads/.*' matches no weight"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
