"""Checkpoints are restored whole, by name and onto any mesh, or the damage is named."""

import functools
import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils.epath import gpath
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.checkpoints import manifest
from vit_jax.checkpoints.checksums import checksum
from vit_jax.checkpoints.manifest import DamagedError
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.parallel import sharding

METADATA = {"seconds": {"train": 1.5}, "owes_evaluation": False}


def mesh_of(data, fsdp):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": 1})


def tree(mesh, factor=1.0):
    """Arrays of several dtypes and placings, as a state has them."""
    where = NamedSharding(mesh, P("fsdp"))
    return {
        "step": jax.device_put(jnp.int32(7), sharding.replicated(mesh)),
        "params": {"w": jax.device_put(factor * jnp.arange(64.0).reshape(16, 4), where)},
        "opt": {"mu": jax.device_put(jnp.ones((16, 4), jnp.bfloat16) * 0.1, where)},
    }


def abstract(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A directory with whole checkpoints of steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("checkpoints")
    store = Store(directory, keep_last=4)
    for step in (1, 2, 3):
        store.save(step, tree(mesh_of(2, 4), step), METADATA)
    store.close()
    return directory


@pytest.fixture
def copy(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "checkpoints")


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 8)])
def test_restores_bit_for_bit_onto_any_mesh(three_steps, shape):
    wanted = tree(mesh_of(*shape), 3.0)
    restored = Store(three_steps).restore_newest(abstract(wanted))
    assert restored.step == 3
    assert restored.metadata == METADATA
    for name, leaf in jax.tree_util.tree_leaves_with_path(restored.tree):
        expected = dict(jax.tree_util.tree_leaves_with_path(wanted))[name]
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.dtype == expected.dtype
        assert leaf.sharding == expected.sharding


def bytes_read_of_arrays():
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_each_shard_is_read_once(tmp_path):
    """However many devices hold a copy. Noise, so that its files are as long as it is.

    On the last mesh a stored shard is cut in two: either device may read all of it.
    """
    noise = jax.random.normal(jax.random.key(0), (512, 512))

    def sharded(mesh):
        everywhere, split = sharding.replicated(mesh), NamedSharding(mesh, P("fsdp"))
        return {"a": jax.device_put(noise, split), "b": jax.device_put(noise, everywhere)}

    store = Store(tmp_path, keep_last=1)
    store.save(1, sharded(mesh_of(2, 4)), METADATA)
    store.close()
    stored = sum(path.stat().st_size for path in data_files(tmp_path, 1))
    for shape, times in (((2, 4), 1), ((8, 1), 1), ((1, 8), 2)):
        before = bytes_read_of_arrays()
        Store(tmp_path).restore(1, abstract(sharded(mesh_of(*shape))))
        assert 0.9 * stored < bytes_read_of_arrays() - before <= 1.01 * times * stored


def test_no_checkpoint_is_none(tmp_path):
    assert Store(tmp_path / "nothing").restore_newest(abstract(tree(mesh_of(8, 1)))) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        Store(tmp_path / "nothing").newest()


def test_a_folder_that_cannot_be_read_is_a_user_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be read: .*Not a directory"):
        Store(tmp_path / "checkpoints").steps()


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1)
ODD = ("lr[0.01]", "[!a]", "a*b", "a?", "{a,b}", "a b", "100%41", "été", "日本", "a\nb", "~", "a~")


def check_directory(folder):
    store = Store(folder / "checkpoints", keep_last=2)
    store.save(1, {"w": jnp.arange(4.0)}, METADATA)
    store.close()
    restored = Store(folder / "checkpoints").restore_newest(abstract({"w": jnp.zeros(4)}))
    np.testing.assert_array_equal(restored.tree["w"], np.arange(4.0))


@pytest.mark.parametrize("name", ODD)
def test_a_directory_may_have_any_name(tmp_path, name):
    (tmp_path / name).mkdir()
    check_directory(tmp_path / name)


@settings(max_examples=25, deadline=None)
@given(name=NAMES)
def test_a_directory_may_have_any_name_or_is_refused(tmp_path_factory, name):
    assume(name not in (".", "..") and len(name.encode()) < 200)
    folder = tmp_path_factory.mktemp("named") / name
    folder.mkdir()
    if "\\" in name:
        with pytest.raises(UserError, match="backslash"):
            check_directory(folder)
    else:
        check_directory(folder)


