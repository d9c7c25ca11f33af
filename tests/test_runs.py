"""What a recipe is put together to."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from etils.epath import backend
from ml_collections import ConfigDict
from running import arguments, final, history, make_photo_recipe, steps_on_disk

from bigflax import data, recipes, runs, sharding, summaries, trees, writers
from bigflax.checkpoint import Checkpoints
from bigflax.main import main
from bigflax.writers import open_writers, read_jsonl


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


def test_a_source_of_its_own_to_validate_with(tmp_path):
    """All of one file is trained on, augmented, and all of the other is measured, as it is; without it a hash of names divides the one."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    for name, rows in {"train": slice(0, 16), "test": slice(16, 24)}.items():
        np.savez(tmp_path / f"{name}.npz", image=images[rows], labels=np.arange(24)[rows])
    source = lambda name: dict(kind="numpy", path=str(tmp_path / f"{name}.npz"))
    recipe = dict(
        model=dict(name="cnn", size="tiny", num_labels=24), task=dict(name="classification"), optimizer=dict(lr=1e-3), fit=dict(steps=9),
        data=dict(source=source("train"), validation_source=source("test"), size=8, batch_size=8, mean=(0.0,), std=(1.0,), min_area=1.0,
                  aspect=1.0, flip=0.0, central=1.0, validation_fraction=0.5, augment=[("crop", 3)]),
    )  # fmt: skip
    run = runs.Run(recipes.resolve(ConfigDict(recipe)))
    run.check()
    assert [sum(map(part.chosen, range(len(part.source)))) for split in ("train", "validation") for part in run.records(split)] == [16, 8]
    with run.loader("train") as loader:
        both = [next(loader), next(loader)]
    labels, pixels = (np.concatenate([np.asarray(batch[name]) for batch in both]) for name in ("labels", "pixel_values"))
    pixels = np.rint(255 * pixels[:, 0])
    assert sorted(labels) == [*range(16)] and (pixels != images[labels]).any((1, 2)).sum() > 8  # one of 49 crops is the image itself
    with run.loader("validation") as loader:
        (batch,) = [{name: np.asarray(value) for name, value in batch.items()} for batch in loader]
    assert sorted(batch["labels"]) == [*range(16, 24)]
    np.testing.assert_array_equal(np.rint(255 * batch["pixel_values"][:, 0]), images[batch["labels"]])
    divided = runs.Run(recipes.resolve(ConfigDict(recipe), ["data.validation_source=None"])).records("validation")
    assert [part.source.name(0) for part in divided] == ["train.npz:0"] and divided[0].split == "validation"


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
    assert summaries.summarized(config.work) is None
    trained = runs.Run(config).tokenizer
    opened = open_writers(config.work, tensorboard=False)  # its event files go through google-cloud-storage, of the extra gcs
    opened.write(5, {"loss": 2.5})
    opened.close()
    summaries.summarize(runs.Run(config), 5, "to be", 1.0, {}, print)
    assert summaries.summarized(config.work) == 5
    assert (tmp_path / "gs:/bucket/run/loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(data, "train_bpe", None)
    np.testing.assert_array_equal(runs.Run(config).tokenizer.encode("to be"), trained.encode("to be"))


@pytest.mark.slow
def test_images_and_texts_are_paired_by_recipe(tmp_path):
    """From files to the recall among all that is held out, whose batch is not full: two towers that agree with the words and the pixels of the data."""
    image = pytest.importorskip("PIL.Image", reason="an extra")
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i, tone in enumerate(range(8, 248, 20)):
            image.new("RGB", (16, 16), (tone, 255 - tone, 0)).save(tmp_path / f"{i}.png")
            file.write(json.dumps({"image": f"{i}.png", "text": f"a tone of {tone}"}) + "\n")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    pairs = dict(kind="jsonl", path=str(tmp_path / "pairs.jsonl"))
    recipe = dict(
        model=dict(name="clip", text_config=small, vision_config=dict(**small, patch_size=8), projection_dim=8), tokenizer=dict(kind="bytes"),
        data=dict(source=pairs, validation_source=pairs, folder=str(tmp_path), length=16, size=16, batch_size=16),
        task=dict(name="contrastive"), optimizer=dict(lr=1e-3), fit=dict(steps=2),
    )  # fmt: skip
    run = runs.Run(recipes.resolve(ConfigDict(recipe)))
    run.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config = run.model.config
    assert (config["text_config"]["eos_token_id"], config["vision_config"]["image_size"]) == (run.tokenizer.eos_id, 16)
    with run.loader("validation") as loader:
        (batch,) = loader
    both = lambda params: (run.loss_fn(params, batch)[1], run.model.apply(params, **batch)["logits_per_text"])
    metrics, similar = jax.jit(lambda key: both(run.model.init(key)))(jax.random.key(0))
    ranks = (similar[:12, :12] >= np.diag(similar)[:12, None]).sum(1) - 1
    for k in (1, 10):
        assert float(metrics[f"image_recall_at_{k}"].value) == pytest.approx((ranks < k).mean())


@pytest.mark.slow
def test_images_are_learned_stopped_and_continued(tmp_path, one_device, monkeypatch, capsys):
    """From a folder to a model that tells its classes apart; SIGTERM in the middle changes no bit, and what cannot be read is named."""
    recipe, whole = make_photo_recipe(tmp_path), tmp_path / "whole"
    broken = tmp_path / "photos" / "down" / "z.png"
    broken.write_bytes(next((tmp_path / "photos" / "down").glob("*.png")).read_bytes()[:100])
    assert main(arguments(recipe, f"work={whole}")) == 0
    out, summary = capsys.readouterr().out, json.loads((whole / "summary.json").read_text())
    assert "vit: 19.4K parameters" in out and "2 classes; batch 16 images of 16 x 16" in out and "held-out accuracy" in out
    assert summary["eval/accuracy"] > 0.95 and summary["sample"] is None
    assert json.loads((whole / "quarantine.jsonl").read_text())["name"] == "down/z.png"
    assert (whole / "loss.png").exists() and not (whole / "tokenizer").exists()

    write = lambda self, at, values: os.kill(os.getpid(), signal.SIGTERM) if at == 33 else None
    monkeypatch.setattr(writers.TensorBoard, "write", write)
    assert main(arguments(recipe)) == 75
    assert steps_on_disk(tmp_path / "work")[-1] == 33
    assert main(arguments(recipe)) == 0
    assert "resumed from step 33" in capsys.readouterr().out
    assert (history(tmp_path / "work"), final(tmp_path / "work")) == (history(whole), final(whole))

    assert main(["generate", f"--work={whole}", "--prompt=a"]) == 2
    assert "holds no model that continues text" in capsys.readouterr().err


def test_batch_norm_moves_with_a_recipe(tmp_path, one_device):
    """Running statistics reach the state: without them a held-out image would be normalized by what the network began with."""
    recipe = make_photo_recipe(tmp_path)
    text = recipe.read_text()
    recipe.write_text(
        text[: text.index("        model=")] + '        model=dict(name="cnn", size="tiny"),\n' + text[text.index("        data=") :]
    )
    assert main(arguments(recipe, "fit.steps=6", "fit.eval_every=6")) == 0
    run = runs.Run(recipes.resolve(recipes.load(str(recipe))))
    run.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with Checkpoints(tmp_path / "work" / "checkpoints") as checkpoints:
        weights = checkpoints.restore(run.state_like()).state.weights
    counts = {name: int(leaf) for name, leaf in trees.named_leaves(weights) if name.endswith("count")}
    assert counts == {"stem/0/norm/count": 6, "stem/2/norm/count": 6}
    record = next(record for record in read_jsonl(tmp_path / "work" / "metrics.jsonl") if "loss" in record)
    assert record["examples_per_second"] == pytest.approx(16 / record["step_time"]) and "tokens_per_second" not in record
