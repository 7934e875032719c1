"""The training of "DeiT III" (Touvron et al. 2022, arXiv:2204.07118), which two recipes share.

    deit3.train(config, epochs=800, lr=4e-3, gpus=8)
    deit3.use_images(config, size=224, root=arg.data, others=arg.others, fine_tune=False)

The numbers are those of the commands in facebookresearch/deit's README_revenge.md.
"""

from ml_collections import ConfigDict

from vit_jax.recipes import imagenet

NUM_CLASSES = imagenet.NUM_CLASSES


def use_images(config: ConfigDict, *, size: int, root: str, others: str, fine_tune: bool) -> None:
    """Fills the sections `data` and `eval`: wide crops and 3-Augment, or RandAugment.

    size: of training and evaluation images, in pixels.
    root, others: see `imagenet.use`.
    fine_tune: takes the augmentation of the second stage.
    """
    # timm's RandomResizedCropAndInterpolation: 8 to 100 % of the area, ratio 3/4 to 4/3, bicubic.
    bounds = f"{size}, 8, ratio_max={4 / 3:.6f}, method='bicubic', antialias=True"
    crop = f"decode_jpeg_and_inception_crop({bounds}, sampler='torchvision')|flip_lr"
    augment = "|three_augment|color_jitter(0.3, 0.3, 0.3)"
    imagenet.use(
        config,
        root=root,
        others=others,
        minival=False,
        crop=crop,
        augment="|randaug_increasing(2, 9, 0.5)" if fine_tune else augment,
        eval_pp=f"decode|resize_small({size}, 'bicubic', True)|central_crop({size})",
    )
    config.task.update(imagenet.STATISTICS)


def train(config: ConfigDict, *, epochs: int, lr: float, gpus: int) -> None:
    """Sets the first stage: LAMB, binary cross-entropy, mixup and cutmix, three copies an image.

    gpus: the number of their processes, each of which mixes its part of the batch on its own.
    """
    config.total = f"{epochs} epochs"
    config.batch_size = 2048
    config.data.repeats = 3
    config.task.update(
        loss="sigmoid", multihot_mixing=True, mixup=0.8, cutmix=1.0, mixing_groups=gpus
    )
    # Their loss is a mean over classes and this one is a sum, so that gradients are 1,000 times
    # theirs. LAMB divides the factor out of a step, but the limit of clipping and epsilon have to
    # grow with it: theirs are 1 and 1e-8.
    config.optim.name = "lamb"
    # Apex's FusedLAMB gives parameters without decay Adam's step.
    config.optim.args = {"eps": 1e-8 * NUM_CLASSES, "only_kernels": True}
    config.optim.clip_norm = 1.0 * NUM_CLASSES
    config.optim.lr = lr
    config.optim.weight_decay = 0.05
    config.optim.schedule.warmup = "5 epochs"
    config.optim.schedule.end = 1e-5 / lr


def fine_tune(config: ConfigDict, *, epochs: int, checkpoint: str, gpus: int) -> None:
    """Sets the second stage: AdamW at one small rate, softmax with smoothing, mixup and cutmix.

    gpus: see `train`.
    """
    config.total = f"{epochs} epochs"
    config.batch_size = 512
    config.init.checkpoint = checkpoint
    config.init.interpolation = "torch_bicubic"
    config.task.update(label_smoothing=0.1, mixup=0.8, cutmix=1.0, mixing_groups=gpus)
    config.optim.lr = 1e-5
    config.optim.weight_decay = 0.1
    # Their cosine has the same initial and final learning rate, 1e-5, so it is constant.
    config.optim.schedule.name = "constant"
    config.optim.schedule.warmup = "5 epochs"
