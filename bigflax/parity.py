"""Parity: a folder's model here and in transformers with PyTorch, on the same inputs, in float32.

    bigflax parity FOLDER

Whatever the model reads is drawn at random. Of tokens there are several kinds of rows: plain, padded on the right and on the left, the longest
that the model takes (up to `longest`), two token types where it knows them, and documents packed into one row, which PyTorch reads one by one.
For each kind: the largest absolute difference of the outputs, the same relative to PyTorch's largest entry, and for logits the mean KL
divergence and how often the first choice agrees; and the first hidden state (0 is the embedding) that differs by more than the tolerance.

The only module that imports PyTorch. Left out on purpose: gradients, which tests/models/test_parity.py compares for every family.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigflax import hub, models
from bigflax.models.transformer import Embed
from bigflax.nn import Model

OUTPUTS = ("logits", "start_logits", "end_logits", "pooler_output", "text_embeds", "image_embeds", "logits_per_text")
KINDS = ("plain", "padded right", "padded left", "longest", "token types")
Inputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kind of input showed; `first` is the first hidden state out of tolerance, None where all are within."""

    inputs: str
    absolute: float
    relative: float
    kl: float | None
    top1: float | None
    first: str | None


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one kind and the masks [B, T] of what is real in them; `apart` are those that together hold the same, for PyTorch."""

    kind: str
    given: Inputs
    reals: list[np.ndarray]
    apart: list[Inputs]


def compare(source: str, *, tolerance: float = 1e-4, longest: int = 512, seed: int = 0) -> list[Row]:
    """One Row a kind of input. Raises ImportError that names the extra where PyTorch or transformers is absent, ValueError for a model that
    transformers does not have, else what `hub.load` raises."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"parity needs PyTorch and transformers: pip install 'bigflax[parity]' ({error})") from None
    folder = hub.fetch(source)
    model, params = hub.load(folder, dtype="float32")
    home = models.family(model.family)
    kind = home.HEADS[model.config["head"]][0]
    if not hasattr(transformers, str(kind)):
        raise ValueError(f"parity compares with transformers, which has no {model.family}; the family is bigflax's alone")
    theirs = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    ours = jax.jit(functools.partial(model.apply, hidden_states=True))
    # what transformers calls position_ids is in some families the row of a table that begins with rows for other uses
    before = model.module.embed.first_position if getattr(home, "POSITION_ROWS", False) else 0

    def reference(given: Inputs) -> dict[str, Any]:
        if before:
            at = np.arange(given["input_ids"].shape[1])[None]
            given = given | {"position_ids": given.get("position_ids", at) + before}
        with torch.no_grad():
            out = theirs(**{name: torch.from_numpy(x) for name, x in given.items()}, output_hidden_states=True)
        towers = {
            f"{tower}_hidden_states": out[f"{tower}_model_output"].hidden_states
            for tower in ("text", "vision")
            if f"{tower}_model_output" in out
        }
        states = {name: x for name, x in out.items() if name.endswith("hidden_states")} | towers
        return {name: out[name].numpy() for name in OUTPUTS if name in out} | {name: [x.numpy() for x in xs] for name, xs in states.items()}

    cases = _cases(model, longest, seed, hub.read_config(folder).get("pad_token_id") or 0)
    return [_row(case, ours(params, **case.given), _join([reference(given) for given in case.apart]), tolerance) for case in cases]


