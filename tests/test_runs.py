"""What a recipe is put together to."""

import numpy as np
from etils.epath import backend
from ml_collections import ConfigDict

from bigflax import data, recipes, runs
from bigflax.writers import open_writers


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


def test_a_work_folder_in_a_bucket(tmp_path, monkeypatch):
    """What a run leaves besides checkpoints (Orbax writes those itself) goes to gs:// too, and is found there by the run that continues."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setenv("EPATH_USE_TF", "false")
    bucket = DirFileSystem(str(tmp_path), LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
    (tmp_path / "a.txt").write_text("to be or not to be " * 200)
    recipe = dict(
        work="gs://bucket/run", model=dict(name="gpt2", size="tiny"), task=dict(name="causal_lm"), optimizer=dict(lr=1e-3), fit=dict(steps=5),
        tokenizer=dict(kind="bpe", vocab_size=300), data=dict(source=dict(kind="text", path=str(tmp_path / "a.txt")), length=64, batch_size=8),
    )  # fmt: skip
    config = recipes.resolve(ConfigDict(recipe))
    assert runs.summarized(config.work) is None
    trained = runs.Run(config).tokenizer
    writers = open_writers(config.work, tensorboard=False)  # its event files go through google-cloud-storage, of the extra gcs
    writers.write(5, {"loss": 2.5})
    writers.close()
    runs.summarize(runs.Run(config), 5, "to be", 1.0, print)
    assert runs.summarized(config.work) == 5
    assert (tmp_path / "gs:/bucket/run/loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(data, "train_bpe", None)
    np.testing.assert_array_equal(runs.Run(config).tokenizer.encode("to be"), trained.encode("to be"))
