"""Two towers that meet: a text encoder and an image encoder whose embeddings are near where the two belong together.

    TwoTower(text=Transformer(Embed(...), ...), vision=Transformer(PatchEmbed(...), ..., head=...), end="last", ...)

The text tower is read at one token, the vision tower at its head's `pooler_output`; both are projected and scaled to length 1. Either input
may be missing: then only the other's embeddings come out. CLIP: Radford et al. 2021 (arXiv 2103.00020). SigLIP: Zhai et al. 2023 (2303.15343).

    text_embeds, image_embeds [B, D]      of length 1, float32
    logits_per_text [B_text, B_image]     logit_scale * text . image (+ logit_bias), and transposed logits_per_image; not with `logits=False`
    logit_scale, logit_bias               learned numbers; the scale as it multiplies, the logarithm of which is learned
    text_hidden_states, vision_hidden_states    on request, as transformer.py gives them; so too text_attentions, text_qkv ...

Left out on purpose: losses (`tasks.contrastive`), and CLIP's ceiling of 100 for the scale, which its authors enforced between steps.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigflax.models import names
from bigflax.models.transformer import Inputs, Transformer
from bigflax.nn import Linear, weight
from bigflax.sharding import constrain


class TwoTower(nn.Module):
    """`end` says which token of a text stands for it: its "last", the first that is this id, or the first of the "highest" id."""

    text: Transformer
    vision: Transformer
    end: int | str = "last"
    text_project: Linear | None = None
    image_project: Linear | None = None
    scale: float = 2.6592  # log(1 / 0.07)
    bias: float | None = None

    def example(self) -> Inputs:
        return {**self.text.example(), **self.vision.example()}

    def places(self) -> names.Places:
        return {**names.below("text", self.text.places()), **names.below("vision", self.vision.places())}

    @nn.compact
    def __call__(
        self, input_ids=None, attention_mask=None, position_ids=None, *, pixel_values=None, logits=True, hidden_states=False,
        attentions=False, qkv=False,
    ) -> dict[str, Any]:  # fmt: skip
        if input_ids is None and pixel_values is None:
            raise ValueError("this model takes input_ids, pixel_values or both, not nothing")
        out: dict[str, Any] = {}
        asked = {"hidden_states": hidden_states, "attentions": attentions, "qkv": qkv}
        if input_ids is not None:
            said = self.text(input_ids, attention_mask, position_ids=position_ids, **asked)
            pooled_BD = said["last_hidden_state"][jnp.arange(len(input_ids)), end_of(input_ids, self.end)]
            out["text_embeds"] = unit(pooled_BD if self.text_project is None else self.text_project(pooled_BD))
            out |= {f"text_{name}": said[name] for name in asked if name in said}
        if pixel_values is not None:
            seen = self.vision(pixel_values=pixel_values, **asked)
            pooled_BD = seen["pooler_output"]
            out["image_embeds"] = unit(pooled_BD if self.image_project is None else self.image_project(pooled_BD))
            out |= {f"vision_{name}": seen[name] for name in asked if name in seen}
        out["logit_scale"] = jnp.exp(weight(self, "logit_scale", (), "", nn.initializers.constant(self.scale)).astype(jnp.float32))
        if self.bias is not None:
            out["logit_bias"] = weight(self, "logit_bias", (), "", nn.initializers.constant(self.bias)).astype(jnp.float32)
        if logits and input_ids is not None and pixel_values is not None:
            similar = jnp.einsum("td,id->ti", out["text_embeds"], constrain(out["image_embeds"], None, None))
            out["logits_per_text"] = out["logit_scale"] * similar + out.get("logit_bias", 0.0)
            out["logits_per_image"] = out["logits_per_text"].T
        return out


def end_of(ids_BT: jax.Array, end: int | str) -> jax.Array:
    """The place of the token that stands for each text: [B]. Place 0 where a row has no such token."""
    if end == "last":
        return jnp.full(len(ids_BT), ids_BT.shape[1] - 1)
    return jnp.argmax(ids_BT if end == "highest" else ids_BT == end, axis=1)


def unit(x_BD: jax.Array) -> jax.Array:
    """Rows of length 1, float32."""
    x_BD = x_BD.astype(jnp.float32)
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)
