"""What stands upon the weights of a base as a folder of PEFT's."""

import collections
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigflax import models, sharding, trees
from bigflax.adapters.modules import (
    CONFIG,
    FORGETFUL,
    LANGUAGE,
    METHODS,
    PREFIX,
    SOFT,
    TASKS,
    TENSORS,
    Arrays,
    Module,
    modules_of,
    renamed,
)
from bigflax.models import names
from bigflax.nn import Model
from bigflax.tensors import write_json
from bigflax.weights import IA3, Adapted, DoRA, LoRA, dense, is_typed


def save_adapter(model: Model, params: Any, folder: str, *, whole: Sequence[str] | None = None) -> None:
    """Writes the adapters of `params`, all of one kind, as a folder for PEFT; the base is not in it.

    `whole` are patterns of the leaves that are written as they are (PEFT's `modules_to_save`), by default the head where it is one of classes.
    Raises ValueError for what PEFT cannot express.
    """
    if not model.family:
        raise ValueError("only a model of models.create or hub.load knows the names that others read; this one is of no family")
    leaves = dict(trees.named_leaves(params, is_typed))
    found = {type(w).__name__ for w in leaves.values() if isinstance(w, Adapted)} | {name.partition("/")[0] for name in leaves} & {"prefix"}
    if len(found) != 1 or not found <= METHODS.keys():
        there = ", ".join(sorted(found)) or "no adapter"
        raise ValueError(f"PEFT's folder holds one of {', '.join(METHODS)}, and these weights have {there}")
    (method,), (head, home) = found, (model.config["head"], models.family(model.family))
    whole = ([] if head in (*LANGUAGE, None) else ["head/.*"]) if whole is None else whole
    is_whole = lambda leaf: any(re.fullmatch(pattern, leaf) for pattern in whole)
    prefixed = home.HEADS[head][0] != home.HEADS[None][0]  # a model without a head is written without a prefix too
    modules, shapes = modules_of(model, prefixed=prefixed)
    biases = {module.stem: module.entry.leaves for module in modules}
    rs = all(w.rs for w in leaves.values() if isinstance(w, LoRA | DoRA))
    begin, (tensors, said) = ("base_model.", _write_soft(model, leaves)) if METHODS[method] in SOFT else (PREFIX, ({}, {}))
    settings, kept = {}, set()
    for module in modules:
        own = dict(module.entry.names(shapes))
        if any(isinstance(leaves[leaf], LoRA | DoRA | IA3) for leaf in module.entry.leaves):
            _check(model, module, leaves)
            bias = biases.get(f"{module.stem}.bias")
            made, setting = _write_ia3(module, leaves, shapes, bias) if method == "IA3" else _write_lora(module, leaves, shapes, rs)
            settings |= dict.fromkeys((name.removesuffix(".weight") for name in own), (setting, module.transposed))
        elif any(map(is_whole, module.entry.leaves)):
            made = {name: module.entry.write(at, lambda leaf: sharding.whole(dense(leaves[leaf]))) for name, at in own.items()}
            kept |= {name.rpartition(".")[0] for name in own}
        else:
            continue
        tensors |= {begin + name: a for name, a in made.items()}
    ours = {name.rpartition(".")[0] for module in modules for name, _ in module.entry.names(shapes)}
    others = {renamed(template, home).rpartition(".")[0] for _, table in home.HEADS.values() for template in table}
    others = others if prefixed else {name.removeprefix(home.PREFIX) for name in others}
    said |= {"peft_type": METHODS[method], "inference_mode": True, "base_model_name_or_path": model.source}
    said |= {"task_type": _task(model, method, all(is_whole(leaf) for leaf in leaves if leaf.startswith("head/")))}
    said |= {"modules_to_save": _roots(kept, ours) or None} | (_targets(settings, ours | others, method, rs) if settings else {})
    if jax.process_index() == 0:
        _write(folder, tensors, said)