def test_directories_that_match_as_a_pattern_are_not_mixed_up(tmp_path):
    for name, factor in (("ab", 1.0), ("a?", 2.0), ("a*", 3.0)):
        (tmp_path / name).mkdir()
        store = Store(tmp_path / name)
        store.save(1, {name: factor * jnp.arange(4.0)}, METADATA)
        store.close()
    for name, factor in (("ab", 1.0), ("a?", 2.0), ("a*", 3.0)):
        restored = Store(tmp_path / name).restore_newest(abstract({name: jnp.zeros(4)}))
        np.testing.assert_array_equal(restored.tree[name], factor * np.arange(4.0))


@pytest.mark.parametrize("name", ["a\\b", "a\udcff"])
def test_a_directory_that_orbax_cannot_write_to_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="write another path"):
        Store(tmp_path / name).save(1, {"w": jnp.arange(4.0)}, METADATA)


def test_keeps_the_newest(tmp_path):
    store = Store(tmp_path, keep_last=2)
    for step in range(5):
        store.save(step, tree(mesh_of(8, 1)), METADATA)
    store.close()
    assert store.steps() == [3, 4]


@pytest.mark.parametrize(
    ("name", "least_is_best", "values"),
    [("val/accuracy", False, [0.1, 0.9, 0.3, 0.2]), ("val/loss", True, [2.0, 0.5, 1.0, 3.0])],
)
def test_keeps_the_best_too(tmp_path, name, least_is_best, values):
    store = Store(tmp_path, keep_last=1, keep_best=name, least_is_best=least_is_best)
    for step, value in enumerate(values):
        store.save(step, tree(mesh_of(8, 1)), METADATA, {name: value})
    for step in (4, 5):  # Saves between evaluations have no metrics.
        store.save(step, tree(mesh_of(8, 1)), METADATA)
    store.close()
    assert store.steps() == [1, 5]


def test_the_best_of_an_earlier_attempt_is_kept_too(tmp_path):
    def save(values):
        with Store(tmp_path, keep_last=1, keep_best="val/accuracy") as store:
            for step, value in values.items():
                store.save(step, tree(mesh_of(8, 1)), METADATA, {"val/accuracy": value})
        return store.steps()

    assert save({1: 0.9, 2: 0.5}) == [1, 2]
    assert save({3: 0.7}) == [1, 3]
    assert save({4: float("nan"), 5: 0.95}) == [5]


def test_another_dtype_is_cast_after_the_checksums(three_steps):
    wanted = abstract(tree(mesh_of(8, 1), 3.0))
    wanted["params"]["w"] = wanted["params"]["w"].update(dtype=jnp.bfloat16)
    found = Store(three_steps).restore_newest(wanted)
    assert not found.damaged
    assert found.tree["params"]["w"].dtype == jnp.bfloat16
    assert found.tree["params"]["w"].sharding == wanted["params"]["w"].sharding


def test_what_the_checkpoint_lacks_is_named(three_steps):
    wanted = tree(mesh_of(8, 1), 3.0)
    wanted["ema"] = {"w": wanted["params"]["w"]}
    wanted["opt"] = {"nu": wanted["params"]["w"]}
    restored = Store(three_steps).restore_newest(abstract(wanted))
    assert restored.missing == ("ema.w", "opt.nu")
    assert restored.ignored == ("opt.mu",)
    assert restored.tree["ema"]["w"] is None
    np.testing.assert_array_equal(restored.tree["params"]["w"], wanted["params"]["w"])


def data_files(directory, step):
    files = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
    return sorted(path for path in files if path.stat().st_size)


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


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
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
    raw[index, 0] ^= 1 if array.dtype == np.bool_ else 0x10
    assert int(checksum(jnp.asarray(array))) != int(checksum(jnp.asarray(changed)))


def test_checksum_is_the_same_on_any_mesh_and_sees_order():
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    sums = {
        int(checksum(jax.device_put(x, NamedSharding(mesh_of(*shape), P("data", "fsdp")))))
        for shape in ((8, 1), (2, 4), (1, 8))
    }
    assert len(sums) == 1
    assert int(checksum(jnp.asarray(x[::-1]))) not in sums
