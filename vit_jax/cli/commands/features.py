"""`features`: writes the embeddings of image files."""

import argparse

from vit_jax.cli.arguments import add_model_source, open_predictor, out_file
from vit_jax.cli.parser import Command
from vit_jax.errors import show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="Image files, folders of image files, patterns such as 'photos/*.jpg', or @FILE, a"
        " text file with the name of an image file on each line.",
    )
    add_model_source(parser)
    parser.add_argument(
        "--out",
        type=out_file,
        metavar="FILE",
        default="features.npz",
        help="The file to write, ending in .npz or .parquet (default: %(default)s).",
    )


def _run(arguments: argparse.Namespace) -> None:
    from vit_jax.inference import features

    predictor = open_predictor(arguments, headless=True)
    show(features.run(arguments.images, arguments.out, predictor))


COMMAND = Command(
    summary="Write the embeddings of image files to a file.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "features --workdir=runs/photos photos --out=photos.npz",
        "features --checkpoint=dinov2-base photo.jpg --out=photo.parquet",
    ),
    notes="The embedding of an image is the pooled output of the backbone, before any head.",
    overrides=("model",),
)
