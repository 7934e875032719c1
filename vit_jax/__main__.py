"""The commands: `python -m vit_jax COMMAND ...`, also installed as `vit-jax`.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from vit_jax import errors
from vit_jax.errors import UserError, nearest

_FORMATS = ("npz", "big_vision", "timm", "hf", "orbax")
_CONFIG_HELP = "config file, with arguments after a colon: configs/digits.py:runlocal"
_OVERRIDES = """\
Any key of the config can be set with --config.KEY=VALUE, such as --config.optim.lr=0.003.
`python -m vit_jax train --keys` lists them all."""
_LAST_WORDS_SECONDS = 2.0
_STARTED = time.monotonic()

_TOLD = UserError | errors.DoesNotFit | errors.Diverged | errors.LostProcess
"""Errors whose message is all that there is to say."""

CONFIG_COMMANDS = ("train", "evaluate", "plan", "data", "bench", "fewshot")
MODEL_COMMANDS = ("predict", "convert", "features")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the process's exit code (see `vit_jax.errors`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _silence_echoes()
    try:
        return _run(argv) or 0
    except errors.Interrupted as notice:
        print(notice, file=sys.stderr)
        return notice.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + 2
    except BrokenPipeError:
        sys.stderr.close()
        return errors.FAILURE
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """Tells of an error, in one line where it is one of ours; returns the exit code."""
    if _is_one_of_many() and (lost := _lost_process(error)):
        error = errors.LostProcess(lost)
    if isinstance(error, _TOLD):
        print(f"error: {error}", file=sys.stderr)
        return _leave(error.exit_code)
    if not _is_one_of_many():
        raise error
    traceback.print_exc()
    return _leave(errors.FAILURE)


def _silence_echoes() -> None:
    """Keeps libraries from showing stacks of an error that is then raised and told in one line.

    A save that fails does so in dozens of Orbax's background tasks, whose event loop is gone by
    the time the rest of them ends.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook


def _is_one_of_many() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _lost_process(error: Exception) -> str:
    """What to say where all that went wrong is that another process of this run is gone."""
    from vit_jax.runtime import lost_process

    line = lost_process(error)
    advice = "start all processes again, and the run goes on from its last checkpoint"
    return line and f"lost another process of this run ({line}); {advice}"


def _leave(code: int) -> int:
    """The exit code of a failed process; one of several processes ends here and now.

    The others may be waiting for it in a collective operation, and it would wait for them at the
    end of the interpreter: they learn of its end only when it is gone. What fails one process often
    fails all: each gets a moment to say so before the first of them takes the others down.
    """
    if _is_one_of_many():
        sys.stdout.flush()
        sys.stderr.flush()
        if code != errors.LostProcess.exit_code:
            time.sleep(_LAST_WORDS_SECONDS)
        os._exit(code)
    return code


def _run(argv: list[str]) -> int | None:
    if argv[:1] == ["tpu"]:
        return _tpu(argv[1:])
    given = argv
    argv, overrides = split_overrides(argv, "--config.")
    argv, fields = split_overrides(argv, "--model.")
    parser, commands = _parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(f"unknown command {argv[0]!r}; {nearest(argv[0], commands)}")
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return None
    if unknown:
        flags = commands[arguments.command]._option_string_actions
        flag = unknown[0].split("=")[0]
        raise UserError(f"{arguments.command}: unknown argument {flag!r}; {nearest(flag, flags)}")
    if overrides and arguments.command not in CONFIG_COMMANDS:
        raise UserError(f"{arguments.command} takes no --config.{next(iter(overrides))}")
    if fields and arguments.command not in MODEL_COMMANDS:
        raise UserError(f"{arguments.command} takes no --model.{next(iter(fields))}")
    arguments.given, arguments.overrides, arguments.fields = given, overrides, fields
    return arguments.run(arguments)


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


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="python -m vit_jax",
        description="Vision Transformers in JAX: train, evaluate, fine-tune, look inside.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, Parser] = {}

    def command(name: str, run: Callable, summary: str, epilog: str = "") -> Parser:
        commands[name] = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands[name].set_defaults(run=run)
        return commands[name]

    _add_run_commands(command)
    _add_checkpoint_commands(command)
    _add_tools(command)
    return parser, commands


