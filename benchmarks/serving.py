"""A rival and `vit_jax bench` exchange one JSON value for each line, in both directions.

A rival is a script of this folder that runs in a process of its own, so that threads, memory and
libraries stay apart. It answers first with the seconds that it took to get ready. Each request is a
number of steps or batches, and its answer is the seconds that they took, or it is `peak`, and its
answer is the most bytes that were held on a GPU (null where there is none). A text in place of a
number is a mistake of the user's, to be shown as it is.
"""

import importlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, TextIO

Timed = Callable[[int], float]
"""A function that runs so many steps or batches and returns the seconds that they took."""

WARM_UP = 3
"""Batches before the clock of a loader starts: they start workers, compile and fill buffers."""


class UserMistake(Exception):
    """The rival cannot be measured as asked. The message is one line for the user."""


def serve(
    prepare: Callable[..., Timed], arguments: Sequence[str], requests: TextIO, answers: TextIO
) -> None:
    """Prepares a rival with the arguments of its command line, then answers every request."""

    def answer(value: float | str | None) -> None:
        print(json.dumps(value), file=answers, flush=True)

    started = time.perf_counter()
    try:
        seconds_for = prepare(*arguments)
        answer(time.perf_counter() - started)
        for request in requests:
            answer(peak_bytes() if request == "peak\n" else seconds_for(int(request)))
    except UserMistake as mistake:
        answer(str(mistake))


def crop_and_augment(pp: str, rival: str) -> tuple[int, str | None, str | None]:
    """Returns (crop, layers, magnitude) of the preprocessing that big_vision's recipes have.

    Raises:
      UserMistake: it is another kind of preprocessing.
    """
    match = re.fullmatch(
        r"decode_jpeg_and_inception_crop\((\d+)\)\|flip_lr(?:\|randaug\((\d+), *(\d+)\))?", pp
    )
    if not match:
        raise UserMistake(
            f"bench --against={rival} measures 'decode_jpeg_and_inception_crop(SIZE)|flip_lr' with"
            f" or without '|randaug(LAYERS,MAGNITUDE)', not config.data.pp={pp!r}"
        )
    return int(match[1]), match[2], match[3]


def crop_alone(pp: str, rival: str, title: str) -> int:
    """Returns the crop for a library, called `title`, that crops and flips, but augments no more.

    Raises:
      UserMistake: it is another kind of preprocessing, or one with RandAugment.
    """
    size, layers, _ = crop_and_augment(pp, rival)
    if layers:
        raise UserMistake(f"bench --against={rival}: {title} has no RandAugment")
    return size


def timing(loader: Iterable[Any]) -> Timed:
    """Returns a function that times batches of a loader, which starts anew after each epoch."""

    def seconds_for(batches: int) -> float:
        stream = itertools.chain.from_iterable(itertools.repeat(loader))
        for _ in range(WARM_UP):
            next(stream)
        started = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return time.perf_counter() - started

    return seconds_for


def peak_bytes() -> int | None:
    """Returns the most bytes that torch has held on the GPU; None without torch or a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None


def main(prepare: Callable[..., Timed]) -> None:
    """Serves on standard input and output; what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(prepare, sys.argv[1:], sys.stdin, answers)


def import_timm() -> ModuleType:
    """Returns torch, with timm imported and ready.

    Raises:
      UserMistake: one of them is not installed.
    """
    try:
        import torch

        register = torch.library.register_fake
        # A torchvision built for CUDA cannot register its operators with a build of torch for
        # CPUs, and timm needs only its transforms.
        torch.library.register_fake = lambda *_, **__: lambda function: function
        try:
            importlib.import_module("timm.data")
        finally:
            torch.library.register_fake = register
    except ImportError as error:
        raise UserMistake(
            f"bench --against=timm needs timm ({error}); pip install -e '.[bench]'"
        ) from error
    return torch
