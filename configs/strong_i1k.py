"""The strongest plain ViT-S/16 and -B/16 from ImageNet-1k alone that the public record supports.

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/strong_i1k.py:s16 --workdir=runs/strong-s16
    python -m vit_jax train --config=configs/strong_i1k.py:b16 --workdir=runs/strong-b16

Arguments: `epochs=800`, `data=ROOT`, `others=real+v2`, `runlocal`.

We have not run it, so it has no score of its own. Published scores for comparison, at 224 px:
DeiT III S 81.4, B 83.8 %; ViT-5 S 82.2, B 84.2 % (arXiv:2602.08071); RoPE-ViT B 83.9 % (Heo et al.
2024); at 256 px timm's little 83.2 and medium 83.8 %. The architecture follows ViT-5, which in
addition to the rotary positions of patches has a learned table of positions and rotated registers.

S fits a TPU v5e-32 (9.4 of 16 GiB a chip), where its 800 epochs would take 4 hours at 30 % of the
chips' peak; B a v5e-64 (10.5 GiB) and 8 hours (both by `plan`).

Products in bfloat16, the residual stream in float32.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import imagenet

# variant: (learning rate, drop path); DeiT III's, which ViT-5 keeps.
SIZES = {"s16": (4e-3, 0.05), "b16": (3e-3, 0.2)}


def get_config(arg=None):
    arg = parse_arg(arg, variant="s16", epochs=800, data="", others="", runlocal=False)
    if arg.variant not in SIZES:
        raise UserError(f"config argument variant={arg.variant!r}; {nearest(arg.variant, SIZES)}")
    lr, drop_path = SIZES[arg.variant]
    size = 32 if arg.runlocal else 224
    config = default_config()
    config.total = f"{arg.epochs} epochs"

    config.model = {
        "name": f"vit_{arg.variant}",
        # Mixed rotary positions beat axial ones and a table at 224 px and above it (Heo et al.
        # 2024, arXiv:2403.13298, table 2).
        "position": "rope_mixed",
        # Four registers: Darcet et al. 2024, arXiv:2309.16588, section 3.1; ViT-5 and timm's SBB.
        "num_registers": 4,
        # Mean pooling needs no class token (Beyer et al. 2022, table 1: a little better at 90
        # epochs); timm's SBB models pool so with registers.
        "pooling": "mean",
        # ViT-5: RMSNorm throughout, norms of queries and keys, LayerScale from 1e-4, GELU rather
        # than SwiGLU, which does worse with LayerScale. (ViT-5 has no biases of queries, keys and
        # values; this config has them.)
        "norm": "rmsnorm",
        "qk_norm": True,
        "layer_scale": 1e-4,
        # DeiT III: one rate for all blocks.
        "drop_path": drop_path,
        "constant_drop_path": True,
        # Both start all kernels, the head included, from a normal distribution of deviation 0.02.
        # LAMB moves a kernel by a share of its norm, so it could hardly leave a head of zeros.
        "initialization": "deit",
        "head_zero_init": False,
        "dtype": "bfloat16",
        "residual_dtype": "float32",
    }
    # DeiT III's section 3: binary cross-entropy on both classes of a mixed image, 3-Augment with
    # color jitter, wide crops, no erasing, dropout or smoothing, three copies of an image a batch.
    config.task = {
        "name": "classification",
        "loss": "sigmoid",
        "mixup": 0.8,
        "cutmix": 1.0,
        "multihot_mixing": True,
    }
    imagenet.use(
        config,
        root=arg.data,
        others=arg.others,
        minival=False,
        crop=f"decode_jpeg_and_inception_crop({size}, 8, method='bicubic', antialias=True)|flip_lr",
        augment="|three_augment|color_jitter(0.3, 0.3, 0.3)",
        eval_pp=f"decode|resize_small({size}, 'bicubic', True)|central_crop({size})",
    )
    config.batch_size, config.data.repeats = 2048, 3

    # LAMB at these rates trained both DeiT III and ViT-5. Muon and NAdaMuon have done better in
    # timm's SBB recipes and on smaller sets, but there is no such report for this recipe.
    config.optim.name = "lamb"
    config.optim.args = {"eps": 1e-8, "only_kernels": True}
    config.optim.clip_norm = 1000.0
    config.optim.lr = lr
    config.optim.weight_decay = 0.05
    config.optim.schedule.warmup = "5 epochs"
    config.optim.schedule.end = 1e-5 / lr

    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48)
    return config
