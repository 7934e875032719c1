"""A frozen teacher, and several students that learn from it in one step.

(Siméoni et al. 2025, DINOv3, section 5.2.) The outputs of the teacher are computed once for all
students, which is most of the work where the teacher is large.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import pair, token_stride
from vit_jax.models.published import TEACHER
from vit_jax.models.vit import VisionTransformer
from vit_jax.optim.groups import STUDENTS
from vit_jax.plugins import check_fields
from vit_jax.tasks._checks import build_backbone
from vit_jax.tasks._distill import check_keys, check_model, load_teacher
from vit_jax.types import Params


@dataclasses.dataclass(frozen=True)
class FrozenTeacher:
    """The teacher that `config.task.distill` describes: a trained network with its heads.

    Attributes:
      model: the name and the fields of its backbone.
      checkpoint: its parameters, those of the heads included, such as a workdir of the same task.
      head_depth, head_hidden, head_bottleneck, ibot_hidden, ibot_bottleneck: the sizes of its
        heads; 0 for those of the students.
    """

    model: Mapping[str, Any]
    checkpoint: str
    head_depth: int = 0
    head_hidden: int = 0
    head_bottleneck: int = 0
    ibot_hidden: int = 0
    ibot_bottleneck: int = 0

    @classmethod
    def create(cls, keys: Mapping[str, Any]) -> "FrozenTeacher":
        """Returns the teacher of `config.task.distill`. Raises `UserError` for unknown keys."""
        check_keys(keys, {field.name for field in dataclasses.fields(cls)})
        check_fields(cls, keys, "config.task.distill.")
        return cls(**keys)

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of heads that are not those of the students."""
        names = (field.name for field in dataclasses.fields(self))
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if isinstance(value, int) and value}

    def load(self, network: nn.Module, image_shape: tuple[int, ...]) -> Params:
        """Returns the parameters of the checkpoint, for images `(height, width, channels)`.

        Raises:
          UserError: the checkpoint cannot be read, or belongs to another network.
        """
        return load_teacher(self.checkpoint, network, image_shape)


def backbone_like(
    where: str, model: Mapping[str, Any], like: Any, crops: Sequence[tuple[int, ...]]
) -> VisionTransformer:
    """Returns another backbone for the crops and the masks of `like`.

    crops: the shapes of those that the backbone sees; see `with_position_grid`.

    Raises:
      UserError: the model is no such ViT, or has patches of another size.
    """
    check_model(where, model)
    try:
        backbone = with_position_grid(build_backbone("dinov2", model), crops)
    except UserError as error:
        raise UserError(f"config.task.{where}: {error}") from error
    if pair(backbone.patch_size) != pair(like.patch_size) or backbone.pooling != "token":
        raise UserError(
            f"config.task.{where}: teacher and students share crops and masks; write patch_size="
            f"{like.patch_size} and pooling='token'"
        )
    return backbone


def with_position_grid(
    backbone: VisionTransformer, crops: Sequence[tuple[int, ...]]
) -> VisionTransformer:
    """Returns a backbone whose learned positions are kept for the first of the crops.

    Args:
      crops: the shapes `(height, width, ...)` of all images that the backbone sees.

    Raises:
      UserError: the blocks have tables of positions, and the crops have grids of several sizes.
    """
    stride = token_stride(backbone)
    assert stride is not None
    grids = [(height // stride[0], width // stride[1]) for height, width, *_ in crops]
    has_tables = backbone.block_positions or "table" in backbone.position_bias
    if has_tables and len({*grids}) > 1:
        sizes = " and ".join(f"{rows}×{columns}" for rows, columns in sorted({*grids}))
        raise UserError(
            f"block_positions and position_bias={backbone.position_bias!r}: tables of positions in"
            f" blocks fit one grid, but the crops have grids of {sizes} patches; write"
            " block_positions=false and position_bias='none' or 'mlp'"
        )
    has_table = backbone.position == "learned" or backbone.position_table
    if backbone.position_grid or not has_table:
        return backbone
    return backbone.clone(position_grid=grids[0])


def own_params(params: Params) -> Params:
    """Returns the parameters without those of a frozen teacher and of further students."""
    others = (TEACHER, STUDENTS)
    return {name: tree for name, tree in params.items() if name not in others}
