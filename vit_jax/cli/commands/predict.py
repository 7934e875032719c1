"""`predict`: prints and draws what a trained model says about image files."""

import argparse

from vit_jax.cli.arguments import add_model_source, open_predictor, png_file, positive
from vit_jax.cli.parser import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="Image files, folders of image files, or patterns such as 'photos/*.jpg'.",
    )
    add_model_source(parser)
    answers = parser.add_argument_group("the answers")
    answers.add_argument(
        "--top",
        type=positive,
        default=5,
        metavar="N",
        help="Number of answers printed for each image (default: %(default)s).",
    )
    answers.add_argument(
        "--labels",
        metavar="FILE",
        help="With --checkpoint: a text file with one class name per line.",
    )
    answers.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TEXT",
        help="A text that an image may match. Repeat the flag for each text. Only for runs that"
        " were trained on images with texts.",
    )
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--out", type=png_file, metavar="OUT.png", help="Draw the answers on the images."
    )
    pictures.add_argument(
        "--attention",
        type=png_file,
        metavar="OUT.png",
        help="Draw where the model looked. For a single image all heads of all layers are drawn.",
    )
    pictures.add_argument(
        "--patches",
        type=png_file,
        metavar="OUT.png",
        help="Draw the first image as the patches that the model reads.",
    )


def _run(arguments: argparse.Namespace) -> None:
    from vit_jax.inference.preparation import find_images

    predictor = open_predictor(arguments)
    paths = find_images(arguments.images)
    shown = None
    for answers in predictor.answers(paths):
        lines = predictor.task.result_lines(answers.outputs, arguments.top)
        for number, said in enumerate(lines):
            print("\n  ".join(map(_printable, [answers.pictures.describe(number), *said])))
        shown = shown or answers
    if arguments.out:
        predictor.draw(shown, arguments.out)
    if arguments.attention:
        predictor.draw_attention(shown, arguments.attention)
    if arguments.patches:
        predictor.draw_patches(shown.prepared["image"][0], arguments.patches)
    part = f" (the first {len(shown.pictures)} images)" if len(shown.pictures) < len(paths) else ""
    for what, file, which in (
        ("drawn", arguments.out, part),
        ("attention", arguments.attention, part),
        ("patches", arguments.patches, ""),
    ):
        if file:
            print(f"{what}: {file}{which}")


def _printable(text: str) -> str:
    """Returns a text from a file, such as a class name, that cannot control the terminal."""
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)


COMMAND = Command(
    summary="Print the classes, masks, boxes or matching texts of image files, and draw them.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "predict --workdir=runs/photos photo.jpg --attention=looked.png",
        "predict --workdir=runs/detect --out=drawn.png photo.jpg",
        "predict --checkpoint=B_16.npz --labels=imagenet.txt photo.jpg",
        'predict --workdir=runs/captions photo.jpg --text="a cat" --text="a dog"',
    ),
    overrides=("model",),
)
