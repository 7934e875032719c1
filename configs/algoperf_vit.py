"""ViT-S/16 on ImageNet-1k in the terms of AlgoPerf's `imagenet_vit` workload (Dahl et al. 2023).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/algoperf_vit.py --workdir=runs/algoperf

The target is 77.309 % on the validation images (error 0.22691), with training on all training
images. The benchmark measures the time to the target on eight V100s. This is the baseline of v0.5,
NAdamW with the second of its five published settings, under the hint of v0.5, 186,666 steps.

Expect 78.3 % after 169,000 steps, and the target after 153,000 (theirs; we have not run it). In the
three complete studies of exactly this setting (mlcommons/algorithmic-efficiency,
prize_qualification_baselines/logs/external_tuning/full_budget, studies 0, 2 and 3,
imagenet_vit_jax/trial_2), the target was first reached at the evaluations of steps 152,814, 154,661
and 151,165, after 69,358, 70,620 and 69,360 s. Their budget of 77,520 s ended the runs at 168,954
to about 170,800 steps, the last evaluations of which have 78.28, 78.32 and 78.29 % (the best of
them 78.30, 78.32 and 78.39), and 66.9, 66.5 and 66.7 % on ImageNet-V2. This run goes on to the end
of the schedule.

v0.6 has a hint of 167,999 steps and a budget of 69,768 s (`steps=167999`); the logs of its baseline
end out of memory after the first evaluation. Under that hint (mlcommons/submissions_algorithms,
artifacts/tech_report_v1, section 4) a NAdamW of other settings reached the target in three of three
studies, after 66,879, 72,016 and 74,586 s and at best with 77.34, 77.71 and 77.59 %; the median is
152,461 steps. "NAdamW (Baseline AlgoPerf v0.5)" reached 74.8, 74.8 and 75.0 %: the fifth setting,
with dropout of 0.1, and without label smoothing, which its submission.py leaves at 0. On other
hardware, only the number of steps is comparable. It fits a TPU v5e-16 (8.9 of 16 GiB a chip).

Arguments: `steps=186666`, `data=ROOT`, `others=v2` for the benchmark's test set, ImageNet-V2
(target error 0.3481), `runlocal`. Float32.

`configs/algoperf_vit.csv` holds every setting against the JAX workload, which the baseline ran.
These differ, without an effect that we expect: an image with an odd margin is cut half a pixel
further up and to the left in evaluation; evaluation images are truncated to whole levels after
resizing; images are shuffled as a whole, theirs in a buffer of 16 batches; the warm-up has 9,334
steps, theirs 9,333; a gray image of which the whole is drawn gets their center crop only here,
because their test for it compares channels, too.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet


def get_config(arg=None):
    arg = parse_arg(arg, steps=186_666, data="", others="", runlocal=False)
    size = 32 if arg.runlocal else 224
    config = default_config()
    config.total = arg.steps
    config.batch_size = 1024

    config.model = {
        "name": "vit_s16",
        "pooling": "mean",
        "position": "sincos2d",
        "representation_size": 384,
    }
    config.task = {
        "name": "classification",
        "mixup": 0.2,
        "label_smoothing": 0.2,
        **imagenet.STATISTICS,
    }
    # Bicubic without antialiasing, as `tf.image.resize` does it by default.
    bounds = f"{size}, 8, ratio_max={4 / 3:.6f}, method='bicubic', sampler='flax'"
    imagenet.use(
        config,
        root=arg.data,
        others=arg.others,
        minival=False,
        crop=f"decode_jpeg_and_inception_crop({bounds})|flip_lr",
        augment="|randaug(2, 10)",
        eval_pp=f"decode|central_crop(share=0.875)|resize({size}, 'bicubic')",
    )
    config.eval.every = 2500

    config.optim.name = "nadamw"
    config.optim.args = {
        "b1": 1 - 0.11042418465,
        "b2": 0.9978504782314613,
        "shared_correction": True,
    }
    config.optim.lr = 0.0008445074561975979
    config.optim.weight_decay = 0.08135402759553023
    config.optim.decay_mask = ".*"  # The baseline decays all parameters.
    config.optim.schedule.warmup = "5 percent"

    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48)
    return config
