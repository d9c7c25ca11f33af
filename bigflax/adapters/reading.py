"""A folder of PEFT's upon the weights of a base."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from bigflax import hub, models, sharding, trees
from bigflax.adapters.modules import CHANGING, CONFIG, PREFIX, SOFT, TENSORS, UNKNOWN, Arrays, Module, modules_of, renamed
from bigflax.models import names
from bigflax.nn import Model
from bigflax.sharding import TABLE, Table, shardings
from bigflax.tensors import Tensor, map_file, read_json
from bigflax.weights import IA3, DoRA, LoRA, Prompted, dense, is_typed


def load_adapter(model: Model, params: Any, source: str, *, table: Table = TABLE) -> Any:
    """`params` with the adapter of a folder or hub id upon them; its parts are float32, and lie by `table` on the mesh of the weights.

    A prompt or a prefix is read onto a model that has one as long: onto what `peft.prompt` or `peft.prefix` makes.
    Raises ValueError, which names the first key that does not fit, for an adapter of another base or of what we do not compute; FileNotFoundError.
    """
    folder = hub.fetch(source)
    said, stored = _open(folder)
    home = models.family(model.family)
    files = {_bare(key, home): _Stored(key, tensor) for key, tensor in stored.items()}
    modules, shapes = modules_of(model)
    weights, read = dict(trees.named_leaves(params, is_typed)), _lora if said["peft_type"] == "LORA" else _ia3
    biases = {module.stem: module.entry.leaves for module in modules}
    soft = files.get("prompt_embeddings") if said["peft_type"] in SOFT else None
    known, made = (set(), {}) if soft is None else ({"prompt_embeddings"}, _soft(said, soft, weights, folder))
    for module in modules:
        whole = {name for name, _ in module.entry.names(shapes)}
        parts = {name for line in module.lines.values() for name, _ in line.names(shapes)} if module.fits else set()
        known |= whole | parts
        if not whole.isdisjoint(files):
            made |= (found := _whole(module.entry, files, weights, shapes))
            weights |= found  # PEFT writes an adapted table beside its adapter
        if not parts.isdisjoint(files):
            if module.tied_to(model, weights):
                raise ValueError(f"{folder!r} adapts {module.stem} and not the head, which in this model is the same table")
            made |= read(module, files, said, weights, shapes, biases.get(f"{module.stem}.bias"))
    if strange := [file.key for name, file in files.items() if name not in known]:
        head = f"{model.family} with head {model.config['head']!r}"
        raise ValueError(f"{folder!r} is an adapter of another base: it has {min(strange)}, and {head} has no matrix of that name")
    if not made:
        raise ValueError(f"{folder!r} holds no tensor of a {said['peft_type']}")
    return _placed(params, made, model.axes, table)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of the adapter's file and the name it has there."""

    key: str
    tensor: Tensor

    @property
    def module(self) -> str:
        return re.sub(r"\.lora_(embedding_)?[AB](\.weight)?$", "", self.key.removeprefix(PREFIX))

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """The array, in float32. Raises ValueError where it has another shape than this base wants, or is of a type that is not read."""
        if self.tensor.shape != shape:
            raise ValueError(f"{self.key} in {self.tensor.file!r} has shape {self.tensor.shape}; this base makes it {shape}")
        return np.asarray(self.tensor[(slice(None),) * len(shape)].view(self.tensor.published), np.float32)


