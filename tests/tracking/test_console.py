"""Progress: a live line on a terminal, plain lines anywhere else."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from vit_jax.tracking.console import Progress, RemainingTime, format_duration

METRICS = {
    "train/loss": 0.12345,
    "train/lr": 1e-3,
    "train/images_per_sec": 5123.4,
    "train/input_wait_fraction": 0.02,
}


class Clock:
    """Seconds that move only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal, `columns` wide."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)


def without_codes(text):
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def screen(text):
    """The lines a terminal shows after `text`: `\\r` goes back, `ESC [K` clears to the end."""
    lines, column = [""], 0
    for piece in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            lines, column = [*lines, ""], 0
        elif piece == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif piece[0] != "\x1b":
            lines[-1] = lines[-1][:column] + piece + lines[-1][column + len(piece) :]
            column += len(piece)
    return lines


def test_a_log_file_gets_one_plain_line_an_update():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, 0, stream, clock)
    for step in (10, 20, 30):
        clock.now += 5
        progress.update(step, METRICS, note="warming up")
    progress.message("step 30  test accuracy 0.9")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 10/100 (10%)  ETA --  loss 0.1235  lr 0.001  5,123 images/s  input wait 2%"
        "  warming up",
        "step 20/100 (20%)  ETA 40s  loss 0.1235  lr 0.001  5,123 images/s  input wait 2%"
        "  warming up",
        "step 30/100 (30%)  ETA 35s  loss 0.1235  lr 0.001  5,123 images/s  input wait 2%"
        "  warming up",
        "step 30  test accuracy 0.9",
    ]


def test_missing_numbers_are_left_out_of_a_log_line():
    stream = io.StringIO()
    Progress(10, 0, stream).update(1, {"train/loss": float("nan")})
    assert stream.getvalue() == "step 1/10 (10%)  ETA --  loss nan\n"


def test_the_last_line_says_how_long_it_took():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, 0, stream, clock)
    clock.now = 65
    progress.update(10, {})
    assert stream.getvalue() == "step 10/10 (100%)  took 1m 05s\n"


def test_a_terminal_has_one_line_redrawn_in_place():
    clock, stream = Clock(), Terminal()
    progress = Progress(100, 0, stream, clock)
    for step in range(10, 101, 10):
        clock.now += 1
        progress.update(step, METRICS)
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 1
    # The line is overwritten and its rest cleared, never blanked first: no flicker.
    assert "\r\x1b[K" not in text
    assert screen(text)[0].rstrip().endswith("input wait 2%")
    assert "100/100  100%  took 10s" in screen(text)[0]


def test_the_live_line_remembers_numbers_that_an_update_leaves_out():
    clock, stream = Clock(), Terminal()
    progress = Progress(100, 0, stream, clock)
    progress.update(10, METRICS)
    clock.now += 1
    progress.update(11, {})
    assert "loss 0.1235" in stream.getvalue().rpartition("\r")[2]


def test_quick_updates_are_not_all_drawn_but_the_last_one_shows():
    clock, stream = Clock(), Terminal()
    progress = Progress(1000, 0, stream, clock)
    for step in range(1, 500):
        clock.now += 0.001
        progress.update(step, {"train/loss": float(step)})
    progress.close()
    text = stream.getvalue()
    assert text.count("\r") < 20
    assert "499/1000" in screen(text)[0]
    assert "loss 499" in screen(text)[0]


def test_messages_stay_and_the_line_follows_below():
    clock, stream = Clock(), Terminal()
    progress = Progress(100, 0, stream, clock)
    progress.message("before")
    progress.update(10, METRICS)
    progress.message("saved step 10")
    progress.close()
    progress.message("after")
    lines = screen(stream.getvalue())
    assert [lines[0], lines[1], lines[3]] == ["before", "saved step 10", "after"]
    assert "10/100" in lines[2]


