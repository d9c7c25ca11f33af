"""Mixup and cutmix: images of a batch mixed with one another, and their labels in the same shares. Inside the step, so a function of its key.

    mixup     x = s x_i + (1 - s) x_j                            Zhang et al. 2018 (arXiv 1710.09412)
    cutmix    a box of x_j, (1 - s) of the area, inside of x_i   Yun et al. 2019 (arXiv 1905.04899)

s ~ Beta(alpha, alpha) for each image, and j is the row before i: a batch is in random order anyhow, and on a mesh only rows at a device's edge
travel. Where both are asked for, each image takes one of them with even chances. A row without a label, and one whose partner has none,
stays as it is.

Legend: B batch, C channels (of images) or classes (of targets), H height, W width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigflax.losses import IGNORE


def mixed(batch: Mapping[str, Any], rng: jax.Array, *, classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> dict[str, Any]:
    """The batch with `pixel_values` [B, C, H, W] mixed and soft `labels` [B, classes], rows of -100 where there was no label. `mixup` and `cutmix`
    are alphas, 0 for not at all."""
    if min(mixup, cutmix) < 0 or mixup == cutmix == 0:
        raise ValueError(f"mixup {mixup} and cutmix {cutmix} are at least 0, and one of them is above")
    if "pixel_values" not in batch or batch["labels"].ndim != 1:
        raise ValueError(f"mixup and cutmix are for pixel_values with labels [B]; this batch has {', '.join(batch)}")
    images_BCHW, labels_B = batch["pixel_values"], batch["labels"]
    B, _, H, W = images_BCHW.shape
    which, share, at = jax.random.split(rng, 3)
    cuts_B = jax.random.bernoulli(which, 0.5 if mixup and cutmix else float(cutmix > 0), (B,))
    alpha_B = jnp.where(cuts_B, cutmix, mixup)
    share_B = jax.random.beta(share, alpha_B, alpha_B)
    before = lambda x: jnp.roll(x, 1, axis=0)
    alone_B = (labels_B == IGNORE) | (before(labels_B) == IGNORE)

    # The part of each pixel that is its own: one number for mixup; for cutmix 0 in the box, whatever of it lies in the image, and 1 outside.
    side_B = jnp.sqrt(1 - share_B)
    inside = lambda n, centre_B: jnp.abs(jnp.arange(n) + 0.5 - n * centre_B[:, None]) < n * side_B[:, None] / 2
    y_B, x_B = jax.random.uniform(at, (2, B))
    box_BHW = inside(H, y_B)[:, :, None] & inside(W, x_B)[:, None, :]
    own_BHW = jnp.where(cuts_B[:, None, None], ~box_BHW, share_B[:, None, None])
    own_BHW = jnp.where(alone_B[:, None, None], 1.0, own_BHW)
    true_B1 = own_BHW.mean((1, 2))[:, None]  # of the pixels that there are

    own_B1HW = own_BHW[:, None].astype(images_BCHW.dtype)
    hot_BC = jax.nn.one_hot(labels_B, classes)
    soft_BC = true_B1 * hot_BC + (1 - true_B1) * before(hot_BC)
    return {
        **batch,
        "pixel_values": own_B1HW * images_BCHW + (1 - own_B1HW) * before(images_BCHW),
        "labels": jnp.where(labels_B[:, None] == IGNORE, jnp.float32(IGNORE), soft_BC),
    }
