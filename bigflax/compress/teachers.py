"""What a teacher says, asked once: its likeliest classes written down, and texts that it, or the student, samples.

    source = remember("cache", batches, top_k(teacher, params, 32, temperature=2.0), identity={"teacher": "llama3-8b", "temperature": 2.0})
    batches = data.record_batches(source, lambda record, rng: record, batch_size=64)          the batches' own fields, teacher_values, teacher_ids
    loss_fn = distill(tasks.token_loss, student, temperature=2.0)                              without a teacher in memory

    say = sampled(lambda params, ids, mask, rng: generate(model, params, ids, attention_mask=mask, rng=rng, max_new_tokens=64), eos_id=2)
    source = remember("texts", prompts, lambda batch: say(teacher_params, batch, key), ...)    sequence-level: Kim and Rush 2016 (arXiv 1606.07947)
    state, metrics = step(state, say(untaught(state.weights), prompts, key))                   on-policy: Agarwal et al. 2023 (GKD, 2306.13649)

Kept are log p of the k likeliest at the temperature that it is learned with, and of all others together, float16 (losses.top_k_divergence has the
formula): for k 32 and 50,000 classes 194 bytes a token instead of 100,000. The cache is a data set: it holds what the batches hold too, one record a
row, padding rows left out, so that it is shuffled, split and resumed like any other source. Its files are ArrayRecord, of a number of batches each, and
have their name only when complete: a cache half written goes on where its last file ends, for batches that come in the same order, whose first is compared.

Left out on purpose: several hosts writing together, other places than local disks, and values for other temperatures than the one asked for: the tail of
softened probabilities does not follow from the k.

Legend: B batch, P prompt, N new tokens, T = P + N - 1, k the likeliest.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import data, losses, sharding
from bigflax.compress.terms import classes_of
from bigflax.data.records import extra
from bigflax.nn import Model
from bigflax.sharding import TABLE, Table, tracing_on

Ask = Callable[[Any], Mapping[str, Any]]


def top_k(
    teacher: Model, params: Any, k: int, *, temperature: float = 2.0, mesh: jax.sharding.Mesh | None = None, table: Table = TABLE,
    chunk: int | None = None,
) -> Ask:  # fmt: skip
    """A function from a batch to `teacher_values` [.., k + 1] float16 and `teacher_ids` [.., k] int32 of its rows or tokens (losses.top_k)."""

    @jax.jit
    def ask(params, batch):
        with tracing_on(mesh, table):
            inputs = {name: x for name, x in batch.items() if name != "labels"}
            values, ids = classes_of(teacher, params, inputs, lambda logits: losses.top_k(logits, k, temperature=temperature), chunk)
        return {"teacher_values": values.astype(jnp.float16), "teacher_ids": ids.astype(jnp.int32)}

    return lambda batch: ask(params, batch)


# -- the cache -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Remembered:
    """A source of what `remember` wrote: `source[i]` is a dict of arrays."""

    source: data.Source
    fields: Mapping[str, tuple[str, tuple[int, ...]]]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, out, at = self.source[index], {}, 0
        if "bytes" not in record:
            return record
        for name, (kind, shape) in self.fields.items():
            dtype = jnp.dtype(kind)
            size = int(np.prod(shape, dtype=int))
            out[name] = np.frombuffer(record["bytes"], dtype, size, at).reshape(shape)
            at += size * dtype.itemsize
        return out

    def name(self, index: int) -> str:
        return self.source.name(index)


def recall(folder: str | os.PathLike) -> Remembered:
    """The source of a complete cache. Raises ValueError for one that is not."""
    said = _read(folder)
    if not said.get("complete"):
        raise ValueError(f"there is no complete cache in {os.fspath(folder)!r}; remember(...) writes one, or goes on with it")
    fields = {name: (kind, tuple(shape)) for name, (kind, shape) in said["fields"].items()}
    return Remembered(data.open_source("arrayrecord", path=folder, decode="bytes"), fields)


def remember(
    folder: str | os.PathLike, batches: Iterable[Any], ask: Ask, *, identity: Mapping[str, Any], batches_a_file: int = 32
) -> Remembered:
    """Writes each row of the batches with what `ask` says of it, once, and gives the source; a complete cache is opened as it is, half a one goes on.

    `identity`, as JSON keeps it, says what it is of: teacher, temperature, data. The batches end, and come in the same order each time. Raises
    ValueError where the folder holds a cache of something else, or its first batch was another one.
    """
    identity = json.loads(json.dumps({**identity, "batches_a_file": batches_a_file}))
    os.makedirs(folder, exist_ok=True)
    said = _read(folder) or {"identity": identity}
    changed = [key for key in {**said["identity"], **identity} if said["identity"].get(key) != identity.get(key)]
    if changed:
        told = ", ".join(f"{key} ({said['identity'].get(key)!r} there, {identity.get(key)!r} here)" for key in changed)
        raise ValueError(f"the cache in {os.fspath(folder)!r} is of something else: {told}; take another folder")
    if said.get("complete"):
        return recall(folder)
    done, stream = len(_files(folder)), iter(batches)
    for number in itertools.count():
        group = list(itertools.islice(stream, batches_a_file))
        if number == 0 and group:
            first = _digest(group[0])
            if said.setdefault("first", first) != first:
                raise ValueError(f"the cache in {os.fspath(folder)!r} began with another batch; the batches must come in one order")
        if not group:
            break
        if number >= done:
            _write_file(folder, number, group, ask, said)
    if not _files(folder):
        raise ValueError("there is nothing to remember: no batch came")
    _write(folder, {**said, "complete": True})
    return recall(folder)


def _write_file(folder: Any, number: int, group: list[Any], ask: Ask, said: dict[str, Any]) -> None:
    writer_of = extra("array_record.python.array_record_module", "records").ArrayRecordWriter
    name = f"{number:06d}.array_record"
    hidden = os.path.join(folder, f".{name}")  # which no reader sees
    writer = writer_of(hidden, "group_size:1")
    for batch in group:
        told = {name: sharding.whole(x) for name, x in {**batch, **ask(batch)}.items()}
        fields = {name: [str(x.dtype), list(x.shape[1:])] for name, x in told.items()}
        if said.setdefault("fields", fields) != fields:
            raise ValueError(f"the batches are not of one shape: {fields} after {said['fields']}")
        for i in np.flatnonzero(_rows(told)):
            writer.write(b"".join(np.ascontiguousarray(x[i]).tobytes() for x in told.values()))
    writer.close()
    _write(folder, said)
    os.replace(hidden, os.path.join(folder, name))


def _rows(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which rows are no padding of a loader: labels -100 throughout, or without labels an attention mask of 0."""
    name = next((name for name in ("labels", "attention_mask", "prompt_mask") if name in batch), None)
    if name is None:
        return np.ones(len(next(iter(batch.values()))), bool)
    real = np.asarray(batch[name] != losses.IGNORE if name == "labels" else batch[name] > 0)
    return np.any(real.reshape(len(real), -1), axis=-1)