@pytest.mark.parametrize("columns", [200, 80, 60, 40, 24, 10])
def test_the_line_never_reaches_the_edge(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    Progress(100_000, 0, stream).update(12_345, METRICS, note="evaluating on a long-named set")
    line = screen(stream.getvalue())[0]
    assert len(line.rstrip("\n")) < columns
    assert line.strip().startswith("12345") or "12345/100000" in line


def test_a_narrow_line_gives_up_the_least_important_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    Progress(1000, 0, stream).update(100, METRICS)
    line = without_codes(stream.getvalue())
    assert "loss" in line
    assert "input wait" not in line


def test_no_color_is_respected(monkeypatch):
    colored, plain = Terminal(), Terminal()
    Progress(100, 0, colored).update(50, METRICS)
    monkeypatch.setenv("NO_COLOR", "1")
    Progress(100, 0, plain).update(50, METRICS)
    assert "\x1b[36m" in colored.getvalue()
    assert re.findall(r"\x1b\[[0-9;]*m", plain.getvalue()) == []
    assert without_codes(plain.getvalue()) == without_codes(colored.getvalue())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Progress(100, 0, stream).update(50, {})
    assert stream.getvalue() == "step 50/100 (50%)  ETA --\n"


def test_a_terminal_without_unicode_gets_an_ascii_bar():
    stream = Terminal()
    stream.encoding = "ascii"
    Progress(100, 0, stream).update(50, {})
    assert "####" in stream.getvalue()
    assert stream.getvalue().isascii()


def test_a_broken_stream_does_not_stop_the_run():
    class Broken(Terminal):
        def write(self, text):
            tried.append(text)
            raise BrokenPipeError

    tried = []
    progress = Progress(10, 0, Broken())
    progress.update(1, {})
    assert len(tried) == 1
    progress.message("nobody hears")
    progress.close()


SCRIPT = """
from vit_jax.tracking import Progress
progress = Progress(4)
for step in (1, 2, 3, 4):
    progress.update(step, {"train/loss": 1 / step})
    if step == 2:
        progress.message("half way")
progress.close()
"""


def test_a_real_terminal_and_a_real_pipe():
    piped = subprocess.run(
        [sys.executable, "-c", SCRIPT], stderr=subprocess.PIPE, text=True, check=True
    ).stderr
    assert [line.split("  ")[0] for line in piped.splitlines()] == [
        "step 1/4 (25%)",
        "step 2/4 (50%)",
        "half way",
        "step 3/4 (75%)",
        "step 4/4 (100%)",
    ]
    assert "\x1b" not in piped
    assert "\r" not in piped

    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the terminal's other end is closed and all was read
            break
    os.close(ours)
    lines = screen(shown.decode().replace("\r\n", "\n"))
    assert lines[0].strip() == "half way"
    assert "4/4  100%" in lines[1]
    assert lines[2] == ""


def test_remaining_time_needs_two_reports():
    remaining = RemainingTime(100)
    assert remaining.seconds() is None
    remaining.report(10, 100.0)
    assert remaining.seconds() is None
    remaining.report(20, 101.0)
    assert remaining.seconds() == pytest.approx(8.0)


def test_remaining_time_leaves_out_compilation_and_one_pause_barely_moves_it():
    remaining = RemainingTime(1000)
    now = 60.0  # compilation
    for step in range(10, 510, 10):
        now += 1.0
        remaining.report(step, now)
    assert remaining.seconds() == pytest.approx(50.0, rel=0.05)


def test_remaining_time_counts_pauses_that_recur():
    remaining = RemainingTime(1000)
    now = 0.0
    for step in range(0, 501, 10):
        now += 1.0
        remaining.report(step, now)
        if step % 50 == 0:
            now += 5.0  # an evaluation: as long as the steps between two of them
    assert remaining.seconds() == pytest.approx(100.0, rel=0.05)


def test_remaining_time_follows_a_slow_down():
    remaining = RemainingTime(2000)
    now = 0.0
    for step in range(0, 1001, 10):
        now += 1.0 if step < 700 else 3.0
        remaining.report(step, now)
    assert remaining.seconds() == pytest.approx(300.0)


def test_remaining_time_after_a_resume_counts_only_steps_done_now():
    remaining = RemainingTime(1000)
    remaining.report(900, 50.0)
    remaining.report(910, 51.0)
    remaining.report(910, 70.0)  # an evaluation reported at the same step
    assert remaining.seconds() == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (3599, "59m 59s"),
        (7800, "2h 10m"),
        (273600, "3d 04h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
