"""Checkpoints are restored whole, by name and onto any mesh, or the damage is named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.checkpoints.checksums import checksum
from vit_jax.checkpoints.digests import FILE as DIGESTS
from vit_jax.checkpoints.digests import DamagedError
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


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x04
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, delete, flip])
def test_harm_to_any_file_is_noticed_and_named(three_steps, copy, harm):
    for path in data_files(three_steps, 3):
        shutil.rmtree(copy)
        shutil.copytree(three_steps, copy)
        name = path.relative_to(three_steps)
        harm(copy / name)
        restored = Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))
        if name.name == DIGESTS and harm is delete:
            assert restored.step == 3  # As after a kill between the save and its digests.
            continue
        assert restored.step == 2, name
        assert str(name) in restored.damaged[0] or "manifest" in restored.damaged[0]
        assert restored.damaged[0].endswith("renamed 3.damaged")
        assert (copy / "3.damaged").is_dir()
        assert not (copy / "3").exists()
        expected = tree(mesh_of(8, 1), 2.0)
        np.testing.assert_array_equal(restored.tree["params"]["w"], expected["params"]["w"])


@pytest.mark.parametrize("harm", [truncate, delete, flip])
def test_without_digests_no_wrong_array_comes_back(three_steps, copy, harm):
    """After a kill between a save and its digests, or on an object store: the arrays' checksums."""
    noticed = 0
    for path in data_files(three_steps, 3):
        shutil.rmtree(copy)
        shutil.copytree(three_steps, copy)
        (copy / "3" / DIGESTS).unlink()
        if path.name == DIGESTS:
            continue
        harm(copy / path.relative_to(three_steps))
        restored = Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))
        expected = tree(mesh_of(8, 1), float(restored.step))
        np.testing.assert_array_equal(restored.tree["params"]["w"], expected["params"]["w"])
        np.testing.assert_array_equal(restored.tree["opt"]["mu"], expected["opt"]["mu"])
        noticed += restored.step == 2
    assert noticed >= 3  # The manifest, the metadata and the arrays at the least.


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


def test_newer_layouts_are_refused(copy):
    path = copy / "3" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="has version 99"):
        Store(copy).restore_newest(abstract(tree(mesh_of(8, 1))))


@pytest.mark.parametrize("described", [{"dtype": "float3"}, {"shape": 4}, {}])
def test_a_manifest_that_describes_no_array_is_damaged(copy, described):
    path = copy / "3" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    for name, array in manifest["arrays"].items():
        manifest["arrays"][name] = {**array, **described} if described else {}
    path.write_text(json.dumps(manifest))
    (copy / "3" / DIGESTS).unlink()
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
