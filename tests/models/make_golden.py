"""Writes golden/FAMILY.npz with PyTorch: python tests/models/make_golden.py [FAMILY ...]

Each holds a config, the tensors' names and shapes, and the outputs of the model whose weights families.drawn makes from those names."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import FAMILIES, OURS_ALONE, inputs, kinds, load_tensors, torch_model

HERE = Path(__file__).parent / "golden"


def main(families):
    import torch

    from bigflax import models

    HERE.mkdir(exist_ok=True)
    for family in families:
        head = next(iter(models.family(family).HEADS.keys() & {"causal_lm", "masked_lm", "seq2seq_lm"}), None)
        model = torch_model(family, head)
        given, _ = inputs(family, kinds(family)[min(1, len(kinds(family)) - 1)])
        with torch.no_grad():
            out = model(**{name: torch.from_numpy(x) for name, x in given.items()})
        stored = {f"out {name}": x.numpy() for name, x in out.items() if isinstance(x, torch.Tensor)}
        config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
        with tempfile.TemporaryDirectory() as folder:  # as they are named in the file, which is not always as in the module
            model.save_pretrained(folder)
            tensors = {name: list(w.shape) for name, w in load_tensors(folder).items()}
        np.savez_compressed(HERE / f"{family}.npz", config=json.dumps(config), tensors=json.dumps(tensors), **stored)


if __name__ == "__main__":
    main(sys.argv[1:] or [family for family in FAMILIES if family not in OURS_ALONE])
