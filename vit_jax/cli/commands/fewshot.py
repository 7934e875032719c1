"""`fewshot`: measures how good a model's frozen features are."""

import argparse

from vit_jax.cli.arguments import add_config, add_trust, check_one_of, load_config, set_up
from vit_jax.cli.parser import Command
from vit_jax.errors import show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model", "Give --workdir or --config.")
    group.add_argument(
        "--workdir", metavar="DIR", help="A run that was trained; its own data is used."
    )
    add_config(
        group,
        "A config whose init.checkpoint names the model and whose data is used, with arguments"
        " after a colon.",
    )
    add_trust(parser)


def _run(arguments: argparse.Namespace) -> None:
    check_one_of(arguments, "workdir", "config")
    from vit_jax.inference import fewshot
    from vit_jax.training.workdir import Workdir

    if arguments.workdir:
        overrides = {**arguments.overrides, "init.checkpoint": arguments.workdir}
        config = Workdir.existing(arguments.workdir).read_config(overrides)
    else:
        config = load_config(arguments)
    set_up(config, arguments)
    for name, value in fewshot.run(config).items():
        show(f"{name:32} {value:.6g}")


COMMAND = Command(
    summary="Measure frozen features: few-shot and full linear probes, and nearest neighbors.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "fewshot --workdir=runs/digits",
        "fewshot --config=configs/folder.py:photos --config.init.checkpoint=B_16.npz",
    ),
    notes="The probes are least squares on the features of config.data.split, which need no\n"
    "training. With --config.eval.probes.split=train --config.eval.probes.rates=[0.01,0.1] there\n"
    "are linear classifiers by SGD too, of patches where there are segmentations and no labels.\n"
    "The printed numbers are accuracies (or mean IoU) on the first evaluation split.",
    overrides=("config",),
)
