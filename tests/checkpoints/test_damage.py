"""Damage to a checkpoint is noticed, named and passed over."""

import functools
import itertools
import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils.epath import gpath
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from states import METADATA, abstract, data_files, mesh_of, tree

from vit_jax.checkpoints import checksums, manifest
from vit_jax.checkpoints.checksums import checksum
from vit_jax.checkpoints.manifest import DamagedError
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    path.unlink()


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0x04
    path.write_bytes(content)


def make_a_folder(path):
    """Reading it is an error other than that it is missing."""
    path.unlink()
    path.mkdir()


HARMS = {
    "cut": truncate,
    "deleted": delete,
    "a folder": make_a_folder,
    **{f"flipped at {x}": functools.partial(flip, position=x) for x in (0, 0.1, 0.5, 0.9)},
}
MORE_FLIPS = ("flipped at 0.1", "flipped at 0.9")
ESSENTIAL = ("manifest/metadata", "state/manifest.ocdbt")


def harmed_copies(three_steps, copy, harm):
    """Yields the name of each file of the newest step, when it alone is harmed."""
    for path in data_files(three_steps, 3):
        shutil.rmtree(copy)
        shutil.copytree(three_steps, copy)
        harm(copy / path.relative_to(three_steps))
        yield str(path.relative_to(three_steps / "3"))


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_harm_to_any_file_is_passed_over_or_changes_nothing(three_steps, copy, harm):
    """Some files are for people, or for readers other than ours."""
    for name in harmed_copies(three_steps, copy, harm):
        restored = Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))
        expected = tree(mesh_of(8, 1), float(restored.step))
        jax.tree.map(np.testing.assert_array_equal, restored.tree, expected)
        assert restored.metadata == METADATA
        assert restored.missing == ()
        if name in ESSENTIAL:
            assert restored.step == 2, name
        if restored.step == 2:
            assert f"{copy}/3" in restored.damaged[0]
            assert restored.damaged[0].endswith("renamed 3.damaged")
            assert (copy / "3.damaged").is_dir()
            assert not (copy / "3").exists()
        else:
            assert restored.damaged == ()


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(harm, marks=[pytest.mark.soak] * (name in MORE_FLIPS), id=name)
        for name, harm in HARMS.items()
    ],
)
def test_harm_to_any_file_of_a_step_lets_the_next_step_be_saved(three_steps, copy, harm):
    for _ in harmed_copies(three_steps, copy, harm):
        store = Store(copy, keep_last=1)
        store.save(4, tree(mesh_of(8, 1), 4.0), METADATA)
        store.close()
        assert store.steps()[-1] == 4


def test_any_flipped_bit_of_the_manifest_is_damage(copy):
    path = copy / "3" / manifest.FILE
    content = path.read_bytes()

    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, len(content) - 1), st.integers(0, 7))
    def check(position, bit):
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match="manifest"):
            manifest.read(copy / "3")

    check()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "EIO")])
def test_a_manifest_that_cannot_be_read_is_damage(copy, monkeypatch, error):
    read_bytes = gpath.PosixGPath.read_bytes

    def refuse(path):
        if "/3/" in str(path):
            raise error
        return read_bytes(path)

    monkeypatch.setattr(gpath.PosixGPath, "read_bytes", refuse)
    restored = Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))
    assert restored.step == 2
    assert error.strerror in restored.damaged[0]


def as_before(step, *, with_digests):
    """Makes a manifest what versions without a checksum in it wrote."""
    path = step / manifest.FILE
    stored = json.loads(path.read_text())
    del stored["checksum"], stored["metrics"]
    path.write_text(json.dumps(stored))
    if with_digests:
        digest = [path.stat().st_size, zlib.crc32(path.read_bytes())]
        (step / "digests.json").write_text(json.dumps({manifest.FILE: digest}))


@pytest.mark.parametrize("with_digests", [True, False])
def test_manifests_without_a_checksum_are_read(copy, with_digests):
    as_before(copy / "3", with_digests=with_digests)
    restored = Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))
    assert restored.step == 3
    assert not restored.damaged


@pytest.mark.parametrize(
    ("before", "after", "with_digests"),
    [
        ('"version": 1', '"version": 3', False),
        ('"version"', '"versiom"', False),
        ('"metadata"', '"metadatb"', False),
        ('"float32"', '"float33"', False),
        ('"shape": [16, 4]', '"shape": "16,4"', False),
        ('"params.w"', '"params.v"', True),
        ('"shape": [16, 4]', '"shape": [16, 5]', True),
    ],
)
def test_changes_of_a_manifest_without_a_checksum_are_damage(copy, before, after, with_digests):
    as_before(copy / "3", with_digests=with_digests)
    path = copy / "3" / manifest.FILE
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    assert Store(copy).restore_newest(abstract(tree(mesh_of(8, 1)))).step == 2


def test_memory_that_runs_out_is_no_damage(copy, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: failed to allocate 17179869184 bytes")

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))
    assert Store(copy).steps() == [1, 2, 3]


def test_two_damaged_are_passed_over_three_are_not(copy, three_steps):
    wanted = abstract(tree(mesh_of(8, 1)))
    store = Store(copy, keep_last=5)
    store.save(4, tree(mesh_of(8, 1), 4.0), METADATA)
    store.close()
    for step in (4, 3):
        (copy / str(step) / "manifest" / "metadata").unlink()
    assert Store(copy).restore_newest(wanted).step == 2
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "3.damaged", "4.damaged"]

    shutil.rmtree(copy)
    shutil.copytree(three_steps, copy)
    store = Store(copy, keep_last=5)
    store.save(4, tree(mesh_of(8, 1), 4.0), METADATA)
    store.close()
    for step in (4, 3, 2):
        (copy / str(step) / "manifest" / "metadata").unlink()
    with pytest.raises(UserError, match=r"the newest 3 checkpoints .* Nothing was changed"):
        Store(copy).restore_newest(wanted)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "3", "4"]


