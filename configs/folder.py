"""A ViT on your own folder of images: ROOT/train/CLASS/*.jpg|png and ROOT/val/CLASS/*.jpg|png.

    python -m vit_jax train --config=configs/folder.py:ROOT --workdir=runs/mine

If there is only ROOT/CLASS/*, a fixed tenth of the images is held out.
Arguments: `root=DIR,model=vit_ti16,size=96,epochs=50`. The defaults suit some thousand images on
one machine; from a few hundred images on, fine-tuning a released checkpoint does better.
"""

from pathlib import Path

from vit_jax.config import default_config, parse_arg
from vit_jax.data.sources.folder import split_folders


def get_config(arg=None):
    arg = parse_arg(arg, root="", model="vit_ti16", size=96, epochs=50)
    has_validation = "validation" in split_folders(Path(arg.root).expanduser())
    config = default_config()
    config.total = f"{arg.epochs} epochs"
    config.batch_size = 64
    config.ema_decay = 0.999

    config.model = {"name": arg.model, "drop_path": 0.1}
    config.task = {"name": "classification", "mixup": 0.2, "label_smoothing": 0.1}

    config.data.source = "folder"
    config.data.name = arg.root
    config.data.split = "train" if has_validation else "train[:90%]"
    config.data.pp = (
        f"decode_jpeg_and_inception_crop({arg.size})|flip_lr|randaug(2,10,corrected=True)"
    )
    config.data.eval_pp = f"decode|resize_small({round(arg.size * 8 / 7)})|central_crop({arg.size})"
    config.eval.sets = {"val": {"split": "validation" if has_validation else "train[90%:]"}}

    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    return config