def _digest(batch: Mapping[str, Any]) -> str:
    parts = (name.encode() + np.ascontiguousarray(sharding.whole(x)).tobytes() for name, x in sorted(batch.items()))
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _files(folder: Any) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".array_record") and not name.startswith("."))


def _read(folder: Any) -> dict[str, Any]:
    path = os.path.join(folder, "cache.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _write(folder: Any, said: Mapping[str, Any]) -> None:
    path = os.path.join(folder, "cache.json")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(said, file)
    os.replace(f"{path}.new", path)


# -- texts that a model samples --------------------------------------------------------------------------------------------


def sampled(generate: Callable[..., jax.Array], *, eos_id: int | None = None) -> Callable[[Any, Any, jax.Array], dict[str, jax.Array]]:
    """A function (params, batch, rng) -> a batch to learn from: `prompt_ids` and `prompt_mask` [B, P], padded on the left, with what
    `generate(params, prompt_ids, prompt_mask, rng)` -> [B, N] says after them.

    The student's params make it on-policy, the teacher's sequence-level distillation. `partly` takes only a share of the batches from it.
    """

    def say(params: Any, batch: Mapping[str, Any], rng: jax.Array) -> dict[str, jax.Array]:
        if missing := {"prompt_ids", "prompt_mask"} - batch.keys():
            raise ValueError(f"texts are sampled after prompts, and the batch has no {min(missing)}, but {', '.join(batch)}")
        return continued(
            batch["prompt_ids"], batch["prompt_mask"], generate(params, batch["prompt_ids"], batch["prompt_mask"], rng), eos_id=eos_id
        )

    return say


def continued(prompt_BP: jax.Array, mask_BP: jax.Array, tokens_BN: jax.Array, *, eos_id: int | None = None) -> dict[str, jax.Array]:
    """`input_ids`, `attention_mask`, `position_ids` and `labels` [B, T], int32: labels aligned with the positions, -100 on the prompt, behind the first
    `eos_id`, and in rows without a prompt."""
    ends = tokens_BN == eos_id if eos_id is not None else jnp.zeros(tokens_BN.shape, bool)
    said = (jnp.cumsum(ends, 1) - ends == 0) & (mask_BP > 0).any(-1, keepdims=True)
    mask = jnp.concatenate([mask_BP > 0, said], 1)[:, :-1].astype(jnp.int32)
    labels = jnp.where(said, tokens_BN, losses.IGNORE)
    return {
        "input_ids": jnp.concatenate([prompt_BP, tokens_BN], 1)[:, :-1].astype(jnp.int32),
        "attention_mask": mask,
        "position_ids": jnp.maximum(jnp.cumsum(mask, 1) - 1, 0).astype(jnp.int32),
        "labels": jnp.pad(labels, ((0, 0), (prompt_BP.shape[1] - 1, 0)), constant_values=losses.IGNORE).astype(jnp.int32),
    }


def partly(say: Callable[..., Any], share: float) -> Callable[[Any, Any, jax.Array], Any]:
    """GKD's algorithm 1: a batch of what `say` samples with this chance, else the batch itself, without its prompts. Both have the fields of `continued`."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of sampled batches is from 0 to 1, not {share}")

    def either(params: Any, batch: Mapping[str, Any], rng: jax.Array) -> dict[str, Any]:
        coin, key = jax.random.split(rng)
        if float(jax.random.uniform(coin)) < share:
            return say(params, batch, key)
        return {name: x for name, x in batch.items() if not name.startswith("prompt_")}

    return either
