"""Linear classifiers on frozen features, trained by SGD, many learning rates at once.

The protocols of DINO (Caron et al. 2021, section 4.1 and appendix F) and DINOv2 (Oquab et al. 2023,
section 7.1): class tokens of the last blocks, with or without the mean of the patches, momentum of
0.9, no weight decay, a cosine schedule. MAE (He et al. 2022, appendix A) normalizes features by the
batch and trains with LARS (You et al. 2017). Here features are computed once, without augmentation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.intermediate import LastLayers
from vit_jax.models.layers.basic import lift
from vit_jax.training.neighbors import Labelled
from vit_jax.types import Array, Params

MOMENTUM = 0.9
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""DINOv2's base rates, for a batch of 256."""
_EPSILON = 1e-6
_BATCH_SHARE = 0.1
"""The share of a batch in the running mean and variance."""


def appended(layers: LastLayers, blocks: int, average: bool) -> Array:
    """Returns features `[batch, dim]`: class tokens of the last blocks, oldest first (DINOv2).

    average: append the mean patch token of the last block. A model without class token has the mean
      patch tokens of the last blocks in any case.
    """
    if layers.cls is None:  # I-JEPA has patches alone.
        return jnp.concatenate([*layers.patches[-blocks:].mean(axis=2)], axis=-1)
    parts = [*layers.cls[-blocks:]]
    if average:
        parts.append(layers.patches[-1].mean(axis=1))
    return jnp.concatenate(parts, axis=-1)


def interleaved(layers: LastLayers) -> Array:
    """Returns features `[batch, 2 * width]` of the last block as DINO orders them.

    The class token and the mean patch token alternate, element by element.
    """
    assert layers.cls is not None
    pair = [layers.cls[-1], layers.patches[-1].mean(axis=1)]
    return jnp.stack(pair, axis=-1).reshape(len(pair[0]), -1)


@dataclasses.dataclass(frozen=True)
class Probes:
    """Classifiers that read the same features, one for each learning rate.

    Attributes:
      rates: their learning rates.
      momentum: of the gradients.
      batch_norm: features are normalized by the mean and the variance of the batch, and by running
        ones after training; without scale and offset (He et al. 2022, MAE).
      trust: the coefficient of LARS, by which each kernel's step has a share of the kernel's
        length; 0 is plain SGD, MAE has 0.001.
    """

    rates: Sequence[float]
    momentum: float = MOMENTUM
    batch_norm: bool = False
    trust: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))  # Compiled functions hash it.

    def init(self, key: Array, dim: int, num_classes: int) -> Params:
        """Returns kernels `[rates, dim, classes]`, normal of deviation 0.01, and zero biases.

        With `batch_norm` there are the running `mean` 0 and `variance` 1 `[dim]`, too.
        """
        shape = (len(self.rates), dim, num_classes)
        kernel = 0.01 * jax.random.normal(key, shape, jnp.float32)
        params = {"kernel": kernel, "bias": jnp.zeros((shape[0], num_classes))}
        if self.batch_norm:
            params |= {"mean": jnp.zeros(dim), "variance": jnp.ones(dim)}
        return params

    def logits(self, params: Params, features: Array) -> Array:
        """Returns the logits of all classifiers, `[rates, batch, classes]`."""
        if self.batch_norm:
            features = _normalized(features, params["mean"], params["variance"])
        products = jnp.einsum("bd,rdc->rbc", features, params["kernel"], precision="highest")
        return products + params["bias"][:, None]

    @functools.partial(jax.jit, static_argnums=0)
    def answers(self, params: Params, features: Array) -> Array:
        """Returns the classes of the highest logits, `[rates, batch]`; -1 if one is not finite."""
        logits = self.logits(params, features)
        return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)

    def losses(self, params: Params, features: Array, labels: Array) -> Array:
        """Returns the mean cross-entropy of each classifier, `[rates]`.

        labels: int `[batch]`, or the share of each class float `[batch, classes]`; rows of zeros
          count for nothing.
        """
        log_p = jax.nn.log_softmax(self.logits(params, features))
        if labels.ndim == 2:
            total = jnp.maximum(labels.sum(), 1e-6)
            return -jnp.einsum("rbc,bc->r", log_p, labels, precision="highest") / total
        picked = jnp.take_along_axis(log_p, labels[None, :, None], axis=-1)
        return -picked.mean(axis=(1, 2))

    @functools.partial(jax.jit, static_argnums=0)
    def step(
        self, params: Params, velocity: Params, features: Array, labels: Array, factor: Array
    ) -> tuple[Params, Params, Array]:
        """Returns parameters and velocities after one step of SGD, and the losses before it.

        factor: the multiplier of all learning rates at this step.
        """

        def total(trained: Params) -> tuple[Array, Array]:
            losses = self.losses({**params, **trained}, features, labels)
            return losses.sum(), losses

        running = {}
        if self.batch_norm:
            mean, variance = features.mean(0), features.var(0)
            unbiased = variance * len(features) / max(len(features) - 1, 1)
            running = {"mean": mean, "variance": unbiased}
            running = {
                name: (1 - _BATCH_SHARE) * params[name] + _BATCH_SHARE * value
                for name, value in running.items()
            }
            params = {**params, "mean": mean, "variance": variance}
        trained = {name: params[name] for name in ("kernel", "bias")}
        grads, losses = jax.grad(total, has_aux=True)(trained)
        if self.trust:
            grads["kernel"] *= self._shares(trained["kernel"], grads["kernel"])
        velocity = {name: self.momentum * velocity[name] + grads[name] for name in trained}
        rates = factor * jnp.asarray(self.rates, jnp.float32)

        def descend(p: Array, v: Array) -> Array:
            return p - rates.reshape((-1,) + (1,) * (p.ndim - 1)) * v

        return {**running, **jax.tree.map(descend, trained, velocity)}, velocity, losses

    def _shares(self, kernel: Array, grads: Array) -> Array:
        """Returns trust * |kernel| / |gradient| of each classifier, 1 where one of them is 0."""
        length, slope = (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (kernel, grads))
        share = self.trust * length / jnp.where(slope > 0, slope, 1.0)
        return jnp.where((length > 0) & (slope > 0), share, 1.0)

    def fit(
        self,
        params: Params,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
        factor: Callable[[int], float],
    ) -> tuple[Params, np.ndarray]:
        """Returns the parameters after one step for each batch, and the losses `[steps, rates]`.

        Args:
          params: those of `init`.
          batches: pairs of features `[batch, dim]` and labels int `[batch]`.
          factor: the multiplier of the rates by step, such as `cosine(steps)`.
        """
        velocity = {name: jnp.zeros_like(params[name]) for name in ("kernel", "bias")}
        losses = []
        for i, (features, labels) in enumerate(batches):
            params, velocity, loss = self.step(params, velocity, features, labels, factor(i))
            losses.append(loss)
        return params, np.asarray(losses)


