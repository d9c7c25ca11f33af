"""Every way in which a tensor holds leaves: what is written is read back, whole and by any slice."""

import numpy as np
import pytest

from bigflax.models.names import entries

L, D, N, K, H, F, E = 3, 6, 4, 2, 5, 7, 2
QKV = "blocks/q blocks/k blocks/v"
MHA = {"blocks/q": (L, D, N, H), "blocks/k": (L, D, N, H), "blocks/v": (L, D, N, H)}
CASES = {  # the line, the leaves' shapes, the tensor's shape
    "permuted": (("h.{l}.w", "blocks/w", "F D -> D F"), {"blocks/w": (L, D, F)}, (F, D)),
    "as it is": (("wte", "embed", "V D"), {"embed": (F, D)}, (F, D)),
    "heads apart": (("h.{l}.o", "blocks/o", "D (N H) -> N H D"), {"blocks/o": (L, N, H, D)}, (D, N * H)),
    "three behind each other (GPT-2)": (("h.{l}.qkv", QKV, "D (S N H) -> S D N H"), MHA, (D, 3 * N * H)),
    "three within each head (NeoX)": (("h.{l}.qkv", QKV, "(N S H) D -> S D N H"), MHA, (N * 3 * H, D)),
    "of different sizes (Phi-3)": (
        ("h.{l}.qkv", QKV, "(N H) D -> D N H"),
        {"blocks/q": (L, D, N, H), "blocks/k": (L, D, K, H), "blocks/v": (L, D, K, H)},
        ((N + 2 * K) * H, D),
    ),
    "a single number": (("h.{l}.count", "blocks/count", ""), {"blocks/count": (L,)}, ()),
    "ones that we leave out": (("p", "w", "1 1 V D -> V D"), {"w": (F, D)}, (1, 1, F, D)),
    "a number": (("scale", "w", ""), {"w": ()}, ()),
    "a number in a row": (("scale", "w", "1"), {"w": ()}, (1,)),
    "filters": (("p", "w", "D C P Q -> C P Q D"), {"w": (E, K, H, D)}, (D, E, K, H)),
    "experts": (("h.{l}.e.{e}.w", "blocks/w", "F D -> D F"), {"blocks/w": (L, E, D, F)}, (F, D)),
}


@pytest.mark.parametrize("line, shapes, theirs", CASES.values(), ids=CASES)
def test_written_and_read(line, shapes, theirs):
    rng = np.random.default_rng(0)
    leaves = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    (entry,) = entries({line[0]: line[1:]})
    files = {name: entry.write(at, leaves.__getitem__) for name, at in entry.names(shapes)}
    assert entry.shape(shapes) == theirs and {w.shape for w in files.values()} == {theirs}
    assert sum(w.size for w in files.values()) == sum(w.size for w in leaves.values())
    for name, shape in shapes.items():
        for _ in range(20):
            index = tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in shape)
            np.testing.assert_array_equal(entry.read(name, index, shapes, files.__getitem__, float), leaves[name][index])


def test_a_tensor_is_what_pytorch_multiplies_with():
    """Known by hand: y = x W^T of PyTorch is x w of ours, and in GPT-2's joined tensor keys follow all queries."""
    w = np.arange(6.0).reshape(1, 2, 3)
    (entry,) = entries({"h.{l}.w": ("blocks/w", "F D -> D F")})
    np.testing.assert_array_equal(entry.write((0,), {"blocks/w": w}.__getitem__), w[0].T)
    (joined,) = entries({"h.{l}.qk": ("blocks/q blocks/k", "D (S N H) -> S D N H")})
    q, k = np.zeros((1, 2, 1, 3)), np.ones((1, 2, 1, 3))
    np.testing.assert_array_equal(joined.write((0,), {"blocks/q": q, "blocks/k": k}.__getitem__), [[0, 0, 0, 1, 1, 1]] * 2)


def test_a_layer_apart():
    """The first of three has another shape and no axis of layers; with an empty pattern a tensor is a single number."""
    table = {"h.{l}.w": ("blocks/w", "F D -> D F"), "h.{l}.n": ("blocks/n", "")}
    made = entries(table, {"blocks": [("blocks_0", 0, 1, 0), ("blocks_1", 1, 1, 2)]})
    leaves = {"blocks_0/w": np.ones((D, F)), "blocks_0/n": np.int32(3), "blocks_1/w": np.ones((2, D, D)), "blocks_1/n": np.arange(2)}
    shapes = {leaf: w.shape for leaf, w in leaves.items()}
    written = {name: entry.write(at, leaves.__getitem__) for entry in made for name, at in entry.names(shapes)}
    assert {name: w.shape for name, w in written.items()} == {
        "h.0.w": (F, D), "h.1.w": (D, D), "h.2.w": (D, D), "h.0.n": (), "h.1.n": (), "h.2.n": (),
    }  # fmt: skip
    assert [int(written[f"h.{i}.n"]) for i in range(3)] == [3, 0, 1]


def test_layers_of_two_kinds_and_a_rest():
    """Seven layers: (a, b, c) twice and one more a. Each line serves its own layers."""
    made = entries({"h.{l}.w": ("blocks/w", "F D -> D F")}, {"blocks": [("blocks_0", 0, 3, 2), ("blocks_1", 6, 1, 1)]})
    shapes = {leaf: (2, D, F) for leaf in ("blocks_0/0/w", "blocks_0/1/w", "blocks_0/2/w")} | {"blocks_1/w": (1, D, F)}
    served = {entry.leaves[0]: [name for name, _ in entry.names(shapes)] for entry in made}
    assert served == {
        "blocks_0/0/w": ["h.0.w", "h.3.w"], "blocks_0/1/w": ["h.1.w", "h.4.w"], "blocks_0/2/w": ["h.2.w", "h.5.w"], "blocks_1/w": ["h.6.w"],
    }  # fmt: skip