def _add_run_commands(command: Callable[..., Parser]) -> None:
    train = command("train", _train, "train, or resume what is in the workdir", _OVERRIDES)
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
        "evaluate", _evaluate, "exact metrics of a run's newest checkpoint", _OVERRIDES
    )
    evaluate.add_argument("--workdir", metavar="DIR", help="a run that was trained")
    evaluate.add_argument("--config", metavar="FILE[:ARGS]", help="with --checkpoint: the run")
    evaluate.add_argument("--checkpoint", metavar="PATH", help="a checkpoint of any format")
    evaluate.add_argument("--step", type=int, help="checkpoint to evaluate; default: the newest")
    evaluate.add_argument("--json", metavar="FILE", help="also write the metrics there")
    _add_cluster(evaluate)

    report = command("report", _report, "rebuild the report of a run")
    report.add_argument("--workdir", metavar="DIR", required=True, help="a run, finished or not")

    predict = command(
        "predict", _predict, "classes, masks or boxes of image files, and where the model looked"
    )
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    _add_model_source(predict)
    predict.add_argument("--labels", metavar="FILE", help="class names, one a line")
    predict.add_argument(
        "--attention", metavar="OUT.png", help="draw where the model looked; all heads of one image"
    )
    predict.add_argument("--patches", metavar="OUT.png", help="draw the first image in patches")
    predict.add_argument("--top", type=int, default=5, help="lines an image; default: %(default)s")
    predict.add_argument("--out", metavar="OUT.png", help="draw the answers on the images")


