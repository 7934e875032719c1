"""Every task's heads on every family of backbones: a step, an evaluation, and learning by heart."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import tasks
from vit_jax.types import ArraySpec, DataInfo

VIT = {"width": 16, "depth": 1, "num_heads": 1}
BACKBONES = {
    "vit": {"name": "vit", "patch_size": 8, **VIT},
    "yolos": {"name": "vit", "patch_size": 8, "num_registers": 6, **VIT},
    "hybrid": {"name": "r_ti16", "patch_size": 2, "width_factor": 0.5, **VIT},
    "mixer": {
        "name": "mixer_s16",
        "patch_size": 8,
        "width": 16,
        "depth": 1,
        "tokens_mlp_dim": 8,
        "channels_mlp_dim": 16,
    },
    "resnet": {"name": "bit_r50x1", "stages": (1,), "width_factor": 0.5},
}
PYRAMID = {"pyramid": (4.0, 0.5), "pyramid_width": 16}
HEADS = {
    "linear": ("segmentation", {"head": "linear", "subcells": 2}),
    "mask": ("segmentation", {"head": "mask", "decoder_depth": 1, "dice": 0.5}),
    "pixels": ("segmentation", {"head": "pixels", "subcells": 2}),
    "per_token": ("detection", {"head": "per_token"}),
    "linear on levels": ("segmentation", {"head": "linear", **PYRAMID}),
    "per_token on levels": ("detection", {"head": "per_token", **PYRAMID}),
    "tokens": (
        "detection",
        {"head": "tokens", "num_queries": 6, "decoder_depth": 1, "loss": "softmax"},
    ),
    "towers": (
        "contrastive",
        {
            "dim": 16,
            "vocab": "bytes",
            "text": {**VIT, "pooling": "mean", "scan": False},
            "scale": 30.0,
        },
    ),
}
DATA = {
    "segmentation": (11, ("image", "segmentation")),
    "detection": (10, ("image", "boxes", "box_label")),
    "contrastive": (10, ("image", "tokens")),
}


# The heads of each dense task meet every family together; what the others add is seen on one.
FAMILIES = dict.fromkeys(HEADS, ("vit",)) | {
    "linear": ("resnet",),
    "per_token": (),  # These heads are seen below.
    "linear on levels": (),  # Linear heads, and the pyramid, are seen above and below.
    "per_token on levels": ("mixer",),
    "towers": (),  # The contrastive task has runs of its own.
}


def marks(head, backbone):
    return [] if backbone in FAMILIES[head] else [pytest.mark.soak]


PAIRS = [
    pytest.param(head, backbone, marks=marks(head, backbone))
    for head in HEADS
    for backbone in BACKBONES
]


@pytest.mark.parametrize(("head", "backbone"), PAIRS)
def test_a_step_reaches_the_parameters_and_evaluation_gives_numbers(
    scene_batch, scene_info, backbone, head
):
    name, fields = HEADS[head]
    task = tasks.build({"name": name, **fields}, BACKBONES[backbone], scene_info(*unpacked(name)))
    # Two rows, the second of them padding.
    batch = {key: x[:2] for key, x in scene_batch.items() if key in task.info.spec}
    batch["mask"] = np.array([1, 0], np.float32)

    @jax.jit
    def step_and_evaluate(key):
        params = nn.unbox(task.init(key))
        perturbed = task.augment(batch, key)
        (loss, count), grads = jax.value_and_grad(task.loss_fn, has_aux=True)(
            params, perturbed, key
        )
        sums, rows = task.eval_sums(params, batch), task.eval_rows(params, batch)
        reached = jax.tree.map(lambda g: jnp.any(g != 0), grads)
        return loss / count, reached, {**sums, **{key: x[:1] for key, x in rows.items()}}

    loss, reached, found = jax.device_get(step_and_evaluate(jax.random.key(0)))
    assert np.isfinite(loss)
    reached = {
        jax.tree_util.keystr(path): bool(x)
        for path, x in jax.tree_util.tree_leaves_with_path(reached)
    }
    # Those before a last layer that starts at zero wait for the first step.
    waiting = ("class_token", "cls", "['box']['dense1']", "['box']['dense2']", "registers")
    left = [path for path, x in reached.items() if not x and not any(w in path for w in waiting)]
    own = ("decoder", "pyramid", "text", "proj", "scale")
    assert [path for path in left if any(part in path for part in own)] == []
    metrics = task.metrics(found)
    assert metrics["num_examples"] == 1
    assert all(np.isfinite(value) for value in metrics.values())


def unpacked(name):
    num_classes, fields = DATA[name]
    return (num_classes, *fields)


# How each head learns: steps, its fields and the backbone's, rows and columns of the scenes.
BY_HEART = {
    "linear": (500, {"subcells": 8}, {}, slice(0, 32)),
    "pixels": (300, {"subcells": 8}, {}, slice(0, 32)),
    # One token a pixel, for masks are as fine as tokens.
    "mask": (500, {"dice": 0.0}, {"patch_size": 1}, slice(12, 20)),
    "per_token": (500, {}, {}, slice(0, 32)),
    "linear on levels": (
        400,
        {"subcells": 4, "pyramid": (2.0, 0.5), "pyramid_width": 64},
        {},
        slice(0, 32),
    ),
    "per_token on levels": (300, {}, {}, slice(0, 32)),
    "tokens": (500, {}, {"num_registers": 12}, slice(0, 32)),
    "towers": (120, {}, {}, slice(0, 32)),
}


@pytest.mark.soak  # Other tests of the default suite have runs of every task that learn.
@pytest.mark.parametrize("head", BY_HEART)
def test_eight_scenes_are_learned_by_heart(scene_batch, head):
    name, fields = HEADS[head]
    num_steps, own_fields, own_model, part = BY_HEART[head]
    fields = {**fields, **own_fields}
    scenes = {key: scene_batch[key] for key in DATA[name][1]}
    for key in {"image", "segmentation"} & set(scenes):
        scenes[key] = scenes[key][:, part, part]
    model = {"name": "vit", "patch_size": 8, "width": 64, "depth": 1, "num_heads": 2, **own_model}
    info = DataInfo(
        {key: ArraySpec(x.shape[1:], x.dtype) for key, x in scenes.items()}, DATA[name][0]
    )
    task = tasks.build({"name": name, **fields}, model, info)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 5e-3, 20, num_steps))
    batch = task.augment(scenes, jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def steps(params, state):
        def step(carry, _):
            params, state = carry

            def mean(params):
                loss, count = task.loss_fn(params, batch, jax.random.key(0))
                return loss / count

            loss, grads = jax.value_and_grad(mean)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), length=num_steps)

    params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    (params, _), losses = steps(params, optimizer.init(params))
    assert losses[-1] < 0.02 * losses[0]
    every = {**scenes, "mask": np.ones(8, np.float32)}
    evaluated = jax.jit(lambda p: {**task.eval_sums(p, every), **task.eval_rows(p, every)})(params)
    found = task.metrics(jax.device_get(evaluated))
    assert found[task.headline] > 0.9