def _normalized(features: Array, mean: Array, variance: Array) -> Array:
    return (features - lift(mean, 2)) * lift(jax.lax.rsqrt(variance + _EPSILON), 2)


def cosine(total: int, every: int = 1) -> Callable[[int], float]:
    """Returns half a cosine from 1 to 0 over `total` changes, one change after `every` steps.

    DINOv2 changes its rates with each step, DINO with each epoch.
    """
    return lambda step: 0.5 * (1.0 + math.cos(math.pi * (step // every) / total))


def sweep(
    train: Labelled,
    test: Mapping[str, Labelled],
    num_classes: int,
    *,
    rates: Sequence[float] = RATES,
    batch_size: int = 256,
    epochs: int = 10,
    seed: int = 0,
    batch_norm: bool = False,
) -> dict[str, np.ndarray]:
    """Returns the accuracies `[rates]` on each test split of classifiers trained on `train`.

    Args:
      rates: base rates; they are multiplied by batch_size / 256.
      batch_size: a smaller training set makes one batch.
      epochs: passes over the training set, in another order each time; a rest of fewer examples
        than a batch is left to the next pass.
      batch_norm: see `Probes`.
    """
    probes, params = trained(
        train, num_classes, rates=rates, batch_size=batch_size, epochs=epochs, seed=seed,
        batch_norm=batch_norm,
    )  # fmt: skip
    return {name: _accuracies(probes, params, split) for name, split in test.items()}


def trained(
    train: Labelled,
    num_classes: int,
    *,
    rates: Sequence[float],
    batch_size: int = 256,
    epochs: int = 10,
    seed: int = 0,
    batch_norm: bool = False,
) -> tuple[Probes, Params]:
    """Returns classifiers of features and their parameters, trained as `sweep` says.

    The labels of `train` may be rows of shares; see `Probes.losses`. With `batch_norm`, mean and
    variance are those of all features of `train`.
    """
    size = min(batch_size, len(train.labels))
    scaled = tuple(rate * batch_size / 256 for rate in rates)
    probes = Probes(scaled, batch_norm=batch_norm)
    params = probes.init(jax.random.key(seed), train.features.shape[1], num_classes)
    steps = len(train.labels) // size

    def batches() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for epoch in range(epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(train.labels))
            for i in range(steps):
                rows = order[i * size : (i + 1) * size]
                yield train.features[rows], train.labels[rows]

    params, _ = probes.fit(params, batches(), cosine(epochs * steps))
    if batch_norm:  # The running ones only approach these, slowly.
        mean, variance = (reduce(train.features, axis=0) for reduce in (np.mean, np.var))
        params = {**params, "mean": mean, "variance": variance}
    return probes, params


def _accuracies(probes: Probes, params: Params, split: Labelled, chunk: int = 4096) -> np.ndarray:
    """Returns the accuracy of each classifier, `[rates]`; logits that are not finite are wrong."""
    right = [
        np.asarray(probes.answers(params, split.features[i : i + chunk]))
        == split.labels[i : i + chunk]
        for i in range(0, len(split.labels), chunk)
    ]
    return np.concatenate(right, axis=1).mean(axis=1)
