"""Our own folder of weights: any tree of arrays and typed weights, as it is, and no bit more on disk than its numbers need.

    config.json  tokenizer files ...    as hub.py writes them: family, sizes, head
    weights.json                        of each weight its type, its static fields, and of each part the dtype, the shape and how it is packed
    weights.safetensors                 one tensor a part, by our names: blocks/mlp/up/base/qvalue; several files with an index where they are large

Numbers of few bits stand b bits each, lowest first, in rows of bytes along their last axis: int4, nf4 and mxfp4 two a byte, int2 four, masks eight. Of
integers b is as many bits as the largest of a part needs, so that codes of int3 or int2 that live in an int4, or of int5 in an int8, take three, two and
five. All else has safetensors' own type, and what it has no name for that of unsigned integers of as many bits. A type's parts are what it
gives JAX as a pytree, its static fields the rest of its dataclass, so a type that is registered (weights.typed) is stored without a word here.

Reading cuts each shard out of the mapped file, one leaf after the other; rows of bytes are unpacked as far as a shard reaches.
Left out on purpose: entropy coding, which has no slices; and what is no weight but a moment of training: PRNG keys, and a Perturbed, which belongs to
one batch.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import trees, weights
from bigflax.nn import Model
from bigflax.sharding import Table, shardings, whole
from bigflax.tensors import KINDS, SHARD_BYTES, Item, Tensor, empty, open_tensors, read_json, write_json, write_tensors

RECORD, STEM, FORMAT = "weights.json", "weights", "bigflax weights 1"


# -- bits ------------------------------------------------------------------------------------------------------------------


def pack(a: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [.., ceil(n bits / 8)] of the lowest `bits` of each of the numbers [.., n], of at most a byte: eight numbers are `bits` bytes."""
    *rows, n = a.shape or (1,)
    codes, out = a.view(np.uint8).reshape(math.prod(rows), n), np.empty((math.prod(rows), -(-n * bits // 8)), np.uint8)
    for part in _parts_of(*codes.shape):
        eights = np.pad(codes[part] & np.uint8(2**bits - 1), [(0, 0), (0, -n % 8)]).reshape(-1, -(-n // 8), 8)
        words = functools.reduce(np.bitwise_or, (eights[..., i].astype("<u8") << np.uint64(bits * i) for i in range(8)))
        out[part] = words[..., None].view(np.uint8)[..., :bits].reshape(len(words), -(-n // 8) * bits)[:, : out.shape[1]]
    return out.reshape(*rows, out.shape[1])


def unpack(packed: np.ndarray, bits: int, span: range, dtype: Any) -> np.ndarray:
    """Of each row that `pack` made the numbers of a span; `packed` begins with the group of eight that the span begins in."""
    *rows, there = packed.shape
    begin, eights = span.start % 8, -(-span.stop // 8) - span.start // 8
    packed, out = packed.reshape(math.prod(rows), there), empty((math.prod(rows), len(span)), dtype)
    for part in _parts_of(len(packed), 8 * eights):
        words = np.pad(packed[part], [(0, 0), (0, eights * bits - there)]).reshape(-1, eights, bits)
        words = np.pad(words, [(0, 0), (0, 0), (0, 8 - bits)]).view("<u8")[..., 0]
        codes = np.stack([(words >> np.uint64(bits * i)).astype(np.uint8) & np.uint8(2**bits - 1) for i in range(8)], -1)
        codes = codes.reshape(len(words), 8 * eights)[:, begin : begin + len(span)]
        if _signed(dtype):
            sign = np.uint8(2 ** (bits - 1))
            codes = ((codes ^ sign) - sign).view(np.int8)
        out[part] = np.ascontiguousarray(codes).view(dtype) if jnp.issubdtype(dtype, jnp.floating) else codes.astype(dtype)
    return out.reshape(*rows, len(span))


def _parts_of(rows: int, n: int, most: int = 2**22) -> Iterator[slice]:
    """Rows few enough that what is made of them on the way is small beside a leaf."""
    step = max(1, most // max(n, 1))
    return (slice(i, i + step) for i in range(0, rows, step))


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


def _signed(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.signedinteger)


@jax.jit
def _bounds(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.int16)
    return x.min(), x.max()


def _bits(x: Any) -> int | None:
    """How many bits each number of a part takes, or None where it has a whole type of its own."""
    if x.dtype == bool:
        return 1
    own = round(8 * trees.itemsize(x.dtype))
    if own > 8 or (own == 8 and not _is_integer(x.dtype)):
        return None
    if _is_integer(x.dtype) and x.size:
        low, high = map(int, _bounds(x))
        own = max(1, high.bit_length(), (~low).bit_length() if low < 0 else 0) + _signed(x.dtype)
    return None if own == 8 else own


# -- out -------------------------------------------------------------------------------------------------------------------


def write(folder: str, model: Model, params: Any, *, dtype: Any = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes weights.json and its safetensors; `dtype` casts arrays of floats on the way out, and no part of a typed weight."""
    items: list[Item] = []
    shapes = {name: leaf.shape for name, leaf in trees.named_leaves(model.shapes())}
    for name, w in weights.named_weights(params):
        if weights.shape(w) != shapes[name]:
            raise ValueError(f"{name} has shape {weights.shape(w)}; the model has {shapes[name]} there")
    said = {name: _described(name, w, dtype, items) for name, w in weights.named_weights(params)}
    os.makedirs(folder, exist_ok=True)
    forget(folder)
    first = jax.process_index() == 0
    write_tensors(folder, items, stem=STEM, shard_bytes=shard_bytes, writes=first)
    if first:
        kind = str(jnp.dtype(dtype or model.config["dtype"]))
        write_json(os.path.join(folder, RECORD), {"format": FORMAT, "dtype": kind, "weights": said})


def forget(folder: str) -> None:
    """Removes what a folder's weights.json says, before its files change: it is written last, so a folder that has it is whole."""
    if jax.process_index() == 0 and os.path.exists(path := os.path.join(folder, RECORD)):
        os.remove(path)


def _described(name: str, w: Any, dtype: Any, items: list[Item]) -> dict[str, Any] | None:
    """What weights.json says of a weight or of a part, None of one that is absent; what is to be written joins `items`."""
    if w is None:
        return None
    if weights.is_typed(w):
        if isinstance(w, weights.Perturbed | weights.Paired):
            raise ValueError(f"{name} is a {type(w).__name__}, which belongs to one batch and is not saved; save its base")
        if isinstance(w, weights.Observed):
            raise ValueError(f"{name} is an Observed, which looks at one pass and is not saved; save its base")
        parts = _parts(w)
        static = {f.name: _plain(f"{name}/{f.name}", getattr(w, f.name)) for f in dataclasses.fields(w) if f.name not in parts}
        below = {part: _described(f"{name}/{part}", x, None, items) for part, x in parts.items()}
        return {"type": type(w).__name__, "static": static, "parts": below}
    if not hasattr(w, "dtype") or jax.dtypes.issubdtype(w.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name} is a {getattr(w, 'dtype', type(w).__name__)}, which is no part of a weight and is not saved")
    casts = dtype is not None and jnp.issubdtype(w.dtype, jnp.floating)
    kind, bits = jnp.dtype(dtype) if casts else w.dtype, None if casts else _bits(w)
    said = {"dtype": str(kind), "shape": list(w.shape), **({"bits": bits} if bits else {})}
    stored, size = _stored(said)

    def make() -> np.ndarray:
        a = whole(w).astype(kind, copy=False)
        return pack(a, bits) if bits else np.asarray(a, order="C").view(stored)

    items.append((name, math.prod(size) * stored.itemsize, make))
    return said


def _parts(w: Any) -> dict[str, Any]:
    """The parts of a typed weight by name, those that are absent too."""
    return dict(trees.named_leaves(w, is_leaf=lambda x: x is not w))


def _stored(said: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of the tensor that holds an array."""
    dtype, shape = jnp.dtype(said["dtype"]), tuple(said["shape"])
    if bits := said.get("bits"):
        *rows, n = shape or (1,)
        return np.dtype("uint8"), (*rows, -(-n * bits // 8))
    return (dtype if dtype.name in KINDS.values() else np.dtype(f"u{dtype.itemsize}")), shape


def _plain(name: str, value: Any) -> Any:
    """A static field as JSON has it. Raises ValueError for what JSON could not give back."""
    if isinstance(value, tuple):
        return {"tuple": [_plain(name, one) for one in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.dtype | type):  # JAX's own, jnp.int4, are types
        return {"dtype": jnp.dtype(value).name}
    raise ValueError(f"{name} is a {type(value).__name__}, and a static field that is saved is a number, a string or a dtype")


# -- in --------------------------------------------------------------------------------------------------------------------


def open_record(folder: str) -> dict[str, Any] | None:
    """What a folder's weights.json says, or None where it has none. Raises ValueError for one that is not ours, or of a later version."""
    path = os.path.join(folder, RECORD)
    if not os.path.exists(path):
        return None
    record = read_json(path, "format", "dtype", "weights")
    if record["format"] != FORMAT:
        raise ValueError(f"{path!r} has the format {record['format']!r}, and {FORMAT!r} is read here")
    if not isinstance(record["weights"], dict) or record["dtype"] not in KINDS.values():
        raise ValueError(f"{path!r} is damaged: its dtype is {record['dtype']!r}, its weights are a {type(record['weights']).__name__}")
    return record


def read(
    folder: str, record: dict[str, Any], model: Model, *, dtype: Any, mesh: jax.sharding.Mesh, table: Table, head: bool,
    new: Callable[[str, Any], jax.Array],
) -> Any:  # fmt: skip
    """The weights of a folder, on the mesh by `table`; plain arrays of floats in `dtype`, typed weights in their own.

    With `head` another head than the folder's may be asked for: what the model's has and the folder's lacks is `new(name, sharding)`.
    Raises ValueError, which says what is wrong with which file, FileNotFoundError.
    """
    path, files = os.path.join(folder, RECORD), open_tensors(folder, STEM)
    try:
        there = {name: _like(said) for name, said in record["weights"].items()}
        plans = dict(_arrays(record["weights"]))
        stored = {name: _stored(said) for name, said in plans.items()}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path!r} is damaged: {type(error).__name__} {error}") from None
    for name, (kind, shape) in stored.items():
        if name not in files or (files[name].dtype, files[name].shape) != (kind, shape):
            found = f"{files[name].dtype}{list(files[name].shape)}" if name in files else "nothing"
            raise ValueError(f"{path!r} says that {name} is stored as {kind}{list(shape)}, and its safetensors hold {found}")
    if strange := sorted(files.keys() - stored.keys()):
        raise ValueError(f"{folder!r} holds {strange[0]}, of which {RECORD} says nothing")

    shapes = {name: leaf.shape for name, leaf in trees.named_leaves(model.shapes())}
    of_head = lambda name: head and name.startswith("head/")
    if lost := [name for name in sorted(shapes.keys() ^ there.keys()) if not of_head(name)]:
        raise ValueError(f"{folder!r} and its config differ: {lost[0]} is in one of the two only")
    fits = lambda name: name in there and weights.shape(there[name]) == shapes[name]
    if other := [name for name in shapes if not fits(name) and not of_head(name)]:
        raise ValueError(f"{other[0]} in {path!r} has shape {weights.shape(there[other[0]])}; the config makes it {shapes[other[0]]}")

    floats = lambda like: jnp.issubdtype(like.dtype, jnp.floating)
    cast = lambda like: jax.ShapeDtypeStruct(like.shape, dtype) if not weights.is_typed(like) and floats(like) else like
    likes = trees.map_named(lambda name, leaf: cast(there[name] if fits(name) else leaf), model.shapes())

    def leaf(name: str, like: Any, sharding: Any) -> jax.Array:
        if name in shapes and not fits(name):
            return new(name, sharding)
        cut = lambda index: _slice(files[name], plans[name], index).astype(like.dtype, copy=False)
        made = jax.make_array_from_callback(like.shape, sharding, cut, dtype=like.dtype)
        files[name].forget()
        return made

    return trees.map_named(leaf, likes, shardings(likes, model.axes, mesh, table))


def _like(said: dict[str, Any] | None) -> Any:
    """The weight that is described, of shapes and dtypes alone."""
    if said is None:
        return None
    if "type" not in said:
        return jax.ShapeDtypeStruct(tuple(said["shape"]), jnp.dtype(said["dtype"]))
    types = {cls.__name__: cls for cls in weights.TYPES}
    if said["type"] not in types:
        raise ValueError(f"{RECORD} speaks of a weight of type {said['type']!r}; {trees.did_you_mean(said['type'], types, 'there are')}")
    static = {name: _from_plain(value) for name, value in said["static"].items()}
    return types[said["type"]](**{name: _like(part) for name, part in said["parts"].items()}, **static)


def _from_plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return jnp.dtype(value["dtype"]) if "dtype" in value else tuple(map(_from_plain, value["tuple"]))


def _arrays(said: dict[str, Any], above: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Name and description of every array."""
    found = []
    for name, one in said.items():
        if one is not None:
            found += _arrays(one["parts"], f"{above}{name}/") if "type" in one else [(above + name, one)]
    return found


def _slice(tensor: Tensor, said: dict[str, Any], index: tuple[slice, ...]) -> np.ndarray:
    """That part of an array, a copy: of packed rows only the groups of eight numbers that it reaches into."""
    dtype, bits, shape = jnp.dtype(said["dtype"]), said.get("bits"), tuple(said["shape"])
    if not bits:
        part = tensor[index]
        out = empty(part.shape, part.dtype)
        out[...] = part
        return out.view(dtype)
    *rows, span = [range(n)[s] for s, n in zip(index, shape, strict=True)] or [range(1)]
    groups = slice(span.start // 8 * bits, -(-span.stop // 8) * bits)
    cut = unpack(tensor[(*(slice(row.start, row.stop) for row in rows), groups)], bits, span, dtype)
    return cut if shape else cut.reshape(())
