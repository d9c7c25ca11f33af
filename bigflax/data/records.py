"""Sources whose files need a library of their own: Parquet, Hugging Face folders, ArrayRecord, TFDS, images. Each library is an extra,
imported when opened.

A file that cannot be opened (truncated, not of its format) counts as one record with a fault, so that the policy for bad records decides
about it. Parquet decodes whole row groups; the last few are kept. Shuffled reading of Parquet much larger than memory is slow by nature:
write it once as ArrayRecord or JSONL. Left out on purpose: writing any of these formats.
"""

import collections
import functools
import importlib
import json
import os
from typing import Any

import numpy as np
from etils import epath

from bigflax.data.files import find_files, is_local

ROW_GROUPS_KEPT = 8


def extra(module: str, name: str) -> Any:
    """Imports an optional library, or says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this source needs {module.split(".")[0]}: pip install "bigflax[{name}]" ({error})') from error


class Parts:
    """Records in parts (row groups, files): `sizes[p]` records each, `load(p)(row)` is a record. The last few stay loaded."""

    def __init__(self, names, sizes, load, *, keep: int = ROW_GROUPS_KEPT):
        self._names, self._load, self._keep = list(names), load, keep
        self._ends = np.cumsum([0, *sizes])
        self._loaded: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right")) - 1
        return part, index - int(self._ends[part])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self._locate(index)
        loaded = self._loaded.get(part)
        if loaded is None:
            loaded = self._loaded[part] = self._load(part)
            while len(self._loaded) > self._keep:
                self._loaded.popitem(last=False)
        return loaded(row)

    def name(self, index: int) -> str:
        part, row = self._locate(index)
        return f"{self._names[part]}:{row}"

    def __getstate__(self):
        return {**self.__dict__, "_loaded": collections.OrderedDict()}


def _fault(reason: str, _row: int) -> dict[str, Any]:
    return {"fault": reason}


def _table_row(table, row: int) -> dict[str, Any]:
    return {name: column[row].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}


def _load_parquet(parts, columns, index: int):
    path, group, fault = parts[index]
    if fault is not None:
        return functools.partial(_fault, fault)
    parquet_library = extra("pyarrow.parquet", "records")
    try:
        with epath.Path(path).open("rb") as file:
            return functools.partial(_table_row, parquet_library.ParquetFile(file).read_row_group(group, columns=columns))
    except (ValueError, OSError) as error:
        return functools.partial(_fault, f"unreadable row group {group}: {error}")


def parquet(*, path, columns: list[str] | None = None) -> Parts:
    """Parquet files: a record a row."""
    return _parquet(find_files(path, suffixes=(".parquet",)), columns)


def _parquet(files, columns) -> Parts:
    library, names, sizes, parts = extra("pyarrow.parquet", "records"), [], [], []
    for name, path in files:
        try:
            with path.open("rb") as file:
                groups = library.ParquetFile(file).metadata
                rows = [groups.row_group(g).num_rows for g in range(groups.num_row_groups)]
            found = [(os.fspath(path), g, None) for g in range(len(rows))]
        except (ValueError, OSError) as error:
            rows, found = [1], [(os.fspath(path), 0, f"not a whole Parquet file: {error}")]
        names += [name if len(rows) == 1 else f"{name}#{g}" for g in range(len(rows))]
        sizes, parts = sizes + rows, parts + found
    return Parts(names, sizes, functools.partial(_load_parquet, parts, columns))


def _open_arrow(path):
    """A table over one arrow file, stream or file format, memory-mapped where it is local."""
    arrow = extra("pyarrow", "records")
    data = arrow.memory_map(os.fspath(path)) if is_local(path) else arrow.BufferReader(epath.Path(path).read_bytes())
    try:
        return arrow.ipc.open_stream(data).read_all()
    except arrow.ArrowInvalid:
        data.seek(0)
        return arrow.ipc.open_file(data).read_all()


def _load_arrow(paths, index: int):
    try:
        return functools.partial(_table_row, _open_arrow(paths[index]))
    except (ValueError, OSError) as error:
        return functools.partial(_fault, f"not a whole arrow file: {error}")


def hf(*, path, split: str = "train") -> Parts:
    """A Hugging Face dataset folder: as written by `save_to_disk` (arrow files named by state.json), or Parquet files of a downloaded data
    set.
    """
    root = epath.Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(root)!r}; download or save the data set first")
    if (root / "dataset_dict.json").exists():
        splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise ValueError(f"the data set {os.fspath(root)!r} has no split {split!r}, only {', '.join(splits)}")
        root = root / split
    if (root / "state.json").exists():
        state = json.loads((root / "state.json").read_text())
        files = [(entry["filename"], root / entry["filename"]) for entry in state["_data_files"]]
        absent = [name for name, file in files if not file.exists()]
        if absent:
            raise FileNotFoundError(f"{os.fspath(root)!r} is incomplete: {absent[0]!r}, named in its state.json, is missing")
        return _arrow(files)
    files = find_files(root, suffixes=(".parquet",))
    of_split = [(name, file) for name, file in files if split in name.replace("\\", "/").split("/")[:-1] or file.name.startswith(split)]
    if not of_split:
        raise ValueError(
            f"no Parquet file below {os.fspath(root)!r} belongs to the split {split!r}; there are {', '.join(n for n, _ in files[:5])}"
        )
    return _parquet(of_split, None)


def _arrow(files) -> Parts:
    sizes, paths = [], [file for _, file in files]
    for path in paths:
        try:
            sizes.append(_open_arrow(path).num_rows)
        except (ValueError, OSError):
            sizes.append(1)  # one record, whose fault is named when it is read
    return Parts([name for name, _ in files], sizes, functools.partial(_load_arrow, paths), keep=len(paths))


def _bytes_record(decode: str, raw: bytes) -> dict[str, Any]:
    if decode != "json":
        return {decode: raw}
    try:
        value = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        return {"fault": f"not JSON: {error}"}
    return value if isinstance(value, dict) else {"value": value}


def _array_reader(path) -> Any:
    return extra("array_record.python.array_record_data_source", "records").ArrayRecordDataSource([os.fspath(path)])


def _load_array_record(paths, decode: str, index: int):
    try:
        reader = _array_reader(paths[index])
        len(reader)
    except Exception as error:  # its reader raises bare RuntimeError and ValueError for a truncated file
        return functools.partial(_fault, f"not a whole ArrayRecord file: {str(error).splitlines()[0]}")
    return lambda row: _bytes_record(decode, reader[row])


def array_record(*, path, decode: str = "json") -> Parts:
    """ArrayRecord files: decode="text" gives {"text": bytes}, "bytes" {"bytes": bytes}, "json" the object itself."""
    if decode not in ("json", "text", "bytes"):
        raise ValueError(f"decode={decode!r} is none of 'json', 'text', 'bytes'")
    extra("array_record.python.array_record_data_source", "records")
    files, sizes = find_files(path, suffixes=(".array_record", ".arrayrecord")), []
    for _, file in files:
        try:
            sizes.append(len(_array_reader(file)))
        except Exception:
            sizes.append(1)  # one record, whose fault is named when it is read
    paths = [file for _, file in files]
    return Parts([name for name, _ in files], sizes, functools.partial(_load_array_record, paths, decode), keep=len(paths))


class Tfds:
    """A TensorFlow data set read through its ArrayRecord files, without TensorFlow."""

    def __init__(self, name: str, split: str, data_dir: str | None):
        self._arguments, self._source = (name, split, data_dir), None
        self._size = len(self._opened)

    @property
    def _opened(self):
        if self._source is None:
            name, split, data_dir = self._arguments
            library = extra("tensorflow_datasets", "tfds")
            try:
                self._source = library.data_source(name, split=split, data_dir=data_dir)
            except (AssertionError, FileNotFoundError, ValueError, NotImplementedError) as error:
                raise FileNotFoundError(
                    f"cannot open the data set {name!r} under {data_dir or 'the default data_dir'} as ArrayRecord; prepare it first with "
                    f"file_format='array_record' ({str(error).strip().splitlines()[0]})"
                ) from error
        return self._source

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._size:
            raise IndexError(f"record {index} of {self._size}")
        return dict(self._opened[index])

    def name(self, index: int) -> str:
        return f"{self._arguments[0]}/{self._arguments[1]}:{index}"

    def __getstate__(self):
        return {**self.__dict__, "_source": None}


def tfds(*, name: str, split: str = "train", data_dir: str | None = None) -> Tfds:
    """A TFDS data set prepared in the ArrayRecord format."""
    return Tfds(name, split, data_dir)


def decoded(file, mode: str) -> Any:
    """The PIL image of an open file, "RGB" or "L". Raises ValueError where the file is no whole image, or one too large to be meant."""
    library = extra("PIL.Image", "images")
    try:
        return library.open(file).convert(mode)
    except (OSError, ValueError, SyntaxError, library.DecompressionBombError) as error:
        raise ValueError(f"not a whole image: {error}") from error


class Images:
    """{"image": uint8[height, width, 3 or 1], "labels": int32} of a folder with one subfolder a class; `classes` lists their names in label
    order.
    """

    def __init__(self, files, classes: list[str], size: tuple[int, int] | None, gray: bool):
        self._files, self.classes, self._size, self._mode = files, classes, size, "L" if gray else "RGB"
        self._labels = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, path = self._files[index]
        library = extra("PIL.Image", "images")
        try:
            with path.open("rb") as file:
                picture = decoded(file, self._mode)
        except (OSError, ValueError) as error:
            return {"fault": str(error)}
        if self._size is not None:
            picture = picture.resize(self._size[::-1], library.Resampling.BILINEAR)
        pixels = np.asarray(picture, np.uint8)
        return {"image": pixels.reshape(*pixels.shape[:2], -1), "labels": np.int32(self._labels[name.split("/")[0]])}

    def name(self, index: int) -> str:
        return self._files[index][0]


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")


def images(*, path, size: tuple[int, int] | int | None = None, gray: bool = False) -> Images:
    """`size`: (height, width), or one number for a square, to which every image is resized; batches need one."""
    extra("PIL.Image", "images")
    root = epath.Path(path)
    files = [
        (name, file) for name, file in find_files(root, suffixes=IMAGE_SUFFIXES + tuple(s.upper() for s in IMAGE_SUFFIXES)) if "/" in name
    ]
    if not files:
        raise FileNotFoundError(f"the folder {os.fspath(root)!r} has no subfolder with images: one subfolder a class is expected")
    height_width = (size, size) if isinstance(size, int) else (size[0], size[1]) if size else None
    classes = sorted({name.split("/")[0] for name, _ in files})
    return Images(files, classes, height_width, gray)