def _task(model: Model, method: str, scored: bool) -> str | None:
    """What PEFT calls a head's task, whose class reads text and takes its scores to be in the folder. Raises ValueError for a prompt without one."""
    head, soft = model.config["head"], METHODS[method] in SOFT
    task = TASKS.get(head) if all(name.endswith("input_ids") for name in model.module.example()) else None
    if soft and not (task and (scored or head in LANGUAGE)):
        raise ValueError(
            f"PEFT puts no prompt or prefix before a model with head {head!r}" + ("" if scored else " that is not written whole")
        )
    return task if soft or (task not in FORGETFUL and (scored or head in LANGUAGE)) else None


def _write(folder: str, tensors: dict[str, np.ndarray], said: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, TENSORS)
    save_file(tensors, path + ".tmp", metadata={"format": "pt"})
    os.replace(path + ".tmp", path)
    write_json(os.path.join(folder, CONFIG), said)


def _write_soft(model: Model, leaves: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensor and the fields of a prompt or a prefix."""
    groups = getattr(model.module, "encoder", model.module).groups
    common = {"num_layers": sum(group.layers for group in groups), "num_transformer_submodules": 1}
    if "prefix/k" not in leaves:
        prompt = sharding.whole(leaves["embed/tokens"].prompt).astype(np.float32)
        said = {"num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1], "num_attention_heads": groups[0].blocks[0].attention.heads}
        return {"prompt_embeddings": prompt}, common | said
    rows_PL2KH = np.stack([sharding.whole(leaves[f"prefix/{part}"]).astype(np.float32).swapaxes(0, 1) for part in "kv"], axis=2)
    P, _, _, K, H = rows_PL2KH.shape
    said = common | {"num_virtual_tokens": P, "token_dim": K * H, "num_attention_heads": K, "prefix_projection": False}
    return {"prompt_embeddings": rows_PL2KH.reshape(P, -1)}, said


def _check(model: Model, module: Module, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError for what stands in a module's place and has no counterpart in PEFT."""
    name = next(leaf for leaf in module.entry.leaves if isinstance(leaves[leaf], Adapted))
    kind = type(leaves[name]).__name__
    if not module.fits or (module.table and kind != "LoRA"):
        raise ValueError(f"PEFT has no {kind} for {name}, which is no layer's matrix with a module of its own; merge it or take it off")
    if module.tied_to(model, leaves):
        raise ValueError(f"{name} is the head too, where PEFT's {kind} would not reach it; merge it or take it off")
    if any(isinstance(leaves[leaf].base, Adapted) for leaf in module.entry.leaves if isinstance(leaves[leaf], Adapted)):
        raise ValueError(f"{name} has an adapter upon another, and a folder holds one; merge the first")


def _write_lora(
    module: Module, leaves: Mapping[str, Any], shapes: names.Shapes, rs: bool
) -> tuple[dict[str, np.ndarray], tuple[int, float]]:
    """A module's tensors, and its rank and alpha."""
    near_axis, far_axis = (-1 if part == "a" else len(module.entry.fields) for part in (module.near, module.far))  # of the rank
    there = {leaf: leaves[leaf] for leaf in module.entry.leaves if isinstance(leaves[leaf], Adapted)}
    first, scales = next(iter(there.values())), {leaf: getattr(w, "direction", w).scale for leaf, w in there.items()}
    scale, near = next(iter(scales.values())), [sharding.whole(getattr(w, module.near)).astype(np.float32) for w in there.values()]
    one = all(np.array_equal(part, near[0]) for part in near)
    joined = near[0] if one else np.concatenate(near, near_axis)
    rank, begin = joined.shape[near_axis], 0
    far = {leaf: np.zeros(size, np.float32) for leaf, size in module.shapes("far", shapes, rank).items()}
    for leaf, w in there.items():
        part = np.moveaxis(sharding.whole(getattr(w, module.far)) * np.float32(scales[leaf] / scale), far_axis, 0)
        np.moveaxis(far[leaf], far_axis, 0)[begin : begin + len(part)] = part
        begin += 0 if one else len(part)
    tensors = _scatter(module, "near", {module.entry.leaves[0]: joined}, shapes) | _scatter(module, "far", far, shapes)
    if isinstance(first, DoRA):
        flat = module.shapes("magnitude", shapes)
        magnitudes = {leaf: sharding.whole(w.magnitude).astype(np.float32).reshape(flat[leaf]) for leaf, w in there.items()}
        tensors |= _scatter(module, "magnitude", module.lengths(leaves, but=there) | magnitudes, shapes)
    same = rank == first.a.shape[-1] and first.rs == rs
    return tensors, (rank, first.alpha if same else scale * (math.sqrt(rank) if rs else rank))


def _write_ia3(module: Module, leaves: Mapping[str, Any], shapes: names.Shapes, biases: Any) -> tuple[dict[str, np.ndarray], bool]:
    """A module's tensors, and whether they scale its inputs."""
    k, scales, sides = len(module.entry.fields), {}, set()
    for leaf in module.entry.leaves:
        w = leaves[leaf]
        if isinstance(w, IA3):
            sides.add(any(size > 1 for size, letter in zip(w.scale.shape[k:], module.inner, strict=True) if letter in module.inputs))
            scales[leaf] = sharding.whole(w.scale).astype(np.float32)
            if biases and w.bias is None and sides == {False}:
                raise ValueError(f"PEFT's IA3 scales the bias of {leaf} too, and this one does not know it: weights.ia3(bias=)")
    inputs = sides == {True}
    what = "scale of inputs" if inputs else "scale of outputs"
    flat = module.shapes(what, shapes)
    parts = [*scales.values()]
    if len(sides) > 1 or (inputs and (len(parts) < len(module.entry.leaves) or any((part != parts[0]).any() for part in parts))):
        raise ValueError(
            f"{', '.join(module.entry.leaves)} are one module in the file, whose inputs have one scale, and these have several"
        )
    ones = {leaf: np.ones(size, np.float32) for leaf, size in flat.items()}
    return _scatter(module, what, ones | {leaf: part.reshape(flat[leaf]) for leaf, part in scales.items() if leaf in flat}, shapes), inputs


def _scatter(module: Module, what: str, ours: Arrays, shapes: names.Shapes) -> dict[str, np.ndarray]:
    """The tensors of one of a module's lines, from our leaves."""
    line = module.lines[what]
    return {name: line.write(at, ours.__getitem__) for name, at in line.names(shapes)}


def _targets(settings: Mapping[str, tuple], modules: set[str], method: str, rs: bool) -> dict[str, Any]:
    """What a config says of the modules that have an adapter."""
    short = {name: setting for name, (setting, _) in _shortened(settings, modules).items()}
    common = {"fan_in_fan_out": any(transposed for _, transposed in settings.values())}
    if method == "IA3":
        return common | {"target_modules": sorted(short), "feedforward_modules": sorted(name for name, inputs in short.items() if inputs)}
    most = [collections.Counter(values).most_common(1)[0][0] for values in zip(*short.values(), strict=True)]
    other = [{name: setting[i] for name, setting in short.items() if setting[i] != most[i]} for i in (0, 1)]
    return common | {
        "target_modules": sorted(short), "r": most[0], "lora_alpha": most[1], "rank_pattern": other[0], "alpha_pattern": other[1],
        "use_rslora": rs, "use_dora": method == "DoRA", "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True,
    }  # fmt: skip


def _shortened(settings: Mapping[str, tuple], modules: set[str]) -> dict[str, tuple]:
    """The settings of modules, by the shortest ends of their names that mean them alone among all `modules`: "q_proj" for those of all layers."""
    short = {}
    for name, setting in settings.items():
        parts = name.split(".")
        for i in reversed(range(len(parts))):
            if parts[i].isdigit():
                continue
            end = ".".join(parts[i:])
            if end in short or {settings.get(other) for other in modules if other == end or other.endswith(f".{end}")} == {setting}:
                short[end] = setting
                break
    return short


def _roots(kept: set[str], modules: set[str]) -> list[str]:
    """The fewest modules below which are all those that are kept, and no others."""
    roots = set()
    for name in kept:
        parts = name.split(".")
        above = (".".join(parts[: i + 1]) for i in range(len(parts)))
        roots.add(next(root for root in above if {m for m in modules if f"{m}.".startswith(f"{root}.")} <= kept))
    return sorted(roots)
