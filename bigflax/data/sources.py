"""Random-access sources: `len(source)`, `source[i] -> dict`, `source.name(i) -> str`; one table of kinds, one way to open them.

A record that cannot be read is a value, not an exception: `{"fault": reason}`. Text files come as bytes. What then happens to a bad
record is decided in one place, quality.py, by the policy of the recipe. `name(i)` is stable (a path below the folder asked for, or
path:line): errors show it and splits hash it.

Here: text, the Python standard library, JSONL, CSV, NumPy. In records.py: Parquet, ArrayRecord, TFDS, Hugging Face folders, image
folders. A source opens its files on first use and can be pickled into worker processes. Left out on purpose: streams without random
access (a shuffle through a buffer would neither be uniform nor resume exactly).
"""

import csv
import difflib
import functools
import hashlib
import inspect
import io
import json
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from bigflax.data import records
from bigflax.data.files import ByteRanges, find_files, line_starts

Record = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """`source[i]` twice gives the same record; i in [0, len(source))."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    def name(self, index: int) -> str: ...


class TextFiles:
    """One document a file: {"text": bytes}."""

    def __init__(self, files: Sequence[tuple[str, epath.Path]]):
        self._files = list(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        return {"text": self._files[index][1].read_bytes()}

    def name(self, index: int) -> str:
        return self._files[index][0]


class Lines:
    """One record a line of a set of files, through an index of byte offsets. `parse(line, header) -> record` may raise ValueError: a
    fault.
    """

    def __init__(self, files, parse, *, quoted: bool = False, header: bool = False):
        self._parse, self._skip = parse, int(header)
        self._names, self._files, self._starts = [], [], []
        for name, path in files:
            self._names.append(name)
            self._files.append(ByteRanges(path))
            self._starts.append(line_starts(path, quoted=quoted))
        self._ends = np.cumsum([max(0, len(s) - 1 - self._skip) for s in self._starts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0) + self._skip

    def _line(self, file: int, line: int) -> bytes:
        start, stop = (int(x) for x in self._starts[file][line : line + 2])
        return self._files[file].read(start, stop)

    @functools.cached_property
    def _headers(self) -> list[bytes]:
        return [self._line(file, 0) if self._skip else b"" for file in range(len(self._files))]

    def __getitem__(self, index: int) -> Record:
        file, line = self._locate(index)
        raw = self._line(file, line)
        if not raw.strip():
            return {"fault": "empty line"}
        try:
            return self._parse(raw, self._headers[file])
        except UnicodeDecodeError as error:
            return {"fault": f"not UTF-8 (byte {error.start})"}
        except ValueError as error:
            return {"fault": str(error)}

    def name(self, index: int) -> str:
        file, line = self._locate(index)
        return f"{self._names[file]}:{line + 1}"


def _parse_text(line: bytes, _header: bytes) -> Record:
    return {"text": line.rstrip(b"\r\n")}


def _parse_json(line: bytes, _header: bytes) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON (column {error.colno}: {error.msg}); a truncated file ends like this") from error
    return record if isinstance(record, dict) else {"value": record}


@functools.lru_cache(64)
def _csv_fields(line: bytes, delimiter: str) -> list[str]:
    csv.field_size_limit(2**31 - 1)  # its default, 128 KiB, is shorter than documents are
    rows = list(csv.reader(io.StringIO(line.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True))
    return rows[0] if len(rows) == 1 else []


def _parse_csv(line: bytes, header: bytes, *, delimiter: str) -> Record:
    names = _csv_fields(header, delimiter)
    try:
        values = _csv_fields.__wrapped__(line, delimiter)
    except csv.Error as error:
        raise ValueError(f"not CSV ({error}); a truncated file ends like this") from error
    if len(values) != len(names):
        raise ValueError(f"{len(values)} fields under a header of {len(names)}; a truncated file ends like this")
    return dict(zip(names, values, strict=True))


class Arrays:
    """A dict of arrays with one common first axis; record i is the dict of their rows i."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str):
        sizes = {key: len(value) for key, value in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the arrays of {name} must have one common length, not {sizes}")
        self._arrays, self._name, self._size = dict(arrays), name, next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        return {key: np.array(value[index]) for key, value in self._arrays.items()}

    def name(self, index: int) -> str:
        return f"{self._name}:{index}"


def text(*, path, per: str = "file") -> Source:
    """Text files, globs or folders. per="file": a document a file; per="line": a document a line."""
    if per not in ("file", "line"):
        raise ValueError(f"per={per!r} is neither 'file' nor 'line'")
    files = find_files(path)
    return TextFiles(files) if per == "file" else Lines(files, _parse_text)


# Not library code that anyone reads: tests, their data, and inputs that are broken on purpose.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "ensurepip"})


def python_stdlib() -> Source:
    """Every non-empty .py file of the running Python's standard library without its tests: real text that is on every machine (11 to 13
    MB).
    """
    root, files = sysconfig.get_paths()["stdlib"], []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_STDLIB]
        paths = (os.path.join(folder, name) for name in names if name.endswith(".py"))
        files += [(os.path.relpath(p, root).replace(os.sep, "/"), epath.Path(p)) for p in paths if os.path.isfile(p) and os.path.getsize(p)]
    if not files:
        version = ".".join(map(str, sys.version_info[:2]))
        raise FileNotFoundError(
            f"this Python {version} has no standard library source under {root!r}; name your own text with the kind 'text'"
        )
    return TextFiles(sorted(files))


