"""Folders of models in and out, Hugging Face's and our own: config.json, sharded safetensors, tokenizer files. PyTorch is not needed.

    model, params = load("meta-llama/Llama-3.1-8B", mesh=mesh)       a folder, or a hub id (then through huggingface_hub and its cache)
    save(model, params, "out")                                       transformers loads it unchanged

Typed weights (int4, LoRA ...) are saved as they are, as a folder of our own (packed.py), which `load` reads too; transformers cannot.

Every leaf is made on the mesh shard by shard from the slices of the file that it consists of (models/names.py), one leaf after the other:
no device and no host ever holds a second copy of more than one leaf. A config that says something we do not compute is refused, not guessed
(models/published.py).

Left out on purpose: pickled weights (`pytorch_model.bin` can run code; convert it once with transformers), and remote code.
"""

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import models, packed, trees
from bigflax.models import names, published
from bigflax.nn import Model
from bigflax.sharding import TABLE, Table, make_mesh, shardings, whole
from bigflax.tensors import SHARD_BYTES, Item, Tensor, open_tensors, read_json, write_json, write_tensors
from bigflax.weights import dense, is_typed

TOKENIZER_FILES = (
    r"(tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template)\.(json|txt|jinja|model)|merges\.txt|.*\.model|spiece\..*"
)
CARRIED = r"(generation|preprocessor|processor)_config\.json"  # what else of a loaded folder stays true


# -- in --------------------------------------------------------------------------------------------------------------------


def load(
    source: str, *, head: str | None = "", dtype: Any = None, mesh: jax.sharding.Mesh | None = None, table: Table = TABLE, **changes: Any
) -> tuple[Model, Any]:
    """`(model, params)` of a folder or hub id.

    `head` names another head than the folder's (models/heads.py; None: no head); one whose weights are not in the folder is made new, and
    so are the scores of a head that is asked for with another `num_labels`. `dtype` is that of weights and computation, by default the stored
    one; integers stay integers, and typed weights what they are. With a `mesh` the weights lie on it by `table`. `changes` are further arguments
    of the family: `remat="full"`.
    Raises ValueError, which says what is wrong with which file, FileNotFoundError.
    """
    folder = fetch(source)
    family, config = describe(folder, head)
    own, files = packed.open_record(folder), {}
    if own is None:
        files = open_tensors(folder)
        largest = max(files.values(), key=lambda tensor: math.prod(tensor.shape), default=None)
        stored = jax.dtypes.canonicalize_dtype("float32" if largest is None else largest.published)
    else:
        stored = own["dtype"]
    dtype = jnp.dtype(dtype or stored)
    model = models.create(family, **{**config, "dtype": str(dtype), **changes})
    model = dataclasses.replace(model, source=folder)
    mesh, fresh, relabelled = mesh or make_mesh(devices=jax.devices()[:1]), head != "", "num_labels" in changes
    if own is not None:
        new = lambda name, sharding: _new(model, name, dtype, sharding)
        return model, packed.read(folder, own, model, dtype=dtype, mesh=mesh, table=table, head=fresh or relabelled, new=new)
    where = shardings(model.shapes(), model.axes, mesh, table)
    return model, _read(model, files, dtype, where, folder, fresh=fresh, relabelled=relabelled)


def describe(source: str, head: str | None = "") -> tuple[str, dict[str, Any]]:
    """The family of a folder or hub id, and what its files say of the arguments of `models.create`; `head` as for `load`."""
    folder = fetch(source)
    said = read_config(folder)
    family, config = published.understand(said, folder)
    home = models.family(family)
    config["head"] = published.head_of(said, home) if head == "" else head
    if hasattr(home, "settle"):  # what the files say and the config does not
        own = packed.open_record(folder)
        config |= home.settle(config, open_tensors(folder) if own is None else _names(home, own["weights"]))
    return family, config


def _names(home: Any, there: Container[str]) -> set[str]:
    """Of the published names of a family's heads those whose leaves are all there."""
    table = {name: line for _, lines in home.HEADS.values() for name, line in lines.items()}
    return {name for name, (leaves, _) in table.items() if all(leaf in there for leaf in leaves.split())}


def fetch(source: str) -> str:
    """The local folder of `source`: itself, or that of a hub id in huggingface_hub's cache. Raises FileNotFoundError, in one sentence."""
    if os.path.isdir(source):
        return source
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise FileNotFoundError(f"there is no folder {source!r}, and a hub id is written owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{source!r} is neither a folder here nor to be had from the hub ({first})") from None


def read_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{folder!r} has no config.json; a folder as transformers writes it is needed")
    return read_json(path)


