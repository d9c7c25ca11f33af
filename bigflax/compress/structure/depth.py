"""Fewer layers: the stacks that there are, a model without some of their layers, and which those are to be."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from bigflax import nn, trees
from bigflax.compress.structure.fields import Scores, changed_fields, config_of, field_of, matching, texts_of
from bigflax.weights import is_typed


class Unit(NamedTuple):
    """Layers that stay or go together, a period of a group: the name of its leaves, which of its repeats (None: not stacked), their numbers."""

    group: str
    repeat: int | None
    layers: range


def stacks(model: nn.Model) -> dict[str, list[Unit]]:
    """The stacks of layers, by the name of their leaves. Raises ValueError where there are none."""
    found = getattr(model.module, "places", dict)()
    if not found:
        raise ValueError("this model has no stack of layers, so that none can be left out")
    units = lambda name, first, period, repeats: [
        Unit(name, i if repeats else None, range(first + i * period, first + (i + 1) * period)) for i in range(repeats or 1)
    ]
    return {stack: [unit for group in groups for unit in units(*group)] for stack, groups in found.items()}


def layers(model: nn.Model, params: Any, rules: trees.Rules) -> tuple[Any, dict[str, Any]]:
    """(params with the layers of each stack that its rule lists, in their order; the fields of the config that change with them).

    Any weights: the axis of layers leads all their parts. Raises ValueError for layers that there are not, and where kinds of layer alternate for less than
    whole periods, or for nothing of a group.
    """
    there, texts, rules = stacks(model), texts_of(model), trees.checked(rules)
    matching(rules, there, "stack")
    repeats, fields, lists = {}, {}, {}
    for stack, units in there.items():
        every = [i for unit in units for i in unit.layers]
        listed = trees.match(rules, stack)
        kept = every if listed is None else [i for i in every if isinstance(listed, Iterable) and i in {*listed}]
        if listed is not None and (not isinstance(listed, Iterable) or not kept or len(kept) < len({*listed})):
            raise ValueError(
                f"{stack} has layers 0 to {every[-1]}, and {listed!r} is no list of some of them; best_layers makes one of a number"
            )
        for unit in units:
            inside = {*unit.layers} & {*kept}
            if inside and len(inside) < len(unit.layers):
                raise ValueError(
                    f"layers {unit.layers[0]} to {unit.layers[-1]} of {stack} are a period of several kinds; keep or leave out all of them"
                )
            repeats.setdefault(unit.group, []).extend([unit.repeat] if inside else [])
        for group in {unit.group for unit in units}:
            if not repeats[group]:
                raise ValueError(f"no layer would be left of {group}, and its kind is not that of the others; keep one")
        path = field_of(model, stack, "layers", len(every))
        fields[path] = len(kept)
        config = config_of(model, path)
        lists |= {
            (*path[:-1], name): [value[i] for i in kept]
            for name, value in config.items() if "layer" in name and isinstance(value, list | tuple) and len(value) == len(every)
        }  # fmt: skip

    def cut(name, w):
        group = next((group for group in repeats if name.startswith(f"{group}/")), None)
        if group is None or repeats[group] == [None] or "layers" not in texts[name].stack:
            return w
        return jax.tree.map(lambda part: part[np.array(repeats[group])], w)

    return trees.map_named(cut, params, is_leaf=is_typed), changed_fields(model, {**fields, **lists})


def best_layers(model: nn.Model, scores: Scores, rules: trees.Rules) -> list[tuple[str, list[int]]]:
    """The rules for `layers` that keep as many layers of each stack as these rules say, or such a share: those of the highest scores [L], by periods where
    kinds of layer alternate."""

    def choose(stack, units, drop):
        if stack not in scores:
            raise ValueError(f"there are no scores of {stack}; {trees.did_you_mean(stack, scores, 'there are those of')}")
        value = lambda unit: sum(float(scores[stack][i]) for i in unit.layers)
        gone: list[Unit] = []
        for unit in sorted((unit for unit in units if unit.repeat is not None), key=value):
            size = sum(len(other.layers) for other in gone)
            alone = all(other.group != unit.group or other in gone for other in units if other is not unit)
            if not alone and size + len(unit.layers) <= drop:
                gone.append(unit)
        return gone

    return _choose(model, rules, choose)


def best_run(model: nn.Model, distances: Scores, rules: trees.Rules) -> list[tuple[str, list[int]]]:
    """As `best_layers`, but what goes is one run of layers, that between whose ends the distance is least."""

    def choose(stack, units, drop):
        if stack not in distances:
            raise ValueError(f"there are no distances of {stack}; {trees.did_you_mean(stack, distances, 'there are those of')}")
        runs = []
        for i in range(len(units)):
            for j in range(i + 1, len(units) + 1):
                run = units[i:j]
                group = [unit for unit in units if unit.group == run[0].group]
                if {unit.group for unit in run} == {run[0].group} and run[0].repeat is not None and len(run) < len(group):
                    runs.append(run)
        fitting = [run for run in runs if sum(len(unit.layers) for unit in run) == drop]
        return min(fitting, key=lambda run: float(distances[stack][run[0].layers[0]][run[-1].layers[-1] + 1]), default=[])

    return _choose(model, rules, choose)


def _choose(model, rules, choose) -> list[tuple[str, list[int]]]:
    there, rules, made = stacks(model), trees.checked(rules), []
    matching(rules, there, "stack")
    for stack, units in there.items():
        L, value = sum(len(unit.layers) for unit in units), trees.match(rules, stack)
        if value is None:
            continue
        many = round(value * L) if isinstance(value, float) else value
        gone = choose(stack, units, L - many) if isinstance(many, int) and 0 < many <= L else []
        kept = [i for unit in units if unit not in gone for i in unit.layers]
        if len(kept) != many:
            sizes = {len(unit.layers) for unit in units}
            why = f"periods of {max(sizes)}" if max(sizes) > 1 else "its groups"
            raise ValueError(f"of the {L} layers of {stack}, {value!r} cannot be kept; keep at least one and no part of {why}")
        made.append((re.escape(stack), kept))
    return made
