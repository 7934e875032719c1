"""Checkpoints are kept, and restored whole, by name and onto any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from states import METADATA, abstract, data_files, mesh_of, tree

from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.parallel import sharding


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
