"""The bodies of the commands, from parsed arguments to the functions that do the work.

Each imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence

from vit_jax.errors import UserError, nearest

_STARTED = time.monotonic()


def _check_one_of(arguments: argparse.Namespace, *flags: str) -> None:
    given = [flag for flag in flags if getattr(arguments, flag)]
    if len(given) != 1:
        names = " or ".join(f"--{flag}" for flag in flags)
        raise UserError(f"{arguments.command}: give {names} (one of them)")


def _refuse(arguments: argparse.Namespace, *flags: str, beside: str) -> None:
    """Raises `UserError` for a flag that would be ignored."""
    for flag in flags:
        if getattr(arguments, flag.replace("-", "_"), None):
            raise UserError(f"{arguments.command}: --{flag} does not go with --{beside}")


def _cluster(arguments: argparse.Namespace):
    from vit_jax.parallel.processes import Cluster

    return Cluster(arguments.coordinator, arguments.num_processes, arguments.process_id)


def _load_config(arguments: argparse.Namespace):
    from vit_jax import config as config_lib

    return config_lib.load(arguments.config, arguments.overrides)


def _set_up(config, arguments: argparse.Namespace) -> None:
    from vit_jax.parallel import processes

    cluster = _cluster(arguments) if hasattr(arguments, "coordinator") else processes.Cluster()
    processes.setup(config.compilation_cache, config.precision, cluster)


def run_train(arguments: argparse.Namespace) -> int | None:
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
    from vit_jax.training import loop

    _set_up(config, arguments)
    outcome = loop.train(config, arguments.workdir, profile=arguments.profile, started=_STARTED)
    import jax

    if jax.process_index() == 0:
        print(outcome.describe())
    return None


def run_evaluate(arguments: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    _check_one_of(arguments, "workdir", "checkpoint")
    from vit_jax.training import evaluate
    from vit_jax.training.workdir import Workdir

    if arguments.checkpoint:
        _refuse(arguments, "step", beside="checkpoint")
        if not arguments.config:
            raise UserError("evaluate: --checkpoint needs --config=FILE, which names the data")
        config = _load_config(arguments)
        _set_up(config, arguments)
        results = evaluate.evaluate_checkpoint(config, arguments.checkpoint)
    else:
        _refuse(arguments, "config", beside="workdir")
        workdir = Workdir.existing(arguments.workdir)
        _set_up(workdir.read_config(arguments.overrides), arguments)
        results = evaluate.evaluate_workdir(workdir, arguments.overrides, arguments.step)
    for name, value in results.items():
        print(f"{name:32} {value:.6g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")


def run_report(arguments: argparse.Namespace) -> None:
    from vit_jax.report import write_report
    from vit_jax.training.workdir import Workdir

    print(write_report(Workdir.existing(arguments.workdir).path))


def run_predict(arguments: argparse.Namespace) -> None:
    predictor = _predictor(arguments)
    images = predictor.read(arguments.images)
    if arguments.patches:
        predictor.draw_patches(images[0], arguments.patches)
    outputs = predictor.predict(images)
    lines = predictor.task.lines(outputs, arguments.top)
    for path, said in zip(arguments.images, lines, strict=True):
        print("\n  ".join([path, *said]))
    if arguments.out:
        predictor.draw(images, outputs, arguments.out)
    if arguments.attention:
        captions = predictor.task.captions(outputs)
        predictor.draw_attention(images, captions, arguments.attention)
    for what, file in (
        ("drawn", arguments.out),
        ("attention", arguments.attention),
        ("patches", arguments.patches),
    ):
        if file:
            print(f"{what}: {file}")


def _predictor(arguments: argparse.Namespace, *, headless: bool = False):
    """The model that --workdir, or --checkpoint with --model, names."""
    _check_one_of(arguments, "workdir", "checkpoint")
    from vit_jax import config
    from vit_jax.inference import predict

    if arguments.workdir:
        _refuse(arguments, "model", "image-size", "labels", beside="workdir")
        if arguments.fields:
            raise UserError(f"{arguments.command}: --model.FIELD does not go with --workdir")
        return predict.Predictor.from_workdir(arguments.workdir, getattr(arguments, "text", ()))
    if getattr(arguments, "text", ()):
        raise UserError("--text needs the --workdir of a run that learned images and texts")
    return predict.Predictor.from_checkpoint(
        arguments.checkpoint,
        model=arguments.model,
        fields=config.parse_values(arguments.fields),
        image_size=arguments.image_size,
        labels=getattr(arguments, "labels", None),
        headless=headless,
    )


def run_convert(arguments: argparse.Namespace) -> None:
    from vit_jax import config
    from vit_jax.inference import convert

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


def run_features(arguments: argparse.Namespace) -> None:
    from vit_jax.inference import features

    predictor = _predictor(arguments, headless=True)
    print(features.run(arguments.images, arguments.out, predictor))


def run_fewshot(arguments: argparse.Namespace) -> None:
    _check_one_of(arguments, "workdir", "config")
    from vit_jax.inference import fewshot
    from vit_jax.training.workdir import Workdir

    if arguments.workdir:
        overrides = {**arguments.overrides, "init.checkpoint": arguments.workdir}
        config = Workdir.existing(arguments.workdir).read_config(overrides)
    else:
        config = _load_config(arguments)
    _set_up(config, arguments)
    for name, value in fewshot.run(config).items():
        print(f"{name:32} {value:.6g}")


def run_data(arguments: argparse.Namespace) -> None:
    config = _load_config(arguments)
    from vit_jax.report.contact_sheet import contact_sheet
    from vit_jax.training.run import Run

    _set_up(config, arguments)
    run = Run.build(config)
    with contextlib.closing(run.batches_seen(arguments.step)) as batches:
        contact_sheet(
            batches,
            run.source.class_names,
            arguments.out,
            num_images=arguments.images,
            tokenizer=_tokenizer(run.task.info.spec.get("tokens")),
        )
    print(arguments.out)


def _tokenizer(tokens):
    """What made texts of a batch's tokens, where its spec tells."""
    if not (tokens and tokens.vocab):
        return None
    from vit_jax.data.tokenizer import open_tokenizer

    return open_tokenizer(tokens.vocab, tokens.shape[-1])


