"""Parity: a folder's model here and in transformers with PyTorch, on the same inputs, in float32.

    bigflax parity FOLDER

Inputs: plain rows, rows padded on the right and on the left, the longest row that the model takes (up to `longest`), two token types where
it knows them, and documents packed into one row, which PyTorch reads one by one; images where it takes them, beside the rows or alone. For
each: the largest absolute difference of the outputs, the same relative to PyTorch's largest entry, and for logits the mean KL divergence and
how often the first choice agrees; and the first hidden state (0 is the embedding) that differs by more than the tolerance.

The only module that imports PyTorch. Left out on purpose: gradients, which tests/models/test_parity.py compares for every family.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from bigflax import hub, models
from bigflax.nn import Model

OUTPUTS = ("logits", "start_logits", "end_logits", "pooler_output", "text_embeds", "image_embeds", "logits_per_text")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kind of input showed; `first` is the first hidden state out of tolerance, None where all are within."""

    inputs: str
    absolute: float
    relative: float
    kl: float | None
    top1: float | None
    first: int | None


def compare(source: str, *, tolerance: float = 1e-4, longest: int = 512, seed: int = 0) -> list[Row]:
    """One Row a kind of input. Raises ImportError that names the extra where PyTorch or transformers is absent, ValueError for a model that
    reads anything else than tokens, else what `hub.load` raises."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"parity needs PyTorch and transformers: pip install 'bigflax[parity]' ({error})") from None
    folder = hub.fetch(source)
    model, params = hub.load(folder, dtype="float32")
    if [*(reads := model.module.example())] != ["input_ids"]:
        raise ValueError(f"parity compares models that read rows of tokens alone, and {model.family} reads {' and '.join(reads)}")
    kind = models.family(model.family).HEADS[model.config["head"]][0]
    if not hasattr(transformers, kind) or "input_ids" not in model.module.example():
        raise ValueError(f"parity feeds tokens to what transformers has too, and {model.family} is not of that kind")
    theirs = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    ours = jax.jit(functools.partial(model.apply, hidden_states=True))

    # what transformers calls position_ids is in some families the row of a table that begins with rows for other uses
    before = _text(model).first_position if getattr(models.family(model.family), "POSITION_ROWS", False) else 0

    def reference(given: dict[str, np.ndarray]) -> dict[str, Any]:
        if before:
            at = np.arange(given["input_ids"].shape[1])[None]
            given = given | {"position_ids": given.get("position_ids", at) + before}
        with torch.no_grad():
            out = theirs(**{name: torch.from_numpy(x) for name, x in given.items()}, output_hidden_states=True)
        towers = [out[f"{tower}_model_output"] for tower in ("text", "vision") if f"{tower}_model_output" in out]
        states = [x.numpy() for part in towers or [out] for x in part.hidden_states]
        return {**{name: out[name].numpy() for name in OUTPUTS if name in out}, "hidden_states": states}

    rows = []
    pad = hub.read_config(folder).get("pad_token_id") or 0
    for name, given, real in _inputs(model, longest, seed, pad):
        got = ours(params, **given)
        got.setdefault("hidden_states", (*got.get("text_hidden_states", ()), *got.get("vision_hidden_states", ())))
        rows.append(_row(name, got, reference(given), real, tolerance))
    if [*model.module.example()] != ["input_ids"]:
        return rows
    packed, documents = _packed(model, seed)
    got, alone = ours(params, **packed), [reference(document) for document in documents]
    if got.get("logits", np.zeros(0)).ndim == 3 or "start_logits" in got or not any(name in got for name in OUTPUTS):
        rows.append(_row("packed", got, _join(alone), packed["segment_ids"] > 0, tolerance))
    return rows


def _join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Outputs of documents read one by one, as those of one row."""
    one = {
        name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0] if name not in ("hidden_states", "pooler_output")
    }
    return {
        **one,
        "hidden_states": [np.concatenate(states, axis=1) for states in zip(*(part["hidden_states"] for part in parts), strict=True)],
    }


def _text(model: Model) -> Any:
    """The embedding of tokens, in one of two towers where there are two."""
    return getattr(model.module, "text", model.module).embed


