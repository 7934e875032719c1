"""`prepare`: makes a dataset ready for training."""

import argparse
import sys

from vit_jax.cli.arguments import refuse
from vit_jax.cli.parser import Command
from vit_jax.errors import UserError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="The name of a dataset: digits, digit_scenes/32px, or any name of TensorFlow"
        " Datasets, such as cifar10. For tar files of WebDataset, such as 'shards/{split}-*.tar',"
        " an index is written beside each of them.",
    )
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        default="",
        help="The folder for prepared datasets (default: that of TensorFlow Datasets).",
    )
    parser.add_argument(
        "--manual_dir",
        metavar="DIR",
        default="",
        help="The folder of archives that you downloaded yourself, for datasets that need them.",
    )
    parser.add_argument(
        "--tfrecord",
        metavar="DIR",
        help="Convert the TFRecord version of the dataset that is in this folder, instead of"
        " preparing it from its sources.",
    )
    parser.add_argument(
        "--store",
        metavar="FORM",
        help="Write a second version of the prepared dataset, whose images are encoded anew: q90 is"
        " JPEG of quality 90, and q90,max_side=512 also reduces images to sides of at most 512"
        " pixels. It is a dataset of its own, such as imagenet2012_q90_512, and decodes faster.",
    )
    parser.add_argument(
        "--copy_to",
        metavar="DIR",
        help="Copy the prepared dataset to this folder, such as gs://BUCKET/tfds.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="Count the records of the prepared dataset and compare their checksums. With"
        " --manual_dir, compare the checksums of the archives instead.",
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    name, data_dir = arguments.name, arguments.data_dir
    if name.lower().endswith(".tar"):
        from vit_jax.data.sources import webdataset

        for flag in ("data_dir", "manual_dir", "tfrecord", "store", "copy_to", "check"):
            if getattr(arguments, flag):
                raise UserError(f"prepare: --{flag} is for datasets of TFDS, not for tar files")
        print(webdataset.prepare(name, _tell))
        return
    from vit_jax.data.prepare import datasets, imagenet_tars

    if arguments.check and arguments.manual_dir:
        refuse(arguments, "tfrecord", "copy_to", "data_dir", beside="check --manual_dir")
        if name != imagenet_tars.NAME:
            raise UserError(f"prepare: --check --manual_dir goes with {imagenet_tars.NAME} alone")
        imagenet_tars.check_archives(Path(arguments.manual_dir).expanduser(), _tell)
        return
    if arguments.store:
        from vit_jax.data.prepare import store
        from vit_jax.data.stored import Form

        refuse(arguments, "tfrecord", "copy_to", "manual_dir", "check", beside="store")
        print(store.store(name, data_dir, Form.parse(arguments.store), _tell))
        return
    if arguments.tfrecord:
        folder = datasets.convert_tfrecord(name, arguments.tfrecord, data_dir, _tell)
    elif not (arguments.copy_to or arguments.check):
        folder = datasets.prepare(name, data_dir, arguments.manual_dir, _tell)
    if arguments.check:
        folder = datasets.check(name, data_dir, _tell)
    if arguments.copy_to:
        folder = datasets.copy(name, data_dir, arguments.copy_to, _tell)
    print(folder)


COMMAND = Command(
    summary="Prepare a dataset for training, and print the folder that holds it.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "prepare digits",
        "prepare imagenet2012 --manual_dir=~/archives",
        "prepare imagenet2012 --store=q90,max_side=512",
        "prepare 'shards/train-*.tar'",
        "prepare cifar10 --copy_to=gs://BUCKET/tfds",
    ),
    notes="Records are written in a format with random access (ArrayRecord), which training\n"
    "needs. ImageNet has to be downloaded by hand: the command says what it needs.",
)
