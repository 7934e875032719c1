"""A released image-text model, evaluated on images with classes, whose names are its texts.

    python -m vit_jax evaluate --checkpoint=openai/clip-vit-base-patch32 \\
        --config=configs/zero_shot.py:photos,checkpoint=openai/clip-vit-base-patch32

Nothing is trained (Radford et al. 2021, CLIP, section 3.1). `checkpoint` is a folder of
transformers or open_clip with both towers and the tokenizer, its name or its address on the hub.
`photos` is a folder ROOT/CLASS/*.jpg or ROOT/SPLIT/CLASS/*.jpg, or a dataset of TensorFlow
Datasets; `split` (`test`) is the part of it. {} in `prompt` stands for the name of a class; the
vectors of several sentences are averaged (`--config.task.prompts`), and
`--config.task.classes` replaces the names.

Sizes, means and deviations are those of the files beside the weights. Images are resized by
TensorFlow with antialiasing, not by Pillow as in `predict`, which may change single answers.
"""

import os

from vit_jax import checkpoints
from vit_jax.checkpoints import hub, input_spec
from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError


def get_config(arg=None):
    arg = parse_arg(arg, data="", checkpoint="", split="test", prompt="a photo of a {}.", batch=64)
    if not arg.checkpoint:
        raise UserError("zero_shot: write checkpoint=FOLDER, of an image-text model")
    towers = checkpoints.towers_config(arg.checkpoint)
    told = input_spec.read(arg.checkpoint) or input_spec.InputSpec()
    height, width = told.size or (224, 224)
    config = default_config()
    config.total = 1
    config.batch_size = arg.batch
    config.model = dict(towers.model)
    config.task = {
        "name": "contrastive",
        "text": dict(towers.text),
        "vocab": str(hub.local_path(arg.checkpoint, weights=False)),
        "text_length": towers.length,
        "dim": towers.dim,
        "project_image": towers.project_image,
        "loss": "sigmoid" if towers.has_bias else "softmax",
        "prompts": (arg.prompt,),
        "mean": told.mean,
        "std": told.std,
    }
    config.data.source = "folder" if os.path.isdir(arg.data) else "tfds"
    config.data.name = arg.data
    config.data.split = arg.split
    how = f'method="{told.interpolation}", antialias=True'
    if told.keeps_aspect:
        smaller = round(min(height, width) / told.crop)
        resize = f"resize_small({smaller}, {how})|central_crop(({height}, {width}))"
    else:
        resize = f"resize(({height}, {width}), {how})"
    config.data.pp = config.data.eval_pp = f"decode|{resize}"
    config.eval.sets = {arg.split: {"split": arg.split}}
    return config
