"""The mesh, batches over it, and the completeness of the table of logical axes."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models import lora
from vit_jax.parallel import sharding

GOLDEN = Path(__file__).parents[1] / "golden" / "sharding"


def mesh_of(data=-1, fsdp=1, tensor=1):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


def test_mesh_fills_the_rest():
    assert dict(mesh_of(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (4, 4, 1)])
def test_impossible_mesh_is_a_user_error(sizes):
    with pytest.raises(UserError, match="mesh"):
        mesh_of(*sizes)


def test_batch_size_must_divide_and_the_message_says_what_would():
    with pytest.raises(UserError, match="write 96 or 112"):
        sharding.check_batch_size(mesh_of(), 100, accum_steps=2)
    sharding.check_batch_size(mesh_of(data=1, fsdp=1, tensor=8), 3)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_placed_batch_is_the_batch(shape):
    mesh = mesh_of(*shape)
    rows = sharding.local_rows(mesh, 16)
    batch = {"image": np.arange(16 * 3).reshape(16, 3), "label": np.arange(16)}
    placed = sharding.place(batch, rows, mesh, 16)
    np.testing.assert_array_equal(rows, np.arange(16))
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding.spec == P(("data", "fsdp"))


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), names)


def test_parameters_follow_their_logical_axes():
    mesh = mesh_of(2, 2, 2)
    params = {
        "kernel": boxed((16, 32), ("embed", "mlp")),
        "odd": boxed((16, 3), ("embed", "heads")),
        "bias": boxed((32,), ("mlp",)),
    }
    found = sharding.param_shardings(params, mesh)
    assert found["kernel"].spec == P("fsdp", "tensor")
    assert found["odd"].spec == P("fsdp", None)  # 3 heads cannot be split in two.
    assert found["bias"].spec == P("tensor")


def test_parameters_without_names_are_replicated():
    mesh = mesh_of(2, 2, 2)
    params = {
        "own": {"w": jax.ShapeDtypeStruct((512, 512), np.float32)},
        "ours": boxed((512, 512), ("embed", "mlp")),
    }
    assert sharding.unnamed(params) == ["own/w"]
    places = sharding.param_shardings(params, mesh)
    assert places["own"]["w"].spec == P()
    assert places["ours"].spec == P("fsdp", "tensor")
    copies = sharding.optimizer_shardings(params, places, mesh)
    assert copies["own"]["w"].spec == P()
    assert copies["ours"].spec != places["ours"].spec


def test_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule for the logical axes \['depth'\]"):
        sharding.param_shardings({"w": boxed((2,), ("depth",))}, mesh_of())


SHOWN = ["vit_ti16", "vit_s16", "vit_b16", "vit_l16", "vit_h14", "vit_g14", "vit_G14"]
FEW = {"depth": 1}
# Every parameter that any field of any model makes.
COVERED = {
    "vit": {
        "name": "vit_ti16", "representation_size": 8, "num_registers": 2, "layer_scale": 0.1,
        "qk_norm": True, "mlp": "swiglu", "pooling": "map", **FEW,
    },
    "parallel": {
        "name": "vit_ti16", "parallel": True, "norm": "rmsnorm", "position": "rope_mixed",
        "layer_scale": 0.1, "scan": False, **FEW,
    },
    "flexi": {"name": "flexivit_s", **FEW},
    "mixer": {"name": "mixer_s32", **FEW},
    "hybrid": {"name": "r26_s32", **FEW},
    "resnet": {"name": "bit_r50x1"},
    "text": {"name": "text_ti", "pooling": "map", **FEW},
}  # fmt: skip


def boxed_params(name, num_classes=1000, **fields):
    model = models.build(name, num_classes=num_classes, **fields)
    backbone = getattr(model, "backbone", model)
    size = models.variants()[models.find(name)].input_size
    inputs = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    if hasattr(backbone, "example_input"):
        inputs = backbone.example_input(size, 3)
    return jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]


@pytest.mark.parametrize("case", COVERED)
def test_every_parameter_of_every_model_has_a_place(case):
    found = boxed_params(**COVERED[case])
    assert sharding.unnamed(found) == []
    shardings = sharding.param_shardings(found, mesh_of(2, 2, 2))
    assert jax.tree.structure(shardings) == jax.tree.structure(nn.unbox(found))
    arrays = [box.value for box in jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "names"))]
    for array, place in zip(arrays, jax.tree.leaves(shardings), strict=True):
        assert array.size < sharding.MIN_SPLIT or not place.is_fully_replicated


def test_a_pyramid_has_a_place():
    backbone = models.build("vit_ti16", depth=1)
    detector = models.Detector(backbone, 91, pyramid=(4.0, 2.0, 1.0, 0.5))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    found = jax.eval_shape(detector.init, jax.random.key(0), images)["params"]["pyramid"]
    places = sharding.param_shardings(found, mesh_of(2, 2, 2))
    specs = {str(path[-1].key): place.spec for path, place in jax.tree.leaves_with_path(places)}
    assert specs["kernel"] == P(None, None, None, "fsdp")
    assert specs["scale"] == P("fsdp")


def test_adapters_have_a_place():
    base = boxed_params("vit_ti16", depth=1)
    adapt = functools.partial(lora.init, params=base, rank=2, targets=lora.ATTENTION_AND_MLP)
    factors = jax.eval_shape(adapt, jax.random.key(0))
    places = sharding.param_shardings(factors, mesh_of(2, 2, 2))
    assert any(not place.is_fully_replicated for place in jax.tree.leaves(places))


RECORDED = [((1, 16, 1), False), ((2, 4, 2), False), ((16, 1, 1), True), ((1, 256, 1), False)]


@pytest.mark.parametrize(("mesh", "zero1"), RECORDED)
def test_tables_of_placements_are_as_recorded(mesh, zero1):
    """Checks parameters, and moments with ZeRO-1. Deleting the files records them anew."""
    sizes = dict(zip(sharding.AXES, mesh, strict=True))
    abstract_mesh = AbstractMesh(mesh, sharding.AXES)
    text = ""
    for name in SHOWN:
        found = boxed_params(name)
        places = sharding.param_shardings(found, abstract_mesh)
        if zero1:
            places = sharding.optimizer_shardings(found, places, abstract_mesh)
        arrays = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            nn.unbox(found),
            places,
        )
        total = sharding.bytes_per_device(arrays)
        text += f"{name}: {total:,} bytes per device\n"
        text += sharding.table(sharding.placements(arrays)) + "\n\n"
    file = GOLDEN / f"{'x'.join(map(str, mesh))}{'_zero1' if zero1 else ''}.txt"
    if not file.exists():
        file.write_text(text)
        pytest.fail(f"recorded {file.name} of {sizes}: read it and run again")
    assert text == file.read_text()


def test_indivisible_width_is_split_along_another_axis():
    """384 is no multiple of 256; the MLP's 1,536 is. A small parameter stays whole."""
    mesh = AbstractMesh((1, 256, 1), sharding.AXES)
    params = {
        "mlp": boxed((12, 384, 1536), ("layers", "embed", "mlp")),
        "scale": boxed((12, 384), ("layers", "embed")),
    }
    found = sharding.param_shardings(params, mesh)
    assert found["mlp"].spec == P(None, None, ("tensor", "fsdp"))
    assert found["scale"].spec == P(None, None)


