"""The mesh, batches over it, and the completeness of the table of logical axes."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vit_jax import sharding
from vit_jax.errors import UserError


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


def test_parameter_without_names_is_an_error():
    with pytest.raises(ValueError, match="names no logical axes"):
        sharding.param_shardings({"w": jax.ShapeDtypeStruct((2,), np.float32)}, mesh_of())


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
