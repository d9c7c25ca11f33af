"""mT5: T5 version 1.1 in a hundred languages, of a larger vocabulary. Xue et al. 2021 (arXiv 2010.11934).

Arguments are the fields of the Hugging Face config (`model_type` "mt5"), with its defaults.
"""

import functools

from bigflax.models.families import t5

SIZES = {"tiny": t5.SIZES["tiny"]} | {
    name: dict(size, tie_word_embeddings=False)
    for name, size in {"small": t5.SMALL, "base": t5.BASE, "large": t5.LARGE, "xl": t5.XL, "xxl": t5.XXL}.items()
}
build = functools.partial(t5.build, **t5.SMALL, vocab_size=250112, feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
PREFIX, names, UNUSED, BUFFERS, IGNORED, FIXED = t5.PREFIX, t5.names, t5.UNUSED, t5.BUFFERS, t5.IGNORED, t5.FIXED
HEADS = t5.heads("MT5")


def settle(config, files):
    """As T5's, but for the scale, which there never is."""
    return t5.settle(config, files) | {"scale_decoder_outputs": False}