def _positions(model: Model) -> int | None:
    return _text(model).positions or model.config.get("max_position_embeddings")


def _tokens(model: Model, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    vocab = _text(model).vocab
    return rng.integers(min(5, vocab - 1), vocab, shape)


def _inputs(model: Model, longest: int, seed: int, pad: int) -> list[tuple[str, dict[str, np.ndarray], np.ndarray]]:
    """(kind, inputs, which tokens are real) of every kind but the packed one."""
    rng, example = np.random.default_rng(seed), model.module.example()
    images = {name: rng.normal(size=(3, *x.shape[1:])).astype(np.float32) for name, x in example.items() if name == "pixel_values"}
    if "input_ids" not in example:
        return [("plain", images, np.ones((3, 0), bool))]
    most = min(longest, _positions(model) or longest)
    length, out = min(24, most), []
    for kind, n in {"plain": length, "padded right": length, "padded left": length, "longest": most, "token types": length}.items():
        ids, real = _tokens(model, rng, (3, n)), np.ones((3, n), bool)
        for row, cut in enumerate((0, n // 4, n // 2)) if kind.startswith("padded") else ():
            real[row, (slice(n - cut, None) if kind == "padded right" else slice(0, cut))] = False
        # transformers finds the last real token of a row, which it classifies by, through pad_token_id: no real token may bear it
        ids = np.where(real, np.where(ids == pad, (pad + 1) % _text(model).vocab, ids), pad)
        given = {"input_ids": ids, "attention_mask": real.astype(np.int64), **images}
        if kind == "padded left":
            given["position_ids"] = np.maximum(real.cumsum(1) - 1, 0)
        if kind == "token types":
            if "type_vocab_size" not in model.config:
                continue
            given["token_type_ids"] = rng.integers(0, model.config["type_vocab_size"], ids.shape)
        out.append((kind, given, real))
    return out


def _packed(model: Model, seed: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Three documents in one row, and each alone."""
    rng, lengths = np.random.default_rng(seed + 1), (7, 3, 5)
    documents = [_tokens(model, rng, (1, n)) for n in lengths]
    packed = {
        "input_ids": np.concatenate(documents, axis=1),
        "segment_ids": np.repeat(np.arange(1, len(lengths) + 1), lengths)[None],
        "position_ids": np.concatenate([np.arange(n) for n in lengths])[None],
    }
    return packed, [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in documents]


def _row(name: str, got: Any, want: Any, real: np.ndarray, tolerance: float) -> Row:
    def masked(x: Any) -> np.ndarray:
        x = np.asarray(x, np.float32)
        return x[real] if x.shape[:2] == real.shape else x.reshape(-1, x.shape[-1])

    far = lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    states = [far(masked(a), masked(b)) for a, b in zip(got["hidden_states"], want["hidden_states"], strict=True)]
    first = next((i for i, distance in enumerate(states) if not distance <= tolerance), None)
    compared = [(masked(got[key]), masked(want[key])) for key in OUTPUTS if key in got and key in want]
    compared = compared or [(masked(got["hidden_states"][-1]), masked(want["hidden_states"][-1]))]
    kl = top1 = None
    if "logits" in got and "logits" in want and compared[0][0].ndim == 2:
        a, b = (_log_softmax(x) for x in compared[0])
        kl, top1 = float((np.exp(b) * (b - a)).sum(-1).mean()), float((a.argmax(-1) == b.argmax(-1)).mean())
    return Row(name, max(float(np.abs(a - b).max()) for a, b in compared), max(far(a, b) for a, b in compared), kl, top1, first)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def table(rows: list[Row]) -> str:
    """The rows as text, one a line."""
    shown = [("inputs", "max abs", "relative", "KL", "top-1", "first layer that differs")]
    for r in rows:
        kl, top1 = ("-" if r.kl is None else f"{r.kl:.1e}"), ("-" if r.top1 is None else f"{r.top1:.1%}")
        shown.append((r.inputs, f"{r.absolute:.1e}", f"{r.relative:.1e}", kl, top1, "none" if r.first is None else str(r.first)))
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown)
