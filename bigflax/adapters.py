"""PEFT's own folders in and out: adapter_config.json and adapter_model.safetensors. Neither PEFT nor PyTorch is needed.

    params = load_adapter(model, params, "folder")       the adapter's typed weights (weights.py) upon the base's
    save_adapter(model, params, "folder")                PEFT on PyTorch loads it and gives the same outputs

Of a module y = W x (+ bias) with `in` inputs and `out` outputs, a folder holds

    LORA    lora_A [r, in], lora_B [out, r]                     W + B A alpha / r, or alpha / sqrt(r) with `use_rslora`
            lora_embedding_A [r, V], lora_embedding_B [D, r]    the same of a table [V, D]
            lora_magnitude_vector [out]                         DoRA, with `use_dora`
    IA3     ia3_l [out, 1]                                      l y, the bias in it
            ia3_l [1, in]                                       W (l x), of `feedforward_modules`

each module under its name of models/names.py; ranks and alphas that differ stand in `rank_pattern` and `alpha_pattern`. What trains whole beside them, a
head of classes, is written as it is (`modules_to_save`).

One leaf of ours is a module of all layers, or a part of one that the file joins (GPT-2's c_attn, GPT-NeoX's query_key_value, Phi-3's qkv_proj). In: the
layers' ranks are filled up by zeros to the largest, which stay zeros in training, and scales that differ are multiplied into B; joined parts
get one A and their rows of B. Out: parts that still have one A are joined again; others as [A1; A2] and a B of blocks, of the sum of the ranks. Both are exact.

Sources: github.com/huggingface/peft, version 0.21, whose names and fields these are.
Left out on purpose: methods that PEFT has and weights.py has not, experts of mixtures (PEFT's joined experts are no modules), pickled files, and
initializations that change the base (PiSSA, OLoRA), which PEFT itself can convert to plain LoRA.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from bigflax import hub, models, peft, trees
from bigflax.models import names
from bigflax.nn import Model
from bigflax.sharding import TABLE, Table, shardings
from bigflax.sharding import whole as whole_array
from bigflax.weights import IA3, Adapted, Axes, DoRA, LoRA, Prompted, dense, is_typed, parse_axes

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# the head of a model -> what PEFT calls its task
TASKS = {
    "causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS", None: "FEATURE_EXTRACTION", "embedding": "FEATURE_EXTRACTION",
}  # fmt: skip
LANGUAGE = ("causal_lm", "masked_lm", "seq2seq_lm")  # heads that are the base's own
METHODS = {"LoRA": "LORA", "DoRA": "LORA", "IA3": "IA3", "Prompted": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}  # ours -> PEFT's type
SOFT = ("PROMPT_TUNING", "PREFIX_TUNING")
# PEFT's classes of these tasks forget token types: only a prompt, which needs a class, names them.
FORGETFUL = ("QUESTION_ANS", "FEATURE_EXTRACTION")
# Fields of a config that change what its tensors mean, and that weights.py has nothing for.
UNKNOWN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
CHANGING = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")  # values of init_lora_weights that change the base

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Module:
    """A line of a family's table as PEFT sees it: a matrix with one dimension of inputs and one of outputs, and the names of its parts' tensors.

    Of a table of embeddings the rows are the inputs. The letters are those of names.py, and R is the rank.
    """

    entry: names.Entry
    axes: Axes  # of its leaves

    @property
    def stem(self) -> str:
        return self.entry.template.removesuffix(".weight")

    @property
    def table(self) -> bool:
        return self.axes.outputs_first and not self.entry.leaves[0].startswith("head/")

    @property
    def inner(self) -> tuple[str, ...]:
        """The letters of a leaf's dimensions behind those of its layers."""
        return tuple(letter for letter in self.entry.letters if letter != "S")

    @property
    def inputs(self) -> tuple[str, ...]:
        first = len(self.axes.first)
        return self.inner[:first] if self.table or not self.axes.outputs_first else self.inner[first:]

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(letter for letter in self.inner if letter not in self.inputs)

    @property
    def transposed(self) -> bool:
        """Whether the file has inputs first, as transformers' Conv1D does."""
        return not self.table and set(self.entry.groups[0]) <= set(self.inputs)

    @property
    def fits(self) -> bool:
        """Whether it is such a matrix, and a module of its own."""
        sides = [{letter in self.inputs for letter in group} for group in self.entry.groups]
        mixture = "experts" in self.axes.stack or any("/router/" in leaf for leaf in self.entry.leaves)
        return (
            self.entry.template.endswith(".weight")
            and bool(self.axes.first)
            and sorted(sides, key=max) == [{False}, {True}]
            and not mixture
        )

    @property
    def near(self) -> str:
        """Which part of a LoRA is PEFT's A, that which the inputs meet."""
        return "a" if self.inner[: len(self.inputs)] == self.inputs else "b"

    @property
    def far(self) -> str:
        return "b" if self.near == "a" else "a"

    @functools.cached_property
    def lines(self) -> dict[str, names.Entry]:
        """The tensors that PEFT may have of this module, by what each is to us. What meets the inputs is one for all parts."""
        ins, outs = (next(group for group in self.entry.groups if (set(group) <= set(self.inputs)) == side) for side in (True, False))
        ins, outs = f"({' '.join(ins)})", f"({' '.join(outs)})"
        ranked = lambda part, letters: (*letters, "R") if part == "a" else ("R", *letters)
        a, b = (".lora_embedding_A", ".lora_embedding_B") if self.table else (".lora_A.weight", ".lora_B.weight")
        return {
            "near": self._line(a, f"R {ins}", ranked(self.near, self.inputs), True),
            "far": self._line(b, f"{outs} R", ranked(self.far, self.outputs), False),
            "magnitude": self._line(".lora_magnitude_vector", outs, self.outputs, False),
            "scale of outputs": self._line(".ia3_l", f"{outs} 1", self.outputs, False),
            "scale of inputs": self._line(".ia3_l", f"1 {ins}", self.inputs, True),
        }

    def _line(self, suffix: str, theirs: str, ours: Sequence[str], shared: bool) -> names.Entry:
        leaves = self.entry.leaves[:1] if shared else self.entry.leaves
        ours = [*(["S"] if "S" in self.entry.letters and not shared else []), *ours]
        return dataclasses.replace(self.entry, template=self.stem + suffix, leaves=leaves, pattern=f"{theirs} -> {' '.join(ours)}")

    def shapes(self, what: str, shapes: names.Shapes, rank: int = 1) -> names.Shapes:
        """The shapes that our leaves of one of `lines` have."""
        line, k = self.lines[what], len(self.entry.fields)
        sizes = {leaf: {**dict(zip(self.inner, shapes[leaf][k:], strict=True)), "R": rank} for leaf in line.leaves}
        return {leaf: (*shapes[leaf][:k], *(sizes[leaf][letter] for letter in line.letters if letter != "S")) for leaf in line.leaves}

    def beside(self, vector: np.ndarray, full: Sequence[int], inputs: bool) -> np.ndarray:
        """A vector of the inputs or outputs, with axes of size 1 where the leaf, of shape `full`, has its others."""
        k = len(self.entry.fields)
        return vector.reshape(
            *full[:k], *(size if (c in self.inputs) == inputs else 1 for c, size in zip(self.inner, full[k:], strict=True))
        )

    def lengths(self, weights: Mapping[str, Any], but: Any = ()) -> dict[str, np.ndarray]:
        """Of each leaf the norm over the inputs, one a layer and output: the magnitude that changes nothing."""
        k = len(self.entry.fields)
        over = tuple(k + i for i, letter in enumerate(self.inner) if letter in self.inputs)
        length = lambda w: np.sqrt(np.square(whole_array(dense(w)).astype(np.float32)).sum(over))
        return {leaf: length(weights[leaf]) for leaf in self.entry.leaves if leaf not in but}

    def tied_to(self, model: Model, weights: Mapping[str, Any]) -> bool:
        """Whether the table is also the head, which PEFT leaves as it was."""
        return self.table and self.entry.leaves[0].endswith("tokens") and model.config["head"] in LANGUAGE and "head/w" not in weights