def _join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Outputs of documents read one by one, as those of one row; those of a whole document are left out."""
    if len(parts) == 1:
        return parts[0]
    join = lambda xs: np.concatenate(xs, axis=1)
    return {
        name: [join(xs) for xs in zip(*(part[name] for part in parts), strict=True)] if isinstance(x, list) else join([part[name] for part in parts])
        for name, x in parts[0].items()
        if isinstance(x, list) or x.ndim > 2 or name in ("start_logits", "end_logits")
    }  # fmt: skip


# -- inputs ----------------------------------------------------------------------------------------------------------------


def _embeds(model: Model) -> list[Embed]:
    """The embeddings of tokens: of the model, or of its parts."""
    parts = [getattr(model.module, part, None) for part in ("encoder", "decoder", "text")]
    embeds = [getattr(part, "embed", None) for part in (model.module, *parts)]
    return [embed for embed in embeds if isinstance(embed, Embed)]


def _cases(model: Model, longest: int, seed: int, pad: int) -> list[Case]:
    rng, example, embeds = np.random.default_rng(seed), model.module.example(), _embeds(model)
    if "input_features" in example:  # transformers hears sound of one length alone, as long as there are positions
        mels, frames = example["input_features"].shape[1], 2 * model.module.encoder.embed.positions
        example |= {"input_features": jax.ShapeDtypeStruct((1, mels, frames), jnp.float32)}
    rest: Inputs = {name: rng.normal(size=(3, *x.shape[1:])).astype(np.float32) for name, x in example.items() if x.dtype != jnp.int32}
    rows = [name.removesuffix("input_ids") for name in example if name.endswith("input_ids")]
    reads_again = "decoder_" in rows and model.config["head"] not in (None, "seq2seq_lm")  # the decoder of such a head reads the same
    rows = [""] if reads_again else rows
    if not rows:
        return [Case("plain", rest, [], [rest])]
    tables = [embed.positions or model.config.get("max_position_embeddings") or longest for embed in embeds]
    most, vocab = min(longest, *tables), embeds[0].vocab
    draw = lambda shape: rng.integers(min(5, vocab - 1), vocab, shape)
    cases = []
    for kind in KINDS:
        given, reals, n = dict(rest), [], most if kind == "longest" else min(24, most)
        if kind == "token types" and "type_vocab_size" not in model.config:
            continue
        for i, row in enumerate(rows):
            real = _real(kind, n - i)  # a decoder's rows are shorter, so that no output is taken for the encoder's
            # transformers finds the last real token of a row, which it classifies by, through pad_token_id: no real token may bear it
            ids = draw(real.shape)
            ids = np.where(real, np.where(ids == pad, (pad + 1) % vocab, ids), pad)
            if reads_again:  # a sequence's scores are those at its eos, one a row
                ids = np.where(real & (real[:, ::-1].cumsum(1)[:, ::-1] == 1), model.module.eos, ids)
            given |= {f"{row}input_ids": ids} | (
                {} if "input_features" in rest and not row else {f"{row}attention_mask": real.astype(np.int64)}
            )
            reals.append(real)
        if kind == "padded left" and rows == [""] and not reads_again:
            given["position_ids"] = np.maximum(reals[0].cumsum(1) - 1, 0)
        if kind == "token types":
            given["token_type_ids"] = rng.integers(0, model.config["type_vocab_size"], given["input_ids"].shape)
        cases.append(Case(kind, given, reals, [given]))
    if not rest and not reads_again and model.config["head"] not in ("sequence_classification", "embedding"):
        cases.append(_packed(rows, draw))
    return cases


def _real(kind: str, n: int) -> np.ndarray:
    real = np.ones((3, n), bool)
    for row, cut in enumerate((0, n // 4, n // 2)) if kind.startswith("padded") else ():
        real[row, (slice(n - cut, None) if kind == "padded right" else slice(0, cut))] = False
    return real


def _packed(rows: list[str], draw: Any) -> Case:
    """Three documents in one row, and each alone; a pair's two sides are of different lengths."""
    packed, reals, apart = {}, [], [{} for _ in range(3)]
    for row, lengths in zip(rows, ((7, 3, 5), (4, 6, 2)), strict=False):
        documents = [draw((1, n)) for n in lengths]
        segments = np.repeat(np.arange(1, 4), lengths)[None]
        packed |= {f"{row}input_ids": np.concatenate(documents, axis=1), f"{row}segment_ids": segments}
        packed |= {f"{row}position_ids": np.concatenate([np.arange(n) for n in lengths])[None]}
        reals.append(segments > 0)
        for one, ids in zip(apart, documents, strict=True):
            one |= {f"{row}input_ids": ids, f"{row}attention_mask": np.ones_like(ids)}
    return Case("packed", packed, reals, apart)


# -- differences -----------------------------------------------------------------------------------------------------------


def _row(case: Case, got: Any, want: Any, tolerance: float) -> Row:
    def seen(x: Any) -> np.ndarray:
        x = np.asarray(x, np.float32)
        real = next((real for real in case.reals if real.shape == x.shape[:2]), None)
        return x.reshape(-1, x.shape[-1]) if real is None else x[real]

    far = lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    states = {
        f"{name.removesuffix('hidden_states').replace('_', ' ')}{i}": (seen(a), seen(b))
        for name, xs in got.items()
        if name.endswith("hidden_states")
        for i, (a, b) in enumerate(zip(xs, want[name], strict=True))
    }
    first = next((name for name, (a, b) in states.items() if not far(a, b) <= tolerance), None)
    compared = {key: (seen(got[key]), seen(want[key])) for key in OUTPUTS if key in got and key in want} or dict([list(states.items())[-1]])
    kl = top1 = None
    if "logits" in compared and compared["logits"][0].ndim == 2:
        a, b = (_log_softmax(x) for x in compared["logits"])
        kl, top1 = float((np.exp(b) * (b - a)).sum(-1).mean()), float((a.argmax(-1) == b.argmax(-1)).mean())
    pairs = compared.values()
    return Row(case.kind, max(float(np.abs(a - b).max()) for a, b in pairs), max(far(a, b) for a, b in pairs), kl, top1, first)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def table(rows: list[Row]) -> str:
    """The rows as text, one a line."""
    shown = [("inputs", "max abs", "relative", "KL", "top-1", "first layer that differs")]
    for r in rows:
        kl, top1 = ("-" if r.kl is None else f"{r.kl:.1e}"), ("-" if r.top1 is None else f"{r.top1:.1%}")
        shown.append((r.inputs, f"{r.absolute:.1e}", f"{r.relative:.1e}", kl, top1, r.first or "none"))
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown)
