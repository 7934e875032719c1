"""The state that a run begins with, and the records of its earlier attempts in the log."""

import dataclasses
import math

from vit_jax import optim
from vit_jax.checkpoints import MergeReport
from vit_jax.checkpoints.store import Restored, Store
from vit_jax.errors import UserError
from vit_jax.tracking import read_metrics
from vit_jax.tracking.step_log import total_seconds
from vit_jax.training import initial_state, step
from vit_jax.training.best import Best
from vit_jax.training.class_names import class_names
from vit_jax.training.run import Run
from vit_jax.training.workdir import Workdir


def restore_or_init(
    run: Run, store: Store
) -> tuple[step.State, Restored | None, MergeReport | None]:
    """Returns the newest whole checkpoint, or the initial state where there is no checkpoint.

    Arrays that the checkpoint lacks because the config has changed, such as those of a new
    optimizer or of a moving average that was off, start from its parameters. The `MergeReport`
    describes the use of `config.init.checkpoint`; it is None unless the state starts from one.

    Raises:
      UserError: too many checkpoints are damaged, or the newest lacks parameters of the model.
    """
    restored = store.restore_newest(run.abstract)
    if restored is None:
        state, merged = initial_state.first_state(run)
        return state, None, merged
    for field in dataclasses.fields(step.State):
        if field.name not in initial_state.DERIVED:
            restored.check_whole(field.name)
    state = restored.tree
    if restored.missing:
        lacking = {name.partition(".")[0] for name in restored.missing}
        fresh = initial_state.derived(run, state.params, lacking)
        changes = {name: optim.filled(getattr(state, name), x) for name, x in fresh.items()}
        if "opt_state" in lacking:
            changes["opt_state"], anew = optim.complete(
                state.opt_state, fresh["opt_state"], state.params
            )
            restored = dataclasses.replace(restored, restarted=anew)
        state = state.replace(**changes)
    return state, restored, None


def check_data(run: Run, workdir: Workdir, step: int) -> list[str]:
    """Returns a warning about each difference from the run that is resumed, in data and stages.

    step: the step of the newest checkpoint.

    Raises:
      UserError: the classes have other names, or another order.
    """
    workdir.check_classes(class_names(run.task))
    num_examples = len(run.source)
    return [
        *workdir.changed_commits(run.config),
        *workdir.changed_examples(num_examples, run.task.info.class_counts or ()),
        *workdir.changed_stage(run.config, num_examples, step + 1),
    ]


def check_start(workdir: Workdir, restored: Restored | None, total: int) -> int:
    """Returns the step to start from. Raises a `UserError` if it lies behind the end of the run."""
    start = restored.step if restored else 0
    if start > total:
        raise UserError(
            f"{workdir.path} is at step {start}, and config.total={total} ends before it: give more"
            " steps, or another workdir"
        )
    return start


def lost_seconds(workdir: Workdir, restored: Restored) -> float:
    """Returns the time that an earlier attempt spent on steps that have to be run again.

    The log shows how far that attempt progressed. On object stores it ends at the checkpoint.
    """
    reached = max(
        (row.get("train/run_seconds", 0.0) for row in read_metrics(workdir.path)), default=0
    )
    return max(0.0, reached - total_seconds(restored.metadata["seconds"]))


def caught_up(restored: Restored, workdir: Workdir, best: Best) -> Restored:
    """Returns a checkpoint that owes no evaluation if a later attempt has logged it.

    `best` takes over what the checkpoint stored, and records that evaluation for the early stop.
    """
    best.restore(restored.metadata)
    if not restored.metadata["owes_evaluation"]:
        return restored
    early, found = best.early, last_evaluation(workdir, restored.step, since=restored.step)
    if not found or (early.metric is not None and early.name not in found):
        return restored
    early.update(found)
    return dataclasses.replace(restored, metadata={**restored.metadata, "owes_evaluation": False})


def last_evaluation(workdir: Workdir, until: float = math.inf, since: int = 0) -> dict[str, float]:
    """Returns the metrics of the last evaluation in the run's log, `{"SPLIT/METRIC": value}`.

    since, until: the first and the last step that count.
    """
    results: dict[str, float] = {}
    for row in (row for row in read_metrics(workdir.path) if since <= row["step"] <= until):
        found = {name[5:]: value for name, value in row.items() if name.startswith("eval/")}
        results = found or results
    return results