def _modules(model: Model, *, prefixed: bool = False) -> tuple[list[Module], names.Shapes]:
    """Every line of the model's table as a module, those that are none (biases, norms) too, and the shapes of our leaves."""
    bare, _ = peft.split(model.shapes())  # a prompt or a prefix is in no table
    model = dataclasses.replace(model, shaped=bare)
    axes, shapes = dict(trees.named_leaves(model.axes)), {name: leaf.shape for name, leaf in trees.named_leaves(bare)}
    home, lines = models.family(model.family), hub.lines(model, prefixed=prefixed)
    lines = [dataclasses.replace(line, template=_renamed(line.template, home)) for line in lines]
    return [Module(line, parse_axes(axes[line.leaves[0]])) for line in lines], shapes


def _renamed(name: str, home: Any) -> str:
    """A name in the file as transformers calls it once it is read, where a family says that it differs: `MODULES`, pairs of a regex and its
    replacement; a weight that ends up in no module of its own is named so that it ends on something else than ".weight"."""
    for pattern, new in getattr(home, "MODULES", ()):
        name = re.sub(pattern, new, name)
    return name


# -- in --------------------------------------------------------------------------------------------------------------------


def load_adapter(model: Model, params: Any, source: str, *, table: Table = TABLE) -> Any:
    """`params` with the adapter of a folder or hub id upon them; its parts are float32, and lie by `table` on the mesh of the weights.

    A prompt or a prefix is read onto a model that has one as long: onto what `peft.prompt` or `peft.prefix` makes.
    Raises ValueError, which names the first key that does not fit, for an adapter of another base or of what we do not compute; FileNotFoundError.
    """
    folder = hub.fetch(source)
    said, stored = _open(folder)
    home = models.family(model.family)
    files = {_bare(key, home): _Stored(key, tensor) for key, tensor in stored.items()}
    modules, shapes = _modules(model)
    weights, read = dict(trees.named_leaves(params, is_typed)), _lora if said["peft_type"] == "LORA" else _ia3
    biases = {module.stem: module.entry.leaves for module in modules}
    soft = files.get("prompt_embeddings") if said["peft_type"] in SOFT else None
    known, made = (set(), {}) if soft is None else ({"prompt_embeddings"}, _soft(said["peft_type"], soft, weights, folder))
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
    tensor: hub.Tensor

    @property
    def module(self) -> str:
        return re.sub(r"\.lora_(embedding_)?[AB](\.weight)?$", "", self.key.removeprefix(PREFIX))

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """The array, in float32. Raises ValueError where it has another shape than this base wants."""
        if self.tensor.shape != shape:
            raise ValueError(f"{self.key} in {self.tensor.file!r} has shape {self.tensor.shape}; this base makes it {shape}")
        return np.asarray(self.tensor[(slice(None),) * len(shape)], np.float32)


