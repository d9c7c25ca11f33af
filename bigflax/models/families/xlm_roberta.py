"""XLM-R: RoBERTa on a hundred languages, in a larger vocabulary. Conneau et al. 2020 (arXiv 1911.02116).

Arguments are the fields of the Hugging Face config (`model_type` "xlm-roberta").
"""

from bigflax.models.families import roberta

_R = roberta.SIZES
SIZES = {"tiny": _R["tiny"], "base": dict(_R["base"], vocab_size=250002), "large": dict(_R["large"], vocab_size=250002)}
build = roberta.build
PREFIX, NAMES, FIXED, BUFFERS, IGNORED, POSITION_ROWS = (
    roberta.PREFIX, roberta.NAMES, roberta.FIXED, roberta.BUFFERS, roberta.IGNORED, roberta.POSITION_ROWS,
)  # fmt: skip
HEADS = roberta.heads("XLMRoberta")
