"""Detection on COCO by ViT-S/16 with detection tokens, after YOLOS (Fang et al. 2021).

    python -m vit_jax prepare coco/2017
    python -m vit_jax train --config=configs/detect_coco.py:checkpoint=S_16.npz --workdir=DIR

YOLOS-S reaches 36.1 AP and YOLOS-B 42.0 (theirs) at a shorter side of 800 pixels, pre-trained with
DeiT. This config has not been run. It fits a TPU v5e-8 (8.3 of 16 GiB a chip), where memory
accesses alone take 2 hours 24 minutes (by `plan`).

It keeps their AdamW with its decay and clipping, 150 epochs, 100 tokens, matching, and loss with
its weights (`configs/detect_coco.csv` has every setting). These points differ, and we expect all of
them together to cost several points of AP, most of all the first:

* Images are squares of 512 pixels, and one of them is cut from an image whose shorter side is 307
  to 768 pixels. Theirs keep their shape, with a shorter side of 480 to 800, and half of them are
  cut (384 to 600) and enlarged again. A batch of one shape is what TPUs need. As theirs, a crop
  keeps every object of which any part is inside.
* Batches have 64 images, for the same reason, where theirs have 8 at a rate of 2.5e-5. Adam's rate
  grows with the square root of the batch (Malladi et al. 2022), so this one is 7.1e-5. A warm-up of
  1 % precedes it; theirs has none.
* Every block of YOLOS-S and -B adds a table of positions; here only the first one does.
* The backbone has GELU's tanh form, with which the AugReg file of this command was trained, and
  theirs the exact one, as DeiT. For a DeiT file write `--config.model.activation=gelu`,
  `--config.task.mean='(123.675, 116.28, 103.53)'`, `--config.task.std='(58.395, 57.12, 57.375)'`.
* The loss of the classes is a mean over the batch, theirs a mean of each process's image, so that
  an image with few objects counts less here. They have 92 outputs (COCO's numbers go to 90), of
  which 81 are used; these are the 80 classes and none.
* The heads have GELU, and boxes start at the center of the image with half its size; theirs have
  ReLU and random boxes. Detection tokens here are learned vectors; theirs have positions of their
  own besides. Both of theirs take AdamW's steps, so that the rate of these vectors is doubled. They
  start with a deviation of 0.02, and the sum of theirs with 0.028.
* Products are in bfloat16, theirs in float32.

`:json=instances_{split}.json,images=photos` uses a COCO JSON of
your own; the splits are then `train` and `val`.

`:pyramid` makes one proposal at every position of strides 8, 16 and 32 instead, from the simple
feature pyramid of ViTDet (Li et al. 2022, arXiv:2203.16527, section 3), with the focal loss. ViTDet
itself has the heads of Mask R-CNN, so no published score is comparable.
"""

from vit_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg, model="vit_s16", checkpoint="", json="", images="", size=512, pyramid=False
    )
    config = default_config()
    config.total = "150 epochs"
    config.batch_size = 64
    config.model = {"name": arg.model, "pooling": "mean", "dtype": "bfloat16"}
    config.task = {"name": "detection"}
    config.init.checkpoint = arg.checkpoint
    config.init.interpolation = "torch_bicubic"
    if arg.pyramid:
        config.task.pyramid = [2.0, 1.0, 0.5]
    else:
        config.model.num_registers = 100
        config.init.initialize = ["backbone/registers"]
        config.optim.lr_mults = [["backbone/registers", 2.0]]
        config.task.update(
            head="tokens",
            loss="softmax",
            class_weight=1.0,
            l1_weight=5.0,
            giou_weight=2.0,
            no_object_weight=0.1,
        )
    # A few boxes of COCO have no height or no width.
    config.data.args = {"max_objects": 100, "on_bad_box": "drop"}
    if arg.json:
        config.data.source, config.data.name = "coco", arg.json
        config.data.args.images = arg.images
        config.data.split, validation = "train", "val"
    else:
        config.data.name = "coco/2017"
        config.data.split, validation = "train", "validation"
    keep = "'image', 'boxes', 'box_label', 'box_crowd'"
    config.data.pp = (
        f"joint_decode|joint_flip_lr|joint_scale(0.6, 1.5, True, shorter={arg.size})"
        f"|joint_crop({arg.size}, min_visible=0.0)|keep({keep})"
    )
    config.data.eval_pp = (
        f"joint_decode|joint_fit({arg.size}, True)"
        f"|keep({keep}, 'box_area', 'image_size', 'content')"
    )
    config.eval.sets = {"val": {"split": validation}}
    config.optim.lr = 2.5e-5 * (config.batch_size / 8) ** 0.5
    config.optim.weight_decay = 1e-4
    config.optim.clip_norm = 0.1
    config.optim.schedule.warmup = "1 percent"
    return config