def lines(model: Model, *, prefixed: bool = False) -> list[names.Entry]:
    """The lines of the table that this model's leaves need, in the file's order; base names bear their prefix only where asked for."""
    home = models.family(model.family)
    prefix = home.PREFIX if prefixed else ""
    strip = lambda name: prefix + name.removeprefix(home.PREFIX) if name.startswith(home.PREFIX) else name
    base = home.names(model.config) if hasattr(home, "names") else home.NAMES
    table = {prefix + name: line for name, line in base.items()}
    table |= {strip(name): line for name, line in home.HEADS[model.config["head"]][1].items()}
    there = {name for name, _ in trees.named_leaves(model.shapes())}
    wanted = [entry for entry in names.entries(table, model.module.places()) if there.issuperset(entry.leaves)]
    missing = there.difference(*(entry.leaves for entry in wanted))
    if missing:
        raise ValueError(
            f"{model.family} has no published name for {', '.join(sorted(missing))}: it cannot be read or written as {model.family}"
        )
    return wanted


def _read(model: Model, files: Mapping[str, Tensor], dtype: Any, where: Any, folder: str, *, fresh: bool, relabelled: bool) -> Any:
    home = models.family(model.family)
    files = {name.removeprefix(home.PREFIX): tensor for name, tensor in files.items()}
    shapes = {name: leaf.shape for name, leaf in trees.named_leaves(model.shapes())}
    kinds = {name: leaf.dtype if _counts(leaf) else dtype for name, leaf in trees.named_leaves(model.shapes())}
    owner, expected = {}, {}
    for entry in lines(model):
        owner |= dict.fromkeys(entry.leaves, entry)
        expected |= {name: (entry, entry.shape(shapes)) for name, _ in entry.names(shapes)}
    other = lambda name: relabelled and expected[name][0].leaves[0].startswith("head/") and files[name].shape != expected[name][1]
    absent = {name for name in expected if name not in files or other(name)}
    new = {leaf for name in absent for leaf in expected[name][0].leaves}
    if new and not ((fresh or relabelled) and all(leaf.startswith("head/") for leaf in new)):
        raise ValueError(f"{folder!r} lacks {_list(absent)}, which its config asks for")
    tied = [] if any(leaf == "head/w" for leaf in shapes) else [r"(lm_head|embed_out)\.weight"]
    heads = [re.escape(name.removeprefix(home.PREFIX)) for _, table in home.HEADS.values() for name in table] if fresh else []
    unused = getattr(home, "UNUSED", {}).get(model.config["head"], ())
    known = re.compile("|".join([*home.BUFFERS, *unused, *tied, *heads]) or r"(?!)")
    if strange := [name for name in files if name not in expected and not known.fullmatch(name)]:
        raise ValueError(f"{folder!r} holds {_list(strange)}, which {model.family} with its config does not have")
    for name, (entry, shape) in expected.items():
        if name not in absent and files[name].shape != shape:
            raise ValueError(f"{name} in {files[name].file!r} has shape {files[name].shape}; the config makes it {shape}")
        if name not in absent and jnp.issubdtype(files[name].published, jnp.integer) != jnp.issubdtype(kinds[entry.leaves[0]], jnp.integer):
            raise ValueError(
                f"{name} in {files[name].file!r} is stored as {files[name].dtype}; the model has {kinds[entry.leaves[0]]} there"
            )

    def leaf(name: str, sharding: Any) -> jax.Array:
        if name in new:
            return _new(model, name, kinds[name], sharding)
        read = lambda index: owner[name].read(name, index, shapes, files.__getitem__, kinds[name], lambda tensor: files[tensor].forget())
        return jax.make_array_from_callback(shapes[name], sharding, read, dtype=kinds[name])

    return trees.map_named(leaf, where)


def _new(model: Model, name: str, dtype: Any, sharding: Any) -> jax.Array:
    """A leaf that no folder holds."""
    made = lambda rng: dict(trees.named_leaves(model.init(rng)))[name].astype(dtype)
    return jax.jit(made, out_shardings=sharding)(jax.random.key(0))


def _counts(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.integer)


def _list(items: Any) -> str:
    items = sorted(items)
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


# -- out -------------------------------------------------------------------------------------------------------------------


