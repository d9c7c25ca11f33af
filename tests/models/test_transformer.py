"""The laws of the transformer families: every family in FAMILIES is held to every law below. A new family joins the table and gets them all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigflax import models, ops, sharding, trees, weights
from bigflax.nn import REMAT

T, VOCAB, LAYERS = 8, 40, 3
# name -> (family, config); 3 layers, so that no number of heads is taken for it
FAMILIES = {
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=LAYERS, n_positions=16)),
    "llama": ("llama", dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)),
    "bert": ("bert", dict(hidden_size=32, num_hidden_layers=LAYERS, intermediate_size=48, max_position_embeddings=16)),
    "mixtral": ("mixtral", dict(hidden_size=32, num_hidden_layers=LAYERS, intermediate_size=24)),
}
ENCODERS = {"bert"}
each_family = pytest.mark.parametrize("name", FAMILIES)
# float32: the same sums in another order, through 3 layers, for logits of size 1 to 10
CLOSE = dict(rtol=0, atol=1e-4)


def create(name, **more):
    family, config = FAMILIES[name]
    return models.create(family, size="tiny", vocab_size=VOCAB, **{**config, **more})


@functools.cache
def made(name, **more):
    """A model, weights of which none is zero or one (a bias that is forgotten must be missed), and its compiled apply."""
    model, rng = create(name, **more), np.random.default_rng(0)
    draw = lambda axes, s: rng.normal(size=s.shape) * (0.3 if "embed" in axes else 0.1) + (axes.endswith("norm") and 1)
    params = jax.tree.map(lambda axes, s: jnp.asarray(draw(axes, s), jnp.float32), model.axes, model.shapes())
    return model, params, jax.jit(model.apply, static_argnames=("logits", "hidden_states"))


def ids_of(rows, length=T, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def logits_of(name, params=None, **inputs):
    _, ours, apply = made(name)
    return np.asarray(apply(ours if params is None else params, **inputs)["logits"])


@functools.cache
def alone(name, length):
    """A document and its logits with nothing beside it."""
    ids = ids_of(1, length, seed=length)
    return ids[0], logits_of(name, input_ids=ids)[0]


# -- the tree --------------------------------------------------------------------------------------------------------------

PUBLISHED = {  # parameters, as counted from the checkpoints (those of BERT with the masked-LM head, whose decoder is tied)
    ("gpt2", "124m"): 124_439_808,
    ("gpt2", "355m"): 354_823_168,
    ("gpt2", "774m"): 774_030_080,
    ("gpt2", "1.5b"): 1_557_611_200,
    ("llama", "llama2-7b"): 6_738_415_616,
    ("llama", "llama2-13b"): 13_015_864_320,
    ("llama", "llama3-8b"): 8_030_261_248,
    ("llama", "llama3-70b"): 70_553_706_496,
    ("llama", "llama3.2-1b"): 1_235_814_400,
    ("llama", "llama3.2-3b"): 3_212_749_824,
    ("llama", "tinyllama-1.1b"): 1_100_048_384,
    ("llama", "smollm-135m"): 134_515_008,
    ("llama", "smollm-360m"): 361_821_120,
    ("llama", "smollm-1.7b"): 1_711_376_384,
    ("llama", "smollm2-135m"): 134_515_008,
    ("llama", "smollm2-360m"): 361_821_120,
    ("llama", "smollm2-1.7b"): 1_711_376_384,
    ("albert", "base"): 11_221_680,  # with the masked-LM head, tied, as are the next
    ("albert", "large"): 16_795_824,
    ("albert", "xlarge"): 54_821_040,
    ("albert", "xxlarge"): 206_368_944,
    ("modernbert", "base"): 149_655_232,
    ("modernbert", "large"): 395_881_664,
    ("smollm3", "3b"): 3_075_098_624,
    ("bart", "base"): 139_420_416 + 50_265,  # and the row that is added to the logits, which is no parameter to PyTorch
    ("bart", "large"): 406_291_456 + 50_265,
    ("bart", "large-cnn"): 406_290_432 + 50_264,
    ("distilbert", "base"): 66_985_530,  # with the masked-LM head, tied
    ("electra", "small"): 13_549_057,  # with the discriminator's head
    ("electra", "base"): 109_483_009,
    ("electra", "large"): 335_142_913,
    ("roberta", "base"): 124_697_433,
    ("roberta", "large"): 355_412_057,
    ("xlm-roberta", "base"): 278_295_186,
    ("xlm-roberta", "large"): 560_142_482,
    ("gemma", "2b"): 2_506_172_416,
    ("gemma", "7b"): 8_537_680_896,
    ("gemma2", "2b"): 2_614_341_888,
    ("gemma2", "9b"): 9_241_705_984,
    ("gemma2", "27b"): 27_227_128_320,
    ("gemma3_text", "1b"): 999_885_952,
    ("gpt_neox", "pythia-70m"): 70_426_624,
    ("gpt_neox", "pythia-160m"): 162_322_944,
    ("gpt_neox", "pythia-1.4b"): 1_414_647_808,
    ("gpt_neox", "20b"): 20_554_567_680,
    ("mistral", "7b-v0.1"): 7_241_732_096,
    ("mistral", "7b-v0.3"): 7_248_023_552,
    ("mixtral", "8x7b"): 46_702_792_704,
    ("mixtral", "8x22b"): 140_620_634_112,
    ("mt5", "small"): 300_176_768,
    ("mt5", "base"): 582_401_280,
    ("mt5", "large"): 1_229_581_312,
    ("mt5", "xl"): 3_742_619_648,
    ("mt5", "xxl"): 12_921_057_280,
    ("olmo2", "1b"): 1_484_916_736,
    ("olmo2", "7b"): 7_298_617_344,
    ("olmo2", "13b"): 13_716_198_400,
    ("opt", "125m"): 125_239_296,
    ("opt", "1.3b"): 1_315_758_080,
    ("opt", "6.7b"): 6_658_473_984,
    ("phi3", "mini-4k"): 3_821_079_552,
    ("phi3", "medium-4k"): 13_960_238_080,
    ("qwen2", "0.5b"): 494_032_768,
    ("qwen2", "1.5b"): 1_543_714_304,
    ("qwen2", "7b"): 7_615_616_512,
    ("qwen2_moe", "1.5-a2.7b"): 14_315_784_192,
    ("qwen2_moe", "57b-a14b"): 57_408_658_944,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "1.7b"): 1_720_574_976,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3_moe", "30b-a3b"): 30_532_122_624,
    ("qwen3_moe", "235b-a22b"): 235_093_634_560,
    ("resnet", "18"): 11_689_512,
    ("resnet", "34"): 21_797_672,
    ("resnet", "50"): 25_557_032,
    ("resnet", "101"): 44_549_160,
    ("resnet", "152"): 60_192_808,
    ("convnext", "tiny-224"): 28_589_128,
    ("convnext", "small-224"): 50_223_688,
    ("convnext", "base-224"): 88_591_464,
    ("convnext", "large-224"): 197_767_336,
    ("mobilenet_v2", "1.0-224"): 3_504_872 + 1281,  # published with 1000 labels; the folders have one more, for none of them
    ("mobilenet_v2", "0.75-160"): 2_636_424 + 1281,
    ("mobilenet_v2", "0.35-96"): 1_677_128 + 1281,
    ("cnn", "mnist"): (9 * 32 + 64) + (9 * 32 * 64 + 128) + (7 * 7 * 64 + 1) * 128 + 129 * 10,  # ours: by hand
    ("vit", "base-patch16"): 86_567_656,  # with the classes of ImageNet, as DeiT, which has two heads of them
    ("vit", "large-patch16"): 304_326_632,
    ("deit", "tiny-patch16"): 5_910_800,
    ("deit", "small-patch16"): 22_436_432,
    ("deit", "base-patch16"): 87_338_192,
    ("dinov2", "small"): 22_056_576,
    ("dinov2", "base"): 86_580_480,
    ("dinov2", "large"): 304_368_640,
    ("dinov2", "giant"): 1_136_480_768,
    ("dinov2_with_registers", "small"): 22_058_112,
    ("dinov2_with_registers", "base"): 86_583_552,
    ("dinov2_with_registers", "large"): 304_372_736,
    ("dinov2_with_registers", "giant"): 1_136_486_912,
    ("clip", "base-patch32"): 151_277_313,
    ("clip", "base-patch16"): 149_620_737,
    ("clip", "large-patch14"): 427_616_513,
    ("siglip", "base-patch16-224"): 203_155_970,
    ("siglip", "large-patch16-256"): 652_150_786,
    ("siglip", "so400m-patch14-384"): 877_960_498,
    ("t5", "small"): 60_506_624,
    ("t5", "base"): 222_903_552,
    ("t5", "large"): 737_668_096,
    ("t5", "3b"): 2_851_598_336,
    ("t5", "11b"): 11_307_321_344,
    ("t5", "v1.1-small"): 76_961_152,  # these with a head of their own
    ("t5", "v1.1-base"): 247_577_856,
    ("t5", "v1.1-large"): 783_150_080,
    ("t5", "v1.1-xl"): 2_849_757_184,
    ("t5", "v1.1-xxl"): 11_135_332_352,
    ("whisper", "whisper-tiny"): 37_760_640,
    ("whisper", "whisper-base"): 72_593_920,
    ("whisper", "whisper-small"): 241_734_912,
    ("whisper", "whisper-medium"): 763_857_920,
    ("whisper", "whisper-large-v3"): 1_543_490_560,
    ("bert", "base"): 109_514_298,
    ("bert", "large"): 335_174_458,
    ("bert", "minilm-l6"): 22_713_216 - 384 * 385 + (384 * 385 + 2 * 384 + 30_522),  # published with a pooler and without a head
}


@pytest.mark.parametrize("family, size", PUBLISHED, ids=str)
def test_parameter_count(family, size):
    model = models.create(family, size=size, **({"num_labels": 1000} if family in ("vit", "deit") else {}))
    trained, _ = trees.partition(model.shapes(), weights.trainable(model.shapes(), model.axes))  # running statistics are not counted
    assert trees.count(trained) == PUBLISHED[family, size]


def test_every_published_size_is_counted():
    assert set(PUBLISHED) == {(name, size) for name in models.FAMILIES for size in models.family(name).SIZES if size != "tiny"}
    assert {family for family, _ in FAMILIES.values()} <= set(models.FAMILIES)  # one of each way to be composed


@each_family
def test_axes_name_every_dimension(name):
    model = made(name)[0]
    shapes, axes = dict(trees.named_leaves(model.shapes())), dict(trees.named_leaves(model.axes))
    assert list(shapes) == list(axes)
    for leaf, shape in shapes.items():
        ax = weights.parse_axes(axes[leaf])
        assert len(ax.names) == len(shape.shape), leaf
        assert (ax.stack[0] == "layers" and shape.shape[0] == LAYERS) if leaf.startswith("blocks/") else ax.stack == (), leaf
        assert shape.dtype == jnp.float32, leaf
    assert all(row in model.summary() for row in shapes)


@each_family
def test_fresh_weights(name):
    """Matrices are normal (0.02, in GPT-2 and Llama the ones that write to the residual stream over sqrt(2 L)), each layer its own; a fresh
    model knows nothing: its loss is log V."""
    model = made(name)[0]
    params = jax.jit(model.init)(jax.random.key(0))
    assert jax.tree.map(lambda w: (w.shape, w.dtype), params) == jax.tree.map(lambda s: (s.shape, s.dtype), model.shapes())
    for leaf, w in trees.named_leaves(jax.device_get(params)):
        if "scale" in leaf or "bias" in leaf or leaf.endswith("/b"):
            np.testing.assert_array_equal(w, 1.0 if "scale" in leaf else 0.0, err_msg=leaf)
            continue
        small = name in ("gpt2", "llama") and leaf.rsplit("/", 1)[-1] in ("out", "down")
        want = 0.02 / (2 * LAYERS) ** 0.5 if small else 0.02
        # the deviation of n normal numbers is right to 1 / sqrt(2 n); five of those
        assert abs(w.std() / want - 1) < 5 / (2 * w.size) ** 0.5, leaf
        assert not leaf.startswith("blocks/") or not np.allclose(w[0], w[1]), leaf
    logits = logits_of(name, params, input_ids=ids_of(1 + T))
    assert abs(np.log(np.exp(logits).sum(-1)).mean() - np.log(VOCAB)) < 0.1


# -- who sees whom ---------------------------------------------------------------------------------------------------------


@each_family
def test_a_token_changes_nothing_before_it(name):
    """Row 1 + t differs from row 0 in token t: a decoder's logits differ from t on, an encoder's everywhere."""
    ids = np.repeat(ids_of(1), 1 + T, axis=0)
    ids[np.arange(1, 1 + T), np.arange(T)] += 1
    ids %= VOCAB
    logits = logits_of(name, input_ids=ids)
    differs = np.abs(logits[1:] - logits[:1]).max(-1) > CLOSE["atol"]
    want = np.ones((T, T), bool) if name in ENCODERS else np.triu(np.ones((T, T), bool))
    np.testing.assert_array_equal(differs, want)


@each_family
def test_padding_changes_nothing(name):
    """Neither on the right nor on the left, where positions start behind it; whatever tokens it consists of."""
    ids, mask = ids_of(4), np.zeros((4, T), int)
    places = [(0, slice(0, 3)), (1, slice(0, 5)), (2, slice(T - 3, T)), (3, slice(T - 5, T))]
    for row, place in places:
        ids[row, place], mask[row, place] = alone(name, place.stop - place.start)[0], 1
    logits = logits_of(name, input_ids=ids, attention_mask=mask, position_ids=np.maximum(mask.cumsum(1) - 1, 0))
    for row, place in places:
        np.testing.assert_allclose(logits[row, place], alone(name, place.stop - place.start)[1], **CLOSE)
    assert np.isfinite(logits).all()


@each_family
def test_packed_documents_do_not_see_each_other(name):
    """Two documents in a row, in both orders and with padding between and behind: each has the logits that it has alone."""
    rows, (three, five) = [(3, 5), (5, 3)], (alone(name, 3), alone(name, 5))
    docs = {3: three, 5: five}
    ids = np.stack([np.concatenate([docs[n][0] for n in row] + [[7, 7]]) for row in rows])
    segments = np.stack([np.repeat([1, 2, 0], [*row, 2]) for row in rows])
    positions = np.stack([np.concatenate([np.arange(n) for n in (*row, 2)]) for row in rows])
    logits = logits_of(name, input_ids=ids, segment_ids=segments, position_ids=positions)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits[i, : row[0]], docs[row[0]][1], **CLOSE)
        np.testing.assert_allclose(logits[i, row[0] : 8], docs[row[1]][1], **CLOSE)


def test_token_types():
    ids = ids_of(1 + T)
    plain = logits_of("bert", input_ids=ids)
    given = logits_of("bert", input_ids=ids, token_type_ids=np.arange(1 + T)[:, None] // 5 * np.ones((1, T), int))
    np.testing.assert_allclose(given[:5], plain[:5], **CLOSE)
    assert np.abs(given[5:] - plain[5:]).max((1, 2)).min() > 0.01


# -- what comes out --------------------------------------------------------------------------------------------------------


@each_family
def test_hidden_states(name):
    """The embedding, then every layer, the last as `last_hidden_state`, and the head's factors give the logits' cross-entropy."""
    model, params, _ = made(name)
    ids, labels = ids_of(2), ids_of(2, seed=2)
    labels[0, :3] = -100

    @jax.jit
    def both(params):
        out = model.apply(params, input_ids=ids, hidden_states=True)
        head = model.apply(params, input_ids=ids, logits=False)
        assert "logits" not in head
        return out, ops.linear_cross_entropy(labels_BT=jnp.asarray(labels), **head["head"])[0]

    out, loss = both(params)
    assert len(out["hidden_states"]) == LAYERS + 1
    np.testing.assert_array_equal(out["hidden_states"][-1], out["last_hidden_state"])
    assert len({float(jnp.abs(x).sum()) for x in out["hidden_states"]}) == LAYERS + 1  # each another
    if name == "llama":  # whose embedding is its rows alone
        np.testing.assert_allclose(out["hidden_states"][0], params["embed"]["tokens"][ids], atol=1e-6)
    want = optax.softmax_cross_entropy_with_integer_labels(out["logits"], jnp.maximum(labels, 0))
    np.testing.assert_allclose(loss, np.where(labels == -100, 0, want), rtol=1e-4, atol=1e-5)


@each_family
def test_attentions(name):
    """Asked for, the logits stay what they are, and each layer's heads say whom each token looks at: in all 1, at no padding, and backwards alone where
    the model is causal. Queries, keys and values are each layer's."""
    model, params, _ = made(name)
    ids, mask = ids_of(2), np.ones((2, T), np.int32)
    mask[1, -3:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    out = jax.jit(lambda params: model.apply(params, attentions=True, qkv=True, **given))(params)
    np.testing.assert_allclose(out["logits"], logits_of(name, **given), **CLOSE)
    block = model.module.groups[0].blocks[0].attention
    N, K, H = block.heads, block.kv_heads or block.heads, block.head_dim
    maps = np.stack(out["attentions"])
    assert maps.shape == (LAYERS, 2, N, T, T) and maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert not maps[:, 1, ..., -3:].any() and (name in ENCODERS or not np.triu(maps, 1).any())
    assert len({float(np.square(layer).sum()) for layer in maps}) == LAYERS  # each another
    assert [{n: x.shape for n, x in layer.items()} for layer in out["qkv"]] == [
        {"q": (2, T, N, H), "k": (2, T, K, H), "v": (2, T, K, H)}
    ] * LAYERS
    assert len({float(jnp.abs(layer["q"]).sum()) for layer in out["qkv"]}) == LAYERS


@pytest.mark.slow
def test_attentions_of_stages():
    """Of layers that run as a pipeline, every layer's and every row's are in their place."""
    model, params, _ = made("llama", num_hidden_layers=4)
    ids = ids_of(8)
    look = lambda params: model.apply(params, input_ids=ids, attentions=True, qkv=True)
    want, mesh = jax.jit(look)(params), sharding.make_mesh(stage=2, data=4)

    def piped(params):
        with sharding.tracing_on(mesh):
            return look(params), len(sharding.current_layout().pipelines)

    got, pipelines = jax.jit(piped)(jax.device_put(params, sharding.shardings(params, model.axes, mesh)))
    assert pipelines == 1
    for name in ("attentions", "qkv"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got[name], want[name])


VARIANTS = {f"remat {remat}": dict(remat=remat) for remat in REMAT if remat != "none"} | {"unrolled": dict(unroll=True)}


def loss_and_grad(model):
    ids = ids_of(2)

    def loss(params):
        logits = model.apply(params, input_ids=ids)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, np.roll(ids, -1, 1)).mean()

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def plain_loss_and_grad(name):
    return jax.device_get(loss_and_grad(made(name)[0])(made(name)[1]))


