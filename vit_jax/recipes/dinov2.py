"""The model and the optimizer that the fast setups of DINOv2 and DINOv3 on ImageNet-1k share.

The numbers are those of dinov2/configs/ssl_default_config.yaml in facebookresearch/dinov2, which
dinov3/configs/train/vitl_im1k_lin834.yaml in facebookresearch/dinov3 repeats.
"""

from typing import Any

from ml_collections import ConfigDict

from vit_jax.recipes import crops, imagenet

EPOCH = 1250
"""Steps. Their schedules count in these, whatever the number of images is."""


def use(
    config: ConfigDict, *, data: str, sides: tuple[int, int], model: str, **fields: Any
) -> None:
    """Fills a config for 125,000 steps of 2,048 images.

    Args:
      data: an image folder; empty for TFDS.
      sides: of global and of local crops, in pixels.
      model: the name of the model.
      **fields: its fields, other than those that both setups have.
    """
    config.total = 100 * EPOCH
    config.batch_size = 2048
    imagenet.use(
        config,
        root=data,
        minival=False,
        crop=crops_of(sides),
        eval_pp=crops.evaluation(sides[0]),
    )
    config.model = {
        "name": model,
        "activation": "gelu",
        "initialization": "deit",
        "layer_scale": 1e-5,
        # The same in all blocks, for an exact share of the batch.
        "drop_path": 0.3,
        "constant_drop_path": True,
        "drop_path_exact": True,
        "dtype": "bfloat16",
        "residual_dtype": "float32",
        **fields,
    }
    config.optim.lr = 4e-3 * (config.batch_size / 1024) ** 0.5
    schedule = {"name": "dino", "warmup": 10 * EPOCH, "end": 1e-6 / config.optim.lr}
    config.optim.schedule.update(schedule)
    # The learning rate of the prototypes is 0 at first; unlike in DINO, Adam's moments advance.
    prototypes = {**schedule, "zero_until": EPOCH}
    config.optim.group_schedules = [[".*/prototypes/.*", prototypes]]
    config.optim.layer_decay = 0.9
    config.optim.stem = r"(.*/)?(patch_embed/.*|pos_embed|cls|registers|mask_token)"
    config.optim.lr_mults = [[".*patch_embed/.*", 0.2]]
    config.optim.weight_decay = 0.04
    config.optim.decay_schedule = {"name": "dino", "end": 0.4 / 0.04}
    config.optim.decay_mask = (
        r"(?!.*norm.*)(.*/kernel|.*/(pos_embed|cls|registers|scale)|(.*/)?mask_token)"
    )
    config.optim.clip_norm, config.optim.clip_scope = 3.0, "module"


def crops_of(sides: tuple[int, int]) -> str:
    """Returns the preprocessing for global and local crops of these sides, in pixels."""
    return crops.multi_crop(area=32, sides=sides, blurs=(0.0, 0.9, 0.5), radius=4)


def run_locally(config: ConfigDict, **task: int) -> None:
    """Reduces a recipe to a test of a few seconds; `task` are further fields of its task."""
    imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48, patch_size=4)
    sizes = {"num_prototypes": 32, "head_hidden": 32, "head_bottleneck": 16}
    config.task.update({**sizes, "temperature_warmup": 1, **task})
    for _, schedule in config.optim.group_schedules:
        schedule.update(warmup=1, zero_until=1)