def test_zero1_splits_what_mirrors_the_parameters_once_more():
    mesh = mesh_of(2, 2, 2)
    params = {"kernel": boxed((3, 16, 32), ("layers", "embed", "mlp"))}
    own = sharding.param_shardings(params, mesh)
    found = sharding.optimizer_shardings(params, own, mesh)
    assert own["kernel"].spec == P(None, "fsdp", "tensor")
    assert found["kernel"].spec == P(None, ("fsdp", "data"), "tensor")


def test_state_follows_its_parameters():
    mesh = mesh_of(2, 2, 2)
    params = {"a": {"kernel": jax.ShapeDtypeStruct((16, 32), np.float32)}}
    shardings = {"a": {"kernel": sharding.NamedSharding(mesh, P("fsdp", "tensor"))}}
    state = {
        "adam": {"mu": params, "count": jax.ShapeDtypeStruct((), np.int32)},
        "factored": {"a": {"kernel": jax.ShapeDtypeStruct((16,), np.float32)}},
    }
    found = sharding.shardings_like(state, params, shardings, mesh)
    assert found["adam"]["mu"]["a"]["kernel"].spec == P("fsdp", "tensor")
    assert found["adam"]["count"].spec == P()
    assert found["factored"]["a"]["kernel"].spec == P()
