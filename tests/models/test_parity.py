"""Every family and head beside PyTorch: the same numbers out, the same step, the same file back.

For each row of FAMILIES and each head: a tiny random model of transformers is saved, loaded here, and compared on logits and all hidden
states; both train one step of SGD on one batch and are compared weight by weight; and what `save` writes is bit for bit what was loaded.
Needs the `parity` extra; without it tests/models/test_golden.py holds each family to stored outputs.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, HEADS, OURS_ALONE, VARIANTS, VOCAB, inputs, kinds, labels_for, load_tensors, masked, outputs, torch_model

import bigflax
from bigflax import models, tasks, trees, weights
from bigflax.generate import generate

torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install 'bigflax[parity]'")
transformers = pytest.importorskip("transformers")

CASES = [(family, head) for family in FAMILIES if family not in OURS_ALONE for head in models.family(family).HEADS]
KINDS = ("padded right", "longest")
MORE = [(name, head) for name, (head, _) in VARIANTS.items()]
INPUTS = [(family, head, kind) for family, head in CASES for kind in kinds(family)] + [(*case, kind) for case in MORE for kind in KINDS]
each_case = pytest.mark.parametrize("family, head", CASES, ids=str)
CLOSE = 1e-4  # of the largest entry: float32 through two or three layers, summed in another order


def near(ours, theirs, what=""):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape, what
    worst, size = np.abs(ours - theirs).max(initial=0), np.abs(theirs).max(initial=0)
    assert worst <= CLOSE * max(size, 1e-3), f"{what}: {worst} of {size}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(PyTorch model, its folder) by family and head."""

    @functools.cache
    def make(family, head):
        folder = tmp_path_factory.mktemp(f"{family}-{head}")
        model = torch_model(family, head)
        model.save_pretrained(folder)
        return model, str(folder)

    return make


def both(family, head, saved, **given):
    theirs, folder = saved(family, head)
    if head == "embedding":
        given = {name: x for name, x in given.items() if not name.startswith("decoder")}
    with torch.no_grad():
        at = {"position_ids": given["position_ids"] + 1} if "position_ids" in given and "roberta" in family else {}  # rows; padding's is 0
        want = theirs(**{name: torch.from_numpy(np.asarray(x)) for name, x in (given | at).items()}, output_hidden_states=True)
    want = dict(want)
    for tower in {"text", "vision"} & {name.removesuffix("_model_output") for name in want}:
        want[f"{tower}_hidden_states"] = want[f"{tower}_model_output"].hidden_states
    model, params = bigflax.load(folder, **({"head": "embedding"} if head == "embedding" else {}))
    got = jax.jit(functools.partial(model.apply, hidden_states=True))(params, **given)
    return got, want


@pytest.mark.parametrize("family, head, kind", INPUTS, ids=str)
def test_outputs(family, head, kind, saved):
    given, reals = inputs(family, kind)
    got, want = both(family, head, saved, **given)
    compared = [name for name in outputs(got) if want.get(name) is not None]
    assert any(name.endswith("hidden_states") for name in compared) and (len(compared) > 1 or head in (None, "embedding"))
    for name in compared:
        ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (got[name], want[name]))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            near(masked(a, reals), masked(b, reals), f"{name} {i}")
    if head == "embedding":
        h, m = want["last_hidden_state"].numpy(), reals[0][..., None]
        mean = (h * m).sum(1) / m.sum(1)
        near(got["sentence_embedding"], mean / np.linalg.norm(mean, axis=-1, keepdims=True))


QUICK = ("bert", "gpt2", "llama", "t5", "vit")  # the rest in the slow run
MAPPED = [family for family in FAMILIES if family not in {*OURS_ALONE, "convnext", "mobilenet_v2", "resnet"}]


