"""bigflax: pretrain, fine-tune and shrink large models on TPU and GPU meshes with JAX and Flax.

The public names, each loaded on first use: importing bigflax touches no device, reads no network and sets no JAX option.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "bigflax.train": ("State", "init_state", "state_like", "train_step", "eval_step", "evaluate", "fit"),
    "bigflax.sharding": ("make_mesh", "constrain"),
    "bigflax.hosts": ("start_hosts", "StopSignal"),
    "bigflax.metrics": ("Mean",),
    "bigflax.checkpoint": ("Checkpoints", "restore_params", "target_like"),
    "bigflax.generate": ("generate",),
    "bigflax.hub": ("load", "save"),
    "bigflax.adapters": ("load_adapter", "save_adapter"),
    "bigflax.weights": ("LoRA", "Quantized", "dense"),
    "bigflax.nn": ("Model",),
    "bigflax.planner": ("plan",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = (
    *("checkpoint", "chips", "curves", "data", "flops", "hub", "losses", "metrics", "models", "nn", "ops", "optim", "sharding", "planner"),
    *("adapters", "gguf", "peft", "tasks", "topology", "trees", "weights", "yardsticks"),
)

__all__ = [*_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"bigflax.{name}")
    raise AttributeError(f"module 'bigflax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