def _open(folder: str) -> tuple[dict[str, Any], dict[str, hub.Tensor]]:
    """The config and the tensors of a folder."""
    for name in (CONFIG, TENSORS):
        if not os.path.exists(os.path.join(folder, name)):
            pickled = name == TENSORS and "adapter_model.bin" in os.listdir(folder)
            hint = "; its weights are pickled, which PEFT can load and save again" if pickled else ""
            raise FileNotFoundError(f"{folder!r} has no {name}; a folder as PEFT writes it is needed{hint}")
    said = hub.read_json(os.path.join(folder, CONFIG), "peft_type")
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
    return said, hub.map_file(os.path.join(folder, TENSORS))


def _bare(key: str, home: Any) -> str:
    """A key without PEFT's prefix, and without the family's, which a base that has no head lacks."""
    return _renamed(key.removeprefix("base_model.").removeprefix("model.").removeprefix(home.PREFIX).replace(".base_layer.", "."), home)


def _soft(kind: str, file: _Stored, weights: dict, folder: str) -> dict[str, Any]:
    """The leaves of a prompt or of a prefix."""
    name, maker, leaf = ("prompt", "prompt", "embed/tokens") if kind == "PROMPT_TUNING" else ("prefix", "prefix", "prefix/k")
    there = weights.get(leaf) if kind == "PREFIX_TUNING" or isinstance(weights.get(leaf), Prompted) else None
    P = file.tensor.shape[0]
    if there is None or P != (there.prompt.shape[0] if isinstance(there, Prompted) else there.shape[1]):
        raise ValueError(
            f"{folder!r} is a {name} of {P} tokens, and these params have none as long; peft.{maker}(model, params, {P}) makes such"
        )
    if isinstance(there, Prompted):
        return {leaf: dataclasses.replace(there, prompt=file.read(there.prompt.shape))}
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
    base = lambda leaf: whole_array(dense(weights[leaf]))
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


