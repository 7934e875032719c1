"""Detection of what texts name: OWL-ViT (Minderer et al. 2022) and OWLv2 (Minderer et al. 2023)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.heads.dense import BoxMlp, corners
from vit_jax.models.layers.basic import Linear, make_norm
from vit_jax.models.traits import Traits, traits_of
from vit_jax.types import Array, Features

_LENGTH_EPSILON = 1e-6
_PLACE_EPSILON = 1e-4


class OpenVocabularyDetector(nn.Module):
    """Two towers and a head that gives every patch a box, and a score for each of some texts.

    backbone/, text/, text_proj/    as in `TwoTowers`
    decoder/norm                    of patches, each multiplied with the class token
    decoder/embed, shift, scale     the vector of a patch, and how its products become scores
    decoder/box/, objectness/       MLPs dense1, dense2, dense3

    The score of a patch for a text is `(cosine + shift) * (elu(scale) + 1)`. How likely a patch is
    an object of any kind, which OWLv2 learned without texts, is sown as intermediates/objectness.

    Attributes:
      backbone: the image tower, which has a class token.
      text: the text tower. dim: the length of its projected vectors.
      text_length: the number of tokens of a text.
      texts: the token numbers of the texts that are looked for.
      objectness: whether there is a head for objects of any kind (OWLv2).
      norm_epsilon: that of the decoder's norm.
    """

    backbone: nn.Module
    text: nn.Module
    dim: int
    text_length: int
    texts: Sequence[Sequence[int]] = ()
    objectness: bool = False
    norm_epsilon: float = 1e-5

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns the traits of the image tower, with additions for the text tower and the head."""
        named = traits_of(self.text).named
        return traits_of(self.backbone).but(*named, "a text tower", "detection by texts")

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> tuple[Array, Array]:
        """Maps images `[batch, h, w, channels]` to float32 scores and boxes of N patches.

        Returns scores `[batch, N, texts]` (logits) and boxes `[batch, N, 4]` as (y0, x0, y1, x1),
        whose centers are within 0..1 of the image.

        Raises:
          UserError: the image tower gives no map of patches.
        """
        features = self.backbone(images, train=train)
        if features.grid is None:
            raise UserError("this head reads every patch; write config.model.patch_drop=0")
        wanted = self.texts or [[0] * self.text_length]
        tokens = jnp.asarray(wanted, jnp.int32)
        projection = Linear((self.dim,), ("embed", None), name="text_proj")
        texts = projection(self.text(tokens, train=train).vector())
        decoder = _Decoder(self.dim, self.objectness, self.norm_epsilon, name="decoder")
        scores, boxes, objectness = decoder(features, texts)
        if objectness is not None:
            self.sow("intermediates", "objectness", objectness)
        return scores, boxes


class _Decoder(nn.Module):
    dim: int
    objectness: bool
    epsilon: float

    @nn.compact
    def __call__(self, features: Features, texts: Array) -> tuple[Array, Array, Array | None]:
        grid, token = features.grid, features.pooled
        assert grid is not None
        assert token is not None
        batch, rows, columns, width = grid.shape
        x = grid.reshape(batch, rows * columns, width) * token[:, None]
        norm = make_norm("layernorm", name="norm", dtype=jnp.float32, epsilon=self.epsilon)
        x = norm(x.astype(jnp.float32))
        vectors = _unit(Linear((self.dim,), ("embed", None), name="embed")(x))
        cosines = jnp.einsum("bnd,td->bnt", vectors, _unit(texts), precision="highest")
        shift, scale = (Linear((1,), ("embed", None), name=part)(x) for part in ("shift", "scale"))
        sizes = (width, width)
        box = BoxMlp((*sizes, 4), activation="gelu", name="box")(x)
        objectness = None
        if self.objectness:
            objectness = BoxMlp((*sizes, 1), activation="gelu", name="objectness")(x)[..., 0]
        scores = (cosines + shift) * (nn.elu(scale) + 1)
        return scores, corners(jax.nn.sigmoid(box + _place_logits(rows, columns))), objectness


def _unit(x: Array) -> Array:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + _LENGTH_EPSILON)


def _place_logits(rows: int, columns: int) -> Array:
    """Returns the start of each patch's box `[1, rows * columns, 4]`, as logits.

    In order they are the center's y and x, which is the patch's lower right corner, and the patch's
    height and width.
    """
    ends = jnp.meshgrid(
        *((jnp.arange(n, dtype=jnp.float32) + 1) / n for n in (rows, columns)), indexing="ij"
    )
    sizes = [jnp.full((rows, columns), 1 / n, jnp.float32) for n in (rows, columns)]
    cells = jnp.stack([*ends, *sizes], axis=-1).reshape(1, -1, 4)
    return jnp.log(cells + _PLACE_EPSILON) - jnp.log1p(_PLACE_EPSILON - cells)
