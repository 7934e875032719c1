"""`push`: uploads a run's model to the Hugging Face hub."""

import argparse

from vit_jax.cli.arguments import add_step
from vit_jax.cli.parser import Command
from vit_jax.errors import show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", help="The run.")
    parser.add_argument("address", metavar="hf://USER/REPO", help="The repository to write to.")
    add_step(parser)
    parser.add_argument(
        "--private", action="store_true", help="Make a new repository private (default: public)."
    )


def _run(arguments: argparse.Namespace) -> None:
    from vit_jax.inference.push import push

    show(push(arguments.workdir, arguments.address, private=arguments.private, step=arguments.step))


COMMAND = Command(
    summary="Upload a run's model to the Hugging Face hub.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "push runs/photos hf://me/photos-vit --private",
        "push runs/photos hf://me/photos-vit@best --step=best",
    ),
    notes="Weights in the layout of transformers or timm if it has a place for the model, the\n"
    "names of classes, preprocessing, config, and a model card with the run's metrics, data,\n"
    "command and versions. HF_TOKEN must be set.",
)