def test_only_the_first_process_sets_a_damaged_checkpoint_aside(copy, monkeypatch):
    """The others wait for it, since a second one would find nothing to rename."""
    waited = []
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", waited.append)
    store = Store(copy)
    assert store._set_aside({3: "its manifest is cut"}) == (
        "its manifest is cut; renamed 3.damaged",
    )
    assert len(waited) == 1
    assert store.steps() == [1, 2, 3]
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    store._set_aside({3: "its manifest is cut"})
    assert len(waited) == 2
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "3.damaged"]


def test_all_damaged_says_so_and_stops(copy):
    for step in (1, 2, 3):
        truncate(copy / str(step) / "manifest" / "metadata")
    with pytest.raises(UserError, match=r"all checkpoints .* are damaged"):
        Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "3"]


def test_steps_that_were_covered_by_a_damaged_checkpoint_are_saved_again(copy):
    delete(copy / "3" / "manifest" / "metadata")
    store = Store(copy, keep_last=4)
    wanted = tree(mesh_of(8, 1), 3.0)
    assert store.restore_newest(abstract(wanted)).step == 2
    store.save(3, wanted, METADATA)
    store.close()
    assert Store(copy).restore_newest(abstract(wanted)).step == 3


def rewritten(step, **changes):
    """Changes a manifest, with a checksum that is right."""
    path = step / manifest.FILE
    stored = {**json.loads(path.read_text()), **changes}
    del stored["checksum"]
    path.write_text(json.dumps({**stored, "checksum": manifest._checksum(stored)}))


def test_newer_layouts_are_refused(copy):
    rewritten(copy / "3", version=99)
    with pytest.raises(UserError, match="has version 99"):
        Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))


@pytest.mark.parametrize("described", [{"dtype": "float3"}, {"shape": 4}, {}])
def test_a_manifest_that_describes_no_array_is_damaged(copy, described):
    stored = json.loads((copy / "3" / manifest.FILE).read_text())
    arrays = {
        name: {**array, **described} if described else {}
        for name, array in stored["arrays"].items()
    }
    rewritten(copy / "3", arrays=arrays)
    with pytest.raises(DamagedError, match="manifest"):
        Store(copy).restore(3, abstract(tree(mesh_of(8, 1))))


def test_asking_for_a_damaged_step_is_a_user_error(copy):
    delete(copy / "3" / "manifest" / "metadata")
    with pytest.raises(DamagedError, match=r"manifest.*there are also \[1, 2\]: `train` goes on"):
        Store(copy).restore(3, abstract(tree(mesh_of(8, 1))))


DTYPES = st.sampled_from([np.float32, np.int32, np.uint8, np.float16, np.bool_])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_checksum_notices_every_change_of_one_element(data):
    array = data.draw(hnp.arrays(data.draw(DTYPES), (3, 5)))
    index = data.draw(st.integers(0, 14))
    changed = array.copy()
    raw = changed.view(np.uint8).reshape(15, -1)
    byte = data.draw(st.integers(0, raw.shape[1] - 1))
    raw[index, byte] ^= 1 if array.dtype == np.bool_ else 1 << data.draw(st.integers(0, 7))
    sums = [int(checksum(x)) for x in (array, jnp.asarray(array), changed, jnp.asarray(changed))]
    assert sums[0] == sums[1] != sums[2] == sums[3]


def test_the_host_sums_small_arrays_as_the_devices_sum_large_ones(monkeypatch):
    draw = np.random.default_rng(0).normal
    sharding = NamedSharding(mesh_of(2, 4), P("data"))
    arrays = {
        "cube": jax.device_put(draw(size=(4, 3, 5)).astype(np.float32), sharding),
        "half": jnp.asarray(draw(size=(7, 2)), jnp.bfloat16),
        "row": jnp.arange(9) > 4,
        "count": jnp.int32(-3),
        "empty": jnp.zeros((0, 3)),
        "host": draw(size=(3, 2)).astype(np.float32),
    }
    on_host = checksums.checksums(arrays)
    monkeypatch.setattr(checksums, "MOST_HOST_BYTES", 0)
    assert checksums.checksums(arrays) == on_host


def test_checksum_notices_every_sign_and_every_exchange():
    """A sign is the highest bit, so that its weight must be odd at each place."""
    x = np.arange(1.0, 17.0, dtype=np.float32).reshape(4, 4)
    changed = [x * np.where(np.arange(16).reshape(4, 4) == place, -1, 1) for place in range(16)]
    for one, other in itertools.combinations(range(16), 2):
        order = np.arange(16)
        order[[one, other]] = other, one
        changed.append(x.ravel()[order].reshape(4, 4))
    assert len(changed) == 16 + 120
    sums = jax.jit(jax.vmap(checksum))(np.stack([x, *changed]).astype(np.float32))
    assert not (np.asarray(sums[1:]) == np.asarray(sums[0])).any()


def test_checksum_is_the_same_on_any_mesh_and_sees_order():
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    sums = {
        int(checksum(jax.device_put(x, NamedSharding(mesh_of(*shape), P("data", "fsdp")))))
        for shape in ((8, 1), (2, 4), (1, 8))
    }
    assert len(sums) == 1
    assert int(checksum(jnp.asarray(x[::-1]))) not in sums
