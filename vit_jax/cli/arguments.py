"""What the commands take: their arguments, their help, and overrides of config and model keys."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vit_jax.cli import commands
from vit_jax.errors import UserError

_FORMATS = ("npz", "big_vision", "timm", "hf", "orbax")
_CONFIG_HELP = "config file, with arguments after a colon: configs/digits.py:runlocal"
_OVERRIDES = """\
Any key of the config can be set with --config.KEY=VALUE, such as --config.optim.lr=0.003.
`python -m vit_jax train --keys` lists them all."""
CONFIG_COMMANDS = ("train", "evaluate", "plan", "data", "bench", "fewshot")
MODEL_COMMANDS = ("predict", "convert", "features", "bench")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def split_overrides(argv: Sequence[str], prefix: str) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.KEY=VALUE` (or `--config.KEY VALUE`) from the other arguments."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    items = iter(argv)
    for item in items:
        if not item.startswith(prefix):
            rest.append(item)
            continue
        key, equals, value = item.removeprefix(prefix).partition("=")
        if not equals:
            value = next(items, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{prefix}{key} has no value; write {prefix}{key}=VALUE")
        overrides[key] = value
    return rest, overrides


def parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="python -m vit_jax",
        description="Vision Transformers in JAX: train, evaluate, fine-tune, look inside.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    by_name: dict[str, Parser] = {}

    def command(name: str, run: Callable | None, summary: str, epilog: str = "") -> Parser:
        by_name[name] = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        by_name[name].set_defaults(run=run)
        return by_name[name]

    _add_run_commands(command)
    _add_checkpoint_commands(command)
    _add_tools(command)
    _add_measuring(command)
    return parser, by_name


def _add_run_commands(command: Callable[..., Parser]) -> None:
    train = command(
        "train", commands.run_train, "train, or resume what is in the workdir", _OVERRIDES
    )
    train.add_argument("--config", metavar="FILE[:ARGS]", help=_CONFIG_HELP)
    train.add_argument("--workdir", metavar="DIR", help="where the run is kept; may be gs://...")
    train.add_argument("--keys", action="store_true", help="list every config key and stop")
    train.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again, up to N times in a row, where the run is cut short or loses a process",
    )
    train.add_argument(
        "--profile", default="", metavar="START:STOP", help="trace these steps into WORKDIR/profile"
    )
    _add_cluster(train)

    evaluate = command(
        "evaluate", commands.run_evaluate, "exact metrics of a run's newest checkpoint", _OVERRIDES
    )
    evaluate.add_argument("--workdir", metavar="DIR", help="a run that was trained")
    evaluate.add_argument("--config", metavar="FILE[:ARGS]", help="with --checkpoint: the run")
    evaluate.add_argument("--checkpoint", metavar="PATH", help="a checkpoint of any format")
    evaluate.add_argument("--step", type=int, help="checkpoint to evaluate; default: the newest")
    evaluate.add_argument(
        "--json", type=_out_file, metavar="FILE", help="also write the metrics there"
    )
    _add_cluster(evaluate)

    report = command("report", commands.run_report, "rebuild the report of a run")
    report.add_argument("--workdir", metavar="DIR", required=True, help="a run, finished or not")

    predict = command(
        "predict",
        commands.run_predict,
        "classes, masks, boxes or the right text of image files, and where the model looked",
    )
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    _add_model_source(predict)
    predict.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TEXT",
        help="what an image may show, once for each; for runs that learned images and texts",
    )
    predict.add_argument("--labels", metavar="FILE", help="class names, one a line")
    predict.add_argument(
        "--attention",
        type=_png_file,
        metavar="OUT.png",
        help="draw where the model looked; all heads of one image",
    )
    predict.add_argument(
        "--patches", type=_png_file, metavar="OUT.png", help="draw the first image in patches"
    )
    predict.add_argument(
        "--top", type=_positive, default=5, help="lines an image; default: %(default)s"
    )
    predict.add_argument(
        "--out", type=_png_file, metavar="OUT.png", help="draw the answers on the images"
    )


def _add_checkpoint_commands(command: Callable[..., Parser]) -> None:
    convert = command(
        "convert",
        commands.run_convert,
        "checkpoints from any format to any other",
        "SRC may be a workdir of ours, an .npz of vision_transformer or big_vision, a timm file\n"
        "(.safetensors, .bin, .pth) or a transformers folder.",
    )
    convert.add_argument("src", metavar="SRC")
    convert.add_argument("dst", metavar="DST")
    convert.add_argument("--to", required=True, choices=_FORMATS, help="format of DST")
    convert.add_argument("--model", metavar="NAME", help="where SRC does not tell its model")
    convert.add_argument(
        "--image-size", type=_image_size, metavar="SIZE", help="resize the positions for this size"
    )

    features = command("features", commands.run_features, "embeddings of image files")
    features.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    _add_model_source(features)
    features.add_argument(
        "--out",
        type=_out_file,
        metavar="FILE",
        default="features.npz",
        help=".npz or .parquet; default: %(default)s",
    )

    fewshot = command(
        "fewshot",
        commands.run_fewshot,
        "linear probe and neighbours on a run's frozen features",
        _OVERRIDES,
    )
    fewshot.add_argument("--workdir", metavar="DIR", help="a run that was trained")
    fewshot.add_argument("--config", metavar="FILE[:ARGS]", help="or a config with init.checkpoint")


def _add_tools(command: Callable[..., Parser]) -> None:
    data = command(
        "data", commands.run_data, "a contact sheet of the images that the model sees", _OVERRIDES
    )
    data.add_argument("--config", metavar="FILE[:ARGS]", required=True, help=_CONFIG_HELP)
    data.add_argument(
        "--out", type=_png_file, metavar="FILE", default="data.png", help="default: %(default)s"
    )
    data.add_argument("--images", type=_positive, default=64, help="how many; default: %(default)s")
    data.add_argument("--step", type=int, default=0, help="from the batch of this step on")

    models = command(
        "models",
        commands.run_models,
        "list models with parameters and GFLOPs, or released checkpoints",
        "--released lists one fine-tuned checkpoint of each model, with the accuracies that its\n"
        "authors published; with --index, all that fit, best first.",
    )
    models.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    released = models.add_argument_group("released checkpoints (AugReg, Steiner et al. 2022)")
    released.add_argument("--released", action="store_true", help="list them instead")
    released.add_argument("--index", metavar="FILE", help="their index.csv: a file or an address")
    released.add_argument("--pretraining", metavar="NAME", help="i1k, i21k or i21k_30")
    released.add_argument("--dataset", metavar="NAME", help="fine-tuned on it: imagenet2012, ...")
    released.add_argument("--resolution", type=int, help="fine-tuned at it, in pixels")
    released.add_argument("--top", type=int, help="how many; default: 10")

    prepare = command("prepare", commands.run_prepare, "prepare a dataset for training")
    prepare.add_argument("name", help="digits, or any TFDS name")
    prepare.add_argument("--data_dir", metavar="DIR", default="", help="default: TFDS's own")
    prepare.add_argument("--manual_dir", metavar="DIR", default="", help="archives got by hand")
    prepare.add_argument("--tfrecord", metavar="DIR", help="convert the TFRecord build found there")
    prepare.add_argument("--copy_to", metavar="DIR", help="copy what is prepared, to gs://... say")
    prepare.add_argument(
        "--check",
        action="store_true",
        help="count records, compare checksums (with --manual_dir: of archives)",
    )


def _add_measuring(command: Callable[..., Parser]) -> None:
    plan = command(
        "plan",
        commands.run_plan,
        "what a run would take on machines that are not at hand",
        _OVERRIDES,
    )
    plan.add_argument("--config", metavar="FILE[:ARGS]", required=True, help=_CONFIG_HELP)
    plan.add_argument("--topology", default="", help="v5e:16x16, v5p-512, cpu:8; default: this one")
    plan.add_argument("--slices", type=int, default=1, help="TPU slices; default: %(default)s")
    plan.add_argument("--fit", action="store_true", help="search for the fastest setting that fits")
    plan.add_argument(
        "--input",
        metavar="FILE",
        default="",
        help="how fast hosts prepare images: what `bench input --json=FILE` wrote, or `here`",
    )
    plan.add_argument("--placements", action="store_true", help="print where each parameter lives")
    plan.add_argument("--json", type=_out_file, metavar="FILE", help="also write the plan there")
    plan.add_argument("--save", type=_out_file, metavar="FILE", help="keep the compiled program")

    bench = command("bench", commands.run_bench, "measure this machine; prints JSON", _OVERRIDES)
    bench.add_argument(
        "what", choices=("step", "input", "eval", "start", "checkpoint"), help="what to measure"
    )
    bench.add_argument("--config", metavar="FILE[:ARGS]", help=_CONFIG_HELP)
    bench.add_argument(
        "--model",
        metavar="NAME",
        help="step: of this model (--model.FIELD=VALUE: with it so) on made-up images,",
    )
    bench.add_argument("--batch", type=_positive, metavar="N", help="so many a step (default 8),")
    bench.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of its products (default float32)"
    )
    bench.add_argument(
        "--against",
        metavar="PEERS",
        help="in turns with others, commas between: timm, tfrecord (input); timm, timm-compile,"
        " big_vision:FOLDER, vision_transformer:FOLDER (step --model; the folder of a checkout);"
        " timm needs the extra `bench`",
    )
    bench.add_argument("--json", type=_out_file, metavar="FILE", help="also write the result there")

    # Has actions with arguments of their own, see `launch.tpu`; here for the list of commands.
    command("tpu", None, "create and use Cloud TPU slices: ./run.sh tpu --help")


def _add_model_source(parser: Parser) -> None:
    parser.add_argument("--workdir", metavar="DIR", help="a run that was trained")
    parser.add_argument("--checkpoint", metavar="PATH", help="or a checkpoint of any format,")
    parser.add_argument("--model", metavar="NAME", help="its model, where it does not tell,")
    parser.add_argument(
        "--image-size",
        type=_image_size,
        metavar="SIZE",
        help="and the size that images are brought to: 224, or 192x256 (height, width)",
    )


def _out_file(text: str) -> str:
    """A file that can be written later: whoever mistypes a folder should not wait to learn it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        reason = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise argparse.ArgumentTypeError(f"cannot write {text}: {reason}")
    return text


def _png_file(text: str) -> str:
    _out_file(text)
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} is written as a PNG: name it so, as in out.png")
    return text


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _image_size(text: str) -> tuple[int, int]:
    """`224` or `192x256` as (height, width)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 224, or 192x256")
    return int(match[1]), int(match[2] or match[1])


def _add_cluster(parser: Parser) -> None:
    group = parser.add_argument_group("one run in several processes")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=int, default=0)
    group.add_argument("--process-id", type=int, default=-1, help="of this one, from 0")
