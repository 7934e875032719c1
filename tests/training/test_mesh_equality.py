"""One device, data parallel, sharded, tensor parallel: the same training, to rounding.

Five steps with accumulation, an average and mixup, for every family of models; one of them with
RandAugment on the device.
"""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from vit_jax import optim, tasks
from vit_jax.config import default_config
from vit_jax.config.durations import Duration
from vit_jax.parallel import sharding
from vit_jax.planning.hlo import Program
from vit_jax.training import step
from vit_jax.types import ArraySpec, DataInfo

STEPS, BATCH, SIZE, CLASSES = 5, 16, 16, 8
TRANSFORMER = {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 4}
FAMILIES = {
    "vit": {"name": "vit", **TRANSFORMER},
    "mixer": {
        "name": "vit_jax.models.mixer:Mixer",
        "patch_size": 8,
        "width": 16,
        "depth": 2,
        "tokens_mlp_dim": 8,
        "channels_mlp_dim": 32,
    },
    "hybrid": {
        "name": "vit_jax.models.hybrid:Hybrid",
        **TRANSFORMER,
        "patch_size": 2,
        "stages": (1,),
        "width_factor": 0.5,
    },
    "resnet": {"name": "vit_jax.models.resnet:BiT", "stages": (1,), "width_factor": 0.5},
}
INFO = DataInfo(
    {
        "image": ArraySpec((SIZE, SIZE, 3), np.dtype("uint8")),
        "label": ArraySpec((), np.dtype("int32")),
    },
    CLASSES,
)


def batches():
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "image": random.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8),
            "label": random.integers(0, CLASSES, BATCH, dtype=np.int32),
        }


def trained(family, sizes, zero1=False, start=None):
    """The first state (`start`, if given), the losses of the steps, the last state, the program."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    fields = {"name": "classification", "mixup": 0.2}
    if family == "mixer":
        fields["randaug"] = {"magnitude": 9}
    task = tasks.build(fields, FAMILIES[family], INFO)
    keys = default_config().optim.to_dict()
    keys |= {"name": "sgd", "args": {"momentum": 0.9}, "lr": 0.05, "clip_norm": 1.0}
    duration = Duration(STEPS, BATCH, BATCH * STEPS)
    boxed = tasks.boxed_params(task)
    optimizer = optim.build(keys, nn.unbox(boxed), duration=duration)
    make, abstract = step.init_state(
        task, optimizer, boxed, seed=0, ema=True, mesh=mesh, zero1=zero1
    )
    grad_shardings = None
    if zero1:
        places = sharding.param_shardings(boxed, mesh)
        grad_shardings = sharding.optimizer_shardings(boxed, places, mesh)
    train_step = step.make_train_step(
        task, optimizer, abstract, mesh, accum_steps=2, ema_decay=0.9, grad_shardings=grad_shardings
    )
    start = jax.device_get(make()) if start is None else start
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, abstract)
    rows, losses = sharding.local_rows(mesh, BATCH), []
    with sharding.activate(mesh):
        lowered = train_step.lower(abstract, sharding.abstract_batch(INFO.spec, mesh, BATCH))
        compiled = lowered.compile()
        for batch in batches():
            state, metrics = compiled(state, sharding.place(batch, rows, mesh, BATCH))
            losses.append(float(metrics["loss"]))
    return start, losses, state, Program(compiled.as_text())


@pytest.fixture(scope="module", params=FAMILIES)
def on_one_device(request):
    start, losses, state, _ = trained(request.param, (1, 1, 1))
    return request.param, start, losses, jax.device_get(state)


MESHES = {
    "data": ((8, 1, 1), False),
    "zero1": ((8, 1, 1), True),
    "fsdp": ((2, 4, 1), False),
    "tensor": ((2, 2, 2), False),
    "all": ((2, 2, 2), True),
}


# tests/tasks/test_task_state.py has a run on all axes, with accumulation and `zero1`.
@pytest.mark.parametrize("on_one_device", ["vit"], indirect=True)
def test_meshes_train_alike(on_one_device):
    check_trains_alike(on_one_device, "tensor")


@pytest.mark.soak
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_trains_every_family_alike(on_one_device, mesh):
    check_trains_alike(on_one_device, mesh)


def check_trains_alike(on_one_device, mesh):
    family, start, losses, alone = on_one_device
    _, found, state, program = trained(family, *MESHES[mesh], start=start)
    assert losses[-1] != losses[0]
    np.testing.assert_allclose(found, losses, rtol=2e-5)
    for name in ("params", "ema", "opt_state"):
        ours, theirs = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(alone, name))
        for left, right in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-5)
    if family in ("vit", "mixer") and mesh in ("data", "fsdp", "tensor"):
        check_gathers(program, state.params)
    assert is_split(state.params) == (mesh in ("fsdp", "tensor", "all"))
    assert is_split(state.opt_state) == is_split(state.ema) == (mesh != "data")


def check_gathers(program, params):
    """Stacked kernels are never gathered whole, and images stay where they are.

    Accumulation and mixup are on: micro-batches and partners must not move the batch. What comes
    before the layers, the kernel of the patches, is gathered as it is used.
    """
    stacked = max(leaf.nbytes for leaf in jax.tree.leaves(params["backbone"]["blocks"]))
    whole_batch = BATCH * SIZE * SIZE * 3
    moved = [c for c in program.collectives() if c.kind not in ("all-reduce", "reduce-scatter")]
    kernels = [c for c in moved if "patch_embed" not in c.op_name]
    assert [c for c in kernels if c.bytes >= stacked] == []
    assert [c for c in moved if c.kind == "all-gather" and c.bytes > whole_batch] == []


def is_split(tree):
    return any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))
