"""`export`: writes a trained model as a program for another runtime."""

import argparse

from vit_jax.cli.arguments import add_model_details, open_predictor, positive
from vit_jax.cli.parser import Command
from vit_jax.errors import show
from vit_jax.plugins import names_in


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="A workdir, or a checkpoint in any format.")
    parser.add_argument("out", metavar="OUT", help="The folder to make.")
    formats = ", ".join(names_in("vit_jax.inference.exports"))
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help=f"The format of OUT: {formats}, or package.module:FORMAT for a format of your own."
        " Required.",
    )
    parser.add_argument(
        "--outputs",
        default="answers",
        metavar="KIND",
        help="Either answers (of the task), features (the embedding before any head), or text (the"
        " vectors of texts, for a run that learned images with texts). Default: %(default)s.",
    )
    parser.add_argument(
        "--include-preprocessing",
        action="store_true",
        help="Take uint8 pixels of the model's size, and answer as predict does, for example with"
        " probabilities. Resizing stays with the caller, as OUT/README.md says.",
    )
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="Rows of a batch (default: any number)."
    )
    parser.add_argument(
        "--weights",
        default="float32",
        metavar="DTYPE",
        help="Either float32, bfloat16 for half the size, or int8 for a quarter (default:"
        " %(default)s). Rounded weights are refused if they change an output too much, and int8"
        " also if it changes the class of more than 1 %% of the run's first evaluation split.",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="Image files or folders for the check, which takes the first 64 images (default: one"
        " photograph).",
    )
    add_model_details(parser.add_argument_group("the model"))


def _run(arguments: argparse.Namespace) -> None:
    from vit_jax.inference import export
    from vit_jax.inference.preparation import find_images
    from vit_jax.training.workdir import Workdir

    is_run = Workdir.at(arguments.src) is not None
    arguments.workdir = arguments.src if is_run else None
    arguments.checkpoint = None if is_run else arguments.src
    predictor = open_predictor(arguments, headless=arguments.outputs == "features")
    show(
        export.export(
            predictor,
            arguments.out,
            arguments.to,
            outputs=arguments.outputs,
            include_preprocessing=arguments.include_preprocessing,
            batch=arguments.batch,
            weights=arguments.weights,
            images=find_images(arguments.images),
            workdir=arguments.workdir or "",
        )
    )


COMMAND = Command(
    summary="Write a trained model as a program for another runtime, and check it there.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "export runs/photos served --to=stablehlo",
        "export runs/photos served --to=savedmodel --include-preprocessing",
        "export runs/photos served --to=onnx --weights=int8",
        "export dinov2-base embedder --to=stablehlo --outputs=features --weights=bfloat16",
    ),
    notes="The program is run in its own runtime on real images, and compared with the model. Its\n"
    "size and its time are printed.",
    overrides=("model",),
)
