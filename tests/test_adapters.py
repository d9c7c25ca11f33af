"""PEFT's folders: what is written is read again, what cannot be is refused; and where PEFT is installed, it and we give the same outputs."""

import dataclasses
import json
import warnings as python_warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, VOCAB, inputs, load_tensors, torch_model
from safetensors.numpy import save_file

import bigflax
from bigflax import models, peft, trees, weights
from bigflax.sharding import make_mesh

KEY = jax.random.key(0)
ATTENTION, ALL = "blocks/attention/(q|v)", "blocks/(attention|mlp)/[a-z]+"
# family -> head, rules of the matrices that are adapted: those of a whole module, of a part of a joined one, the head's own table
SITES = {
    "llama": ("causal_lm", f"{ALL}|head/w"), "gpt2": ("causal_lm", ATTENTION), "gpt_neox": ("causal_lm", ALL), "phi3": ("causal_lm", ALL),
    "bert": ("sequence_classification", ATTENTION), "gemma2": ("causal_lm", "blocks_?./?./attention/q"),
}  # fmt: skip


def create(family, head, **more):
    fields = {**FAMILIES[family], **more}
    said = {key: fields[key] for key in fields if key in models.fields(models.family(family).build)}
    model = models.create(family, **said, vocab_size=VOCAB, head=head)
    return model, jax.jit(model.init)(KEY)


def stirred(params):
    """Every part of an adapter, a prefix and a head as if it had trained."""

    def one(name, w):
        begins = name.startswith(("head/scores", "prefix/"))
        if not isinstance(w, weights.Adapted):
            return w + 0.3 * jax.random.normal(jax.random.fold_in(KEY, len(name)), w.shape) if begins else w
        made = {}
        for i, (part, x) in enumerate(weights.parts(w).items()):
            drawn = x + 0.3 * jax.random.normal(jax.random.fold_in(KEY, len(name) + 31 * i), x.shape)
            made[part] = jnp.abs(drawn) if part == "magnitude" else x if part == "bias" else drawn
        return dataclasses.replace(w, **made)

    return trees.map_named(one, params, is_leaf=weights.is_typed)
