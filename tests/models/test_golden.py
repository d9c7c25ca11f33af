"""Each family against outputs of PyTorch stored in golden/ (make_golden.py writes them), where PyTorch itself is absent."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from families import FAMILIES, OURS_ALONE, drawn, inputs, kinds, masked, outputs
from safetensors.numpy import save_file

import bigflax
from bigflax import models


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OURS_ALONE])
def test_outputs_are_those_of_pytorch(family, tmp_path):
    golden = np.load(Path(__file__).parent / "golden" / f"{family}.npz")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    save_file({name: drawn(name, shape) for name, shape in json.loads(str(golden["tensors"])).items()}, tmp_path / "model.safetensors")
    given, reals = inputs(family, kinds(family)[min(1, len(kinds(family)) - 1)])
    model, params = bigflax.load(str(tmp_path))
    got = jax.jit(model.apply)(params, **given)
    compared = [name for name in outputs(got) if f"out {name}" in golden]
    assert compared
    for name in compared:
        a, b = masked(got[name], reals), masked(golden[f"out {name}"], reals)
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), name  # float32 through three layers, summed in another order


def test_every_family_is_there():
    assert set(FAMILIES) == set(models.FAMILIES)
