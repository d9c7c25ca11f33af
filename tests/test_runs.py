"""What a recipe is put together to."""

import numpy as np
from ml_collections import ConfigDict

from bigflax import recipes, runs


def test_held_out_rows_are_full(tmp_path):
    """One pass is one shard: with one for each row of the batch, most rows would be padding once the short shards end."""
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("".join(chr(c) for c in rng.integers(97, 123, rng.integers(20, 900))))
    recipe = dict(
        model=dict(name="gpt2", size="tiny"), tokenizer=dict(kind="bytes"), task=dict(name="causal_lm"), optimizer=dict(lr=1e-3), fit=dict(steps=50),
        data=dict(source=dict(kind="text", path=str(tmp_path / "*.txt")), length=64, batch_size=8, validation_fraction=0.5, shards=8),
    )  # fmt: skip
    run = runs.Run(recipes.resolve(ConfigDict(recipe)))
    filled = np.array([(np.asarray(batch["segment_ids"]) > 0).mean() for batch in run.loader("validation")])
    assert filled[:-1].min() > 0.8  # first fit; the last batch takes what is left