def jsonl(*, path) -> Source:
    """JSON lines: a record a line; a value that is not an object becomes {"value": it}."""
    return Lines(find_files(path, suffixes=(".jsonl", ".json", ".ndjson")), _parse_json)


def csv_files(*, path, delimiter: str | None = None) -> Source:
    """CSV with a header line; every field is a string. A file ending in .tsv is split at tabs."""
    files = find_files(path, suffixes=(".csv", ".tsv"))
    tab = all(name.endswith(".tsv") for name, _ in files)
    parse = functools.partial(_parse_csv, delimiter=delimiter or ("\t" if tab else ","))
    return Lines(files, parse, quoted=True, header=True)


def numpy_arrays(*, path=None, arrays: Mapping[str, np.ndarray] | None = None) -> Source:
    """`arrays` itself; an .npz; or .npy files (memory-mapped, keyed by their stems)."""
    if (path is None) == (arrays is None):
        raise ValueError("name either path= (.npz, .npy or a folder of .npy) or arrays=, not both and not neither")
    if arrays is not None:
        return Arrays(arrays, "arrays")
    found: dict[str, np.ndarray] = {}
    for name, file in find_files(path, suffixes=(".npy", ".npz")):
        try:
            loaded = np.load(os.fspath(file), mmap_mode=None if name.endswith(".npz") else "r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{os.fspath(file)!r} is not a whole NumPy file: {error}") from error
        found.update(dict(loaded) if name.endswith(".npz") else {file.stem: loaded})
    return Arrays(found, os.path.basename(os.fspath(path)) if isinstance(path, str | os.PathLike) else "arrays")


SOURCES = {
    "text": text,
    "python": python_stdlib,
    "jsonl": jsonl,
    "csv": csv_files,
    "numpy": numpy_arrays,
    "parquet": records.parquet,
    "arrayrecord": records.array_record,
    "tfds": records.tfds,
    "hf": records.hf,
    "images": records.images,
}


def open_source(kind: str, **options) -> Source:
    """Opens SOURCES[kind](**options); an unknown kind or option is a ValueError that names the nearest known one."""
    if kind not in SOURCES:
        raise ValueError(f"there is no source kind {kind!r}{nearest(kind, SOURCES)}")
    known = list(inspect.signature(SOURCES[kind]).parameters)
    for option in options:
        if option not in known:
            raise ValueError(f"the source {kind!r} has no option {option!r}{nearest(option, known)}")
    missing = [p.name for p in inspect.signature(SOURCES[kind]).parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(f"the source {kind!r} needs {', '.join(missing)}")
    source = SOURCES[kind](**options)
    if not len(source):
        raise ValueError(f"the source {kind!r} with {options} holds no record")
    return source


def nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, 1, cutoff=0.0)
    return f"; the nearest is {close[0]!r} (known: {', '.join(known)})" if close else "; it takes none"


def fingerprint(source: Source) -> str:
    """sha256 over the number of records and up to 1,000 evenly spaced names: tells another corpus from the same one, without reading it."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in np.linspace(0, len(source) - 1, min(len(source), 1000)).astype(int):
        digest.update(b"\0" + source.name(int(index)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
