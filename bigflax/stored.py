"""How a checkpoint lies on disk, apart from its arrays: which folders are complete, the record, and what is stored for a leaf.

    120/params/    the leaves whose names begin with "params/", as a flat dict of leaf name -> array
    120/rest/      all others: step, optimizer, frozen weights ...
    120/record/    record.json: data position, meta (config), metrics, versions, mesh; shape and dtype of each leaf; a CRC of all that
                   checksums.0.json ...: the share of each process in the checksum of each leaf

A step is written under another name and renamed when complete. Typed PRNG keys are stored as their data, 2- and 4-bit numbers in one
byte each, and of arrays without elements the record alone.
Left out on purpose: the arrays' own files and everything that runs in the background, which are in checkpoint.py.
"""

import errno
import functools
import importlib.metadata
import json
import platform
import shutil
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import trees
from bigflax.checksum import checksum

TEMPORARY = ".orbax-checkpoint-tmp"
_PACKAGES = ("bigflax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def open_path(folder: Any) -> Any:
    from etils import epath  # local folders and gs:// alike

    return epath.Path(folder) if "://" in str(folder) else epath.Path(folder).expanduser().absolute()


def names(folder: Any) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def _mark(place: Any) -> Any:
    """The file that a complete step has. A folder is renamed when complete; an object store cannot, there Orbax writes a mark last."""
    return place / "commit_success.txt" if "://" in str(place) else place / "record" / "record.json"


def steps(folder: Any) -> list[int]:
    return sorted(int(name) for name in names(folder) if name.isdigit() and _mark(folder / name).exists())


def discard(place: Any) -> None:
    """Deletes a step, which is incomplete by name or mark before its first file goes."""
    if "://" in str(place):
        _mark(place).unlink()
    else:
        place = place.rename(place.parent / f"{place.name}{TEMPORARY}-deleted")
    place.rmtree()


class NoRoom(OSError):
    """Seen before the first byte is written."""


def require_room(folder: Any, leaves: dict[str, jax.Array]) -> None:
    """Local disks say how much room they have; what they deny later (a quota, another writer) fails in the background."""
    if "://" not in str(folder):
        need, free = trees.nbytes(leaves), shutil.disk_usage(folder).free
        if need > free:
            raise NoRoom(f"it needs {trees.human(need, 'B', 1024)} and the disk has {trees.human(free, 'B', 1024)} left, free some space")


def write_record(folder: Any, record: dict) -> None:
    record = json.loads(json.dumps(record))  # as it will be read: tuples are lists
    (folder / "record.json").write_text(json.dumps({**record, "crc32": zlib.crc32(_canonical(record))}, indent=1))


def read_record(place: Any) -> dict:
    record = json.loads((place / "record" / "record.json").read_text())
    if record.pop("crc32", None) != zlib.crc32(_canonical(record)):
        raise ValueError("record.json does not match its checksum")
    return record


def _canonical(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def require_json(record: dict) -> None:
    for part in ("data", "meta"):
        try:
            json.dumps(record[part])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{part} of a checkpoint must be JSON (numbers, strings, lists, dicts with string keys): {error}") from None


def reason(error: BaseException) -> tuple[int, str]:
    """An errno and a clause for what went wrong; errors of the storage layer carry it in their text only."""
    known = {
        errno.ENOSPC: ("No space left", "the disk is full, free some space or choose another folder"),
        errno.EDQUOT: ("quota exceeded", "the disk quota is used up, free some space or choose another folder"),
        errno.EROFS: ("Read-only file system", "the folder is read-only, choose another"),
        errno.EACCES: ("Permission denied", "this user may not write there, choose another folder"),
    }
    if isinstance(error, NoRoom):
        return errno.ENOSPC, str(error)
    text = " ".join(str(error).split()) or type(error).__name__
    for number, (mark, clause) in known.items():
        if getattr(error, "errno", None) == number or mark in text:
            return number, clause
    return errno.EIO, text[:200]


@functools.cache  # reading them takes 80 ms, half of what a save would hold up
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


# -- leaves ---------------------------------------------------------------------------------------------------------------


class Mismatch(ValueError):
    """The target is not shaped like the checkpoint."""


def is_param(name: str) -> bool:
    return name.split("/", 1)[0] == "params"


def _is_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _codes(dtype: Any) -> str | None:
    """For numbers of less than a byte, the unsigned integers of their bits."""
    bits = round(8 * trees.itemsize(dtype))
    return f"uint{bits}" if bits < 8 else None


def encode_all(state: Any) -> dict[str, jax.Array]:
    """Name -> the array that goes to disk. Arrays without elements have nothing to store."""
    stored = {}
    for name, leaf in trees.named_leaves(state):
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"leaf {name!r} of the state is a {type(leaf).__name__}, not a jax.Array; plain values go to meta=")
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise ValueError(f"leaf {name!r} lives on one process only; place the whole state on one mesh over all processes")
        if name in stored:
            raise ValueError(f"two leaves of the state are named {name!r}; rename one to save them")
        stored[name] = _encode(leaf)
    return {name: leaf for name, leaf in stored.items() if leaf.size}


def describe(state: Any) -> dict[str, dict]:
    """Name -> shape and dtype (and kind of key) of each leaf."""
    leaves = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in trees.named_leaves(state)}
    kinds = {name: {"impl": str(jax.random.key_impl(leaf))} for name, leaf in trees.named_leaves(state) if _is_key(leaf.dtype)}
    return {name: {**leaf, **kinds.get(name, {})} for name, leaf in leaves.items()}


