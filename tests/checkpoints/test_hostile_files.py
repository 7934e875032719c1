"""Broken and hostile files end in one clear line, and nothing of them is run or believed."""

import io
import itertools
import json
import os
import shutil
import struct
import sys
import zipfile

import fsspec
import ml_dtypes
import numpy as np
import pytest
from models_to_save import build

from vit_jax import checkpoints
from vit_jax.checkpoints import array_files, files, loading, released
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.checkpoints.formats import hf
from vit_jax.checkpoints.source import Source
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, directory with the same checkpoint in every format)."""
    model, params, _ = build("token")
    folder = tmp_path_factory.mktemp("saved")
    for to, name in (("npz", "c.npz"), ("timm", "c.safetensors"), ("hf", "hf"), ("orbax", "own")):
        checkpoints.save(params, model, folder / name, to)
    return model, folder


def refused(path, model, words):
    with pytest.raises(UserError, match=words) as error:
        checkpoints.load(path, model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["c.npz", "c.safetensors"])
def test_cut_short_anywhere(saved, tmp_path, name):
    model, folder = saved
    whole = (folder / name).read_bytes()
    for size in (0, 3, 8, 9, 60, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UserError):
            checkpoints.load(tmp_path / name, model)


@pytest.mark.parametrize("name", ["c.npz", "c.safetensors"])
def test_flipped_bytes_never_raise_anything_else(saved, tmp_path, name):
    """An archive has checksums, so that what is read of it at all is as it was."""
    _, folder = saved
    whole = (folder / name).read_bytes()
    before = array_files.read_arrays(folder / name)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        # Half of the damage hits the headers, where it hurts.
        limit = len(whole) if rng.integers(2) else 2000
        for place in rng.integers(0, limit, 3):
            damaged[place] = rng.integers(256)
        (tmp_path / name).write_bytes(bytes(damaged))
        try:
            found = array_files.read_arrays(tmp_path / name)
        except UserError:
            refused += 1
            continue
        if name.endswith(".npz"):
            assert found.keys() == before.keys()
            assert all(found[key].tobytes() == array.tobytes() for key, array in before.items())
    assert refused > 50


def test_missing_and_foreign_files(saved, tmp_path):
    model, _ = saved
    refused(tmp_path / "absent.npz", model, "there is no checkpoint")
    (tmp_path / "page.npz").write_text("<html>Not found</html>")
    refused(tmp_path / "page.npz", model, "is no checkpoint")
    refused(tmp_path, model, "directory without a checkpoint")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    refused(tmp_path / "other.npz", model, "no format known")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w") as archive:
        archive.writestr("x.npy", npy_bytes(np.zeros(1)))
    refused(tmp_path / "empty.npz", model, "no format known")


def npy_bytes(array, allow_pickle=False):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return sys.exit, (66,)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.symlink_to(path), os.mkdir])  # fmt: skip
def test_only_regular_files_are_opened(saved, tmp_path, make):
    """A pipe would be waited for, and a device read, for ever."""
    model, folder = saved
    for name in ("hf/config.json", "hf/model.safetensors", "own/0/manifest/metadata"):
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(folder / name.partition("/")[0], copy)
        part = copy / name.partition("/")[2]
        part.unlink()
        make(part)
        with pytest.raises(UserError):
            checkpoints.load(copy, model)
    make(tmp_path / "alone")
    with pytest.raises(UserError):
        checkpoints.load(tmp_path / "alone", model)
    with pytest.raises(UserError):
        released.read_index(tmp_path / "alone")


def test_large_texts_are_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(files.MAX_JSON + 1)
    with pytest.raises(UserError, match="at most 16777216 are read"):
        files.read_json(tmp_path / "config.json")


def test_whatever_a_parser_raises_is_one_line(tmp_path):
    for error in (RecursionError(), MemoryError("s_push"), AssertionError("a\nb"), KeyError("x")):
        line = r"^c\.npz is broken or cut short: [^\n]+$"
        with pytest.raises(UserError, match=line), files.reading("c.npz"):
            raise error


def test_pickled_objects_are_not_read(saved, tmp_path):
    objects = np.empty(1, object)
    objects[0] = Malicious()
    write_zip(tmp_path / "c.npz", [("cls/embedding/b.npy", npy_bytes(objects, allow_pickle=True))])
    refused(tmp_path / "c.npz", saved[0], "pickled objects")


@pytest.mark.parametrize("name", ["../evil.npy", "a/../../evil.npy", "readme.txt"])
def test_names_that_are_no_arrays(saved, tmp_path, name):
    write_zip(tmp_path / "c.npz", [(name, npy_bytes(np.zeros(1, np.float32)))])
    refused(tmp_path / "c.npz", saved[0], "no name of an array")


def test_names_that_come_twice(saved, tmp_path):
    data = npy_bytes(np.zeros(1, np.float32))
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(tmp_path / "c.npz", [("cls.npy", data), ("cls.npy", data)])
    refused(tmp_path / "c.npz", saved[0], "no name of an array")


def test_a_zip_bomb_is_not_unpacked(saved, tmp_path):
    zeros = npy_bytes(np.zeros(array_files.ALWAYS_ALLOWED // 2, np.float32))
    write_zip(tmp_path / "c.npz", [("cls/embedding/b.npy", zeros)], zipfile.ZIP_DEFLATED)
    assert (tmp_path / "c.npz").stat().st_size < 200_000
    refused(tmp_path / "c.npz", saved[0], "no checkpoint compresses like that")


def test_a_fresh_head_of_zeros_compresses_and_is_read(tmp_path):
    arrays = {"head/kernel": np.zeros((768, 5000), np.float32)}
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    assert array_files.read_arrays(tmp_path / "c.npz")["head/kernel"].shape == (768, 5000)


@pytest.mark.parametrize("shape", [(10**12,), (2**62, 4), (5,), (-1, -3)])
def test_headers_that_declare_what_is_not_there(saved, tmp_path, shape):
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    write_zip(tmp_path / "c.npz", [("cls/embedding/b.npy", stream.getvalue() + bytes(12))])
    with pytest.raises(UserError):
        checkpoints.load(tmp_path / "c.npz", saved[0])


@pytest.mark.parametrize(
    "header",
    [
        b"(" * 5000,
        b"[" * 9000 + b"]" * 9000,
        b"{'descr': " + b"[" * 3000 + b"'<f4'" + b"]" * 3000 + b"}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 4000 + b")}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1000000000000)}",
        b"{'descr': 'S0', 'fortran_order': False, 'shape': (1000000000000,)}",
        b"{'descr': ('<f4', (1000000, 1000000)), 'fortran_order': False, 'shape': ()}",
        b"\xff" * 100,
    ],
)
def test_headers_of_npy_that_are_no_headers(saved, tmp_path, header):
    length = struct.pack("<I", len(header))
    write_zip(tmp_path / "c.npz", [("cls/embedding/b.npy", b"\x93NUMPY\x02\x00" + length + header)])
    refused(tmp_path / "c.npz", saved[0], r"c\.npz: cls/embedding/b")


def test_an_endless_directory_of_a_zip_is_not_read(saved, tmp_path):
    with open(tmp_path / "c.npz", "wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(array_files.MAX_HEADER + 1000)
        size, start = array_files.MAX_HEADER + 100, 500
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, size, start, 0))
    refused(tmp_path / "c.npz", saved[0], "are read at once")


@pytest.mark.parametrize("compressed", [False, True])
def test_checksums_of_npz_are_compared(saved, tmp_path, compressed):
    model, folder = saved
    with np.load(folder / "c.npz") as stored:
        arrays = dict(stored)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "c.npz", **arrays)
    damage_members(tmp_path / "c.npz")
    refused(tmp_path / "c.npz", model, "c.npz: ")


def damage_members(path):
    """Flips a bit in the data of the largest member of a zip file."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.compress_size)
    data[member.header_offset + 30 + len(member.filename) + 40 + member.compress_size // 2] ^= 4
    path.write_bytes(bytes(data))


def test_encrypted_members(saved, tmp_path):
    write_zip(tmp_path / "c.npz", [("cls/embedding/b.npy", npy_bytes(np.zeros(3, np.float32)))])
    data = bytearray((tmp_path / "c.npz").read_bytes())
    data[6] |= 1  # the flag of the local header, and that of the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "c.npz").write_bytes(bytes(data))
    refused(tmp_path / "c.npz", saved[0], "encrypted")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_values_that_are_not_finite(saved, tmp_path, value, dtype):
    model, folder = saved
    arrays = dict(np.load(folder / "c.npz"))
    arrays["cls"] = np.full_like(arrays["cls"], value, dtype)
    np.savez(tmp_path / "c.npz", **arrays)
    refused(tmp_path / "c.npz", model, "cls holds values that are not finite")


def test_float64_beyond_float32(saved, tmp_path):
    model, folder = saved
    arrays = dict(np.load(folder / "c.npz"))
    arrays["cls"] = np.full_like(arrays["cls"], 1e300, np.float64)
    np.savez(tmp_path / "c.npz", **arrays)
    refused(tmp_path / "c.npz", model, "not finite")


def test_integers_are_no_weights(saved, tmp_path):
    model, folder = saved
    arrays = dict(np.load(folder / "c.npz"))
    arrays["cls"] = np.ones(arrays["cls"].shape, np.int8)
    np.savez(tmp_path / "c.npz", **arrays)
    refused(tmp_path / "c.npz", model, "backbone/cls holds int8")


def test_text_is_no_number(saved, tmp_path):
    model, folder = saved
    arrays = dict(np.load(folder / "c.npz"))
    arrays["cls"] = np.array(["a", "b"])
    np.savez(tmp_path / "c.npz", **arrays)
    refused(tmp_path / "c.npz", model, "not numbers")


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        safetensors(b"{not json"),
        safetensors([1, 2]),
        safetensors(b"{" * 10_000),
        safetensors(b'{"a":' + b"[" * 100_000),
        safetensors({"a": {**ENTRY, "dtype": "F8"}}, bytes(8)),
        safetensors({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
        safetensors({"a": {**ENTRY, "shape": [-2, -1]}}, bytes(8)),
        safetensors({"a": {**ENTRY, "shape": "22"}}, bytes(8)),
        safetensors({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
        safetensors({"a": {**ENTRY, "data_offsets": ["0", 8]}}, bytes(8)),
        safetensors({"a": {**ENTRY, "data_offsets": None}}, bytes(8)),
        safetensors({"a": ENTRY, "b": {**ENTRY, "data_offsets": {"0": 8}}}, bytes(8)),
        safetensors({"a": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}),
        safetensors({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"a": ENTRY, "b": ENTRY}, bytes(8)),
        safetensors({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
        safetensors({"a": ENTRY}, bytes(16)),
        safetensors(
            {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)
        ),
        safetensors({"a": None}),
        safetensors({}),
    ],
)
def test_hostile_safetensors(tmp_path, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError):
        array_files.read_arrays(path)


def test_safetensors_of_every_dtype(tmp_path):
    values = np.array([1.0, -2.5])
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
    header, data = {}, b""
    for name, dtype in kinds.items():
        part = values.astype(dtype).tobytes()
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": name, "shape": [1, 2], "data_offsets": offsets}
        data += part
    (tmp_path / "c.safetensors").write_bytes(safetensors(header, data))
    arrays = array_files.read_arrays(tmp_path / "c.safetensors")
    for name in kinds:
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], values[None])


@pytest.mark.parametrize("name", ["../c.safetensors", "/etc/passwd", "a/b.safetensors", 3])
def test_shards_stay_in_their_directory(saved, tmp_path, name):
    model, folder = saved
    (tmp_path / "config.json").write_bytes((folder / "hf/config.json").read_bytes())
    index = {"weight_map": {"vit.embeddings.cls_token": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, model, "no file of its directory")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"weight_map": []}'])
def test_broken_indices_and_configs(saved, tmp_path, content):
    model, folder = saved
    (tmp_path / "config.json").write_bytes((folder / "hf/config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError):
        checkpoints.load(tmp_path, model)
    (tmp_path / "model.safetensors").write_bytes((folder / "c.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        checkpoints.load(tmp_path, model)


def test_checkpoint_of_vit_jax_with_a_broken_file(saved, tmp_path):
    model, folder = saved
    manifest = "0/manifest/metadata"
    for content in ("", "[]", '{"arrays": 3}', '{"arrays": {"params.a": {"shape": 3}}}'):
        shutil.copytree(folder / "own", tmp_path / "own", dirs_exist_ok=True)
        (tmp_path / "own" / manifest).write_text(content)
        with pytest.raises(UserError):
            checkpoints.load(tmp_path / "own", model)
    shutil.copytree(folder / "own", tmp_path / "torn", dirs_exist_ok=True)
    for path in sorted((tmp_path / "torn/0/state").rglob("*")):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:-500])
    refused(tmp_path / "torn", model, "damaged")


def test_other_file_systems(saved):
    model, folder = saved
    memory = fsspec.filesystem("memory")
    memory.pipe("/c.npz", (folder / "c.npz").read_bytes())
    params = checkpoints.load("memory://c.npz", model)
    np.testing.assert_array_equal(params["backbone"]["cls"], np.load(folder / "c.npz")["cls"])
    refused("memory://absent.npz", model, "cannot read memory://absent.npz")
    refused("nosuchscheme://c.npz", model, "cannot read")


def read(arrays, path):
    source = Source(path, readers={name: lambda x=x: x for name, x in arrays.items()})
    with files.reading(str(path)):  # The boundary that `read_weights` has, too.
        return loading.recognize(source).read(source)


@pytest.mark.parametrize(
    "name", ["c.npz", "c.safetensors", pytest.param("hf/model.safetensors", marks=pytest.mark.soak)]
)
def test_arrays_of_any_other_shape(saved, tmp_path, name):
    """Every array in turn as something else: an error of the user's, or a resize that is told."""
    model, folder = saved
    arrays = array_files.read_arrays(folder / name)
    path = tmp_path / name.rpartition("/")[2]
    config = json.loads((folder / "hf/config.json").read_text()) if "hf" in name else None
    shapes = itertools.cycle([(), (0,), (1, 0, 16), (1, 10, 8), (2, 2, 2, 2, 2)])
    for key, shape in zip(sorted(arrays), shapes, strict=False):
        changed = {**arrays, key: np.ones(shape, np.float32)}
        try:
            weights = hf.from_state(changed, config=config) if config else read(changed, path)
            infer_model(weights, num_heads=2)
            _, report = loading.fit(weights, model, str(path), image_size=12)
        except UserError:
            continue
        assert report.resized or report.initialised
