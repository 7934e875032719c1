"""Attention pooling and the classification head."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models.layers.basic import Linear, lift
from vit_jax.models.layers.initialization import SCHEMES, Scheme, with_axes
from vit_jax.models.layers.transformer import BlockSpec
from vit_jax.models.traits import Traits, traits_of
from vit_jax.types import Array, Features


class MapHead(nn.Module):
    """Multi-head attention pooling (Zhai et al. 2022, "Scaling vision transformers").

    A learned probe attends to all tokens; an MLP with a residual follows unless `mlp` is False
    (Fini et al. 2024, AIMv2). There is no residual around the attention. Parameters: probe
    `[1, 1, dim]`, attn, norm, mlp, where `dim` is the width of the spec's heads together, which
    need not be that of the tokens (Yu et al. 2022, CoCa).

    Its layers are those of the encoder, but always with biases and without norms inside.
    """

    spec: BlockSpec
    train: bool
    mlp: bool = True

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Pools tokens `[batch, n, width]` into `[batch, 1, dim]`."""
        batch, width = tokens.shape[0], self.spec.num_heads * self.spec.head_dim
        init = with_axes(nn.initializers.xavier_uniform(), (None, None, "embed"))
        probe = self.param("probe", init, (1, 1, width), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(tokens.dtype), (batch, 1, width))
        spec = dataclasses.replace(
            self.spec,
            qkv_bias=True,
            key_bias=True,
            proj_bias=True,
            mlp_bias=True,
            attention_norm=False,
            mlp_norm=False,
            num_kv_heads=None,
            position_bias=None,
            differential=False,
        )
        x = spec.make_attention(train=self.train, name="attn")(probe, tokens)
        if not self.mlp:
            return x
        y = spec.make_norm("norm")(x)
        return x + spec.make_mlp(train=self.train, name="mlp")(y)


class ClassHead(nn.Module):
    """Class scores of a vector, always in float32.

    Parameters: kernel `[dim, classes]` and bias `[classes]`; `pre_logits` (dense, then tanh) with
    `representation_size`, the hidden layer that the first ViT paper pre-trained with. `scheme`
    gives the initial kernel where it is not zero.
    """

    num_classes: int
    representation_size: int | None
    head_bias_init: float
    head_zero_init: bool
    scheme: Scheme = SCHEMES["vision_transformer"]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        if self.representation_size:
            pre_logits = Linear(
                (self.representation_size,),
                ("embed", None),
                kernel_init=nn.initializers.lecun_normal(),
                name="pre_logits",
            )
            x = jnp.tanh(pre_logits(x))
        if not self.num_classes:
            return x
        init = nn.initializers.zeros if self.head_zero_init else self.scheme.head
        kernel_init = with_axes(init, ("embed", "classes"))
        bias_init = with_axes(nn.initializers.constant(self.head_bias_init), ("classes",))
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.num_classes), jnp.float32)
        bias = self.param("bias", bias_init, (self.num_classes,), jnp.float32)
        return x @ kernel + lift(bias, x.ndim)


class Classifier(nn.Module):
    """A backbone and a linear head on its pooled features.

    Attributes:
      num_classes: length of the logits; 0 gives `Features` whose pooled vector is what the logits
        would be made of.
      representation_size: width of a hidden tanh layer before them, or None.
      head_bias_init: initial bias; about -log(classes) starts sigmoid losses low (-10 is usual).
      head_zero_init: start the head's kernel at zero, so that training starts from equal logits and
        a pre-trained backbone is not disturbed by a random head. False starts it as the backbone's
        `initialization` says.
    """

    backbone: nn.Module
    num_classes: int
    representation_size: int | None = None
    head_bias_init: float = 0.0
    head_zero_init: bool = True

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        hidden = ("a representation layer",) if self.representation_size else ()
        return traits_of(self.backbone).but(*hidden)

    @nn.compact
    def __call__(
        self, images: Array, *, train: bool = False
    ) -> Array | tuple[Array, Array] | Features:
        """Maps images `[batch, height, width, channels]` to float32 logits `[batch, classes]`.

        A backbone built without pooling gives logits for every place, `[batch, h, w, classes]`. One
        with a distillation token has a head for each of its two tokens: in training both logits
        are returned, (class token's, distillation token's), otherwise their mean (DeiT, section 4).
        """
        features: Features = self.backbone(images, train=train)
        read = features.grid if features.pooled is None else features.pooled
        assert read is not None
        logits = self._head("head")(read)
        if not self.num_classes:
            name = "grid" if features.pooled is None else "pooled"
            return features.replace(**{name: logits})
        if features.distill is None:
            return logits
        distilled = self._head("head_distill")(features.distill)
        return (logits, distilled) if train else (logits + distilled) / 2

    @nn.nowrap
    def _head(self, name: str) -> ClassHead:
        return ClassHead(
            self.num_classes,
            self.representation_size,
            self.head_bias_init,
            self.head_zero_init,
            SCHEMES.get(getattr(self.backbone, "initialization", ""), Scheme()),
            name=name,
        )
