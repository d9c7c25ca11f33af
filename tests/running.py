"""Runs of `bigflax train` small enough to be killed, moved and compared: their text, recipe, command, and what they leave.

Not a test: test_resume.py, test_hosts.py, test_bad_input.py and test_main.py share it.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from bigflax import recipes, runs, sharding, trees
from bigflax.checkpoint import Checkpoints
from bigflax.writers import read_jsonl

RECIPE = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        work={work!r},
        model=dict(name="gpt2", size="tiny", n_embd=32, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0),
        tokenizer=dict(kind="bytes"),
        data=dict(source=dict(kind="text", path={text!r}), length=32, batch_size=8, validation_fraction=0.2),
        task=dict(name="causal_lm"),
        optimizer=dict(lr=1e-2, warmup_steps=2),
        fit=dict(steps=12, log_every=1, save_every=3),
    ))
"""

WORDS = "the a small large red blue cat dog bird tree house river sees finds keeps under over near with and then slowly again".split()
LEARNED = ("step", "loss", "grad_norm", "accuracy")  # what a resumed run must repeat; the other metrics are times


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def make_text(folder: Path, files: int = 40) -> Path:
    """Made-up documents of 50 words, the same ones each time."""
    chance = random.Random(0)
    folder.mkdir()
    for i in range(files):
        (folder / f"{i:03}.txt").write_text(" ".join(chance.choices(WORDS, k=50)) + ".\n")
    return folder


def make_recipe(folder: Path) -> Path:
    """A recipe file with text of its own and the work folder `folder`/work. Its model has dropout (on the embeddings), so randomness must resume too."""
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(work=str(folder / "work"), text=str(make_text(folder / "text"))))
    return path


def arguments(recipe: Path, *overrides: str) -> list[str]:
    """What stands behind `bigflax`; an override is written "fit.steps=3"."""
    return ["train", f"--config={recipe}", *(f"--config.{text}" for text in overrides)]


def xla_flags(devices: int = 0) -> str:
    """XLA_FLAGS of a process that a test starts: those of the tests, which compile fast, and so many fake devices, where it does not say them itself."""
    text = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    return f"{text} --xla_force_host_platform_device_count={devices}" if devices else text


@contextlib.contextmanager
def started(argv: list[str], devices: int = 1) -> Iterator[subprocess.Popen]:
    """`python -m bigflax.main ...` on fake CPU devices; the process never outlives the block."""
    env = {**os.environ, "XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bigflax.main", *argv, f"--fake-devices={devices}"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def ended(child: subprocess.Popen, timeout: float = 400) -> Ended:
    out, err = child.communicate(timeout=timeout)
    return Ended(child.returncode, out, err)


def completed(argv: list[str], devices: int = 1) -> Ended:
    with started(argv, devices) as child:
        return ended(child)


def wait_for(condition: Callable[[], Any], child: subprocess.Popen, timeout: float = 400) -> Any:
    """Polls until `condition()` holds or the process has ended, whichever comes first, and returns its last value."""
    until = time.monotonic() + timeout
    while not (value := condition()) and child.poll() is None:
        if time.monotonic() > until:
            raise TimeoutError(f"nothing happened within {timeout} s")
        time.sleep(0.001)
    return value


# -- what a run leaves --------------------------------------------------------------------------------------------------


def history(work: Path) -> list[tuple]:
    """What was learned at each step, to the bit (JSON keeps floats exactly)."""
    return [tuple(record[name] for name in LEARNED) for record in read_jsonl(work / "metrics.jsonl") if "loss" in record]


def steps_done(work: Path) -> int:
    """The step of the last line of the log, cheap enough to ask often."""
    try:
        with open(work / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines[-2:] if line.startswith(b'{"step": ') and line.endswith(b"}\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def steps_on_disk(work: Path) -> list[int]:
    """The complete checkpoints, by their names."""
    folder = work / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.exists() else []


def temporary(work: Path) -> list[str]:
    """What a save in progress, or one that was cut off, has in the folder."""
    try:
        return [name for name in os.listdir(work / "checkpoints") if not name.isdigit()]
    except FileNotFoundError:
        return []


class Final(NamedTuple):
    step: int
    sha256: str
    data: Any


def restored(work: Path) -> tuple[Any, Any]:
    """The newest checkpoint on one device, and the state that the run began with."""
    with Checkpoints(work / "checkpoints") as checkpoints:
        config = recipes.unflatten(checkpoints.meta()["config"])
        config.work = str(work)
        run = runs.Run(config)
        run.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        return checkpoints.restore(run.state_like()), run.init_state()


def final(work: Path) -> Final:
    """The newest checkpoint: its step, the hash of every array in it (weights, optimizer, counters), and the position in the data."""
    digest, found = hashlib.sha256(), restored(work)[0]
    for name, leaf in trees.named_leaves(found.state):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return Final(found.step, digest.hexdigest(), found.data)


def child_python(code: str, *argv: str, env: dict[str, str] | None = None, timeout: float = 400) -> str:
    """The standard output of a Python program, which must end well."""
    done = subprocess.run([sys.executable, "-c", code, *argv], env=env or {**os.environ}, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.rstrip("\n")


# -- chips that are not here ----------------------------------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (extra plan) is not installed")
TPU = dict(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip


def for_tpu(code: str, *argv: str, level: str = "O0") -> str:
    """The standard output of a Python program that compiles for TPUs; a child, because libtpu looks for one at start.

    At "O0" the compiler takes a seventh of the time. What is sent was the same in three layouts of test_promises.py (fsdp, fsdp x tensor, two
    slices), within 5% of each kind and axis; temporaries may be three times as large, so a bound on them is held at "O2", the default.
    """
    return child_python(code, *argv, env=os.environ | TPU | {"JAX_OPTIMIZATION_LEVEL": level}, timeout=900)


# -- images ---------------------------------------------------------------------------------------------------------------

PICTURES = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        work={work!r},
        model=dict(name="vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=4),
        data=dict(source=dict(kind="images", path={photos!r}), size=16, batch_size=16, min_area=0.7, validation_fraction=0.25, shards=4),
        task=dict(name="classification"),
        optimizer=dict(lr=3e-3, warmup_steps=5, weight_decay=0.01),
        fit=dict(steps=120, log_every=1, eval_every=120),
    ))
"""


def make_photos(folder: Path, each: int = 60) -> Path:
    """Stripes with noise, of all widths and places, in two subfolders: "across" and "down". Sizes differ from file to file."""
    image = pytest.importorskip("PIL.Image", reason="an extra")
    rng = np.random.default_rng(0)
    for i in range(2 * each):
        height, width = rng.integers(20, 40, 2)
        place = np.linspace(0, 1, height)[:, None] if i % 2 else np.linspace(0, 1, width)[None]
        wave = np.sin(2 * np.pi * (place * rng.uniform(2, 4) + rng.random()))[..., None]
        pixels = 128 + 80 * wave * np.sign(rng.normal(size=3)) + rng.normal(size=(height, width, 3)) * 10
        path = folder / ("across", "down")[1 - i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def make_photo_recipe(folder: Path) -> Path:
    """A recipe file of a small ViT with photos of its own and the work folder `folder`/work."""
    path = folder / "photos.py"
    path.write_text(PICTURES.format(work=str(folder / "work"), photos=str(make_photos(folder / "photos"))))
    return path