def _open(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a folder."""
    for name in (CONFIG, TENSORS):
        if not os.path.exists(os.path.join(folder, name)):
            pickled = name == TENSORS and "adapter_model.bin" in os.listdir(folder)
            hint = "; its weights are pickled, which PEFT can load and save again" if pickled else ""
            raise FileNotFoundError(f"{folder!r} has no {name}; a folder as PEFT writes it is needed{hint}")
    said = read_json(os.path.join(folder, CONFIG), "peft_type")
    where = os.path.join(folder, CONFIG)
    if said["peft_type"] not in ("LORA", "IA3", *SOFT):
        raise ValueError(f"{where!r} is of type {said['peft_type']!r}; {', '.join(('LORA', 'IA3', *SOFT))} are read")
    if asked := [name for name in UNKNOWN if said.get(name)]:
        raise ValueError(f"{where!r} has {asked[0]} = {said[asked[0]]!r}, which is not supported")
    if CHANGING.fullmatch(str(said.get("init_lora_weights")).lower()):
        how = said["init_lora_weights"]
        raise ValueError(
            f"{where!r} stands on a base that {how!r} has changed; PEFT's save_pretrained(path_initial_model_for_weight_conversion=) undoes it"
        )
    return said, map_file(os.path.join(folder, TENSORS))


def _bare(key: str, home: Any) -> str:
    """A key without PEFT's prefix, and without the family's, which a base that has no head lacks."""
    return renamed(key.removeprefix("base_model.").removeprefix("model.").removeprefix(home.PREFIX).replace(".base_layer.", "."), home)


def _soft(said: dict, file: _Stored, weights: dict, folder: str) -> dict[str, Any]:
    """The leaves of a prompt or of a prefix. PEFT's default for a pair has as many rows again, for the decoder, and never reads them."""
    kind = said["peft_type"]
    name, maker, leaf = ("prompt", "prompt", "embed/tokens") if kind == "PROMPT_TUNING" else ("prefix", "prefix", "prefix/k")
    there = weights.get(leaf) if kind == "PREFIX_TUNING" or isinstance(weights.get(leaf), Prompted) else None
    rows = file.tensor.shape[0]
    P = rows // 2 if kind == "PROMPT_TUNING" and said.get("num_transformer_submodules") == 2 else rows
    if there is None or P != (there.prompt.shape[0] if isinstance(there, Prompted) else there.shape[1]):
        raise ValueError(
            f"{folder!r} is a {name} of {P} tokens, and these params have none as long; peft.{maker}(model, params, {P}) makes such"
        )
    if isinstance(there, Prompted):
        return {leaf: dataclasses.replace(there, prompt=file.read((rows, there.prompt.shape[1]))[:P])}
    L, P, K, H = there.shape
    rows_PL2KH = file.read((P, 2 * L * K * H)).reshape(P, L, 2, K, H)
    return {f"prefix/{part}": rows_PL2KH[:, :, i].swapaxes(0, 1) for i, part in enumerate("kv")}


def _gather(module: Module, what: str, tensors: Arrays, shapes: names.Shapes, rank: int = 1) -> dict[str, np.ndarray]:
    """Our leaves of one of a module's lines, from its tensors."""
    line, ours = module.lines[what], module.shapes(what, shapes, rank)
    return {leaf: line.read(leaf, (slice(None),) * len(ours[leaf]), ours, tensors.__getitem__, np.float32) for leaf in line.leaves}


def _lora(module: Module, files: Mapping[str, _Stored], said: dict, weights: dict, shapes: names.Shapes, _: Any) -> dict[str, Any]:
    rs, dora, layers = bool(said.get("use_rslora")), bool(said.get("use_dora")), len(module.entry.fields)
    root = math.sqrt if rs else float
    tensors, widest, scale, alpha = _padded(module, files, said, root, shapes)
    (near,), far = _gather(module, "near", tensors, shapes, widest).values(), _gather(module, "far", tensors, shapes, widest)
    lengths = module.lengths(weights) if dora else {}
    magnitudes = _vectors(module, "magnitude", files, shapes, lengths) if dora else {}
    axis = {"a": -1, "b": layers}  # of the rank
    reach = {leaf: np.flatnonzero(np.moveaxis(part, axis[module.far], 0).reshape(widest, -1).any(1)) for leaf, part in far.items()}
    made: dict[str, Any] = {}
    for leaf, part in far.items():
        # A part of a joined module has the ranks that reach it, and no adapter where none does; what has not been trained at all has them all.
        ranks = reach[leaf] if len(far) > 1 and any(map(len, reach.values())) else np.arange(widest)
        if dora and not len(ranks) and not np.allclose(magnitudes[leaf], lengths[leaf], rtol=2**-20):
            ranks = np.arange(widest)
        if not len(ranks):
            continue
        cut = {module.near: near.take(ranks, axis[module.near]), module.far: part.take(ranks, axis[module.far])}
        scaled = dict(alpha=alpha if len(ranks) == widest else scale * root(len(ranks)), rs=rs)
        if dora:
            cut["magnitude"] = module.beside(magnitudes[leaf], shapes[leaf], inputs=False)
        made[leaf] = (DoRA if dora else LoRA)(weights[leaf], **cut, **scaled)  # type: ignore[arg-type]
    return made


def _padded(
    module: Module, files: Mapping[str, _Stored], said: dict, root: Callable, shapes: names.Shapes
) -> tuple[Arrays, int, float, float]:
    """A and B of all layers as if they were of one rank and scale, alpha / root(rank): `(tensors, rank, scale, alpha)`."""
    layers, tensors = [], {}
    for (a, _), (b, _) in zip(module.lines["near"].names(shapes), module.lines["far"].names(shapes), strict=True):
        if (a in files) != (b in files):
            raise ValueError(f"{files[a if a in files else b].key} stands alone, and a LoRA has both lora_A and lora_B")
        rank = files[a].tensor.shape[0] if a in files else 0
        layers.append((a, b, rank, _alpha(said, files[a].module) if rank else 0.0))
    widest = max(rank for *_, rank, _ in layers)
    alpha, scale = next((alpha, alpha / root(rank)) for *_, rank, alpha in layers if rank == widest)
    for a, b, rank, its in layers:
        near, far = (module.lines[what].shape(module.shapes(what, shapes, rank)) for what in ("near", "far"))
        A, B = (files[a].read(near), files[b].read(far)) if rank else (np.zeros(near), np.zeros(far))
        ratio = its / root(rank) / scale if rank else 1.0
        tensors[a] = np.pad(A, ((0, widest - rank), (0, 0)))
        tensors[b] = np.pad(B * np.float32(ratio), ((0, 0), (0, widest - rank)))
    return tensors, widest, scale, float(alpha)


def _alpha(said: dict, module: str) -> float:
    patterns = said.get("alpha_pattern") or {}
    return next((alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), said.get("lora_alpha", 8))


def _vectors(module: Module, what: str, files: Mapping[str, _Stored], shapes: names.Shapes, else_: Arrays) -> dict[str, np.ndarray]:
    """Our leaves of one of a module's lines of vectors; layers that the adapter lacks are as `else_` has them."""
    line, ours = module.lines[what], module.shapes(what, shapes)
    size = line.shape(ours)
    tensors = {name: files[name].read(size) if name in files else line.write(at, else_.__getitem__) for name, at in line.names(shapes)}
    return _gather(module, what, tensors, shapes)


def _ia3(module: Module, files: Mapping[str, _Stored], said: dict, weights: dict, shapes: names.Shapes, biases: Any) -> dict[str, Any]:
    outputs = module.lines["scale of outputs"]
    first = next(files[name] for name, _ in outputs.names(shapes) if name in files)
    inputs = first.tensor.shape[0] == 1 and outputs.shape(module.shapes("scale of outputs", shapes))[0] > 1
    what = "scale of inputs" if inputs else "scale of outputs"
    ones = {leaf: np.ones(size, np.float32) for leaf, size in module.shapes(what, shapes).items()}
    scales = _vectors(module, what, files, shapes, ones)
    made: dict[str, Any] = {}
    for i, leaf in enumerate(module.entry.leaves):
        scale = scales[module.lines[what].leaves[0] if inputs else leaf]
        if len(scales) == 1 or (scale != 1).any() or all((other == 1).all() for other in scales.values()):
            bias = weights[biases[i]] if biases and not inputs else None
            made[leaf] = IA3(weights[leaf], module.beside(scale, shapes[leaf], inputs), bias)  # type: ignore[arg-type]
    return made


def _whole(line: names.Entry, files: Mapping[str, _Stored], weights: dict, shapes: names.Shapes) -> dict[str, np.ndarray]:
    """Our leaves of a line of the table itself; layers that the adapter lacks are the base's."""
    base = lambda leaf: sharding.whole(dense(weights[leaf]))
    size = line.shape(shapes)
    tensors = {name: files[name].read(size) if name in files else line.write(at, base) for name, at in line.names(shapes)}
    full = lambda leaf: (slice(None),) * len(shapes[leaf])
    return {leaf: line.read(leaf, full(leaf), shapes, tensors.__getitem__, dense(weights[leaf]).dtype) for leaf in line.leaves}


def _placed(params: Any, made: Mapping[str, Any], axes: Any, table: Table) -> Any:
    """The tree with what was made in its place, its new arrays laid as its axes say on the mesh of the others."""
    laid = [leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(getattr(leaf, "sharding", None), NamedSharding)]

    def put(new: Any, where: Any) -> Any:
        return new if isinstance(new, jax.Array) else jax.make_array_from_callback(new.shape, where, lambda index: new[index])

    def one(name: str, w: Any, text: str) -> Any:
        if name not in made:
            return w
        new = made[name]
        return jax.tree.map(put, new, shardings(new, text, laid[0].mesh, table)) if laid else jax.tree.map(jnp.asarray, new)

    return trees.map_named(one, params, axes, is_leaf=is_typed)