slow_but = lambda quick: [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("variant", [v if v == "remat full" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
@pytest.mark.parametrize("name", slow_but(["gpt2"]))
def test_neither_remat_nor_unrolling_changes_the_gradient(name, variant):
    want_loss, want = plain_loss_and_grad(name)
    loss, grads = jax.device_get(loss_and_grad(create(name, **VARIANTS[variant]))(made(name)[1]))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for (leaf, g), (_, w) in zip(trees.named_leaves(grads), trees.named_leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * max(np.abs(w).max(), 0.1), err_msg=leaf)
        assert np.abs(w).max() > 0 or leaf.endswith("k_bias"), leaf  # every weight learns; a bias of k moves all of a row's scores alike


@pytest.mark.parametrize("name", slow_but(["llama"]))
def test_remat_recomputes(name):
    """Products in the traced program: "minimal" repeats attention's scores, "dots" its sums too, "full" the layer's as well."""
    traced = {remat: str(loss_and_grad(create(name, remat=remat)).trace(made(name)[1]).jaxpr) for remat in REMAT}
    products = {remat: text.count("dot_general") for remat, text in traced.items()}
    assert products["none"] < products["minimal"] < products["dots"] < products["full"] == products["offload"], products
    kept = f"f32<host>[{LAYERS},2,{T},"  # the stack of the layers' inputs
    assert {remat for remat, text in traced.items() if kept in text} == {"offload"}


@pytest.mark.parametrize("name", ["gpt2", "bert"])  # Llama has none
def test_dropout_is_a_function_of_the_key_and_off_without_one(name):
    _, params, apply = made(name)
    ids = ids_of(1 + T)
    one, again, other = (np.asarray(apply(params, input_ids=ids, rng=jax.random.key(k))["logits"]) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    plain = logits_of(name, input_ids=ids)
    for a, b in [(one, other), (one, plain), (other, plain)]:
        assert (np.abs(a - b).max((1, 2)) > 0.01).all()  # in every row
    rates = {"gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0), "bert": dict(hidden_dropout_prob=0.0)}[name]
    text = jax.jit(create(name, **rates).apply).lower(params, input_ids=ids, rng=jax.random.key(0)).as_text()
    assert "threefry" not in text  # a rate of 0 costs nothing


@each_family
def test_bfloat16_computes_narrow_over_float32_weights(name):
    ids = ids_of(1 + T)
    out = jax.jit(create(name, dtype="bfloat16").apply)(made(name)[1], input_ids=ids)
    assert out["logits"].dtype == out["last_hidden_state"].dtype == jnp.bfloat16
    assert {s.dtype for s in jax.tree.leaves(create(name, dtype="bfloat16").shapes())} == {jnp.dtype("float32")}
    want, got = logits_of(name, input_ids=ids), np.asarray(out["logits"], np.float32)
    # 8 bits of mantissa: 2^-8 a rounding, of which some dozens follow one another, against the spread of the logits
    far = np.abs(got - want).max(-1) >= 0.15 * want.std()
    assert far.mean() <= (0.1 if name == "mixtral" else 0), far.mean()  # a token between two experts may go to the other
    assert np.abs(got - want).max() > 0


# -- typed weights ---------------------------------------------------------------------------------------------------------


def lora_over_int8(model, params):
    """Every matrix of the blocks as LoRA over int8, b not zero."""

    def one(leaf, w, axes):
        if not leaf.startswith("blocks/") or not weights.parse_axes(axes).first:
            return w
        key = jax.random.fold_in(jax.random.key(0), len(leaf))
        made = weights.lora(weights.quantize(w, "int8", axes=axes), 2, axes=axes, rng=key)
        return weights.LoRA(made.base, made.a, 0.1 * jax.random.normal(key, made.b.shape), made.alpha)

    return trees.map_named(one, params, model.axes)


@pytest.mark.parametrize("name", slow_but(["llama"]))
def test_lora_over_int8_trains_a_and_b_alone_under_scan_and_remat(name):
    """And its logits are those of the arrays that the typed weights stand for."""
    model, params, _ = made(name)
    deep = create(name, remat="full")
    typed = jax.jit(functools.partial(lora_over_int8, model))(params)
    can = trees.named_leaves(weights.trainable(typed))
    assert not any(trains for leaf, trains in can if "/base/" in leaf)
    kept, rest = trees.partition(typed, trees.map_named(lambda leaf, _: leaf.endswith(("/a", "/b")) and leaf.startswith("blocks/"), typed))
    ids = ids_of(1 + T)

    @jax.jit
    def run(kept, rest):
        def loss(kept):
            logits = deep.apply(trees.combine(kept, rest), input_ids=ids)["logits"]
            return jnp.mean(logits**2), logits

        return jax.value_and_grad(loss, has_aux=True)(kept)

    (_, logits), grads = run(kept, rest)
    grads = trees.named_leaves(jax.device_get(grads))
    matrices = sum(bool(weights.parse_axes(axes).first) for leaf, axes in trees.named_leaves(model.axes) if leaf.startswith("blocks/"))
    assert len(grads) == 2 * matrices
    assert all(np.isfinite(g).all() and np.abs(g[i]).max() > 0 for _, g in grads for i in range(LAYERS))
    dense = jax.tree.map(weights.dense, typed, is_leaf=weights.is_typed)
    np.testing.assert_allclose(logits, logits_of(name, dense, input_ids=ids), **CLOSE)
    assert np.abs(logits - logits_of(name, input_ids=ids)).max() > 0.1  # the update is not nothing


def test_a_size_is_a_name_or_what_stands_behind_it():
    named, said = (models.create("llama", size=size, vocab_size=40) for size in ("tiny", models.family("llama").SIZES["tiny"]))
    assert named.config == said.config and named.config["vocab_size"] == 40


# -- mistakes --------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "family": (dict(name="gpt3"), "unknown model family 'gpt3'; the families are 'gpt2'"),
    "size": (dict(name="gpt2", size="124M"), "gpt2 has no size '124M'; the sizes are '124m'"),
    "size that is a dict": (dict(name="gpt2", size={"n_embed": 3}), "gpt2 has no config field 'n_embed'; the nearest names are 'n_embd'"),
    "field": (dict(name="llama", hidden_sizes=3), "llama has no config field 'hidden_sizes'; the nearest names are 'hidden_size'"),
    "activation": (dict(name="gpt2", size="tiny", activation_function="gelu_now"), "'gelu_now'.*'gelu_new'"),
    "head": (dict(name="gpt2", size="tiny", head="causl_lm"), "unknown head 'causl_lm'; .*'causal_lm'"),
    "kind of layer": (
        dict(name="qwen3", size="tiny", layer_types=["full_attention", "linear_attention"]),
        "has 'linear_attention'; supported",
    ),
    "list of layers": (dict(name="gemma2", size="tiny", layer_types=["full_attention"] * 3), "lists 3 layers, but the model has 2"),
    "list of turns": (dict(name="smollm3", size="tiny", no_rope_layers=[1, 0]), "no_rope_layers lists 2 layers, but the model has 4"),
    "remat": (dict(name="gpt2", size="tiny", remat="dot"), "'dot'.*'dots'"),
    "heads": (dict(name="gpt2", size="tiny", n_embd=66), "a width of 66 does not divide over 4 heads; nearest is 64"),
    "pooling": (dict(name="modernbert", size="tiny", classifier_pooling="max"), "unknown classifier_pooling 'max'; there are 'mean'"),
    "experts": (dict(name="mixtral", size="tiny", num_experts_per_tok=5), "5 experts a token cannot be chosen from 4"),
    "kv heads": (dict(name="llama", size="tiny", num_key_value_heads=3), "4 query heads do not divide over 3 kv heads"),
}


@pytest.mark.parametrize("options, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        models.create(**options)


def test_inputs_that_cannot_be():
    shape = lambda length: jax.ShapeDtypeStruct((1, length), jnp.int32)
    model, params, _ = made("gpt2")
    with pytest.raises(ValueError, match=r"attention_mask .* or segment_ids .* not both"):
        jax.eval_shape(model.apply, params, input_ids=shape(T), attention_mask=shape(T), segment_ids=shape(T))
    with pytest.raises(ValueError, match=r"17 tokens .* 16 learned positions"):
        jax.eval_shape(model.apply, params, input_ids=shape(17))
