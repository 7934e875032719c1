"""`convert`: writes a checkpoint of any format in another format."""

import argparse

from vit_jax.cli.arguments import add_trust, image_size
from vit_jax.cli.parser import Command
from vit_jax.errors import show
from vit_jax.plugins import names_in


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="The checkpoint to read.")
    parser.add_argument("dst", metavar="DST", help="The file or folder to write.")
    formats = ", ".join(names_in("vit_jax.checkpoints.formats"))
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help=f"The format of DST: {formats}, or package.module:FORMAT for a format of your own."
        " Required.",
    )
    parser.add_argument(
        "--from",
        dest="source_format",
        default="",
        metavar="FORMAT",
        help="The format of SRC. Default: recognized by its content, if it is one of those above.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="The name of the model. Needed only if SRC does not tell it.",
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="SIZE",
        help="Resize the position embeddings for images of this size in pixels, such as 384, or"
        " 192x256 (height x width).",
    )
    add_trust(parser)


def _run(arguments: argparse.Namespace) -> None:
    from vit_jax import config
    from vit_jax.inference import convert

    show(
        convert.run(
            arguments.src,
            arguments.dst,
            arguments.to,
            source_format=arguments.source_format,
            model=arguments.model,
            fields=config.parse_values(arguments.fields),
            image_size=arguments.image_size,
        )
    )


COMMAND = Command(
    summary="Write a checkpoint of any format in any other format.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "convert runs/photos photos.npz --to=npz",
        "convert B_16.npz vit_b16.safetensors --to=timm",
    ),
    notes="SRC may be a workdir of vit_jax, an .npz of vision_transformer or big_vision, a timm\n"
    "file (.safetensors, .bin, .pth) or a folder of transformers or open_clip. If SRC is a\n"
    "released image-text model, --to=open_clip writes both towers, and every other format\n"
    "writes the image tower alone. The call that loads the result is printed.",
    overrides=("model",),
)
