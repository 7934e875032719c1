"""LiT on COCO's captions: a frozen image tower and a trained text tower.

    python -m vit_jax prepare coco_captions
    python -m vit_jax train --workdir=DIR \\
        --config=configs/lit_coco.py:checkpoint=B_16.npz,vocab=vocab.txt

This config follows big_vision's `siglip_lit_coco.py` (Zhai et al. 2023, arXiv:2303.15343): 5,000
steps with batches of 512, a frozen ViT-B/16, and a text tower of the size of BERT-base. It has not
been run; it fits a TPU v5e-8 (2.9 of 16 GiB a chip): 4 minutes at 30 % of its peak (by `plan`).

Recall at 1 of COCO's captions (TFDS's `test`), image to text and text to image, %, all theirs:
`coco_B16B`, which is this example with the softmax loss and batches of 4,096 (`lit_coco.py` before
`siglip_lit_coco.py`), 47.2 and 32.1, and 20.7 on ImageNet without training on it; LiT-B16B, tuned
on CC12M and YFCC100M, 49.4 and 31.1 (49.3 and 31.2 in vision_transformer's model_cards/lit.md);
LiT-B16B_2, 51.5 and 31.8. These are from big_vision's README_lit.md. Expect less here: this text
tower is initialized at random and theirs from BERT, which 5,000 steps on COCO cannot make up for.
Products are in bfloat16, theirs in float32. Captions of equal tokens count here as one, which any
of their images answers, and theirs one by one, so that recalls here are a little higher, above all
from text to image.

`vocab` is BERT's WordPiece `vocab.txt`, a SentencePiece `.model` or a `tokenizer.json`. With
`:lit=LiT-B16B_2.npz` both released towers are loaded (LiT-B16B too, with
`--config.task.project_image=true`), for `evaluate --checkpoint` or further training.
`:loss=softmax` is the loss of CLIP and LiT. `:file=photos/{split}.jsonl,images=photos` uses
captions of your own instead of COCO: see `vit_jax/data/sources/captions.py`.
"""

from vit_jax import checkpoints
from vit_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        model="vit_b16",
        text="bert_base",
        checkpoint="",
        lit="",
        vocab="bytes",
        loss="sigmoid",
        file="",
        images="",
        size=224,
        length=16,
    )
    # flaxformer's BertBaseConfig; other text towers have no such default.
    text_dropout = {"dropout": 0.1} if arg.text.startswith("bert") else {}
    config = default_config()
    config.total = 5_000
    config.batch_size = 512
    config.model = {"name": arg.model, "dtype": "bfloat16"}
    config.model.update(checkpoints.pooling_of(arg.checkpoint))
    config.task = {
        "name": "contrastive",
        "loss": arg.loss,
        "text": {"name": arg.text, "dtype": "bfloat16"} | text_dropout,
        "dim": 768,
        "project_image": False,
        "scale": 10.0,
        "bias": -2.71,
    }
    config.init.checkpoint = arg.lit or arg.checkpoint
    config.data.split = "train"
    if arg.file:
        config.data.source, config.data.name = "captions", arg.file
        config.data.args = {"images": arg.images}
    else:
        config.data.name = "coco_captions"
        config.data.args = {"on_bad_box": "drop"}  # A few boxes of COCO have no height or width.

    def tokens(key):
        vocab = f"{arg.length}, {arg.vocab!r}, key={key!r}"
        return f"lower({key!r})|tokenize({vocab})|keep('image', 'tokens')"

    config.data.pp = f"decode|resize({arg.size})|flip_lr|randaug(2, 10)|choose|{tokens('caption')}"
    config.data.eval_pp = f"decode|resize({arg.size})|{tokens('captions')}"
    split = "val" if arg.file else "test"  # TFDS's `test` is that of the published recalls.
    config.eval.sets = {split: {"split": split}}
    config.optim.lr = 1e-3
    # Not multiplied by lr, so this is what PyTorch and optax call 10.
    config.optim.weight_decay = 1e-2
    config.optim.decay_coupling = "schedule"
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "3 percent"
    config.optim.freeze = ["backbone/.*"]
    return config