def save(
    model: Model, params: Any, folder: str, *, dtype: Any = None, merge: bool = False, tokenizer: Any = None, labels: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Writes config.json, safetensors of at most `shard_bytes` each with their index, and tokenizer files.

    Typed weights (LoRA, int4 ...) are written as the arrays they stand for with `merge`; without, all is written as it is, as a folder of our own
    (packed.py), which `load` reads and transformers does not. `dtype` casts on the way out, the parts of typed weights aside.
    `tokenizer` is a folder to take the files from, or a `data.Tokenizer`; by default they come from where the model was loaded, as do the
    configs of generation and preprocessing. `labels` are the names of a head's classes.
    """
    if not model.family:
        raise ValueError("only a model of models.create or hub.load knows the names that others read; this one is of no family")
    leaves, like = dict(trees.named_leaves(params, is_typed)), dict(trees.named_leaves(model.shapes()))
    if leaves.keys() != like.keys():
        raise ValueError(f"these are not the weights of this model: {_list(leaves.keys() ^ like.keys())} is in one of the two only")
    own = not merge and any(map(is_typed, leaves.values()))
    written = _config(model, dtype, labels)
    first = jax.process_index() == 0
    if own:
        packed.write(folder, model, params, dtype=dtype, shard_bytes=shard_bytes)
    else:
        items = _items(model, leaves, {name: leaf.shape for name, leaf in like.items()}, dtype)
        os.makedirs(folder, exist_ok=True)
        packed.forget(folder)
        write_tensors(folder, items, shard_bytes=shard_bytes, writes=first)
    if not first:
        return
    write_json(os.path.join(folder, "config.json"), written)
    _copy(CARRIED, model.source, folder)
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        _copy(TOKENIZER_FILES, tokenizer or model.source, folder)
    else:
        tokenizer.save(folder)


def _items(model: Model, leaves: Mapping[str, Any], shapes: names.Shapes, dtype: Any) -> list[Item]:
    """The tensors of a published folder, each of them made from the leaves that it holds."""
    home, host = models.family(model.family), _OneLeaf(leaves, dtype)
    base = home.HEADS[model.config["head"]][0] == home.HEADS[None][0]  # a model without a head is written without a prefix too
    kinds = {name: _written(jax.eval_shape(dense, w).dtype, dtype) for name, w in leaves.items()}
    size = lambda entry: math.prod(entry.shape(shapes)) * kinds[entry.leaves[0]].itemsize
    make = lambda entry, at: lambda: entry.write(at, host)
    return [(name, size(entry), make(entry, at)) for entry in lines(model, prefixed=not base) for name, at in entry.names(shapes)]


class _OneLeaf:
    """`leaf(name) -> numpy array`, holding the few leaves of the last table line alone."""

    def __init__(self, leaves: Mapping[str, Any], dtype: Any, most: int = 3):
        self.leaves, self.dtype, self.most, self.held = leaves, dtype, most, {}

    def __call__(self, name: str) -> np.ndarray:
        if name not in self.held:
            while len(self.held) >= self.most:
                self.held.pop(next(iter(self.held)))
            a = whole(dense(self.leaves[name]))
            self.held[name] = a.astype(_written(a.dtype, self.dtype), copy=False)
        return self.held[name]


def _written(stored: Any, dtype: Any) -> np.dtype:
    """What a leaf is written as: integers as PyTorch's 64 bits, all else as `dtype`, where one was asked for."""
    return np.dtype("int64") if jnp.issubdtype(stored, jnp.integer) else jnp.dtype(dtype or stored)


def _config(model: Model, dtype: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """The config.json: that which was loaded, or the family's fields, with the architecture of the head."""
    home = models.family(model.family)
    fields = {key: value for key, value in model.config.items() if key not in published.OURS}
    for derived in getattr(home, "DERIVED", ()):  # transformers derives it where it is left out, and takes null for no
        if fields.get(derived, 0) is None:
            del fields[derived]
    said = read_config(model.source) if model.source else {}
    if "rope_parameters" in said:  # as it was, if what was loaded still holds
        fields = {k: v for k, v in fields.items() if not k.startswith("rope_") and k != "partial_rotary_factor"}
    for part in getattr(home, "PARTS", {}):
        said.pop(f"{part}_dict", None)
        fields[part] = {**(said.get(part) or {}), **fields[part]}
    labels = model.config.get("num_labels")
    taken = models.fields(home.build).get("num_labels")  # for granted, where a config says nothing
    if names and len(names) != labels:
        raise ValueError(f"{len(names)} names of classes are not for this head of {labels}")
    if labels is not None and (names or labels != (len(said.get("id2label") or ()) or taken)):
        names = names or [f"LABEL_{i}" for i in range(labels)]
        fields |= {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}
    stored = {} if dtype is None else {"dtype": str(jnp.dtype(dtype))}
    return {**said, **fields, **stored, "model_type": model.family, "architectures": [home.HEADS[model.config["head"]][0]]}


def _copy(pattern: str, source: Any, folder: str) -> None:
    """The files of `source`, where there is one, whose whole names match."""
    if source is None or os.path.abspath(source) == os.path.abspath(folder):
        return
    for name in sorted(os.listdir(source)):
        if re.fullmatch(pattern, name):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
