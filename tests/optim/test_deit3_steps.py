"""Thirty steps of DeiT III's recipe at toy size equal those of timm's LAMB, loss and mixing."""

import json
from pathlib import Path

import deit3_toy as toy
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import load
from vit_jax.models import Classifier
from vit_jax.models.vit import VisionTransformer
from vit_jax.tasks.classification import LOSSES

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/interop/deit3_steps.json").read_text())["steps"]


def mixed(images, labels, draw):
    """A batch as timm's Mixup returned it: each image with its opposite in the batch."""
    share, labels = np.float32(draw["share"]), np.eye(toy.CLASSES, dtype=np.float32)[labels]
    if draw["box"]:
        y0, x0, y1, x1 = draw["box"]
        images = images.copy()
        images[:, y0:y1, x0:x1] = images[::-1, y0:y1, x0:x1].copy()
    else:
        images = share * images + (1 - share) * images[::-1]
    # `multihot_mixing`: a mixed image is an example of both its classes, unless it kept nothing.
    targets = share * labels + (1 - share) * labels[::-1]
    return images, np.float32(targets > 0)


def test_thirty_steps_of_deit3(make):
    recipe = load(f"{ROOT}/configs/deit3.py").optim.to_dict()
    per_class = toy.CLASSES / 1000  # Clipping and epsilon are in units of a sum over classes.
    recipe["args"]["eps"] *= per_class
    recipe["clip_norm"] *= per_class
    recipe["schedule"]["warmup"] = toy.WARMUP
    assert (recipe["lr"], recipe["weight_decay"]) == (toy.LR, toy.DECAY)
    sizes = {k: toy.SIZES[k] for k in ("width", "depth", "num_heads", "mlp_dim")}
    fields = {"class_token_position": False, "layer_scale": 0.1, "scan": False}
    model = Classifier(VisionTransformer(patch_size=4, **sizes, **fields), toy.CLASSES)
    flat, images, labels = toy.draw()
    params = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(flat, sep="/"))
    optimizer = make(params, toy.STEPS, **recipe)

    @jax.jit
    def train_step(params, state, step, images, targets):
        def mean_loss(params):
            logits = model.apply({"params": params}, images, train=True)
            return LOSSES["sigmoid"](logits, targets).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params, step)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

    state, found = optimizer.init(params), []
    for step, draw in enumerate(GOLDEN):
        batch = mixed(images[step], labels[step], draw)
        params, state, *row = train_step(params, state, step, *batch)
        found.append(row)
    loss, norm = np.asarray(found).T / toy.CLASSES
    np.testing.assert_allclose(loss, [row["loss"] for row in GOLDEN], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, [row["grad_norm"] for row in GOLDEN], rtol=1e-3)
