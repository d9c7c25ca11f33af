"""What a compiled program sends over the network, read from its text (`compiled.as_text()`): every collective, its bytes, its groups, how often it runs.

The compilers write one collective in many ways, and each counts once here:

    all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all, collective-permute       as they are
    all-gather-start ... -done, async-start over a computation that holds one                        pairs
    async_collective_fusion                  TPU: pieces of one collective in many fusions, all of one channel
    all-reduce-scatter                       TPU: a fusion of an all-reduce and the slice that is kept: a reduce-scatter
    recv with a `_xla_megascale_transfer_type`   TPU: between slices, by the hosts: an all-reduce of one device of each slice

What is in the body of a loop runs as often as the loop turns, in the body of an inner one as often as both together. Ahead of time a matrix
product with a gathered operand may have become a loop of collective-permutes around a ring: those are listed as the permutes they are.

Left out on purpose: point-to-point sends of other runtimes, and replicas (`jax.pmap`): devices are partitions.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|true_computation|false_computation)=%([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_ARRAY = re.compile(r"\b([a-z]+)(\d+)?\w*\[([\d,<=]*)\]")
_GROUPS = (
    r"(?:replica_groups|source_target_pairs)="
    r"(\{(?:\{[\d,]*\},?)*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^\]]*\](?:, device_ids=\(\S*\))? \{[^}]*\})"
)


class Collective(NamedTuple):
    """`bytes` are those of one device's result in one execution, of which there are `count` in one run of the program.

    `groups` are the devices that work together, as positions in the mesh's flattened order (partition ids); those of a collective-permute are
    its pairs (from, to).
    """

    kind: str
    bytes: int
    count: int
    groups: list[tuple[int, ...]]
    name: str
    computation: str

    @property
    def wire(self) -> int:
        """Bytes that one device sends in one execution, by the algorithm that sends least: a ring, or for an all-to-all directly."""
        n = max(map(len, self.groups), default=1)
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return int(self.bytes * share)


class _Op(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return None if found is None else found.group(1)


Program = dict[str, dict[str, _Op]]


def collectives(text: str) -> list[Collective]:
    """Every collective of an HLO module's text, in the order of the text. A loop whose turns cannot be read counts once."""
    program, entry = _read(text)
    partitions = int((re.findall(r"\bnum_partitions=(\d+)", text.partition("\n")[0]) or [1])[0])
    callers = _callers(program)
    runs = {entry: 1}

    def times(computation: str) -> int:
        if computation not in runs:
            runs[computation] = sum(times(caller) * turns for caller, turns, _ in callers.get(computation, ()))
        return runs[computation]

    def home(computation: str) -> str:
        """The computation in whose order it runs: that of the fusion around it, which is listed for each of its pieces."""
        for caller, _, op in callers.get(computation, ()):
            if op.opcode == "fusion":
                return home(caller)
        return computation

    found: dict[tuple, Collective] = {}
    for computation, ops in program.items():
        for op in ops.values():
            if (one := _collective(op, ops, computation, partitions)) is None or not times(computation):
                continue
            channel = op.attribute(r"\bchannel_id=(\d+)")
            key = (one.kind, channel, home(computation)) if channel else (op.name, computation)
            found.setdefault(key, one._replace(count=times(home(computation)), computation=home(computation)))
    return list(found.values())


