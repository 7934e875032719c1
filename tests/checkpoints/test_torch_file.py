"""Files of `torch.save`, read without torch; `tests/interop/record.py` recorded them with it."""

import io
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
from golden_cases import GOLDEN

from vit_jax.checkpoints import array_files, torch_file
from vit_jax.errors import UserError

INTEROP = GOLDEN / "interop"


@pytest.mark.parametrize("name", ["torch_training.pth", "torch_views.pth", "torch_old.bin"])
def test_arrays_are_those_that_torch_saved(name):
    """Among optimizers, arguments and other classes; from views of one storage; as bfloat16."""
    expected = array_files.read_arrays(INTEROP / "timm_token.safetensors")
    actual = array_files.read_arrays(INTEROP / name)
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        tolerance = 2**-8 if name == "torch_old.bin" else 0
        np.testing.assert_allclose(actual[key], array, rtol=tolerance)
        assert actual[key].dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sparse", "head.weight is stored with torch._utils._rebuild_sparse_tensor"),
        ("quantized", "head.weight is stored with torch._utils._rebuild_qtensor"),
        ("float8", "head.weight is stored with torch._utils._rebuild_tensor_v3"),
        ("expanded", r"head.weight has 2000000000000 elements .* save it with \.clone\(\)"),
    ],
)
def test_tensors_that_are_not_plain_are_named(kind, words):
    path = INTEROP / f"torch_{kind}.pth"
    with pytest.raises(UserError, match=words) as error:
        array_files.read_arrays(path)
    assert "\n" not in str(error.value)


def rewrite(source, target, changed, compression=zipfile.ZIP_STORED):
    """Copies a zip archive; `changed(name, data)` returns a member's new content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changed(name, old.read(name)))


def test_a_flipped_bit_fails_the_checksum_of_its_member(tmp_path):
    whole = (INTEROP / "torch_views.pth").read_bytes()
    with zipfile.ZipFile(INTEROP / "torch_views.pth") as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename or "pkl" in m.filename]
        ends = [*(m.header_offset for m in archive.infolist()[1:]), archive.start_dir]
        places = dict(zip(archive.namelist(), ends, strict=True))
    for member in members:
        data = bytearray(whole)
        data[places[member.filename] - 40 - member.file_size // 2] ^= 1
        (tmp_path / "c.pth").write_bytes(bytes(data))
        with pytest.raises(UserError, match=r"c\.pth"):
            array_files.read_arrays(tmp_path / "c.pth")


def test_members_that_unpack_to_far_more_are_refused(tmp_path):
    def zeros(name, data):
        return bytes(len(data) + (256 << 20)) if name.endswith("data/0") else data

    source = INTEROP / "torch_views.pth"
    rewrite(source, tmp_path / "c.pth", zeros, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="no checkpoint compresses like that"):
        array_files.read_arrays(tmp_path / "c.pth")


class Opcodes:
    """Pickles that do more than data needs, as their bytes."""

    MEMO = b"\x80\x02}r\xff\xff\xff\x7f."
    BYTEARRAY = b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."
    EXTENSION = b"\x80\x02\x82\x01."
    LONG_TEXT = b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"."
    NO_END = b"\x80\x02}"
    NO_STORAGE = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x01\x85K\x01\x85tR."
    BAD_ID = b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ."
    CLASSES = b"\x80\x02]" + b"".join(b"cmodule\nname%d\n0" % i for i in range(2000)) + b"."


@pytest.mark.parametrize("name", [name for name in vars(Opcodes) if name.isupper()])
def test_hostile_pickles(tmp_path, name):
    def hostile(member, data):
        return getattr(Opcodes, name) if member.endswith("data.pkl") else data

    rewrite(INTEROP / "torch_views.pth", tmp_path / "c.pth", hostile)
    with pytest.raises(UserError) as error:
        array_files.read_arrays(tmp_path / "c.pth")
    assert "\n" not in str(error.value)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.mark.parametrize("state", [Malicious(), {"a": Malicious()}, [1], {"a": 1}])
def test_no_code_is_run_and_what_is_no_state_dict_is_named(tmp_path, capsys, state):
    def hostile(member, data):
        return pickle.dumps(state, 2) if member.endswith("data.pkl") else data

    rewrite(INTEROP / "torch_views.pth", tmp_path / "c.pth", hostile)
    with pytest.raises(UserError, match=r"not a state dict|holds no arrays"):
        array_files.read_arrays(tmp_path / "c.pth")
    assert not capsys.readouterr().out


def test_a_pickle_cannot_change_a_tensor_after_the_checks():
    """BUILD sets attributes; those of a tuple cannot be set."""
    tensor = torch_file.Tensor(torch_file.Storage(np.dtype("<f4"), "0", 1), 0, (1,), (1,))
    for state in ({"shape": (10**9,)}, (None, {"shape": (10**9,)})):
        stream = io.BytesIO()
        pickler = pickle._Pickler(stream, 2)
        pickler.write(pickle.PROTO + b"\x02")
        pickler.write(pickle.BINPERSID.join([b"N", b""]))
        pickler.save(state)
        pickler.write(pickle.BUILD + pickle.STOP)

        class Loads(pickle.Unpickler):
            def persistent_load(self, pid):
                return tensor

        stream.seek(0)
        with pytest.raises(AttributeError):
            Loads(stream).load()


def test_an_old_file_that_is_cut_short_or_longer_is_refused(tmp_path):
    whole = (INTEROP / "torch_old.bin").read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:50], whole + b"x"):
        (tmp_path / "c.bin").write_bytes(data)
        with pytest.raises(UserError, match="broken or cut short"):
            array_files.read_arrays(tmp_path / "c.bin")


def test_a_storage_is_read_once_and_forgotten_after_its_last_tensor():
    storage = torch_file.Storage(np.dtype("<f4"), "0", 4)
    tensors = {name: torch_file.Tensor(storage, i, (2,), (1,)) for i, name in enumerate("ab")}
    reads = []

    def load(storage):
        reads.append(storage.key)
        return np.arange(4, dtype=np.float32)

    held = torch_file.Tensors(tensors, load)
    assert [held.read(name).tolist() for name in "ab"] == [[0, 1], [1, 2]]
    assert reads == ["0"]
    assert not held._held


def test_big_endian_files_are_refused(tmp_path):
    def big(name, data):
        return b"big" if name.endswith("byteorder") else data

    source = INTEROP / "torch_views.pth"
    shutil.copy(source, tmp_path / "same.pth")
    rewrite(source, tmp_path / "c.pth", big)
    with pytest.raises(UserError, match="big-endian"):
        array_files.read_arrays(tmp_path / "c.pth")
