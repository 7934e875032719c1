"""Loading holds each array once: the peak is little more than the file."""

import tracemalloc

import jax
import numpy as np
import pytest
import torch_writer
from models_to_save import random_params

from vit_jax import checkpoints, models
from vit_jax.checkpoints import FORMATS, array_files, file_array


@pytest.fixture(scope="module")
def large():
    """A model with a parameter tree of 29 MB, scanned and not, and its parameters."""
    fields = {"patch_size": 16, "width": 256, "depth": 9, "num_heads": 4, "num_classes": 10}
    scanned, unrolled = (models.build("vit", scan=scan, **fields) for scan in (True, False))
    return scanned, unrolled, random_params(scanned, np.zeros((1, 64, 64, 3), np.float32))


@pytest.mark.parametrize("to", ["npz", "timm", "pth"])
def test_the_peak_is_little_more_than_the_file(tmp_path, monkeypatch, large, to):
    # Stacks, too, in memory that tracemalloc sees.
    monkeypatch.setattr(file_array, "_empty", lambda shape: np.empty(shape, np.float32))
    scanned, unrolled, params = large
    path = tmp_path / f"c{FORMATS.find(to).ending if to != 'pth' else '.safetensors'}"
    checkpoints.save(params, scanned, path, "timm" if to == "pth" else to)
    if to == "pth":
        torch_writer.save(array_files.read_arrays(path), tmp_path / "c.pth")
        path = tmp_path / "c.pth"
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    for model in (scanned, unrolled):
        checkpoints.load(path, model)  # Whatever is imported or compiled once.
        tracemalloc.start()
        try:
            loaded = checkpoints.load(path, model)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # A stack of blocks is allocated beside them; the largest is a third of the file.
        assert size <= peak < (1.4 if model is scanned else 1.1) * size
        if model is scanned:
            jax.tree.map(np.testing.assert_array_equal, loaded, params)
