"""Layers and widths of a teacher by the names of its axes: shapes are the smaller model's, typed weights keep their parts together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import models, trees, weights
from bigflax.compress import students

FAMILIES = {  # family, the config of the teacher, fields of the student, layers, sizes of axes
    "bert": ("bert", {}, dict(num_hidden_layers=1), [1], {}),
    "llama": (
        "llama",
        dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48, hidden_size=32),
        dict(num_hidden_layers=1, hidden_size=24, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1),
        2,
        {"embed": 24, "mlp": 16, "heads": 2, "kv_heads": 1},
    ),
    "gemma3_text": ("gemma3_text", {}, dict(intermediate_size=16), [0], {"mlp": 16}),
    "vit": ("vit", dict(num_hidden_layers=4), dict(num_hidden_layers=2), 2, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shapes_are_those_of_the_smaller_model(name):
    family, config, small, keep, sizes = FAMILIES[name]
    teacher, student = models.create(family, size="tiny", **config), models.create(family, size="tiny", **{**config, **small})
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), teacher.shapes())
    layers = {"num_hidden_layers"} & small.keys()
    if layers:
        params = students.every_layer(params, teacher.axes, keep)
    params = students.sliced(params, teacher.axes, sizes)
    shapes = lambda tree: {name: leaf.shape for name, leaf in trees.named_leaves(tree)}
    assert shapes(params) == shapes(student.shapes())


def test_what_is_kept_is_what_was_there():
    """A stack of three layers, one quantized and one adapted weight: the layers in the order asked for, of each part."""
    axes = {"up": "layers | embed -> mlp", "down": "layers | mlp -> embed", "norm": "layers | norm", "table": "vocab <- embed"}
    draw = lambda i, *shape: jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)
    plain = {"up": draw(0, 3, 8, 16), "down": draw(1, 3, 16, 8), "norm": draw(2, 3, 8), "table": draw(3, 5, 8)}
    typed = {
        **plain,
        "up": weights.lora(weights.quantize(plain["up"], axes=axes["up"]), 2, axes=axes["up"], rng=jax.random.key(0)),
        "down": weights.rotated(plain["down"], jax.random.key(1), axes=axes["down"]),
    }
    for params in (plain, typed):
        taken = jax.jit(lambda params: students.every_layer(params, axes, [2, 0]))(params)
        for name in ("up", "down", "norm"):
            jax.tree.map(lambda part, of: np.testing.assert_array_equal(part, of[np.array([2, 0])]), taken[name], params[name])
            assert weights.shape(taken[name]) == (2, *weights.shape(params[name])[1:])
        np.testing.assert_array_equal(taken["table"], params["table"])
    some = students.every_layer(plain, axes, 2, of="up")
    assert some["up"].shape == (2, 8, 16) and some["down"].shape == (3, 16, 8)


def test_one_choice_of_a_width_holds_everywhere():
    """Channels of an mlp that are chosen at random: what goes in and out of each stays together, so a permutation changes nothing."""
    axes = {"up": "embed -> mlp", "bias": "mlp", "down": "mlp -> embed", "norm": "norm", "pool": "embed -> _"}
    draw = lambda i, *shape: jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)
    params = {"up": draw(0, 6, 10), "bias": draw(1, 10), "down": draw(2, 10, 6), "norm": draw(3, 6), "pool": draw(4, 6, 6)}
    run = lambda p, x: jnp.tanh((jax.nn.relu((x * p["norm"]) @ p["up"] + p["bias"]) @ p["down"]) @ p["pool"])
    x = draw(5, 2, 6)
    order = np.random.default_rng(6).permutation(10)
    np.testing.assert_allclose(run(students.sliced(params, axes, {"mlp": order}), x), run(params, x), rtol=1e-5)
    turn = np.random.default_rng(7).permutation(6)
    np.testing.assert_allclose(run(students.sliced(params, axes, {"embed": turn}), x[:, turn]), run(params, x)[:, turn], rtol=1e-5)
    cut = students.sliced(params, axes, {"mlp": 4}, rng=jax.random.key(0))
    at = [int(np.argmin(np.abs(params["bias"] - b))) for b in cut["bias"]]
    assert at == sorted(set(at)) and at != [0, 1, 2, 3]
    np.testing.assert_array_equal(cut["down"], params["down"][np.array(at)])
    first = students.sliced(params, axes, {"embed": 4})
    assert {name: w.shape for name, w in first.items()} == {"up": (4, 10), "bias": (10,), "down": (10, 4), "norm": (4,), "pool": (4, 4)}


AXES = {"blocks": {"up": "layers | embed -> mlp"}, "table": "vocab <- embed"}
PARAMS = {"blocks": {"up": np.zeros((3, 4, 6))}, "table": np.zeros((5, 4))}
TYPED = {**PARAMS, "table": weights.quantize(jnp.ones((5, 4)), axes=AXES["table"])}
MISTAKES = {
    "a layer": (lambda: students.every_layer(PARAMS, AXES, [0, 3]), r"of 'blocks/up' the layers \[0, 3\] cannot be kept; it has 0 to 2"),
    "no layer": (lambda: students.every_layer(PARAMS, AXES, []), "cannot be kept"),
    "no stack": (lambda: students.every_layer(PARAMS, AXES, 2, of="block/.*"), "is a stack of layers; stacks are 'blocks/up'"),
    "an axis": (lambda: students.sliced(PARAMS, AXES, {"mpl": 2}), "no weight has an axis 'mpl' to cut; the axes are 'mlp'"),
    "too many": (lambda: students.sliced(PARAMS, AXES, {"mlp": 7}), "axis 'mlp' has 6 entries, 0 to 5; 7 of it cannot be kept"),
    "an entry": (lambda: students.sliced(PARAMS, AXES, {"mlp": [0, 6]}), "axis 'mlp' has 6 entries"),
    "two lengths": (
        lambda: students.sliced({**PARAMS, "table": np.zeros((5, 3))}, AXES, {"embed": 2}),
        "axis 'embed' is 3 and 4 long; cut the towers one by one",
    ),
    "a typed weight": (
        lambda: students.sliced(TYPED, AXES, {"embed": 2}),
        "'table' is a typed weight, which cannot be cut along its width",
    ),
}


@pytest.mark.parametrize("call, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