@pytest.mark.parametrize("family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in MAPPED])
def test_attention_maps(family, saved):
    """Of every layer and, of pairs and towers, of every kind: the rows of real tokens."""
    head = None if (family, None) in CASES else next(head for name, head in CASES if name == family)
    theirs, folder = saved(family, head)
    theirs = copy.deepcopy(theirs)
    theirs.set_attn_implementation("eager")
    given, reals = inputs(family, "padded right" if "padded right" in kinds(family) else "plain")
    with torch.no_grad():
        want = dict(theirs(**{name: torch.from_numpy(np.asarray(x)) for name, x in given.items()}, output_attentions=True))
    for tower in {"text", "vision"} & {name.removesuffix("_model_output") for name in want}:
        want[f"{tower}_attentions"] = want[f"{tower}_model_output"].attentions
    model, params = bigflax.load(folder)
    got = jax.jit(functools.partial(model.apply, attentions=True))(params, **given)
    names = {name for name in got if name.endswith("attentions")}
    assert names and names == {name for name, x in want.items() if name.endswith("attentions") and x}
    for name in names:
        for i, (a, b) in enumerate(zip(got[name], want[name], strict=True)):
            assert a.dtype == jnp.float32
            rows = lambda x: masked(np.moveaxis(np.asarray(x), 1, 2), reals)
            near(rows(a), rows(b), f"{name} {i}")


@each_case
def test_one_step(family, head, saved, tmp_path):
    """SGD at rate 0.1 on squares of the outputs against random targets."""
    if head == "embedding":
        pytest.skip("no output of transformers to train on")
    theirs, folder = saved(family, head)
    given, _ = inputs(family, "plain")
    model, params = bigflax.load(folder)
    out = jax.eval_shape(model.apply, params, **given)
    targets = labels_for(out)

    def loss(kept, rest):
        out = model.apply(trees.combine(kept, rest), **given)
        return sum(jnp.mean((out[name] - target) ** 2) for name, target in targets.items())

    kept, rest = trees.partition(params, weights.trainable(params, model.axes))
    kept = jax.jit(lambda kept, rest: jax.tree.map(lambda w, g: w - 0.1 * g, kept, jax.grad(loss)(kept, rest)))(kept, rest)
    params = trees.combine(kept, rest)
    want = theirs(**{name: torch.from_numpy(np.asarray(x)) for name, x in given.items()})
    theirs.zero_grad()
    sum(((want[name] - torch.from_numpy(target)) ** 2).mean() for name, target in targets.items()).backward()
    stepped = copy.deepcopy(theirs)
    with torch.no_grad():
        for w, before in zip(stepped.parameters(), theirs.parameters(), strict=True):
            w -= 0.1 * (0 if before.grad is None else before.grad)
    stepped.save_pretrained(tmp_path / "theirs")
    bigflax.save(model, params, str(tmp_path / "ours"))
    want, got = load_tensors(tmp_path / "theirs"), load_tensors(tmp_path / "ours")
    assert got.keys() == want.keys()
    for name, w in want.items():
        near(got[name], w, name)


def test_dynamic_rotation_beyond_the_trained_length(tmp_path):
    """A model that has read nothing yet: PyTorch's keeps the frequencies of the longest row so far."""
    config = transformers.LlamaConfig(**VARIANTS["llama, dynamic"][1] | dict(max_position_embeddings=5, vocab_size=VOCAB))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    given, reals = inputs("llama", "padded right")
    with torch.no_grad():
        want = transformers.LlamaForCausalLM.from_pretrained(tmp_path)(**{name: torch.from_numpy(x) for name, x in given.items()}).logits
    model, params = bigflax.load(str(tmp_path))
    near(masked(model.apply(params, **given)["logits"], reals), masked(want, reals))


@pytest.mark.parametrize("family, head", CASES + MORE, ids=str)
def test_saved_again_it_is_the_same_file(family, head, saved, tmp_path):
    theirs, folder = saved(family, head)
    if head == "embedding":
        pytest.skip("the pooler is left behind on purpose")
    model, params = bigflax.load(folder)
    bigflax.save(model, params, str(tmp_path))
    want, got = load_tensors(folder), load_tensors(tmp_path)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    back = type(theirs).from_pretrained(tmp_path)
    for name, w in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], w), name


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if "pixel_values" in inputs(family)[0] and "input_ids" in inputs(family)[0]]
)
def test_the_loss_of_pairs(family, saved):
    """Its value and the gradients of the learned scale and bias."""
    theirs, folder = saved(family, None)
    given, _ = inputs(family, "padded right")
    want = theirs(**{name: torch.from_numpy(x) for name, x in given.items()}, return_loss=True).loss
    theirs.zero_grad()
    want.backward()
    model, params = bigflax.load(folder)
    loss, grads = jax.value_and_grad(lambda params: tasks.contrastive(model)(params, given)[0].value)(params)
    near(loss, want.item())
    for name in {"logit_scale", "logit_bias"} & params.keys():
        near(grads[name], getattr(theirs, name).grad.numpy().reshape(()), name)


@pytest.mark.parametrize("family", ["bart", "mt5", "t5", "whisper"])
def test_greedy_decoding(family, saved):
    """From the start token, and from a prompt, over rows whose sources are padded."""
    theirs, folder = saved(family, "seq2seq_lm")
    given, _ = inputs(family, "padded right")
    read = {name: x for name, x in given.items() if not name.startswith("decoder") and name != "position_ids"}
    model, params = bigflax.load(folder)
    prompt = given["decoder_input_ids"][:, :3]
    prompt[:, 0] = model.module.start  # else transformers puts it there
    # Whisper's own generate is of half-minute windows and timestamps; below it lies the one of all models
    run = functools.partial(
        transformers.GenerationMixin.generate, theirs, do_sample=False, num_beams=1, max_new_tokens=8, forced_eos_token_id=None
    )
    run = functools.partial(run, eos_token_id=None, suppress_tokens=None, begin_suppress_tokens=None)
    for start, options in ((1, {}), (3, {"decoder_input_ids": prompt})):
        want = run(**{name: torch.from_numpy(np.asarray(x)) for name, x in (read | options).items()})[:, start:]
        got = generate(model, params, **read, **options, max_new_tokens=8, temperature=0)
        np.testing.assert_array_equal(got, want.numpy())


def test_every_head_is_compared():
    assert {head for _, head in CASES} >= set(HEADS)
