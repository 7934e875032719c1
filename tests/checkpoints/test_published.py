"""Others get the published parameters of a checkpoint of ours."""

import jax
import jax.numpy as jnp

from vit_jax.checkpoints import evaluation_params
from vit_jax.checkpoints.store import Store


def test_parameters_of_an_optimizer_that_is_not_at_hand_are_used_as_trained(tmp_path):
    state = {"params": {"w": jnp.arange(4.0)}, "opt_state": {"somebodys": {"mu": jnp.zeros(4)}}}
    store = Store(tmp_path / "checkpoints")
    store.save(3, state, {})
    store.close()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = evaluation_params.read(store.directory, 3, place)
    assert found.params["w"].tolist() == [0, 1, 2, 3]
    assert not found.note
