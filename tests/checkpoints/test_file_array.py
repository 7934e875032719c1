"""Arrays that stay in their file: what NumPy does with them, and a load of which each device reads
its part."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_cases import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from models_to_save import random_params

from vit_jax import checkpoints, models
from vit_jax.checkpoints import array_files, file_array, files, loading
from vit_jax.checkpoints.file_array import FileArray, OpenFile, Stack
from vit_jax.errors import UserError
from vit_jax.parallel import sharding


@pytest.fixture
def lazy(monkeypatch):
    """Every array of a file is a view of it, and is read a few numbers at a time."""
    for name, value in (("LEAST", 0), ("CHUNK", 96), ("SHORT_RUN", 12)):
        monkeypatch.setattr(file_array, name, value)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A file of 840 numbers in each of two types, and the numbers."""
    folder = tmp_path_factory.mktemp("numbers")
    values = np.random.default_rng(0).standard_normal(840).astype(ml_dtypes.bfloat16)
    found = {}
    for dtype in (np.dtype("<f4"), np.dtype(ml_dtypes.bfloat16)):
        path = folder / dtype.name
        path.write_bytes(b"header" + values.astype(dtype).tobytes())
        found[dtype] = OpenFile(str(path))
    return found, values.astype(np.float32)


SHAPES = ((4, 5, 42), (5, 7, 24), (840,), (1, 840), (7, 1, 5, 24), (2, 3, 4, 35), (40, 21))


@settings(max_examples=60)
@given(data=st.data())
def test_views_hold_what_numpy_makes_of_the_array(lazy_chunks, numbers, data):
    files_of, values = numbers
    dtype = data.draw(st.sampled_from([*files_of]))
    shape = data.draw(st.sampled_from(SHAPES))
    lazy, whole = FileArray(files_of[dtype], "f", dtype, 6, shape), values.reshape(shape)
    for _ in range(data.draw(st.integers(0, 4))):
        kind = data.draw(st.sampled_from(["transpose", "slice", "split", "reshape"]))
        if kind == "transpose":
            order = data.draw(st.permutations(range(whole.ndim)))
            lazy, whole = lazy.transpose(order), whole.transpose(order)
        elif kind == "slice" and whole.ndim:
            steps = [data.draw(st.integers(0, n)) for n in whole.shape]
            index = tuple(slice(n, None, data.draw(st.integers(1, 3))) for n in steps)
            index = data.draw(st.sampled_from([index, index[:1], (0,), (..., -1)]))
            if 0 in whole.shape and any(not isinstance(part, slice) for part in index):
                continue
            lazy, whole = lazy[index], whole[index]
        elif kind == "split" and whole.ndim and whole.shape[0] % 2 == 0:
            lazy, whole = (np.split(x, 2)[1] for x in (lazy, whole))
        elif kind == "reshape" and whole.ndim:
            wanted = data.draw(st.sampled_from([(-1,), (*whole.shape, 1), whole.shape[::-1]]))
            if whole.size:
                lazy, whole = lazy.reshape(wanted), whole.reshape(wanted)
    assert lazy.shape == whole.shape
    np.testing.assert_array_equal(np.asarray(lazy), whole)


@pytest.fixture(scope="module")
def lazy_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_array, "CHUNK", 96)
        patch.setattr(file_array, "SHORT_RUN", 12)
        yield


def test_operations_read_the_array(numbers):
    (file, _), values = numbers[0].values(), numbers[1].reshape(40, 21)
    lazy = FileArray(file, "f", np.dtype("<f4"), 6, (40, 21))
    np.testing.assert_array_equal(2 * lazy + lazy, 3 * values)
    np.testing.assert_array_equal(np.concatenate([lazy, lazy.T.T]), np.concatenate([values] * 2))
    np.testing.assert_array_equal(lazy[[3, 1]], values[[3, 1]])
    np.testing.assert_array_equal([*lazy][2], values[2])
    assert np.any(lazy)
    assert (lazy.max(), lazy.size) == (values.max(), 840)
    assert (lazy.T.ndim, lazy.nbytes, len(lazy.T)) == (2, 4 * 840, 21)
    stacked = Stack([lazy, values, lazy])
    np.testing.assert_array_equal(stacked[1:, 2, 3:5], np.stack([values] * 2)[:, 2, 3:5])
    np.testing.assert_array_equal(np.asarray(stacked), np.stack([values] * 3))


FOLDERS = sorted(p.parent for p in GOLDEN.glob("*_tiny/*/*model.safetensors"))
FOLDERS = [folder for folder in FOLDERS if [*folder.glob("*config.json")]]
COCA = GOLDEN / "hf_tiny" / "open_clip_coca"


def test_formats_make_the_same_of_views_as_of_arrays(monkeypatch):
    monkeypatch.setattr(file_array, "LEAST", 0)
    towers = {folder: "both" for folder in FOLDERS[::4]} | {COCA: "image"}
    read = {folder: loading.read_weights(folder, tower=of) for folder, of in towers.items()}
    monkeypatch.setattr(file_array, "LEAST", math.inf)
    for folder, found in read.items():
        assert any(isinstance(array, FileArray) for array in found.arrays.values()), folder
        expected = loading.read_weights(folder, tower=towers[folder])
        assert found.arrays.keys() == expected.arrays.keys()
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(np.asarray(found.arrays[name]), array)
        assert (found.fields, found.unknown, found.ignored) == (
            (expected.fields, expected.unknown, expected.ignored)
        )


FIELDS = {"patch_size": 4, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 8}


def test_each_device_reads_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(file_array, "LEAST", 0)
    model = models.build("vit", **FIELDS)
    params = random_params(model, np.zeros((1, 8, 8, 3), np.float32))
    checkpoints.save(params, model, tmp_path / "c.safetensors", "timm")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    places = sharding.param_shardings(shapes["params"], mesh)
    wanted = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
    )
    read, put = [], []
    read_into, device_put = FileArray.read_into, jax.device_put
    monkeypatch.setattr(
        FileArray, "read_into", lambda self, out: read.append(out.nbytes) or read_into(self, out)
    )
    monkeypatch.setattr(
        jax, "device_put", lambda x, device: put.append(x.nbytes) or device_put(x, device)
    )
    loaded, _ = checkpoints.load_with_report(tmp_path / "c.safetensors", model, lazy=True)
    held = sum(read)
    placed = jax.tree.map(sharding.place_whole, loaded, wanted)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held < size / 50  # The class token and its position, which are added.
    assert sum(read) < 1.05 * size
    assert max(put) <= max(x.nbytes for x in jax.tree.leaves(params)) / 8
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_damage_is_found_when_a_part_is_read(tmp_path, lazy):
    params = {name: np.ones((8, 6), np.float32) for name in ("a", "b")}
    params["b"][5, 2] = np.inf
    path = tmp_path / "c.safetensors"
    files.write_safetensors(path, params)
    arrays = array_files.read_arrays(path)
    np.testing.assert_array_equal(arrays["b"][:5], 1)
    with pytest.raises(UserError, match=r"c\.safetensors: b holds values that are not finite"):
        np.asarray(arrays["b"])
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"c\.safetensors: a is broken or cut short"):
        np.asarray(arrays["a"] + arrays["b"])
