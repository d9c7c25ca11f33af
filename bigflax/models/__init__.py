"""Models made from nothing: `create("llama", size="tiny", hidden_size=128)`.

A family is one file in `families/`: `build(**config)` composes modules, and `SIZES` names its published sizes and a `tiny` one.
"""

import dataclasses
import importlib
import inspect
from typing import Any

from bigflax import nn, trees

FAMILIES = (
    "bart", "bert", "distilbert", "electra", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mt5", "olmo2", "opt",
    "phi3", "qwen2", "qwen3", "roberta", "t5", "whisper", "xlm-roberta",
)  # fmt: skip


def family(name: str) -> Any:
    """The module of a family. Raises ValueError that lists the families."""
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}; {trees.did_you_mean(name, FAMILIES, 'the families are')}")
    return importlib.import_module(f"bigflax.models.families.{name.replace('-', '_')}")


def create(name: str, *, size: str | None = None, **config: Any) -> nn.Model:
    """A model of a family: `size` fills the config, `config` (the family's Hugging Face field names) overrides it."""
    home = family(name)
    if size is not None and size not in home.SIZES:
        raise ValueError(f"{name} has no size {size!r}; {trees.did_you_mean(size, home.SIZES, 'the sizes are')}")
    known = inspect.signature(home.build).parameters
    for key in config:
        if key not in known:
            raise ValueError(f"{name} has no config field {key!r}; {trees.did_you_mean(key, known)}")
    config = {name: p.default for name, p in known.items()} | (home.SIZES[size] if size else {}) | config
    module = home.build(**config)
    return dataclasses.replace(nn.model(module, **module.example()), family=name, config=config)
