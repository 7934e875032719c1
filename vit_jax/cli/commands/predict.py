"""`predict`: prints and draws what a trained model says about image files."""

import argparse

from vit_jax.cli.arguments import add_model_source, open_predictor, png_file, positive
from vit_jax.cli.parser import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Image files.")
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
    predictor = open_predictor(arguments)
    images = predictor.read(arguments.images)
    if arguments.patches:
        predictor.draw_patches(images[0], arguments.patches)
    outputs = predictor.predict(images)
    lines = predictor.task.result_lines(outputs, arguments.top)
    for path, said in zip(arguments.images, lines, strict=True):
        print("\n  ".join([path, *said]))
    if arguments.out:
        predictor.draw(images, outputs, arguments.out)
    if arguments.attention:
        captions = predictor.task.summaries(outputs)
        predictor.draw_attention(images, captions, arguments.attention)
    for what, file in (
        ("drawn", arguments.out),
        ("attention", arguments.attention),
        ("patches", arguments.patches),
    ):
        if file:
            print(f"{what}: {file}")


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
