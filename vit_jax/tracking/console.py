"""Progress on the console: one live line on a terminal, plain lines in a log file.

Neither tqdm nor rich would make this module smaller. Both draw a bar, but this module would still
need the log lines, the numbers, the order in which a narrow terminal drops them, and an estimate of
the remaining time that pauses for evaluation do not change. Both raise when the stream breaks, rich
shows no progress without a terminal, and each runs a thread.
"""

import collections
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TextIO

from vit_jax.errors import visible_lines
from vit_jax.tracking.plain_text import one_line

_BAR_WIDTH_MAX = 28  # columns; wider bars are no more informative
_BAR_WIDTH_MIN = 8
_REDRAW_SECONDS = 0.05  # the least time between two redraws of a terminal
_RECENT_INTERVALS = 20  # the number of reports in the median of the recent step time

_CLEAR_TO_END = "\x1b[K"
_STYLES = {"bar": "36", "bold": "1", "dim": "2", "plain": ""}


class _Field(NamedTuple):
    """One piece of the live line; `rank` orders the pieces that a line too long leaves out."""

    text: str
    style: str
    rank: int


class Progress:
    """Shows the progress of training, the remaining time and the main metrics.

    On a terminal one line is redrawn in place, cut to the terminal's width; elsewhere each
    `update` prints a line. NO_COLOR and TERM=dumb turn colors off. A stream that breaks (a closed
    pipe) ends the display, never the run.

    Args:
      total_steps: the last step of the run.
      start_step: the step that the run starts or resumes from.
      stream: the stream to print to; standard error if None.
      clock: returns seconds, as `time.monotonic` does.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._remaining_time = RemainingTime(total_steps)
        self._step = start_step
        self._metrics: dict[str, float] = {}
        self._note = ""
        self._drawn_at = -float("inf")
        self._is_live = _is_terminal(self._stream)
        self._is_drawn = False
        self._is_broken = False
        self._has_color = self._is_live and not os.environ.get("NO_COLOR")
        self._glyphs = _glyphs(self._stream)

    def update(self, step: int, metrics: Mapping[str, float], note: str = "") -> None:
        """Reports that `step` is done.

        Of `metrics`, which have their names in the metrics log, the console shows `train/loss`,
        `train/lr`, `train/images_per_sec`, `train/mfu` and `train/input_wait_fraction`, as far as
        they are present. On a terminal a number stays until a newer number replaces it.
        """
        now = self._clock()
        self._remaining_time.report(step, now)
        is_news = note != self._note or step >= self._total_steps
        self._step, self._note = step, one_line(note)
        self._metrics.update(metrics)
        if not self._is_live:
            self._write(_log_line(self._where(), metrics, self._note) + "\n")
        elif is_news or now - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = now
            self._draw()

    def message(self, text: str) -> None:
        """Prints `text` on separate lines, above the live line if there is one.

        Escape codes and other control characters are shown as text.
        """
        text = visible_lines(text)
        if self._is_drawn:
            # A single write prevents the terminal from showing an intermediate state.
            self._write(f"\r{_CLEAR_TO_END}{text}\n{self._live_line()}")
        else:
            self._write(f"{text}\n")

    def close(self) -> None:
        """Draws the last state of the live line and ends it; may be called twice."""
        if self._is_drawn:
            self._write(f"\r{self._live_line()}{_CLEAR_TO_END}\n")
            self._is_drawn = False
        self._is_live = False

    def _draw(self) -> None:
        # Overwriting the line and then clearing the rest, not the reverse, avoids flicker.
        self._write(f"\r{self._live_line()}{_CLEAR_TO_END}")
        self._is_drawn = not self._is_broken

    def _write(self, text: str) -> None:
        if self._is_broken:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except UnicodeEncodeError:
            self._stream.write(text.encode("ascii", "replace").decode())
        except (OSError, ValueError):  # A closed file raises ValueError.
            self._is_broken, self._is_drawn = True, False

    def _where(self) -> list[str]:
        """Returns step, percent (100 only at the end), and time left, or time taken at the end."""
        percent = 100 * self._step // max(self._total_steps, 1)
        seconds = self._remaining_time.seconds()
        if self._step >= self._total_steps:
            when = f"took {format_duration(self._clock() - self._started)}"
        else:
            when = "ETA --" if seconds is None else f"ETA {format_duration(seconds)}"
        return [f"{self._step}/{self._total_steps}", f"{percent}%", when]

    def _live_line(self) -> str:
        step, percent, eta = self._where()
        names = ("loss", "lr", "rate", "mfu", "wait")
        ranks = {"loss": 3, "lr": 4, "rate": 5, "wait": 6, "mfu": 7}
        numbers = _numbers(self._metrics)
        fields = [
            _Field(step, "bold", 0),
            _Field(percent, "plain", 2),
            _Field(eta, "plain", 1),
            *(_Field(numbers[n], "plain", ranks[n]) for n in names if n in numbers),
            _Field(self._note, "dim", 8),
        ]
        fields = [field for field in fields if field.text]
        # The last column stays empty, because writing there makes some terminals wrap.
        columns = _columns(self._stream) - 1
        while _length(fields) > columns and len(fields) > 1:
            fields.remove(max(fields, key=lambda field: field.rank))
        bar = self._bar(columns - _length(fields) - 2)
        texts = [self._styled(field.text[:columns], field.style) for field in fields]
        return bar + "  ".join(texts)

    def _bar(self, columns: int) -> str:
        width = min(columns, _BAR_WIDTH_MAX)
        if width < _BAR_WIDTH_MIN:
            return ""
        done, rest = self._glyphs
        filled = width * self._step // max(self._total_steps, 1)
        filled = max(0, min(width, filled))
        bar = self._styled(done * filled, "bar") + self._styled(rest * (width - filled), "dim")
        return bar + "  "

    def _styled(self, text: str, style: str) -> str:
        code = _STYLES[style]
        return f"\x1b[{code}m{text}\x1b[0m" if self._has_color and code and text else text


class RemainingTime:
    """Estimates the time to the last step from the times at which steps were reported.

    The estimate of the seconds per step is the larger of two values. The median over recent reports
    follows a slow-down, but not the pauses for evaluation and saving. The mean since the first
    report includes the pauses that recur. The time before the first report, mostly compilation, is
    ignored.
    """

    def __init__(self, total_steps: int):
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT_INTERVALS)

    def report(self, step: int, now: float) -> None:
        """Records that `step` was done at `now` (seconds); ignores a step reported before."""
        if self._first is None or self._last is None:
            self._first = self._last = (step, now)
            return
        last_step, last_time = self._last
        if step > last_step:
            self._recent.append((now - last_time) / (step - last_step))
            self._last = (step, now)

    def seconds(self) -> float | None:
        """Returns the seconds left after the last report, or None before there is an estimate."""
        if self._first is None or self._last is None:
            return None
        (first_step, first_time), (step, now) = self._first, self._last
        if not self._recent:
            return None
        mean = (now - first_time) / (step - first_step)
        return (self._total_steps - step) * max(statistics.median(self._recent), mean)


def format_duration(seconds: float) -> str:
    """Returns `seconds` in at most two units: `42s`, `1m 05s`, `2h 10m`, `3d 04h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    for size, unit, part_size, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // part_size:02d}{part}"
    return f"{seconds // 60}m {seconds % 60:02d}s"


def _numbers(metrics: Mapping[str, float]) -> dict[str, str]:
    """Returns the formatted numbers that the console shows, by short name."""
    formats = {
        "loss": ("train/loss", lambda value: f"loss {value:.4g}"),
        "lr": ("train/lr", lambda value: f"lr {value:.3g}"),
        "rate": ("train/images_per_sec", lambda value: f"{value:,.0f} images/s"),
        "mfu": ("train/mfu", lambda value: f"MFU {value:.1%}"),
        "wait": ("train/input_wait_fraction", lambda value: f"input wait {value:.0%}"),
    }
    return {
        short: show(metrics[name]) for short, (name, show) in formats.items() if name in metrics
    }


def _log_line(where: list[str], metrics: Mapping[str, float], note: str) -> str:
    step, percent, eta = where
    pieces = [f"step {step} ({percent})", eta, *_numbers(metrics).values(), note]
    return "  ".join(piece for piece in pieces if piece)


def _length(fields: list[_Field]) -> int:
    return sum(len(field.text) for field in fields) + 2 * (len(fields) - 1)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


def _columns(stream: TextIO) -> int:
    """Returns the current width of the terminal of `stream`; it changes if a window is resized."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _glyphs(stream: TextIO) -> tuple[str, str]:
    """Returns the characters of the bar, (done, to do), that the stream's encoding has."""
    glyphs = ("━", "─")
    try:
        "".join(glyphs).encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ("#", "-")
    return glyphs
