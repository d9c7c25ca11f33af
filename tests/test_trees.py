"""Leaf names, rules, partition, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigflax import trees, weights

TREE = {"blocks": {"mlp": {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}, "norm": jnp.ones(2)}, "head": (jnp.zeros(4, jnp.int8),)}


def test_names_are_paths():
    assert [n for n, _ in trees.named_leaves(TREE)] == ["blocks/mlp/down", "blocks/mlp/up", "blocks/norm", "head/0"]
    lora = {"q": weights.LoRA(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)))}
    assert [n for n, _ in trees.named_leaves(lora)] == ["q/base", "q/a", "q/b"]


RULES = {
    "first match wins": ([("blocks/mlp/up", 1), ("blocks/.*", 2), (".*", 3)], [2, 1, 2, 3]),
    "no match is the default": ([("head/0", 1)], [0, 0, 0, 1]),
    "the whole name must match": ([("blocks/mlp/.*", 1), (".*", 0)], [1, 1, 0, 0]),
}


@pytest.mark.parametrize("rules, want", RULES.values(), ids=RULES)
def test_rules(rules, want):
    assert jax.tree.leaves(trees.apply_rules(rules, TREE, default=0)) == want


@pytest.mark.parametrize("pattern", ["blocks/mpl/up", "up", "blocks"])
def test_a_rule_that_matches_nothing_names_the_nearest(pattern):
    with pytest.raises(ValueError, match=f"rule '{pattern}' matches no weight.*'blocks/"):
        trees.apply_rules([(pattern, True)], TREE)


def test_partition_and_combine_are_inverse():
    typed = {**TREE, "q": weights.lora(weights.quantize(jnp.ones((4, 4)), axes="i -> o"), 2, axes="i -> o", rng=jax.random.key(0))}
    keep = weights.trainable(typed)
    kept, rest = trees.partition(typed, keep)
    assert {n for n, _ in trees.named_leaves(kept)} == {"blocks/mlp/up", "blocks/mlp/down", "blocks/norm", "q/a", "q/b"}
    back = trees.combine(kept, rest)
    assert jax.tree.structure(back) == jax.tree.structure(typed)
    jax.tree.map(np.testing.assert_array_equal, back, typed)


def test_sizes_count_half_bytes():
    tree = {
        "a": jax.ShapeDtypeStruct((3, 4), jnp.float32),
        "b": jax.ShapeDtypeStruct((8,), jnp.int4),
        "c": jax.ShapeDtypeStruct((8,), jnp.bfloat16),
    }
    assert (trees.count(tree), trees.nbytes(tree)) == (28, 48 + 4 + 16)


HUMAN = {
    (999, "", 1000): "999",
    (1234567, "", 1000): "1.23M",
    (1234567, "B", 1024): "1.18MiB",
    (0.5, "s", 1000): "0.5s",
    (12e12, "", 1000): "12T",
}


@pytest.mark.parametrize("args", HUMAN)
def test_human(args):
    assert trees.human(*args) == HUMAN[args]


def test_summary_names_every_weight_and_the_total():
    lines = trees.summary({"w": jnp.ones((2, 3))}, {"w": "embed -> mlp"}).splitlines()
    assert lines[1].split() == ["w", "2x3", "float32", "embed", "->", "mlp", "6", "24B"]
    assert lines[-1].split()[:2] == ["total", "6"]