# -- out -------------------------------------------------------------------------------------------------------------------


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
    modules, shapes = _modules(model, prefixed=prefixed)
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
            made = {name: module.entry.write(at, lambda leaf: whole_array(dense(leaves[leaf]))) for name, at in own.items()}
            kept |= {name.rpartition(".")[0] for name in own}
        else:
            continue
        tensors |= {begin + name: a for name, a in made.items()}
    ours = {name.rpartition(".")[0] for module in modules for name, _ in module.entry.names(shapes)}
    others = {_renamed(template, home).rpartition(".")[0] for _, table in home.HEADS.values() for template in table}
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
    hub.write_file(os.path.join(folder, CONFIG), json.dumps(said, indent=2, sort_keys=True) + "\n")


def _write_soft(model: Model, leaves: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensor and the fields of a prompt or a prefix."""
    groups = model.module.groups
    common = {"num_layers": sum(group.layers for group in groups), "num_transformer_submodules": 1}
    if "prefix/k" not in leaves:
        prompt = whole_array(leaves["embed/tokens"].prompt).astype(np.float32)
        said = {"num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1], "num_attention_heads": groups[0].blocks[0].attention.heads}
        return {"prompt_embeddings": prompt}, common | said
    rows_PL2KH = np.stack([whole_array(leaves[f"prefix/{part}"]).astype(np.float32).swapaxes(0, 1) for part in "kv"], axis=2)
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
    scale, near = next(iter(scales.values())), [whole_array(getattr(w, module.near)).astype(np.float32) for w in there.values()]
    one = all(np.array_equal(part, near[0]) for part in near)
    joined = near[0] if one else np.concatenate(near, near_axis)
    rank, begin = joined.shape[near_axis], 0
    far = {leaf: np.zeros(size, np.float32) for leaf, size in module.shapes("far", shapes, rank).items()}
    for leaf, w in there.items():
        part = np.moveaxis(whole_array(getattr(w, module.far)) * np.float32(scales[leaf] / scale), far_axis, 0)
        np.moveaxis(far[leaf], far_axis, 0)[begin : begin + len(part)] = part
        begin += 0 if one else len(part)
    tensors = _scatter(module, "near", {module.entry.leaves[0]: joined}, shapes) | _scatter(module, "far", far, shapes)
    if isinstance(first, DoRA):
        flat = module.shapes("magnitude", shapes)
        magnitudes = {leaf: whole_array(w.magnitude).astype(np.float32).reshape(flat[leaf]) for leaf, w in there.items()}
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
            scales[leaf] = whole_array(w.scale).astype(np.float32)
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
