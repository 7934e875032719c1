"""An image backbone and a text backbone that embed into the same vector space."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.layers.basic import Linear
from vit_jax.models.layers.initialization import with_axes
from vit_jax.models.traits import Traits, traits_of
from vit_jax.types import Array, Features


class TowerOutputs(NamedTuple):
    """The vectors of images and texts that two towers return.

    Attributes:
      image, text: float32 unit vectors `[batch, dim]`; None if this input was not given.
      scale, bias: scalars; the logit of a pair is `scale * image·text + bias`.
    """

    image: Array | None
    text: Array | None
    scale: Array
    bias: Array

    def logits(self, images: Array, texts: Array) -> Array:
        """Returns the logits of all pairs `[images, texts]`, from products in full float32."""
        products = jnp.einsum("id,td->it", images, texts, precision="highest")
        return self.scale * products + self.bias


class TwoTowers(nn.Module):
    """Two towers (Radford et al. 2021, CLIP; Zhai et al. 2022, LiT; 2023, SigLIP).

    backbone/                       the image tower
    text/                           the text tower
    image_proj/, text_proj/         {kernel `[width, dim]`, bias}
    log_scale `[1]`, bias `[1]`     the second only if `bias_init` is given

    Attributes:
      backbone, text: the image tower and the text tower.
      dim: the length of the vectors.
      project_image: if False, the image tower's own vector is used, which must have length `dim`.
      text_length: the number of tokens of a text, for which parameters are initialized.
      scale_init: the initial scale of the products.
      bias_init: the initial bias of the logits; None for no bias.
    """

    backbone: nn.Module
    text: nn.Module
    dim: int
    text_length: int
    project_image: bool = True
    scale_init: float = 10.0
    bias_init: float | None = None

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns the traits of the image tower, with additions for the text tower and the loss."""
        image, text = traits_of(self.backbone), traits_of(self.text)
        text_kind = "a text tower" if text.reads_text else f"{text.kind} that reads texts"
        found = image.but(*text.named, text_kind)
        if image.kind != "a ViT":
            found = found.but(f"{image.kind} beside a text tower")
        if "no pooling" in image.named:
            found = found.but("no pooling beside a text tower")
        return found if self.bias_init is None else found.but("the sigmoid loss's bias")

    @nn.compact
    def __call__(
        self, images: Array | None = None, tokens: Array | None = None, *, train: bool = False
    ) -> TowerOutputs:
        """Encodes images `[batch, h, w, channels]`, tokens int32 `[batch, text_length]`, or both.

        Initialization with images alone creates all parameters.
        """
        if tokens is None and self.is_initializing():
            tokens = jnp.zeros((1, self.text_length), jnp.int32)
        image = text = None
        if images is not None:
            image = self._unit(self.backbone(images, train=train), "image_proj", self.project_image)
        if tokens is not None:
            text = self._unit(self.text(tokens, train=train), "text_proj", True)
        scale = jnp.exp(self._number("log_scale", jnp.log(self.scale_init)))
        start = self.bias_init
        bias = jnp.float32(0) if start is None else self._number("bias", start)
        return TowerOutputs(image, text, scale, bias)

    @nn.nowrap
    def _unit(self, features: Features, name: str, project: bool) -> Array:
        """Returns vectors of length one; a zero vector stays zero."""
        x = features.vector()
        if project:
            init = nn.initializers.lecun_normal()
            x = Linear((self.dim,), ("embed", None), kernel_init=init, name=name)(x)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-16))

    @nn.nowrap
    def _number(self, name: str, value: Array | float) -> Array:
        init = with_axes(nn.initializers.constant(value), (None,))
        return self.param(name, init, (1,), jnp.float32)[0]
