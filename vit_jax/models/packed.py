"""Images of any size and shape, several to a sequence (Dehghani et al. 2023, "Patch n' Pack").

`pack` cuts images into patches and lays them one after another in sequences of fixed length; a
`PackedViT` lets every token see its own image alone, so that its output for an image is that of a
`FlexiViT` with the same parameters.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.flexi import FlexiViT
from vit_jax.models.heads.classifier import MapHead
from vit_jax.models.layers.basic import cut_patches, pair
from vit_jax.models.layers.resize import linear_weights
from vit_jax.models.registry import Variant
from vit_jax.models.vit import SIZES
from vit_jax.types import Array, Features


@flax.struct.dataclass
class Packed:
    """Sequences of patches from several images.

    patches: float `[batch, tokens, ph * pw * channels]`.
    coordinates: (row, column) of the patch in its image, float32 `[batch, tokens, 2]`.
    grids: (rows, columns) of that image, float32 `[batch, tokens, 2]`; 1 in padding.
    segment_ids: int32 `[batch, tokens]`; images of a sequence count from 1, 0 is padding.
    channels, max_images: of an image, and of a sequence; static.
    """

    patches: Array | np.ndarray
    coordinates: Array | np.ndarray
    grids: Array | np.ndarray
    segment_ids: Array | np.ndarray
    channels: int = flax.struct.field(pytree_node=False)
    max_images: int = flax.struct.field(pytree_node=False)


def pack(
    images: Sequence[np.ndarray],
    *,
    patch_size: int | Sequence[int],
    max_tokens: int,
    max_images: int,
) -> tuple[Packed, np.ndarray]:
    """Lays images `[h, w, channels]` into sequences, each in the first that has room for it.

    Returns the sequences, and int32 `[len(images), 2]`: the sequence that an image went to, and its
    place among the images there (its row of the pooled output).

    Raises:
      UserError: an image has more patches than a sequence has tokens.
    """
    patch = pair(patch_size)
    cut = [np.asarray(cut_patches(jnp.asarray(image)[None], patch))[0] for image in images]
    grids = [patches.shape[:2] for patches in cut]
    homes = _first_fit([rows * columns for rows, columns in grids], max_tokens, max_images)
    batch = int(homes[:, 0].max()) + 1
    packed = Packed(
        patches=np.zeros((batch, max_tokens, cut[0].shape[-1]), np.float32),
        coordinates=np.zeros((batch, max_tokens, 2), np.float32),
        grids=np.ones((batch, max_tokens, 2), np.float32),
        segment_ids=np.zeros((batch, max_tokens), np.int32),
        channels=images[0].shape[-1],
        max_images=max_images,
    )
    filled = np.zeros(batch, int)
    for patches, grid, (sequence, place) in zip(cut, grids, homes, strict=True):
        start, length = filled[sequence], grid[0] * grid[1]
        span = sequence, slice(start, start + length)
        packed.patches[span] = patches.reshape(length, -1)
        packed.coordinates[span] = np.indices(grid).reshape(2, -1).T
        packed.grids[span] = grid
        packed.segment_ids[span] = place + 1
        filled[sequence] += length
    return packed, homes


def _first_fit(lengths: Sequence[int], max_tokens: int, max_images: int) -> np.ndarray:
    """(sequence, place in it) for every length; each goes to the first sequence with room."""
    used: list[int] = []
    counts: list[int] = []
    homes = []
    for number, length in enumerate(lengths):
        if length > max_tokens:
            raise UserError(
                f"image {number} has {length} patches but sequences hold max_tokens={max_tokens}; "
                "resize the image, or write more tokens or a larger patch_size"
            )
        room = (
            i for i in range(len(used)) if used[i] + length <= max_tokens and counts[i] < max_images
        )
        home = next(room, None)
        if home is None:
            home = len(used)
            used.append(0)
            counts.append(0)
        homes.append((home, counts[home]))
        used[home] += length
        counts[home] += 1
    return np.array(homes, np.int32)


class PackedViT(FlexiViT):
    """A ViT over packed sequences. Fields and parameters are those of `FlexiViT`.

    `__call__` takes a `Packed` and returns `Features` whose `pooled` is
    `[batch, max_images, width]`, a row for every image, and garbage (finite) where there is none;
    a `Classifier` gives `[batch, max_images, classes]`. Every image has a class token and registers
    of its own, in front of all patches.
    """

    def __post_init__(self) -> None:
        if self.pooling == "none" or self.patch_drop:
            raise UserError(
                "packed sequences need pooling 'token', 'mean' or 'map' and patch_drop=0; "
                "leave patches out while packing"
            )
        if self.window:
            raise UserError("packed sequences have no grid to cut into windows; write window=0")
        if self.distill_token:
            raise UserError("packed sequences have no distillation token; write False")
        super().__post_init__()

    @nn.nowrap
    def example_input(self, image_size: int | Sequence[int], channels: int) -> Any:
        """Shapes and dtypes of one sequence that holds one image."""
        (ph, pw), (height, width) = pair(self.patch_size), pair(image_size)
        tokens = (height // ph) * (width // pw)
        shape = jax.ShapeDtypeStruct
        return Packed(
            patches=shape((1, tokens, ph * pw * channels), jnp.float32),
            coordinates=shape((1, tokens, 2), jnp.float32),
            grids=shape((1, tokens, 2), jnp.float32),
            segment_ids=shape((1, tokens), jnp.int32),
            channels=channels,
            max_images=1,
        )

    @nn.compact
    def __call__(self, packed: Packed, *, train: bool = False) -> Features:
        """packed: as `pack` makes it."""
        count = packed.max_images
        x = self._project(packed.patches, packed.channels)
        x = self._add_packed_positions(x, packed)
        own = self._own_tokens()
        x, segments = _prepend_for_every_image(x, packed.segment_ids, own, count)
        rope = self._packed_rope(packed, prefix=len(own) * count)
        x = self._encode(x, train, rope=rope, segment_ids=(segments, segments))
        return Features(grid=None, pooled=self._pool_images(x, packed, train))

    @nn.nowrap
    def _own_tokens(self) -> list[Array]:
        """The class token and registers that every image brings, each `[width]`."""
        own = []
        if self._has_class_token():
            own.append(self._token("cls", nn.initializers.zeros, 1)[0, 0])
        if self.num_registers:
            init = nn.initializers.normal(stddev=0.02)
            own.extend(self._token("registers", init, self.num_registers)[0])
        return own

    @nn.nowrap
    def _add_packed_positions(self, x: Array, packed: Packed) -> Array:
        """Absolute positions; the learned table is read between its cells, as by `resize_grid`."""
        coordinates, grids = jnp.asarray(packed.coordinates), jnp.asarray(packed.grids)
        if self.position != "learned":
            return self._add_positions(x, coordinates, ())[0]
        side = self.table_grid
        table = self._position_table(side * side).reshape(side, side, self.width)
        rows = linear_weights(coordinates[..., 0], side, grids[..., 0])
        columns = linear_weights(coordinates[..., 1], side, grids[..., 1])
        return x + jnp.einsum("btr,btc,rcd->btd", rows, columns, table).astype(x.dtype)

    @nn.nowrap
    def _packed_rope(self, packed: Packed, prefix: int) -> Array | None:
        turns = self._turns(jnp.asarray(packed.coordinates), jnp.asarray(packed.grids))
        if turns is None:
            return None
        return jnp.pad(turns, [(0, 0), (prefix, 0)] + [(0, 0)] * (turns.ndim - 2))

    @nn.nowrap
    def _pool_images(self, x: Array, packed: Packed, train: bool) -> Array:
        """`[batch, tokens, width]` to `[batch, max_images, width]`."""
        count, num_patches = packed.max_images, packed.patches.shape[1]
        if self.pooling == "token":
            return x[:, :count]
        patches = x[:, -num_patches:]
        if self.pooling == "map":
            head = MapHead(self.block_spec(), train, name="map_head")
            return head(patches, packed.segment_ids, count)
        member = jax.nn.one_hot(packed.segment_ids - 1, count)  # padding's row is all zeros
        sums = jnp.einsum("bti,btd->bid", member, patches.astype(jnp.float32))
        return sums / jnp.maximum(member.sum(axis=1), 1.0)[..., None]


def _prepend_for_every_image(
    x: Array, segment_ids: Array, own: Sequence[Array], count: int
) -> tuple[Array, Array]:
    """`count` copies of every token in `own` before the patches, the i-th in segment i."""
    batch, _, width = x.shape
    ids = jnp.broadcast_to(jnp.arange(1, count + 1, dtype=jnp.int32)[None], (batch, count))
    copies = [
        jnp.broadcast_to(token.astype(x.dtype)[None, None], (batch, count, width)) for token in own
    ]
    tokens = jnp.concatenate([*copies, x], axis=1)
    return tokens, jnp.concatenate([*(ids for _ in own), segment_ids], axis=1)


# Attention pooling, and a table for 256 pixels, as SigLIP 2's NaFlex models have.
VARIANTS = {
    f"navit_{size}16": Variant(
        PackedViT,
        {**SIZES[size], "patch_size": 16, "kernel_size": 16, "table_grid": 16, "pooling": "map"},
        input_size=256,
    )
    for size in ("s", "b", "l", "so400m")
}