def run_plan(arguments: argparse.Namespace) -> None:
    config = _load_config(arguments)
    from vit_jax.planning import command, feeding

    rate = None
    if arguments.input == "here":
        rate = _rate_here(config)
    elif arguments.input:
        rate = feeding.read_rate(arguments.input)
    command.run(
        config,
        arguments.topology,
        arguments.slices,
        search=arguments.fit,
        placements=arguments.placements,
        rate=rate,
        json_file=arguments.json,
        save=arguments.save,
    )


def _rate_here(config):
    """How fast a core of this machine makes images ready as `config` wants them."""
    from vit_jax.bench.input import bench_input, on_photographs
    from vit_jax.planning.feeding import Rate

    measured = bench_input(on_photographs(config), batches=10)
    rate = measured["images_per_sec_per_core"]
    return Rate(rate, f"{rate:,.0f} images/s a core, measured here on photographs")


def run_models(arguments: argparse.Namespace) -> None:
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


def run_prepare(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_jax.data.prepare import datasets, imagenet_tars

    name, data_dir = arguments.name, arguments.data_dir

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.check and arguments.manual_dir:
        _refuse(arguments, "tfrecord", "copy_to", "data_dir", beside="check --manual_dir")
        if name != imagenet_tars.NAME:
            raise UserError(f"prepare: --check --manual_dir goes with {imagenet_tars.NAME} alone")
        imagenet_tars.check_archives(Path(arguments.manual_dir).expanduser(), tell)
        return
    if arguments.tfrecord:
        folder = datasets.convert_tfrecord(name, arguments.tfrecord, data_dir, tell)
    elif not (arguments.copy_to or arguments.check):
        folder = datasets.prepare(name, data_dir, arguments.manual_dir, tell)
    if arguments.check:
        folder = datasets.check(name, data_dir, tell)
    if arguments.copy_to:
        folder = datasets.copy(name, data_dir, arguments.copy_to, tell)
    print(folder)


def run_bench(arguments: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    measure = _bench_of_model if arguments.model else _bench_of_config
    measured = measure(arguments)
    from vit_jax.bench.machine import describe_machine

    result = json.dumps({**measured, "machine": describe_machine()}, indent=2)
    print(result)
    if arguments.json:
        Path(arguments.json).write_text(result + "\n")


def _bench_of_model(arguments: argparse.Namespace) -> dict[str, float]:
    if arguments.what != "step" or arguments.config or arguments.overrides:
        raise UserError("bench: --model goes with `bench step`, in place of --config")
    from vit_jax import config
    from vit_jax.bench import model, peers

    given = {"batch_size": arguments.batch, "dtype": arguments.dtype}
    given = {name: value for name, value in given.items() if value is not None}
    case = model.Case(arguments.model, **given, fields=config.parse_values(arguments.fields))
    against = _peers(arguments, peers.PEERS)
    _set_up(case.config(), arguments)
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
    config = _load_config(arguments)
    from vit_jax.bench import checkpoint, evaluation, loop, start
    from vit_jax.bench import input as feeding

    rivals = _peers(arguments, tuple(feeding.RIVALS) if arguments.what == "input" else ())
    _set_up(config, arguments)
    if rivals:
        return {
            name: value
            for rival in rivals
            for name, value in feeding.bench_against(config, rival).items()
        }
    measure = {
        "step": loop.bench_step,
        "input": feeding.bench_input,
        "eval": evaluation.bench_eval,
        "start": lambda _: start.bench_start(arguments.config, arguments.overrides),
        "checkpoint": checkpoint.bench_checkpoint,
    }[arguments.what]
    return measure(config)


def _peers(arguments: argparse.Namespace, known: Sequence[str]) -> list[str]:
    """What --against lists, each one of `known`, as NAME or NAME:FOLDER."""
    peers = arguments.against.split(",") if arguments.against else []
    for peer in peers:
        if not known:
            raise UserError("bench: --against goes with `bench input`, or `bench step --model`")
        name = peer.partition(":")[0]
        if name not in known:
            raise UserError(f"bench --against={name}: not known here; {nearest(name, known)}")
    return peers