def _encode(leaf: jax.Array) -> jax.Array:
    if _is_key(leaf.dtype):
        return jax.random.key_data(leaf)
    codes = _codes(leaf.dtype)
    return jax.lax.bitcast_convert_type(leaf, codes).astype(jnp.uint8) if codes else leaf


def decode(stored: jax.Array, like: Any, impl: str | None) -> jax.Array:
    """The inverse of `_encode`, on the sharding of `like`."""
    codes = _codes(like.dtype)
    if impl is None and codes is None:
        return stored
    back = lambda x: jax.random.wrap_key_data(x, impl=impl) if impl else jax.lax.bitcast_convert_type(x.astype(codes), like.dtype)
    return jax.jit(back, out_shardings=like.sharding)(stored)


def mesh_of(state: Any) -> dict:
    """The mesh that the state lies on, for the reader of a record; restoring does not need it."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state)]
    meshes = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    axes = {str(name): int(size) for name, size in meshes[0].shape.items()} if meshes else {}
    return {"axes": axes, "devices": jax.device_count(), "processes": jax.process_count(), "platform": jax.default_backend()}


def blocks_of(x: jax.Array) -> list[tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]]:
    """The arguments of `checksum` for each part of `x` that this process answers for. Over all processes they cover `x` once.

    On accelerators this is the copy to the host that Orbax makes too; JAX keeps it with the shard, so it is made once.
    """
    own = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    return [(np.asarray(shard.data), tuple(part.start or 0 for part in shard.index), x.shape) for shard in own]


def own_checksums(blocks: dict[str, list]) -> dict[str, int]:
    return {name: sum(checksum(*block) for block in each) % 2**32 for name, each in blocks.items()}


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a leaf of a target; where it says no sharding, the first device."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def stored_like(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    stored = jax.eval_shape(_encode, jax.ShapeDtypeStruct(like.shape, like.dtype))
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=like.sharding)


def require_fit(described: dict[str, dict], likes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises with the first names at which checkpoint and target differ."""
    theirs = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in described.items()}
    ours = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in likes.items()}
    if names := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        each = [f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} in the target" for name in names[:3]]
        raise Mismatch("; ".join(each) + (f"; and so on for {len(names) - 3} more leaves" if len(names) > 3 else ""))
