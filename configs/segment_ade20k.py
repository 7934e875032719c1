"""Semantic segmentation as in Segmenter (Strudel et al. 2021): ADE20K, Cityscapes, and two more.

    python -m vit_jax prepare scene_parse150
    python -m vit_jax train --config=configs/segment_ade20k.py:checkpoint=B_16.npz --workdir=DIR

Their score on ADE20K with ViT-B/16 of AugReg, fine-tuned to ImageNet-1k at 384 px (timm's
vit_base_patch16_384), at one scale, is 48.5 mIoU with the mask transformer, and 50.0 at several;
with DeiT 47.1 with the linear head and 48.7 with the mask transformer (their README.md). This
config has not been run. It fits a TPU v5e-8 (3.5 of 16 GiB a chip): 36 minutes at 30 % of its peak
(by `plan`). Their mIoU is not fully comparable: they resize the shorter side of an image to the
training size (of Cityscapes to 1,024 pixels), apply adjacent sliding windows (on Cityscapes,
windows that overlap by a third), and count pixels at the size of the file. Here images are fitted
into a square of twice the training size (Cityscapes into 1024x2048), windows overlap by a third,
and the pixels of that square are counted.

`configs/segment_ade20k.csv` holds every setting against theirs. What differs in training, with the
effect we expect: products and the residual stream are in bfloat16 and theirs in float32 (small,
unmeasured); the decoder's kernels start from Xavier's distribution and theirs from a deviation of
0.02 (none after 160,000 steps); small images are padded with gray before normalization and theirs
with 0 after it, the same within 0.004 for the default statistics; norms have an epsilon of 1e-6 and
GELU its tanh form, as AugReg trained these files, and theirs 1e-5 and the exact form (none); the
loss is a mean over the labeled pixels of the batch, and theirs of the images of each process, whose
means are averaged (very small). Images are distorted before they are cropped, theirs after, with
the same result. A DeiT checkpoint needs its own statistics:
`--config.task.mean='(123.675, 116.28, 103.53)'` and `--config.task.std='(58.395, 57.12, 57.375)'`,
and `--config.model.activation=gelu`. Pets and VOC are not theirs; they take ADE20K's settings.

`:folder=ADEChallengeData2016` reads the images and PNG masks of the released archive instead of
TFDS. `:data=pets`, `:data=voc,folder=VOC2012` and `:data=cityscapes,folder=ROOT` take Oxford-IIIT
Pets' trimaps (TFDS), Pascal VOC and Cityscapes, the last two from folders as they are released.
"""

from vit_jax import checkpoints
from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest

# Cityscapes' 19 evaluated classes, by the number in the files; the others are ignored.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_TABLE = [_CITYSCAPES.index(i) if i in _CITYSCAPES else 255 for i in range(34)]

_DATA = {
    "ade20k": {"tfds": "scene_parse150", "field": "annotation", "classes": 150, "size": 512,
               "total": "64 epochs",
               "labels": "shift_labels(-1)|", "splits": ("train", "test"),
               "args": {"images": "images", "masks": "annotations"},
               "folder_splits": ("training", "validation")},
    "pets": {"tfds": "oxford_iiit_pet", "field": "segmentation_mask", "classes": 3, "size": 256,
             "labels": "shift_labels(-1)|", "splits": ("train", "test")},
    "voc": {"classes": 21, "size": 512, "labels": "",
            "args": {"images": "JPEGImages", "masks": "SegmentationClass",
                     "listed": "ImageSets/Segmentation/{split}.txt"},
            "folder_splits": ("train", "val")},
    "cityscapes": {"classes": 19, "size": 768, "shorter": 1024, "whole": (1024, 2048),
                   "total": "216 epochs", "lr": 1e-2,
                   "labels": f"map_labels({', '.join(map(str, _TABLE))})|",
                   "args": {"images": "leftImg8bit", "masks": "gtFine",
                            "image_end": "_leftImg8bit.png", "mask_end": "_gtFine_labelIds.png"},
                   "folder_splits": ("train", "val")},
}  # fmt: skip


def get_config(arg=None):
    arg = parse_arg(
        arg, data="ade20k", folder="", model="vit_b16", checkpoint="", head="mask", whole=False
    )
    if arg.data not in _DATA:
        raise UserError(f"data={arg.data!r} is unknown; {nearest(arg.data, _DATA)}")
    data = _DATA[arg.data]
    size, labels = data["size"], data["labels"]
    config = default_config()
    config.total = data.get("total", "160_000 steps")
    config.batch_size = 8
    config.model = {"name": arg.model, "dtype": "bfloat16", "drop_path": 0.1}
    config.model.update(checkpoints.pooling_of(arg.checkpoint))
    config.task = {"name": "segmentation", "head": arg.head, "num_classes": data["classes"]}
    if arg.head == "mask":
        config.task.decoder_dropout = 0.1
    if not arg.whole:
        config.task.stride = size * 2 // 3
    config.init.checkpoint = arg.checkpoint
    config.init.interpolation = "torch_bilinear"  # As their `resize_pos_embed`.
    if arg.folder:
        if "args" not in data:
            raise UserError(f"data={arg.data} comes from TFDS; leave folder= out")
        config.data.source, config.data.name = "segmentation_folder", arg.folder
        config.data.args = data["args"]
        config.data.split, validation = data["folder_splits"]
    else:
        if "tfds" not in data:
            raise UserError(f"data={arg.data} is read from its folder; write folder=ROOT")
        config.data.name = data["tfds"]
        config.data.split, validation = data["splits"]
        labels = f"copy({data['field']!r}, 'segmentation')|{labels}"
    # TFDS has another name for masks, so they are renamed before both are decoded together.
    first, _, rest = labels.partition("|") if labels.startswith("copy") else ("", "", labels)
    head = f"{first}|joint_decode|{rest}" if first else f"joint_decode|{rest}"
    head += f"check_segmentation({data['classes']})"
    keep = "keep('image', 'segmentation')"
    # The crop is last, so that its padding is neither flipped nor distorted.
    distort = f"joint_scale(0.5, 2.0, shorter={data.get('shorter', size)})"
    distort += "|joint_flip_lr|photometric_distortion"
    distort += f"|joint_crop({size}, max_class_share=0.75)"
    config.data.pp = f"{head}|{distort}|{keep}"
    # Images of a batch need one size, so evaluation fits them into a square for sliding windows.
    whole = data.get("whole", 2 * size)
    config.data.eval_pp = f"joint_decode|{rest}joint_fit({whole})|{keep}"
    if first:
        config.data.eval_pp = f"{first}|{config.data.eval_pp}"
    config.eval.sets = {"val": {"split": validation}}
    config.optim.name = "sgd"
    config.optim.args = {"momentum": 0.9, "nesterov": True}  # timm's "sgd" is Nesterov's.
    config.optim.lr = data.get("lr", 1e-3)
    config.optim.schedule.name = "polynomial"
    config.optim.schedule.power = 0.9
    config.optim.schedule.end = 1e-5 / config.optim.lr  # Their least rate; it is one for all.
    return config
