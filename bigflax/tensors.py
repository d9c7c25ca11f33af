"""Safetensors files and JSON, in and out: a folder's tensors by name, mapped and not yet read, or written in files of bounded size with their index.

Left out on purpose: what the names mean. Published ones are in models/names.py, our own in packed.py.
"""

import dataclasses
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# what safetensors calls a type -> what NumPy, or JAX for it, does
KINDS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
PUBLISHED = ("F64", "F32", "F16", "BF16", "I64")
SHARD_BYTES = 5 * 2**30


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a mapped file: what slicing it touches is all that is read."""

    name: str
    file: str
    kind: str  # as safetensors calls its type
    shape: tuple[int, ...]
    mapped: mmap.mmap  # the file
    begin: int  # within the file

    @property
    def dtype(self) -> Any:
        return self._one_of(KINDS)

    @property
    def published(self) -> Any:
        """Its dtype. Raises ValueError for one that published weights are not read in: codes would be taken for what they stand for."""
        return self._one_of(PUBLISHED)

    def _one_of(self, kinds: Collection[str]) -> Any:
        if self.kind not in kinds:
            raise ValueError(f"{self.name} in {self.file!r} is stored as {self.kind}, which is not supported; {', '.join(kinds)} are")
        return jnp.dtype(KINDS[self.kind])

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return np.frombuffer(self.mapped, self.dtype, math.prod(self.shape), self.begin).reshape(self.shape)[index]

    def forget(self) -> None:
        """Gives the pages that were read back to the system, which keeps them in its cache as long as it likes."""
        first = self.begin - self.begin % mmap.PAGESIZE
        self.mapped.madvise(mmap.MADV_DONTNEED, first, self.end - first)


def open_tensors(folder: str, stem: str = "model") -> dict[str, Tensor]:
    """Every tensor of a folder's `stem`.safetensors, or of the files that its index lists, by name, none of them read yet."""
    index = os.path.join(folder, f"{stem}.safetensors.index.json")
    if os.path.exists(index):
        listed = read_json(index, "weight_map")["weight_map"]
        files = sorted(set(listed.values()))
    else:
        listed, files = None, [f"{stem}.safetensors"]
    found = {}
    for name in files:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            pickled = any(entry.endswith((".bin", ".pt", ".msgpack", ".h5")) for entry in os.listdir(folder))
            hint = "; its weights are in another format, which transformers can load and save again as safetensors" if pickled else ""
            raise FileNotFoundError(f"{folder!r} has no {name}{hint}")
        found |= map_file(path)
    if listed is not None and (absent := sorted(listed.keys() - found.keys())):
        raise ValueError(f"{index!r} names {absent[0]!r}, which {listed[absent[0]]} does not hold")
    return found


def map_file(path: str) -> dict[str, Tensor]:
    """The tensors of one file. The library checks its header; its own slices are copies, which would take a second turn to lay out as ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path!r} is damaged or cut off: {error}") from None
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    return {
        name: Tensor(name, path, said["dtype"], tuple(said["shape"]), mapped, 8 + size + said["data_offsets"][0])
        for name, said in header.items()
    }


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array on a cache line's bound: JAX takes such a one for its own on a CPU, and copies others."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


Item = tuple[str, int, Callable[[], np.ndarray]]  # a tensor's name, its bytes, and what makes it


def write_tensors(folder: str, items: Sequence[Item], *, stem: str = "model", shard_bytes: int = SHARD_BYTES, writes: bool = True) -> None:
    """Writes `stem`.safetensors, or files of at most `shard_bytes` each with their index; every other safetensors file of a model is removed.

    Each tensor is made when its file is; a process that does not write makes it too, for what lies on several hosts all of them must ask for.
    """
    from safetensors.numpy import save_file

    plan, filled = [[]], 0
    for item in items:
        if plan[-1] and filled + item[1] > shard_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(item)
        filled += item[1]
    one = len(plan) == 1
    files = [f"{stem}.safetensors"] if one else [f"{stem}-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    for file, part in zip(files, plan, strict=True):
        tensors = {name: make() for name, _, make in part}
        if writes:
            path = os.path.join(folder, file)
            save_file(tensors, path + ".tmp", metadata={"format": "pt"})
            os.replace(path + ".tmp", path)
    if not writes:
        return
    index = f"{stem}.safetensors.index.json"
    for old in os.listdir(folder):
        if re.fullmatch(r"(model|weights)(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old) and old not in (*files, index):
            os.remove(os.path.join(folder, old))
    if not one:
        weight_map = {name: file for file, part in zip(files, plan, strict=True) for name, *_ in part}
        total = sum(size for _, size, _ in items)
        write_json(os.path.join(folder, index), {"metadata": {"total_size": total}, "weight_map": weight_map})
    elif os.path.exists(os.path.join(folder, index)):
        os.remove(os.path.join(folder, index))


def read_json(path: str, *keys: str) -> dict[str, Any]:
    """A JSON object with these keys. Raises ValueError where it is anything else."""
    with open(path) as file:
        try:
            found = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path!r} is not JSON: {error}") from None
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise ValueError(f"{path!r} is not an object{' with ' + ', '.join(map(repr, keys)) if keys else ''}")
    return found


def write_json(path: str, said: dict[str, Any]) -> None:
    """In one move: who reads it meanwhile reads what was there."""
    with open(path + ".tmp", "w") as file:
        file.write(json.dumps(said, indent=2, sort_keys=True) + "\n")
    os.replace(path + ".tmp", path)
