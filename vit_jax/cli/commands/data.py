"""`data`: draws the images that a model would be trained on."""

import argparse
import contextlib
from typing import TYPE_CHECKING

from vit_jax.cli.arguments import add_config, load_config, png_file, positive, set_up
from vit_jax.cli.parser import Command

if TYPE_CHECKING:
    from vit_jax.data.tokenizer import Tokenizer
    from vit_jax.types import ArraySpec


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=True)
    parser.add_argument(
        "--out",
        type=png_file,
        metavar="OUT.png",
        default="data.png",
        help="The picture to write (default: %(default)s).",
    )
    parser.add_argument(
        "--images",
        type=positive,
        default=64,
        metavar="N",
        help="Number of images on the picture (default: %(default)s).",
    )
    parser.add_argument(
        "--step",
        type=int,
        default=0,
        metavar="N",
        help="Training step whose batch comes first (default: %(default)s).",
    )

    parser.add_argument(
        "--originals",
        action="store_true",
        help="Draw to the left of each image the one that it was made from, prepared as in"
        " evaluation.",
    )


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments)
    from vit_jax.report.contact_sheet import contact_sheet, dimmed
    from vit_jax.training.run import Run
    from vit_jax.training.stages import Stages

    set_up(config, arguments)
    run = Stages(Run.build(config)).at(arguments.step + 1).run
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(run.batches_seen(arguments.step)))
        originals = None
        if arguments.originals:
            originals = stack.enter_context(run.originals(arguments.step))
        contact_sheet(
            (dimmed(batch, run.task.hidden(batch)) for batch in batches),
            run.source.class_names,
            arguments.out,
            num_images=arguments.images,
            tokenizer=_tokenizer(run.task.info.spec.get("tokens")),
            title=f"{arguments.config} · from step {arguments.step}",
            originals=originals,
        )
    print(arguments.out)


def _tokenizer(tokens: "ArraySpec | None") -> "Tokenizer | None":
    """Returns the tokenizer that made the tokens of a batch, if their spec names its vocabulary."""
    if not (tokens and tokens.vocab):
        return None
    from vit_jax.data.tokenizer import open_tokenizer

    return open_tokenizer(tokens.vocab, tokens.shape[-1])


COMMAND = Command(
    summary="Draw the training images as the model sees them, with their labels.",
    run=_run,
    add_arguments=_add_arguments,
    examples=("data --config=configs/folder.py:photos --out=sheet.png --images=32 --originals",),
    notes="Cropping, augmentation and mixing of images are applied as in training. All crops of\n"
    "an example are drawn side by side; patches that a mask hides from the model are dark. With\n"
    "config.stages, the settings are those of the stage of --step.",
    overrides=("config",),
)
