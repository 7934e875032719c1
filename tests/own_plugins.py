"""One plug-in of each kind in one file outside the package: what a user of the package may add.

A config names them `own_plugins:NAME`, as in `--config.optim.name=own_plugins:sign_descent`, where
Python finds the file: in the current folder, or anywhere on its path.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.data.ops import image_op
from vit_jax.tasks import classification
from vit_jax.types import Features


class Pooled(nn.Module):
    """A model: one convolution, averaged over the image; its parameters name their axes."""

    width: int = 8

    @nn.compact
    def __call__(self, images, *, train=False):
        kernel_init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), ("conv_h", "conv_w", "conv_in", "conv_out")
        )
        conv = nn.Conv(self.width, (4, 4), strides=4, use_bias=False, kernel_init=kernel_init)
        grid = nn.gelu(conv(images))
        return Features(grid=grid, pooled=grid.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Task(classification.Task):
    """A task: classification that is also told to keep its logits small."""

    logit_decay: float = 1e-3

    def loss_fn(self, params, batch, key):
        total, count = super().loss_fn(params, batch, key)
        logits = self.model.apply({"params": params}, batch["image"])
        return total + self.logit_decay * jnp.square(logits).sum(), count


def sign_descent(momentum: float = 0.9) -> optax.GradientTransformation:
    """An update rule: the sign of the momentum."""
    sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    return optax.chain(optax.trace(momentum), sign)


def square_root(step, start, total, *, end=0.0):
    """A schedule: from 1 to `end` along a square root."""
    progress = jnp.clip((step - start) / max(total - start, 1), 0.0, 1.0)
    return 1.0 - (1.0 - end) * jnp.sqrt(progress)


class Stripes:
    """A data source: 8×8 images with lines across (class 0) or down (class 1)."""

    num_classes = 2
    class_names = ("across", "down")

    def __init__(self, split="train", num_examples=64):
        self.fingerprint = f"stripes/{split}/{num_examples}"
        self._num_examples = num_examples

    def __len__(self):
        return self._num_examples

    def fetch(self, indices):
        labels = np.asarray(indices, np.int32) % 2
        across = np.zeros((8, 8, 3), np.uint8)
        across[::2] = 255
        both = np.stack([across, across.transpose(1, 0, 2)])
        return {"image": both[labels], "label": labels}

    def describe(self, index):
        return f"image {index}"


@image_op
def negative(image, white: int = 255):
    """A preprocessing op: black for white."""
    return white - image
