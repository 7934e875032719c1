"""`bench`: measures this machine and prints JSON."""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vit_jax.cli.arguments import add_config, load_config, out_file, positive, set_up
from vit_jax.cli.parser import Command
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("step", "input", "eval", "start", "checkpoint"),
        help="The part to measure: the training step, the input pipeline, evaluation, the time"
        " from start to first step, or saving and restoring checkpoints.",
    )
    add_config(
        parser,
        "The config of the run to measure, with arguments after a colon. Required, except for"
        " `bench step --model`.",
    )
    model = parser.add_argument_group(
        "the step of a named model",
        "Instead of a config, `bench step` takes the name of a model, and trains it on random\n"
        "images of the model's usual size. This needs no data and no TensorFlow.",
    )
    model.add_argument(
        "--model", metavar="NAME", help="The name of the model; `models` lists them."
    )
    model.add_argument(
        "--batch", type=positive, metavar="N", help="With --model: images per step (default: 8)."
    )
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="With --model: the type of matrix products (default: float32).",
    )
    parser.add_argument(
        "--against",
        metavar="RIVALS",
        default="",
        help="Also measure other software, in turns with ours; separate several by commas. For"
        " `bench input`: timm, tfrecord, grain, ffcv. For `bench step --model`: timm, timm-compile,"
        " big_vision:FOLDER, vision_transformer:FOLDER, where FOLDER is a checkout. timm needs"
        " the extra `bench`.",
    )
    parser.add_argument(
        "--stored",
        metavar="FORM",
        default="",
        help="For `bench input --against`: also measure both on images as `prepare --store=FORM`"
        " stores them, such as q90,max_side=512.",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="For `bench input --against`: turns of each, whose median is told (default: 3).",
    )
    parser.add_argument(
        "--json", type=out_file, metavar="FILE", help="Also write the result to FILE."
    )


def _run(arguments: argparse.Namespace) -> None:
    measure = _bench_of_model if arguments.model else _bench_of_config
    measured = measure(arguments)
    from vit_jax.bench.machine import describe_machine
    from vit_jax.storage import json_text, write_output

    result = json_text({**measured, "machine": describe_machine()}, indent=2)
    print(result)
    if arguments.json:
        write_output(arguments.json, result + "\n")


def _bench_of_model(arguments: argparse.Namespace) -> dict[str, float]:
    if arguments.rounds:
        raise UserError("bench: --rounds goes with `bench input --against`")
    if arguments.what != "step" or arguments.config or arguments.overrides:
        raise UserError("bench: --model goes with `bench step`, in place of --config")
    from vit_jax import config
    from vit_jax.bench import model, rivals

    given = {"batch_size": arguments.batch, "dtype": arguments.dtype}
    given = {name: value for name, value in given.items() if value is not None}
    case = model.Case(arguments.model, **given, fields=config.parse_values(arguments.fields))
    against = rivals.parse(arguments.against, "step")
    set_up(case.config(), arguments)
    return model.bench_model(case, against)


def _bench_of_config(arguments: argparse.Namespace) -> dict[str, float]:
    if not arguments.config:
        raise UserError("bench: give --config=FILE, or for `bench step` --model=NAME")
    if arguments.fields:
        raise UserError("bench: --model.FIELD goes with --model; write --config.model.FIELD")
    if arguments.batch is not None:
        raise UserError("bench: --batch goes with --model; write --config.batch_size")
    if arguments.dtype is not None:
        raise UserError("bench: --dtype goes with --model; write --config.model.dtype")
    config = load_config(arguments)
    from vit_jax.bench import checkpoint, evaluation, loop, rivals, start
    from vit_jax.bench import input as feeding

    if arguments.against and arguments.what != "input":
        raise UserError("bench: --against goes with `bench input`, or `bench step --model`")
    against = rivals.parse(arguments.against, "input")
    if arguments.stored and not against:
        raise UserError("bench: --stored goes with `bench input --against`")
    if arguments.rounds and not against:
        raise UserError("bench: --rounds goes with `bench input --against`")
    set_up(config, arguments)
    if against:
        from vit_jax.data.stored import Form

        form = Form.parse(arguments.stored) if arguments.stored else None
        return {
            name: value
            for rival in against
            for name, value in feeding.bench_against(
                config, rival, form, rounds=arguments.rounds or 3
            ).items()
        }
    measures: Mapping[str, Callable[[ConfigDict], dict[str, Any]]] = {
        "step": loop.bench_step,
        "input": feeding.bench_input,
        "eval": evaluation.bench_eval,
        "start": lambda _: start.bench_start(arguments.config, arguments.overrides),
        "checkpoint": checkpoint.bench_checkpoint,
    }
    return measures[arguments.what](config)


COMMAND = Command(
    summary="Measure training, input, evaluation, starts or checkpoints on this machine.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "bench input --config=configs/vit_s16_i1k.py --against=timm --stored=q90,max_side=512",
        "bench step --config=configs/digits.py --json=step.json",
        "bench step --model=vit_s16 --batch=8 --against=timm,timm-compile",
    ),
    notes="The result is printed as JSON, with units in the names. Whatever is compared is\n"
    "measured in turns, because other work on a machine changes its speed.",
    overrides=("config", "model"),
)
