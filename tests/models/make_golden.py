"""Writes golden/FAMILY.npz with PyTorch: python tests/models/make_golden.py [FAMILY ...]

Each holds a config, the tensors' names and shapes, and the outputs of the model whose weights families.drawn makes from those names."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import FAMILIES, inputs, load_tensors, torch_model

HERE = Path(__file__).parent / "golden"


def main(families):
    import torch

    from bigflax import models

    HERE.mkdir(exist_ok=True)
    for family in families:
        head = next(head for head in ("causal_lm", "masked_lm") if head in models.family(family).HEADS)
        model = torch_model(family, head)
        given, _ = inputs(family, "padded right")
        with torch.no_grad():
            logits = model(**{name: torch.from_numpy(x) for name, x in given.items()}).logits.numpy()
        config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
        with tempfile.TemporaryDirectory() as folder:  # as they are named in the file, which is not always as in the module
            model.save_pretrained(folder)
            tensors = {name: list(w.shape) for name, w in load_tensors(folder).items()}
        np.savez_compressed(HERE / f"{family}.npz", config=json.dumps(config), tensors=json.dumps(tensors), logits=logits)


if __name__ == "__main__":
    main(sys.argv[1:] or FAMILIES)
