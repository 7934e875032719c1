"""The program: `vit-jax COMMAND ...`, or `python -m vit_jax COMMAND ...`.

The commands are in `cli/`. This file says how the process starts, and how it ends after an error.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence

from vit_jax import errors
from vit_jax.cli import parser
from vit_jax.errors import UserError

_LAST_WORDS_SECONDS = 2.0

_TOLD = UserError | errors.DoesNotFit | errors.Diverged | errors.LostProcess | errors.CannotSave
"""Errors whose message is all that there is to say."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the process's exit code (see `vit_jax.errors`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _silence_echoes()
    try:
        return parser.run(argv) or 0
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
    if errors.is_out_of_memory(error):
        reason = str(error).strip().splitlines()[0][:200]
        print(
            f"error: out of memory ({reason}): try more config.accum_steps, config.model.remat=full"
            " or a smaller config.batch_size; `plan --fit` looks for what fits",
            file=sys.stderr,
        )
        return _leave(errors.FAILURE)
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
    from vit_jax.parallel.processes import lost_process

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


if __name__ == "__main__":
    sys.exit(main())