def axes_of_groups(groups: Iterable[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes, outermost first, along which devices of one group differ: ("fsdp",), ("data", "fsdp") ..., () where no group has two."""
    varying = set()
    for group in groups:
        for device in group[1:]:
            here, there = _place(group[0], mesh_shape), _place(device, mesh_shape)
            varying |= {axis for axis in mesh_shape if here[axis] != there[axis]}
    return tuple(axis for axis in mesh_shape if axis in varying)


def _place(device: int, mesh_shape: Mapping[str, int]) -> dict[str, int]:
    place = {}
    for axis, size in reversed([*mesh_shape.items()]):
        device, place[axis] = divmod(device, size)
    return place


# -- the text --------------------------------------------------------------------------------------------------------------


def _read(text: str) -> tuple[Program, str]:
    """Each computation's operations by name, and the entry's name."""
    program: Program = {}
    entry, ops = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            ops = program[header.group(1)] = {}
            entry = header.group(1) if line.startswith("ENTRY") else entry
        elif found := _LINE.match(line):
            root, name, type, opcode, rest = found.groups()
            ops[name] = _Op(name, type, opcode, rest, root is not None)
    return program, entry


def _callers(program: Program) -> dict[str, list[tuple[str, int, _Op]]]:
    """(caller, how often it calls, the operation) of each computation that is called."""
    callers: dict[str, list[tuple[str, int, _Op]]] = {}
    for computation, ops in program.items():
        for op in ops.values():
            if ("=%" not in op.rest and "={%" not in op.rest) or op.opcode.endswith(("-done", "-update")):  # the start has called it
                continue
            turns = _turns(op, ops, program) if op.opcode == "while" else 1
            for one, many in _CALLED.findall(op.rest):
                for called in [one] if one else re.findall(r"[\w.\-]+", many):
                    callers.setdefault(called, []).append((computation, turns, op))
    return callers


def _turns(loop: _Op, ops: dict[str, _Op], program: Program) -> int:
    """How often a while loop turns: what the compiler noted, else (end - start) / step where the condition compares a counter to a constant."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (program.get(loop.attribute(rf"\b{part}=%?([\w.\-]+)") or "", {}) for part in ("condition", "body"))
    test = next((op for op in condition.values() if op.root and op.opcode == "compare" and "direction=LT" in op.rest), None)
    if test is None:
        return 1
    counter, end = (condition.get(name) for name in test.operands)
    index = None if counter is None or counter.opcode != "get-tuple-element" else counter.attribute(r"index=(\d+)")
    if index is None or (stop := _constant(end)) is None:
        return 1
    start = _constant(_element(ops.get(loop.operands[0]), int(index), ops)) or 0
    grown = _element(next((op for op in body.values() if op.root), None), int(index), body)
    steps = [] if grown is None or grown.opcode != "add" else [_constant(body.get(name)) for name in grown.operands]
    step = next((step for step in steps if step), 1)
    return max(0, math.ceil((stop - start) / step))


def _constant(op: _Op | None) -> int | None:
    found = re.match(r"(-?\d+)\)", op.rest) if op is not None and op.opcode == "constant" else None
    return None if found is None else int(found.group(1))


def _element(op: _Op | None, index: int, ops: dict[str, _Op]) -> _Op | None:
    """What lies at `index` of a tuple, behind any copies."""
    found = ops.get(op.operands[index]) if op is not None and op.opcode == "tuple" else None
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = ops.get(found.operands[0])
    return found


def _collective(op: _Op, ops: dict[str, _Op], computation: str, partitions: int) -> Collective | None:
    if op.opcode == "recv":
        return _between_slices(op, computation, partitions)
    kind, started, _ = op.opcode.partition("-start")
    if kind not in KINDS:
        return None
    result = op.type
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind, result = "reduce-scatter", next(op.type for op in ops.values() if op.root)
    elif started and ((parts := _parts(result))[0].startswith("(") or kind != "all-reduce"):  # (operands, result, context ...)
        result = parts[1]
    found = op.attribute(_GROUPS)
    return Collective(kind, _bytes(result), 1, _groups(found or "{}", partitions), op.name, computation)


def _between_slices(op: _Op, computation: str, partitions: int) -> Collective | None:
    """A program is that of one slice; the target "{0,1}x{0:3}" names slices and the devices of each."""
    kind, target = (op.attribute(rf'_xla_megascale_{field}="([^"]*)"') for field in ("transfer_type", "target"))
    if kind is None or target is None:
        return None
    slices, devices = (_listed(part) for part in target.split("x"))
    groups = [tuple(i * partitions + device for i in range(len(slices))) for device in devices]
    kind = {"one-to-one": "collective-permute"}.get(kind := kind.lower().replace("_", "-"), kind)
    return Collective(kind, _bytes(_parts(op.type)[0]), 1, groups, op.name, computation)


def _listed(text: str) -> list[int]:
    """ "{0,4:6}" -> [0, 4, 5, 6]."""
    ranges = [[int(n) for n in part.split(":")] for part in text.strip("{}").split(",")]
    return [n for ends in ranges for n in range(ends[0], ends[-1] + 1)]


def _groups(text: str, partitions: int) -> list[tuple[int, ...]]:
    """{{0,1},{2,3}}, [2,4]<=[4,2]T(1,0) or mesh['a'=4,'b'=2] {'a'} as lists of device numbers; {} is all of them."""
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("["):
        shape, _, order = text.partition("<=")
        devices, size = _iota(order), _numbers(shape)[-1]
        return [tuple(devices[i : i + size]) for i in range(0, len(devices), size)]
    return [tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text)] or [tuple(range(partitions))]


def _mesh_groups(text: str) -> list[tuple[int, ...]]:
    """Groups over named axes, or over parts of them: 'a':(2)4 is the digit of 4 values behind one of 2 in the number along axis 'a'."""
    shape, _, axes = text.rpartition("{")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", shape)}
    strides = {name: math.prod([*sizes.values()][i + 1 :]) for i, name in enumerate(sizes)}
    digits = []  # (stride, values) of each
    for name, before, values in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        values = int(values or sizes[name])
        digits.append((strides[name] * sizes[name] // (int(before or 1) * values), values))
    listed = re.search(r"device_ids=\((.*)\)", shape)
    groups: dict[int, list[tuple[list[int], int]]] = {}
    for place, device in enumerate(_iota(listed.group(1)) if listed else range(math.prod(sizes.values()))):
        at = [place // stride % values for stride, values in digits]
        first = place - sum(i * stride for i, (stride, _) in zip(at, digits, strict=True))
        groups.setdefault(first, []).append((at, device))
    return [tuple(device for _, device in sorted(group)) for group in groups.values()]


def _iota(text: str) -> list[int]:
    """[4,2]T(1,0) is 0 to 7 in rows of 2, read by columns; 0,2,1,3 is what it says."""
    if not text.startswith("["):
        return _numbers(text)
    shape, _, order = text.partition("T")
    sizes = _numbers(shape)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    turned = _numbers(order) or range(len(sizes))
    indices = itertools.product(*(range(sizes[axis]) for axis in turned))
    return [sum(i * strides[axis] for i, axis in zip(index, turned, strict=True)) for index in indices]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _parts(type: str) -> list[str]:
    """The elements of a tuple type."""
    parts, depth, begin = [], 0, 1
    for i, letter in enumerate(type):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(re.sub(r"/\*.*?\*/", "", type[begin:i]).strip())
            begin = i + 1
    return parts


def _bytes(type: str) -> int:
    """Bytes of an array or a tuple of them."""
    bits = 0
    for kind, width, sizes in _ARRAY.findall(type):
        bits += (8 if kind == "pred" else int(width or 0)) * math.prod(_numbers(sizes))
    return math.ceil(bits / 8)
