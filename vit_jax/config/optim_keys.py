"""The keys of `config.optim`, and those of a schedule."""

from collections.abc import Mapping

from vit_jax.config.key import FIXED, WARNED, Key, duration, open_section, pattern, patterns

SCHEDULE = {
    "name": Key(
        "cosine",
        WARNED,
        "The curve: cosine, linear, polynomial, rsqrt, constant, stair, one of a method's own"
        " (dino, ijepa, simmim, simmim_stair), or package.module:function.",
    ),
    "warmup": duration(0, WARNED, "Length of the linear ramp from 0 at the start."),
    "cooldown": duration(0, WARNED, "Length of the linear ramp to 0 at the end."),
    "end": Key(
        0.0,
        WARNED,
        "Multiplier that cosine, linear, polynomial and methods' curves reach at the end.",
        at_least=0,
    ),
    "first": Key(
        0.0, WARNED, "For methods' curves: the multiplier that the warm-up starts from.", at_least=0
    ),
    "stretch": Key(
        1.0, WARNED, "For ijepa: the curve is that of a run this many times as long.", above=0
    ),
    "zero_until": duration(0, WARNED, "For dino: the time before which the multiplier is 0."),
    "power": Key(1.0, WARNED, "For polynomial: the power of the remaining share.", above=0),
    "timescale": duration(
        10_000, WARNED, "Time after which rsqrt has fallen to 1/sqrt(2).", above=0
    ),
    "shift": duration(0, WARNED, "Time by which rsqrt starts further along its curve."),
    "boundaries": duration([], WARNED, "For stair: the times at which the rate changes."),
    "factors": Key(
        [], WARNED, "For stair: the multiplier from each boundary on.", of=float, at_least=0
    ),
    "args": open_section({}, WARNED, "Further arguments of a curve of your own."),
}

OPTIM = {
    "name": Key(
        "adamw",
        FIXED,
        "The update rule: a file of optim/rules (adamw, sgd, adafactor, lamb, muon, ...), NAME for"
        " the scale_by_NAME of optax (lion, radam, ...), or package.module:function.",
    ),
    "args": open_section({}, WARNED, "Arguments of the update rule, such as b2 or mu_dtype."),
    "lr": Key(1e-3, WARNED, "Base learning rate, which the schedule multiplies.", at_least=0),
    "weight_decay": Key(0.0, WARNED, "Strength of decoupled weight decay.", at_least=0),
    # "lr": w -= lr·schedule·(u + decay·w), as in optax and PyTorch. "schedule": big_vision's and
    # Loshchilov & Hutter's (2019) w -= schedule·(lr·u + decay·w), where a decay of 1e-4 at lr 1e-3
    # is what "lr" calls 0.1.
    "decay_coupling": Key(
        "lr",
        WARNED,
        "What scales the weight decay besides the schedule: lr (as in PyTorch and optax), or"
        " schedule (nothing else, as in big_vision).",
        choices=("lr", "schedule"),
    ),
    "decay_mask": pattern(
        ".*/kernel", WARNED, "Regex that matches the whole name of each parameter that decays."
    ),
    "decay_mults": Key(
        [],
        WARNED,
        "[[regex, multiplier of weight_decay], ...]; the first match wins.",
        kind="pattern",
        of=tuple[str, float],
    ),
    # DINO's multiplier of the decay is a cosine with end=10: from 0.04 to 0.4.
    "decay_schedule": open_section(
        {},
        WARNED,
        "Schedule of the weight decay, with the keys of `schedule`; empty keeps it constant.",
    ),
    "clip_norm": Key(
        0.0, WARNED, "Largest norm of the gradient; 0 switches clipping off.", at_least=0
    ),
    "clip_scope": Key(
        "global",
        WARNED,
        "What has the norm that clip_norm bounds: global (all gradients together), module (each"
        " entry of the tree of parameters) or parameter (each one).",
        choices=("global", "module", "parameter"),
    ),
    # Foret et al. (2021); Chen et al. (2022, arXiv:2106.01548) give 0.1 to 0.2 for ViTs.
    "sam_rho": Key(
        0.0,
        WARNED,
        "Radius of sharpness-aware minimization, which doubles the cost of a step; 0 switches it"
        " off.",
        at_least=0,
    ),
    "schedule": SCHEDULE,
    "group_schedules": Key(
        [],
        WARNED,
        "[[regex, schedule], ...]: schedules of parameters that have one of their own.",
        of=tuple[str, Mapping],
    ),
    "lr_mults": Key(
        [],
        WARNED,
        "[[regex, multiplier of lr], ...]; the first match wins.",
        kind="pattern",
        of=tuple[str, float],
    ),
    "freeze": patterns(WARNED, "[regex, ...]: parameters that are not trained."),
    "freeze_until": Key(
        [],
        WARNED,
        "[[regex, duration], ...]: parameters that are not trained before that time. The rule"
        " counts their updates from then on.",
        kind="pattern",
        of=tuple[str, int | str],
    ),
    # Clark et al. (2020, ELECTRA), Bao et al. (2022, BEiT): 0.65 to 0.75 for fine-tuning.
    "layer_decay": Key(
        1.0,
        WARNED,
        "Ratio of the learning rate of a block to that of the block after it; 1 switches layer"
        " decay off.",
        above=0,
        at_most=1,
    ),
    "blocks": pattern(
        r"(?:.*/)?blocks(?:_(\d+))?/.*",
        WARNED,
        "Regex of the parameters in the repeated blocks. Its group is the number of the block; a"
        " match without a number means that the blocks are stacked along the first axis.",
    ),
    "stem": pattern(
        r"(?:.*/)?(?:(?:patch_embed|stem|(?:embed|pre)_norm|position_bias)/.*"
        r"|(?:token|segment|pos)_embed|cls|distill|registers)",
        WARNED,
        "Regex of the parameters before the first block, the lowest layer of layer_decay.",
    ),
}
