"""Each family against outputs of PyTorch stored in golden/ (make_golden.py writes them), where PyTorch itself is absent."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from families import FAMILIES, drawn, inputs
from safetensors.numpy import save_file

import bigflax
from bigflax import models


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_pytorch(family, tmp_path):
    golden = np.load(Path(__file__).parent / "golden" / f"{family}.npz")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    save_file({name: drawn(name, shape) for name, shape in json.loads(str(golden["tensors"])).items()}, tmp_path / "model.safetensors")
    given, real = inputs(family, "padded right")
    model, params = bigflax.load(str(tmp_path))
    logits, want = np.asarray(jax.jit(model.apply)(params, **given)["logits"])[real], golden["logits"][real]
    assert np.abs(logits - want).max() <= 1e-4 * np.abs(want).max()  # float32 through three layers, summed in another order


def test_every_family_is_there():
    assert set(FAMILIES) == set(models.FAMILIES)
