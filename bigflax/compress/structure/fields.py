"""Names of leaves, sizes of axes, and the fields of a config that say them: what narrowing and leaving out layers share."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bigflax import nn, trees
from bigflax.weights import parse_axes

Scores = Mapping[str, Any]  # {place: array [*stack, size]}, or of layers {stack: [L]}

# axis -> what a config may call its size, whose {side} is where the leaf lies: "encoder", "text" ...
FIELDS = {
    "layers": "{side}_layers num_{side}_layers num_hidden_layers n_layer n_layers num_layers",
    "mlp": "{side}_ffn_dim moe_intermediate_size shared_expert_intermediate_size intermediate_size d_ff n_inner ffn_dim hidden_dim",
    "heads": "{side}_attention_heads num_attention_heads n_head n_heads num_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim d_kv",
}


def texts_of(model: nn.Model) -> dict[str, Any]:
    """The axes of each leaf, by its name."""
    return {name: parse_axes(text) for name, text in trees.named_leaves(model.axes)}


def module_of(name: str) -> str:
    """The name of the module that a leaf, or a module, lies in."""
    return name.rpartition("/")[0]


def read_axis(axis: str) -> str:
    """The axis that a matrix sums over where this one ends."""
    return "mlp" if axis == "mlp" else "heads"


def matching(rules: list[tuple[str, Any]], names: Iterable[str], what: str) -> None:
    """Raises ValueError for a rule that none of the names matches."""
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"rule {pattern!r} matches no {what}; {trees.did_you_mean(pattern, names, 'there are')}")


def config_of(model: nn.Model, path: tuple[str, ...]) -> Mapping[str, Any]:
    """The config, or that inside of it, in which a field lies."""
    return model.config if len(path) == 1 else model.config[path[0]]


def has_field(model: nn.Model, at: str, axis: str) -> bool:
    """Whether the config may say the size of an axis of this leaf."""
    config, side = _part(model, at)
    return any(name.format(side=side) in config for name in FIELDS[axis].split())


def _part(model: nn.Model, at: str) -> tuple[Mapping[str, Any], str]:
    """(the config, or that inside of it, which says the sizes of this leaf; the leaf's side)."""
    side = at.partition("/")[0]
    return model.config.get(f"{side}_config", model.config), side


def field_of(model: nn.Model, at: str, axis: str, size: int) -> tuple[str, ...]:
    """The field of the config that says the size of an axis of this leaf, or would. Raises ValueError where none does."""
    config, side = _part(model, at)
    names = [name.format(side=side) for name in FIELDS[axis].split()]
    found = next((name for name in names if name in config and config[name] in (size, None)), None)
    if found is None:
        raise ValueError(
            f"no field of {model.family or 'this model'}'s config says that {at} has {size} of {axis!r}, so they cannot be fewer"
        )
    return (found,) if config is model.config else (f"{side}_config", found)


def changed_fields(model: nn.Model, fields: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The fields that are not as they were; those inside of a config with all of it."""
    changes: dict[str, Any] = {}
    for path, value in fields.items():
        if config_of(model, path)[path[-1]] != value:
            home = changes if len(path) == 1 else changes.setdefault(path[0], dict(model.config[path[0]]))
            home[path[-1]] = value
    return changes
