"""Models made from nothing: `create("llama", size="tiny", hidden_size=128)`.

A family is one file in `families/`: `build(**config)` composes modules, and `SIZES` names its published sizes and a `tiny` one. Where a
config holds others, `PARTS` maps the name of each (`text_config`) to the function whose arguments are its fields.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bigflax import nn, trees, weights

FAMILIES = (
    "albert", "bart", "bert", "clip", "cnn", "convnext", "deit", "dinov2", "dinov2_with_registers", "distilbert", "electra", "gemma", "gemma2",
    "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "mobilenet_v2", "modernbert", "mt5", "olmo2", "opt", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "resnet", "rnn", "roberta", "siglip", "smollm3", "t5", "vit", "whisper", "xlm-roberta",
)  # fmt: skip


def family(name: str) -> Any:
    """The module of a family. Raises ValueError that lists the families."""
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}; {trees.did_you_mean(name, FAMILIES, 'the families are')}")
    return importlib.import_module(f"bigflax.models.families.{name.replace('-', '_')}")


def create(name: str, *, size: str | Mapping[str, Any] | None = None, **config: Any) -> nn.Model:
    """A model of a family: `size`, the name of one or a dict as SIZES holds, fills the config, and `config` overrides it; both bear the
    family's Hugging Face field names."""
    home = family(name)
    if isinstance(size, str) and size not in home.SIZES:
        raise ValueError(f"{name} has no size {size!r}; {trees.did_you_mean(size, home.SIZES, 'the sizes are')}")
    chosen = home.SIZES[size] if isinstance(size, str) else size or {}
    whole = _over(fields(home.build), chosen, config, name)
    for part, build in getattr(home, "PARTS", {}).items():
        whole[part] = _over(part_fields(build), chosen.get(part, {}), config.get(part) or {}, name, f"{part}.")
    module = home.build(**whole)
    return dataclasses.replace(nn.model(module, **module.example()), family=name, config=whole)


def resized(model: nn.Model, params: Any, changes: Mapping[str, Any]) -> nn.Model:
    """The model of the config with these changes, whose weights `params` are: what compress/structure/ cuts. Where it was loaded from stays, so that
    `hub.save` writes the tokenizer's files too. Raises ValueError where it would have other weights."""
    if not model.family:
        raise ValueError("only a model of models.create or hub.load has a config to be resized by; this one is of no family")
    made = dataclasses.replace(create(model.family, **{**model.config, **changes}), source=model.source)
    ours, theirs = ({name: weights.shape(w) for name, w in weights.named_weights(tree)} for tree in (made.shapes(), params))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{model.family} with {dict(changes)} has {name} of shape {ours.get(name)}, and these weights have {theirs.get(name)}"
            )
    return made


def fields(build: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a family's `build` and their defaults."""
    return {name: p.default for name, p in inspect.signature(build).parameters.items()}


def part_fields(build: Callable[..., Any]) -> dict[str, Any]:
    """The fields of a config inside of another, and their defaults; how to compute is said once, outside."""
    return {name: default for name, default in fields(build).items() if name not in ("dtype", "remat", "unroll")}


def _over(known: dict[str, Any], chosen: Mapping[str, Any], config: Mapping[str, Any], name: str, path: str = "") -> dict[str, Any]:
    for key in (*chosen, *config):
        if key not in known:
            raise ValueError(f"{name} has no config field {path + key!r}; {trees.did_you_mean(key, known)}")
    return {**known, **chosen, **config}
