"""Images as tokens, and the heads that read them. The layers between are those of any encoder (transformer.py):

    Transformer(PatchEmbed(...), (Group((Block(Attention(causal=False), Mlp(...), Norm("layer")),), 12),), norm=Norm("layer"), head=...)

An image is cut into patches, each patch is projected to the width and gets a learned position, and learned tokens stand in front of them.
ViT: Dosovitskiy et al. 2021 (arXiv 2010.11929). DeiT: Touvron et al. 2021 (2012.12877). DINOv2: Oquab et al. 2023 (2304.07193).

`pixel_values` [B, C, H, W] have channels first and are normalized, as the processors of transformers give them; `data.channels_first` makes
them of images with channels last.

Left out on purpose: masked-image training (DINOv2's mask token is kept, so that a folder goes out as it came in, and nothing reads it).

Legend: B batch, T tokens, D width, C channels or labels, P Q a patch's height and width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigflax import ops
from bigflax.models.transformer import Inputs
from bigflax.nn import NORMAL, Attention, Initializer, Linear, Mlp, Norm, dropout, weight, zeros
from bigflax.sharding import constrain


def pair(size: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """(height, width) of a config's size, which is a number where both are the same."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class PatchEmbed(nn.Module):
    """Patches of an image as tokens, behind `tokens` learned ones that have positions (class, distillation) and `registers` that have none.

    What does not fill a patch at the right and lower edge is cut off. `resize` says how positions are interpolated for an image of another
    size than `image`: "cubic", "antialiased", or None, where such an image is refused.
    """

    features: int
    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int = 3
    tokens: tuple[str, ...] = ("class",)
    registers: int = 0
    mask: bool = False
    bias: bool = True
    resize: str | None = None
    norm: Norm | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    init: Initializer = NORMAL

    takes = "pixel_values"

    def example(self) -> Inputs:
        return {"pixel_values": jax.ShapeDtypeStruct((1, self.channels, *self.image), jnp.float32)}

    @nn.compact
    def __call__(self, pixel_values, position_ids=None, token_type_ids=None, table=None):
        """(x_BTD, None): there is no table of tokens."""
        (P, Q), C, D, B, shape = self.patch, self.channels, self.features, len(pixel_values), pixel_values.shape
        if len(shape) != 4 or shape[1] != C:
            raise ValueError(f"pixel_values of shape {shape} are not [batch, {C}, height, width]: channels come before height and width")
        whole, rows, columns = (self.image[0] // P, self.image[1] // Q), shape[2] // P, shape[3] // Q
        if shape[2:] != self.image and self.resize is None:
            raise ValueError(
                f"images of {shape[2]} x {shape[3]} pixels do not fit a model of {self.image[0]} x {self.image[1]}; resize them"
            )
        if not rows or not columns:
            raise ValueError(f"images of {shape[2]} x {shape[3]} pixels do not hold one patch of {P} x {Q}")
        pixels = pixel_values[:, :, : rows * P, : columns * Q].astype(self.dtype).reshape(B, C, rows, P, columns, Q)
        patches = pixels.transpose(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C, P, Q)
        x_BTD = ops.einsum("btcpq,cpqd->btd", patches, weight(self, "patches", (C, P, Q, D), "_ _ _ -> embed", self.init))
        if self.bias:
            x_BTD += weight(self, "patches_bias", (D,), "norm", zeros).astype(x_BTD.dtype)
        learned = lambda name, n: constrain(weight(self, name, (n, D), "_ <- embed", self.init), None, None).astype(x_BTD.dtype)
        repeated = lambda w_TD: jnp.broadcast_to(w_TD, (B, *w_TD.shape))
        n, at_TD = len(self.tokens), learned("positions", len(self.tokens) + whole[0] * whole[1])
        if (rows, columns) != whole:
            at_TD = jnp.concatenate([at_TD[:n], self._resized(at_TD[n:], whole, (rows, columns))])
        front = [learned(name, 1) + at_TD[i] for i, name in enumerate(self.tokens)]
        front += [learned("registers", self.registers)] if self.registers else []
        if self.mask:
            weight(self, "mask", (D,), "norm", zeros)
        x_BTD = jnp.concatenate([*map(repeated, front), x_BTD + at_TD[n:]], axis=1)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return constrain(dropout(self, x_BTD, self.dropout), "batch", "seq", None), None

    def _resized(self, at_TD, old, new):
        """Positions of a grid of `old` rows and columns as those of a grid of `new`; in float32."""
        grid = at_TD.astype(jnp.float32).reshape(*old, -1)
        rows, columns = (cubic(o, n, antialiased=self.resize == "antialiased") for o, n in zip(old, new, strict=True))
        return jnp.einsum("yxd,ry,cx->rcd", grid, rows, columns, precision="highest").reshape(new[0] * new[1], -1).astype(at_TD.dtype)


def cubic(old: int, new: int, *, antialiased: bool = False) -> np.ndarray:
    """[new, old] float32: how `new` places in a row are interpolated from `old`, as PyTorch's bicubic does it. Keys 1981.

    Plain, A is -0.75 and the edge is repeated beyond it; antialiased, A is -0.5, the kernel is as wide as a step where steps are wider than
    one, and what is beyond the edge does not count.
    """
    step = old / new
    wide, a = (max(step, 1.0), -0.5) if antialiased else (1.0, -0.75)
    there = np.arange(-2, old + 2)
    x = np.abs((np.arange(new)[:, None] + 0.5) * step - 0.5 - there) / wide
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    share = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialiased:
        share = share[:, 2:-2]
        return (share / share.sum(1, keepdims=True)).astype(np.float32)
    out = np.zeros((new, old))
    np.add.at(out.T, np.clip(there, 0, old - 1), share.T)
    return out.astype(np.float32)


class TwoPartHead(nn.Module):
    """Scores of the class token joined with the mean of the patches, `front` tokens behind it (DINOv2's linear probe)."""

    labels: int
    front: int = 1
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD, embed_VD=None, real_BT=None):
        joined_BD = jnp.concatenate([x_BTD[:, 0], x_BTD[:, self.front :].mean(1)], axis=-1)
        return {"logits": Linear(self.labels, "embed -> _", init=self.init, name="scores")(joined_BD)}


class TeacherHead(nn.Module):
    """Scores of the class token and of the distillation token, `cls_logits` and `distillation_logits`, and their mean (DeiT).

    Trained with a teacher, the first learn from the labels and the second from the teacher.
    """

    labels: int
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD, embed_VD=None, real_BT=None):
        one, other = (Linear(self.labels, "embed -> _", init=self.init, name=n)(x_BTD[:, i]) for i, n in enumerate(("scores", "taught")))
        return {"logits": (one + other) / 2, "cls_logits": one, "distillation_logits": other}


class AttentionPool(nn.Module):
    """One learned query that looks at all tokens, and an mlp behind it: `pooler_output` [B, D]. Lee et al. 2019 (1810.00825); SigLIP."""

    attention: Attention  # cross
    mlp: Mlp
    norm: Norm
    init: Initializer = NORMAL

    @nn.compact
    def __call__(self, x_BTD, embed_VD=None, real_BT=None):
        B, _, D = x_BTD.shape
        probe = jnp.broadcast_to(weight(self, "probe", (D,), "norm", self.init).astype(x_BTD.dtype), (B, 1, D))
        y_B1D, _ = self.attention(probe, memory=x_BTD, kv_segments=None if real_BT is None else real_BT.astype(jnp.int32))
        return {"pooler_output": (y_B1D + self.mlp(self.norm(y_B1D)))[:, 0]}
