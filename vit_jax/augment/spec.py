"""The augmentation of training batches on the device, as one object that any task may use."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.augment import randaugment
from vit_jax.augment.images import (
    by_row,
    check_affine,
    check_elastic,
    cutmix,
    distort,
    distort_labels,
    draw_affine,
    draw_elastic,
    erase,
    is_map,
    mixup,
)
from vit_jax.errors import UserError
from vit_jax.types import Array, ArraySpec

Targets = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of a training batch, in the order of the attributes.

    A target of shape `[b, h, w]`, h and w being those of the images, is a map of labels: it moves
    with the images. Every other target belongs to its image as a whole.

    Attributes:
      affine: bounds of random distortions: {rotate, shift, scale, shear}, see `draw_affine`; {} =
        off.
      elastic: random smooth distortions: {deviation, grid}, see `draw_elastic`; {} = off.
      randaug: RandAugment: {num_layers, magnitude, corrected}; keys that are left out have the
        defaults of the preprocessing op of this name; {} = off. It moves no maps.
      erasing: the share of the images in which noise replaces a box; see `erase`.
      mixup, cutmix: the parameter of each one's Beta distribution, 0 = off. With both, a fair coin
        picks one for each group.
      mixing_groups: the number of equal parts of a batch that draw a coin, a coefficient and a box
        of their own. Codebases that mix on each device on its own have one for each device.
    """

    affine: Mapping[str, float] = dataclasses.field(default_factory=dict)
    elastic: Mapping[str, float] = dataclasses.field(default_factory=dict)
    randaug: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixing_groups: int = 1

    @classmethod
    def of(cls, task: Any) -> "Augmentation":
        """Returns the augmentation that the fields of a task with these names describe."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(task, name) for name in names if hasattr(task, name)})

    def check(self, image: ArraySpec) -> None:
        """Raises a `UserError` if an attribute is invalid or does not fit the images."""
        check_affine(self.affine)
        check_elastic(self.elastic)
        randaugment.check(self.randaug, image)
        if not 0 <= self.erasing <= 1:
            raise UserError(f"config.task.erasing={self.erasing}: write a number from 0 to 1")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"config.task.{name}={getattr(self, name)}: write 0 or more")
        if self.mixing_groups < 1:
            raise UserError(f"config.task.mixing_groups={self.mixing_groups}: write 1 or more")

    def __call__(
        self,
        key: Array,
        images: Array,
        targets: Targets,
        normalize: Callable[[Array], Array],
    ) -> tuple[Array, Targets]:
        """Returns (images, targets) of the augmented batch.

        Args:
          key: for all random numbers.
          images: `[b, h, w, c]` as the pipeline yields them.
          targets: arrays by name, leading axis b. Mixup needs numbers whose means make sense, such
            as probabilities.
          normalize: brings images into the range of the model, before erasing and mixing.
        """
        # The order of these keys is part of every result.
        key_coin, key_mix, key_erase, key_distort, key_augment = jax.random.split(key, 5)
        if self.affine or self.elastic:
            moves = self._draw_moves(key_distort, images)
            targets = {
                name: distort_labels(x, *moves) if is_map(x, images) else x
                for name, x in targets.items()
            }
            images = distort(images, *moves)
        if self.randaug:
            images = randaugment.augment(key_augment, images, **self.randaug)
        images = normalize(images)
        if self.erasing:
            images = erase(key_erase, self.erasing, images)
        return self._mix(key_coin, key_mix, images, targets)

    def _draw_moves(self, key: Array, images: Array) -> tuple[Array, ...]:
        """Returns the arguments of `distort` beside the images."""
        amounts = draw_affine(key, len(images), **self.affine)
        if not self.elastic:
            return (amounts,)
        # A key of its own, so that runs without elastic distortions keep their numbers.
        key = jax.random.fold_in(key, 1)
        return amounts, draw_elastic(key, len(images), images.shape[1:3], **self.elastic)

    def _mix(
        self, key_coin: Array, key_mix: Array, images: Array, targets: Targets
    ) -> tuple[Array, Targets]:
        """Returns normalized images and targets after mixup or cutmix, if either is on."""
        groups = self.mixing_groups
        if (self.mixup or self.cutmix) and len(images) % groups:
            raise UserError(
                f"config.task.mixing_groups={groups} does not divide the batch of {len(images)}"
            )

        def mixed_up() -> tuple[Array, Targets]:
            return mixup(key_mix, self.mixup, images, targets, groups=groups)

        def pasted() -> tuple[Array, Targets]:
            return cutmix(key_mix, self.cutmix, images, targets, groups=groups)

        if self.mixup and self.cutmix:
            if groups == 1:
                return jax.lax.cond(jax.random.bernoulli(key_coin), mixed_up, pasted)
            heads = jax.random.bernoulli(key_coin, shape=(groups,))
            return jax.tree.map(
                lambda x, y: jnp.where(by_row(heads, x), x, y), mixed_up(), pasted()
            )
        if self.mixup:
            return mixed_up()
        return pasted() if self.cutmix else (images, targets)