def _add_checkpoint_commands(command: Callable[..., Parser]) -> None:
    convert = command(
        "convert",
        _convert,
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

    features = command("features", _features, "embeddings of image files")
    features.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    _add_model_source(features)
    features.add_argument(
        "--out",
        metavar="FILE",
        default="features.npz",
        help=".npz or .parquet; default: %(default)s",
    )

    fewshot = command(
        "fewshot", _fewshot, "linear probe and neighbours on a run's frozen features", _OVERRIDES
    )
    fewshot.add_argument("--workdir", metavar="DIR", help="a run that was trained")
    fewshot.add_argument("--config", metavar="FILE[:ARGS]", help="or a config with init.checkpoint")


def _add_tools(command: Callable[..., Parser]) -> None:
    data = command("data", _data, "a contact sheet of the images that the model sees", _OVERRIDES)
    data.add_argument("--config", metavar="FILE[:ARGS]", required=True, help=_CONFIG_HELP)
    data.add_argument("--out", metavar="FILE", default="data.png", help="default: %(default)s")
    data.add_argument("--images", type=int, default=64, help="how many; default: %(default)s")
    data.add_argument("--step", type=int, default=0, help="from the batch of this step on")

    plan = command(
        "plan", _plan, "what a run would take on machines that are not at hand", _OVERRIDES
    )
    plan.add_argument("--config", metavar="FILE[:ARGS]", required=True, help=_CONFIG_HELP)
    plan.add_argument("--topology", default="", help="v5e:16x16, v5p-512, cpu:8; default: this one")
    plan.add_argument("--slices", type=int, default=1, help="TPU slices; default: %(default)s")
    plan.add_argument("--fit", action="store_true", help="search for the fastest setting that fits")
    plan.add_argument("--placements", action="store_true", help="print where each parameter lives")
    plan.add_argument("--json", metavar="FILE", default="", help="also write the plan there")
    plan.add_argument("--save", metavar="FILE", default="", help="keep the compiled program")

    models = command(
        "models",
        _models,
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

    prepare = command("prepare", _prepare, "prepare a dataset for training")
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

    bench = command("bench", _bench, "measure this machine; prints JSON", _OVERRIDES)
    bench.add_argument(
        "what", choices=("step", "input", "start", "checkpoint"), help="what to measure"
    )
    bench.add_argument("--config", metavar="FILE[:ARGS]", required=True, help=_CONFIG_HELP)
    bench.add_argument(
        "--against", choices=("timm",), help="input: timm's loader too, in turns (extra `bench`)"
    )
    bench.add_argument("--json", metavar="FILE", help="also write the result there")

    command("tpu", _tpu, "create and use Cloud TPU slices: ./run.sh tpu --help")


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


def _check_one_of(arguments: argparse.Namespace, *flags: str) -> None:
    given = [flag for flag in flags if getattr(arguments, flag)]
    if len(given) != 1:
        names = " or ".join(f"--{flag}" for flag in flags)
        raise UserError(f"{arguments.command}: give {names} (one of them)")


def _cluster(arguments: argparse.Namespace):
    from vit_jax.runtime import Cluster

    return Cluster(arguments.coordinator, arguments.num_processes, arguments.process_id)


def _load_config(arguments: argparse.Namespace):
    from vit_jax import config as config_lib

    return config_lib.load(arguments.config, arguments.overrides)


def _set_up(config, arguments: argparse.Namespace) -> None:
    from vit_jax import runtime

    cluster = _cluster(arguments) if hasattr(arguments, "coordinator") else runtime.Cluster()
    runtime.setup(config.compilation_cache, config.precision, cluster)


def _train(arguments: argparse.Namespace) -> int | None:
    if arguments.keys:
        from vit_jax import config as config_lib

        print(config_lib.describe())
        return None
    for flag in ("config", "workdir"):
        if not getattr(arguments, flag):
            raise UserError(f"train: --{flag} is missing (see python -m vit_jax train --help)")
    if arguments.restarts:
        from vit_jax.launch import supervise

        return supervise.run([*arguments.given, "--restarts=0"], arguments.restarts)
    config = _load_config(arguments)
    from vit_jax import train

    _set_up(config, arguments)
    outcome = train.train(config, arguments.workdir, profile=arguments.profile, started=_STARTED)
    import jax

    if jax.process_index() == 0:
        print(outcome.describe())
    return None


def _evaluate(arguments: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    _check_one_of(arguments, "workdir", "checkpoint")
    from vit_jax import evaluate
    from vit_jax.workdir import Workdir

    if arguments.checkpoint:
        if not arguments.config:
            raise UserError("evaluate: --checkpoint needs --config=FILE, which names the data")
        config = _load_config(arguments)
        _set_up(config, arguments)
        results = evaluate.evaluate_checkpoint(config, arguments.checkpoint)
    else:
        workdir = Workdir.existing(arguments.workdir)
        _set_up(workdir.read_config(arguments.overrides), arguments)
        results = evaluate.evaluate_workdir(workdir, arguments.overrides, arguments.step)
    for name, value in results.items():
        print(f"{name:32} {value:.6g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")


def _report(arguments: argparse.Namespace) -> None:
    from vit_jax.report import write_report
    from vit_jax.workdir import Workdir

    print(write_report(Workdir.existing(arguments.workdir).path))


def _predict(arguments: argparse.Namespace) -> None:
    predictor = _predictor(arguments)
    images = predictor.read(arguments.images)
    outputs = predictor.predict(images)
    lines = predictor.task.lines(outputs, arguments.top)
    for path, said in zip(arguments.images, lines, strict=True):
        print("\n  ".join([path, *said]))
    if arguments.out:
        predictor.draw(images, outputs, arguments.out)
        print(f"drawn: {arguments.out}")
    if arguments.attention:
        captions = predictor.task.captions(outputs)
        predictor.draw_attention(images, captions, arguments.attention)
        print(f"attention: {arguments.attention}")
    if arguments.patches:
        predictor.draw_patches(images[0], arguments.patches)
        print(f"patches: {arguments.patches}")


def _predictor(arguments: argparse.Namespace, *, headless: bool = False):
    """The model that --workdir, or --checkpoint with --model, names."""
    _check_one_of(arguments, "workdir", "checkpoint")
    from vit_jax import config, predict

    if arguments.workdir:
        return predict.Predictor.from_workdir(arguments.workdir)
    return predict.Predictor.from_checkpoint(
        arguments.checkpoint,
        model=arguments.model,
        fields=config.parse_values(arguments.fields),
        image_size=arguments.image_size,
        labels=getattr(arguments, "labels", None),
        headless=headless,
    )


def _convert(arguments: argparse.Namespace) -> None:
    from vit_jax import config, convert

    print(
        convert.run(
            arguments.src,
            arguments.dst,
            arguments.to,
            model=arguments.model,
            fields=config.parse_values(arguments.fields),
            image_size=arguments.image_size,
        )
    )


def _features(arguments: argparse.Namespace) -> None:
    from vit_jax import features

    predictor = _predictor(arguments, headless=True)
    print(features.run(arguments.images, arguments.out, predictor))


def _fewshot(arguments: argparse.Namespace) -> None:
    _check_one_of(arguments, "workdir", "config")
    from vit_jax import fewshot
    from vit_jax.workdir import Workdir

    if arguments.workdir:
        overrides = {**arguments.overrides, "init.checkpoint": arguments.workdir}
        config = Workdir.existing(arguments.workdir).read_config(overrides)
    else:
        config = _load_config(arguments)
    _set_up(config, arguments)
    for name, value in fewshot.run(config).items():
        print(f"{name:32} {value:.6g}")


def _data(arguments: argparse.Namespace) -> None:
    config = _load_config(arguments)
    from vit_jax.data.contact_sheet import contact_sheet
    from vit_jax.run import Run

    _set_up(config, arguments)
    run = Run.build(config)
    with contextlib.closing(run.batches_seen(arguments.step)) as batches:
        names = run.source.class_names
        contact_sheet(batches, names, arguments.out, num_images=arguments.images)
    print(arguments.out)


def _plan(arguments: argparse.Namespace) -> None:
    config = _load_config(arguments)
    from vit_jax.planning import command

    command.run(
        config,
        arguments.topology,
        arguments.slices,
        search=arguments.fit,
        placements=arguments.placements,
        json_file=arguments.json,
        save=arguments.save,
    )


def _models(arguments: argparse.Namespace) -> None:
    flags = ("index", "pretraining", "dataset", "resolution", "top")
    given = {flag: getattr(arguments, flag) for flag in flags if getattr(arguments, flag)}
    if arguments.released:
        from vit_jax.checkpoints import released

        print(released.describe(model=arguments.names, **given))
        return
    if given:
        raise UserError(f"models: --{next(iter(given))} needs --released")
    from vit_jax.models import listing

    print(f"{'name':20} {'parameters':>15} {'GFLOPs':>10} {'input':>6}")
    for row in listing.rows(arguments.names or None):
        print(f"{row.name:20} {row.params:>15,} {row.gflops:>10.2f} {row.input_size:>6}")


def _prepare(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_jax.data import imagenet_tars, prepare

    name, data_dir = arguments.name, arguments.data_dir

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.check and arguments.manual_dir:
        imagenet_tars.check_archives(Path(arguments.manual_dir), tell)
        return
    if arguments.tfrecord:
        folder = prepare.convert_tfrecord(name, arguments.tfrecord, data_dir, tell)
    elif not (arguments.copy_to or arguments.check):
        folder = prepare.prepare(name, data_dir, arguments.manual_dir, tell)
    if arguments.check:
        folder = prepare.check(name, data_dir, tell)
    if arguments.copy_to:
        folder = prepare.copy(name, data_dir, arguments.copy_to, tell)
    print(folder)


def _bench(arguments: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    config = _load_config(arguments)
    from vit_jax import bench, bench_checkpoint

    if arguments.against and arguments.what != "input":
        raise UserError("bench: --against goes with `bench input`")
    _set_up(config, arguments)
    measured = {
        "step": lambda: bench.bench_step(config),
        "input": lambda: (
            bench.bench_against_timm(config) if arguments.against else bench.bench_input(config)
        ),
        "start": lambda: bench.bench_start(arguments.config, arguments.overrides),
        "checkpoint": lambda: bench_checkpoint.bench_checkpoint(config),
    }[arguments.what]()
    result = json.dumps({**measured, "machine": bench.describe_machine()}, indent=2)
    print(result)
    if arguments.json:
        Path(arguments.json).write_text(result + "\n")


def _tpu(argv: list[str]) -> int:
    """Has actions and flags of its own, so the arguments come unread."""
    from vit_jax.launch import tpu

    argv, overrides = split_overrides(argv, "--config.")
    return tpu.run(argv, overrides, Parser)


if __name__ == "__main__":
    sys.exit(main())
