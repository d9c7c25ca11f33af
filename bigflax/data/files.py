"""Finding files and reading byte ranges of them: local paths and gs:// alike, through `etils.epath`.

A name is the path below the folder or pattern that was asked for, so it stays the same when the corpus moves to another machine; splits
hash it. Left out on purpose: compressed text (no random access into it: decompress first) and http (download first).
"""

import glob
import os
import threading
from typing import Any

import numpy as np
from etils import epath

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def is_local(path) -> bool:
    return "://" not in os.fspath(path)


def find_files(paths, *, suffixes: tuple[str, ...] | None = None) -> list[tuple[str, epath.Path]]:
    """Returns sorted (name, path) of every file that `paths` (a file, folder or glob, or a list of them) stands for.

    Hidden files are passed over in folders and globs. FileNotFoundError, in one sentence, where nothing is found.
    """
    found: dict[str, tuple[str, epath.Path]] = {}
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for name, file in _expand(os.path.expanduser(os.fspath(path)), suffixes):
            found.setdefault(os.fspath(file), (name, file))
    if not found:
        raise FileNotFoundError("no path was given: name at least one file, folder or pattern")
    return sorted(found.values(), key=lambda pair: (pair[0], os.fspath(pair[1])))


def _expand(text: str, suffixes) -> list[tuple[str, epath.Path]]:
    path = epath.Path(text)
    if any(c in text for c in "*?[") and not path.exists():
        return _matches(path.parts, text)
    if path.is_dir():
        files = _visible((file, root_name) for file, root_name in _walk(path, "") if not suffixes or root_name.endswith(suffixes))
        if not files:
            raise FileNotFoundError(f"the folder {text!r} holds no {' or '.join(suffixes or ('visible',))} file")
        return files
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {text!r}; check the path (the working folder is {os.getcwd()})")
    return [(path.name, path)]


def _matches(parts: tuple[str, ...], text: str) -> list[tuple[str, epath.Path]]:
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root, pattern = epath.Path(*parts[:fixed]) if fixed else epath.Path("."), os.path.join(*parts[fixed:])
    if is_local(root):
        found = ((root / name, name) for name in glob.glob(pattern, root_dir=os.fspath(root), recursive=True))
    else:
        found = ((file, str(file.relative_to(root))) for file in root.glob(pattern))  # no ** there: epath refuses it
    files = _visible((file, name) for file, name in found if file.is_file())
    if not files:
        raise FileNotFoundError(f"the pattern {text!r} matches no file; check it, and quote it in a shell")
    return files


def _walk(folder, prefix: str):
    """(file, name below the first folder) of all files below; hidden folders are not entered."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield entry, prefix + entry.name


def _visible(files) -> list[tuple[str, epath.Path]]:
    return [(name.replace(os.sep, "/"), file) for file, name in files if not os.path.basename(name).startswith(".")]


class ByteRanges:
    """Reads file[start:stop]. Local files are read with pread, so threads need no lock; the open handle is not pickled."""

    def __init__(self, path):
        self.path = epath.Path(path)
        self._lock = threading.Lock()
        self._handle: Any = None  # a descriptor, or a remote file object

    def read(self, start: int, stop: int) -> bytes:
        return self._read_local(start, stop) if is_local(self.path) else self._read_remote(start, stop)

    def _read_local(self, start: int, stop: int) -> bytes:
        with self._lock:
            if self._handle is None:  # a bare descriptor: a file object in a garbage cycle would warn that nobody closed it
                self._handle = os.open(self.path, os.O_RDONLY)
        return os.pread(self._handle, stop - start, start)

    def _read_remote(self, start: int, stop: int) -> bytes:
        with self._lock:
            if self._handle is None:
                self._handle = self.path.open("rb")
            self._handle.seek(start)
            return self._handle.read(stop - start)

    def __reduce__(self):
        return ByteRanges, (self.path,)

    def __del__(self):
        if isinstance(getattr(self, "_handle", None), int):
            os.close(self._handle)


def line_starts(path, *, quoted: bool = False) -> np.ndarray:
    """Returns int64[n + 1]: the byte at which each line starts, and the file's size. With `quoted`, a line break inside double quotes is
    text (CSV).
    """
    if os.fspath(path).endswith(COMPRESSED):
        raise ValueError(f"{os.fspath(path)!r} is compressed, which allows no random access; decompress it first")
    starts, position, open_quote = [0], 0, False
    with epath.Path(path).open("rb") as file:
        for line in file:
            position += len(line)
            open_quote ^= quoted and line.count(b'"') % 2 == 1
            if not open_quote:
                starts.append(position)
    if starts[-1] != position:  # a quote that never closes: the rest is one (bad) record
        starts.append(position)
    return np.asarray(starts, np.int64)
