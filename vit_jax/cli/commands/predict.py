"""`predict`: prints and draws what a trained model says about image files."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vit_jax.cli.arguments import (
    add_model_source,
    open_predictor,
    png_file,
    positive,
    results_file,
)
from vit_jax.cli.parser import Command
from vit_jax.errors import UserError, visible

if TYPE_CHECKING:
    from vit_jax.inference.answers import Answers
    from vit_jax.inference.predict import Predictor
    from vit_jax.tasks import BaseTask


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="Image files, folders of image files, patterns such as 'photos/*.jpg', or @FILE, a"
        " text file with the name of an image file on each line.",
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
        " were trained on images with texts, and folders of CLIP or SigLIP with their tokenizer.",
    )
    answers.add_argument(
        "--results",
        type=results_file,
        metavar="FILE",
        help="Write the classes of each image to FILE, as .csv, .jsonl or .parquet, in place of"
        " printing them. After an interruption or an unreadable image, the same call keeps the"
        " answers of the images that are unchanged.",
    )
    answers.add_argument(
        "--probabilities",
        action="store_true",
        help="With --results: also write the probability of every class.",
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
    from vit_jax.checkpoints import input_spec
    from vit_jax.inference.preparation import BATCH_SIZE, find_images

    if arguments.probabilities and not arguments.results:
        raise UserError("predict: --probabilities needs --results=FILE")
    path = arguments.checkpoint
    if path and not arguments.text and input_spec.is_image_text_model(path):
        raise UserError(
            f"{path} tells which text fits an image: write --text=TEXT once for each (features"
            " has the vectors of images)"
        )
    predictor = open_predictor(arguments)
    paths = find_images(arguments.images)
    if arguments.results:
        _write(arguments, predictor, paths)
        if arguments.out or arguments.attention or arguments.patches:
            first = next(predictor.answers(paths[:BATCH_SIZE]))
            _draw(arguments, predictor, first, len(paths))
        return
    first_ones: list = []
    _print(predictor.task, _keeping_first(predictor.answers(paths), first_ones), arguments.top)
    _draw(arguments, predictor, first_ones[0], len(paths))


def _write(arguments: argparse.Namespace, predictor: "Predictor", paths: list[str]) -> None:
    from vit_jax.inference.results import Results, identity_of

    results = Results(
        predictor.task,
        arguments.top,
        everything=arguments.probabilities,
        identity=identity_of(predictor.params, [*predictor.settings(), *arguments.text]),
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )

    def answers(files: Sequence[str]) -> Iterator[tuple[Sequence[str], dict]]:
        return _with_paths(predictor.answers(files), files)

    count = results.write(arguments.results, paths, answers)
    print(f"results: {arguments.results} ({count} images)")


def _keeping_first(answers: Iterable, first: list) -> Iterator:
    """Yields answers, and appends the first of them to a list: those that are drawn."""
    for batch in answers:
        if not first:
            first.append(batch)
        yield batch


def _with_paths(answers: Iterable, paths: Sequence[str]) -> Iterator[tuple[Sequence[str], dict]]:
    start = 0
    for batch in answers:
        yield paths[start : start + len(batch.pictures)], batch.outputs
        start += len(batch.pictures)


def _print(task: "BaseTask", answers: Iterable, top: int) -> None:

    for batch in answers:
        for number, said in enumerate(task.result_lines(batch.outputs, top)):
            print("\n  ".join(map(visible, [batch.pictures.describe(number), *said])))


def _draw(
    arguments: argparse.Namespace, predictor: "Predictor", shown: "Answers", count: int
) -> None:
    if arguments.out:
        predictor.draw(shown, arguments.out)
    if arguments.attention:
        predictor.draw_attention(shown, arguments.attention)
    if arguments.patches:
        predictor.draw_patches(shown.prepared["image"][0], arguments.patches)
    part = f" (the first {len(shown.pictures)} images)" if len(shown.pictures) < count else ""
    for what, file, which in (
        ("drawn", arguments.out, part),
        ("attention", arguments.attention, part),
        ("patches", arguments.patches, ""),
    ):
        if file:
            print(f"{what}: {file}{which}")


COMMAND = Command(
    summary="Print the classes, masks, boxes or matching texts of image files, and draw them.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "predict --workdir=runs/photos photo.jpg --attention=looked.png",
        "predict --workdir=runs/photos --step=best photos --results=answers.csv",
        "predict --workdir=runs/detect --out=drawn.png photo.jpg",
        "predict --checkpoint=B_16.npz --labels=imagenet.txt photo.jpg",
        'predict --workdir=runs/captions photo.jpg --text="a cat" --text="a dog"',
        "predict --checkpoint=openai/clip-vit-base-patch32 photo.jpg --text=cat --text=dog",
    ),
    overrides=("model",),
)
