"""The report: one file, whatever of the run is there."""

import base64
import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from drawn import ODD_NAMES, ODD_VALUES, a_figure, names
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page
from PIL import Image

from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.report import Section, figures, save_sections, write_comparison, write_report
from vit_jax.report.html import anchors, render
from vit_jax.tracking import Metric, MetricsLog
from vit_jax.tracking.metrics import as_json

CONFIG = {
    "version": 1,
    "config": {
        "seed": 0,
        "batch_size": 128,
        "model": {"name": "vit_digits", "patch_size": 2},
        "data": {"source": "tfds", "name": "digits", "args": {}},
        "optim": {"schedule": {"warmup": "5 percent"}},
    },
    "headline": "accuracy",
    "command": ["python", "-m", "vit_jax", "train", "--config=configs/digits.py"],
    "commit": "0123abcd",
    "packages": {"jax": "0.10.2"},
}


def log_a_run(workdir, steps=range(10, 101, 10)):
    writer = MetricsLog(workdir, resume_step=0)
    for step in steps:
        writer.write(
            step,
            {
                "train/loss": 200 / step,
                "train/lr": 1e-3,
                "train/images_per_sec": 5000.0 + step,
                "train/grad_norm": 1.0,
            },
        )
        if step % 50 == 0:
            for name, accuracy in (("test", step / 110), ("test_ema", step / 105)):
                writer.write(
                    step,
                    {
                        f"eval/{name}/accuracy": accuracy,
                        f"eval/{name}/loss": 1 / step,
                        f"eval/{name}/num_examples": 360,
                    },
                )
    writer.write(0, {"model/num_params": 1_234_567})
    times = {"train": 180.0, "eval": 20.0, "save": 5.0, "input wait": 5.0, "compile": 20.0}
    writer.write(max(steps), {f"time/{name}": value for name, value in times.items()})
    writer.close()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "digits_run"
    log_a_run(path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "DONE").write_text("step 100\n")
    save_sections(
        path,
        [
            Section(
                "Confusion matrix",
                "Rows are true.\n\nColumns are predicted.",
                a_figure(),
                alt='343 of 360 images of "cats" are right.',
                numbers=[["true class", "recall"], ["cat", 0.98765]],
            ),
            Section("Classes", table=[["class", "recall"], ["<cat>", 0.98765]]),
        ],
    )
    return path


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Draws charts of the same values once: most of these tests are about the rest of the page."""

    def remembered(function, key):
        kept = {}

        def call(*args):
            if key(args) not in kept:
                kept[key(args)] = function(*args), args
            return kept[key(args)][0]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("learning_curve", "learning_curves"):
            patch.setattr(figures, name, remembered(getattr(figures, name), repr))
        for name in ("svg", "png"):
            patch.setattr(figures, name, remembered(getattr(figures, name), lambda x: id(x[0])))
        yield


@pytest.fixture
def workdir(finished_run, tmp_path):
    """A finished run that the test may take apart."""
    return shutil.copytree(finished_run, tmp_path / finished_run.name)


def page_of(workdir, **options):
    return Page(write_report(workdir, **options).read_text())


def test_the_report_has_everything_a_reader_looks_for(workdir):
    page = page_of(workdir)
    for expected in (
        "vit_digits on digits",
        "finished",
        "95.2 %",  # the averaged parameters' last accuracy
        "test accuracy, averaged parameters",
        "343 of 360",
        "1.23M",
        "5,055",  # the median of images per second
        "3m 00s",
        "Loss",
        "Accuracy",
        "Learning rate",
        "Images per second",
        "Grad norm",
        "Confusion matrix",
        "Columns are predicted.",
        "<cat>",
        "0.9877",
        "2m 30s · 75%",  # steps: training without evaluation, saving and waiting
        "optim.schedule.warmup",
        "5 percent",
        "0123abcd",
        "python -m vit_jax train --config=configs/digits.py",
    ):
        assert expected in page.text, expected


def test_the_report_is_self_contained(workdir):
    path = write_report(workdir)
    source = path.read_text()
    page = Page(source)
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    for drawing in drawings_in(source):
        assert not re.search(r'(href|src)="(?!#|data:)|@import|url\((?!#)|<script', drawing)
    source = re.sub(r'"data:image/[a-z+]*;base64,[^"]*"', '""', source)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|fetch\(", source)
    assert "default-src 'none'" in source


def drawings_in(source):
    """The SVG files within a page, as text."""
    found = re.findall(r'"data:image/svg\+xml;base64,([^"]*)"', source)
    return [base64.b64decode(code).decode() for code in found]


def test_charts_are_drawings_with_a_legend(workdir):
    source = write_report(workdir).read_text()
    page = Page(source)
    assert len(drawings_in(source)) == 5 + 1  # Five charts and the section's figure.
    legend = ["train loss", "test loss", "test loss, averaged parameters"]
    first = page.texts.index("Loss") + 1
    assert page.texts[first : first + 6 : 2] == legend
    assert "95.2 %" in page.texts[page.texts.index("Accuracy") :][:5]


def test_headings_of_all_alphabets_have_names_that_differ():
    titles = ["Confusion matrix", "Wo 模型 looks", "模型", "!", "?", "Time", "Matrix!", "matrix"]
    found = anchors(titles)
    assert found[:3] == ["confusion-matrix", "wo-模型-looks", "模型"]
    assert found[3:] == ["section", "section-2", "time-2", "matrix", "matrix-2"]


def test_headings_are_reached_by_links_and_charts_have_words_and_numbers(workdir):
    source = write_report(workdir).read_text()
    linked = set(re.findall(r'href="#([^"]+)"', source))
    assert {"learning-curves", "final-metrics", "confusion-matrix", "time", "again"} <= linked
    assert linked <= set(re.findall(r' id="([^"]+)"', source))
    assert "The training loss is that of augmented images" in source
    assert 'alt="Accuracy by step: test accuracy ends at 90.9 %; test accuracy, averaged' in source
    assert source.count("<th ") == source.count("<th scope=")
    assert "Made by <code>vit-jax report</code>" in source
    page = Page(source)
    assert 'alt="343 of 360 images of &#34;cats&#34; are right."' in source
    matrix = page.texts[page.texts.index("Columns are predicted.") + 1 :]
    assert matrix[:5] == ["Numbers", "true class", "recall", "cat", "0.9877"]
    numbers = page.texts[page.texts.index("Numbers") :]
    assert numbers[1:4] == ["step", "train loss", "test loss"]
    assert numbers[5:7] == ["10", "20"]
    for broad in re.findall(r'<div class="(?:wide|picture)"[^>]*>', source):
        assert "tabindex" in broad  # What scrolls is reached by the keyboard.


def test_runs_are_compared_on_one_page(workdir, tmp_path, capsys):
    other = shutil.copytree(workdir, tmp_path / "other" / workdir.name)
    stored = json.loads((other / "config.json").read_text())
    stored["config"]["seed"] = 7
    (other / "config.json").write_text(json.dumps(stored))
    log = (other / "metrics.jsonl").read_text().replace('"eval/test/accuracy":0.9', "")
    lines = [json.loads(line) for line in log.splitlines() if line.endswith("}")]
    lines.append({"step": 101, "eval/test/accuracy": 0.99})
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "both.html"
    assert main(["report", str(workdir), f"--workdir={other}", f"--out={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    source = out.read_text()
    page = Page(source)
    names = [f"{tmp_path.name}/{workdir.name}", f"other/{workdir.name}"]
    assert page.texts[page.texts.index("2 runs side by side") + 1 :][:2] == names
    rows = page.texts[page.texts.index("test accuracy") :]
    assert rows[1:3] == ["90.9 %", "99.0 %"]
    assert "<b>99.0 %</b>" in source
    keys = page.texts[page.texts.index("What differs in the configs") :]
    assert keys[4:7] == ["seed", "0", "7"]
    assert "model.patch_size" not in page.text
    assert "Train loss" in page.texts
    assert len(drawings_in(source)) >= 4
    assert page.texts.count("Numbers") == len(drawings_in(source))
    assert page.texts[page.texts.index("Numbers") + 1 :][:3] == ["step", *names]


def test_lines_of_a_comparison_are_told_apart(tmp_path, monkeypatch):
    """Also where a run is given twice, and where two metrics have the same words."""
    run, out = tmp_path / "run", tmp_path / "out.html"
    log = MetricsLog(run, resume_step=0)
    metrics = {"eval/val/accuracy": 0.2, "eval/val_2/top": 0.3, "eval/val/2_top": 0.4}
    for step in (1, 2):
        log.write(step, metrics)
    log.close()
    (run / "config.json").write_text("{}")
    drawn = []
    monkeypatch.setattr(figures, "learning_curve", lambda *drawing: drawn.append(drawing))
    page = Page(write_comparison([run, run], out).read_text())
    assert page.texts[page.texts.index("2 runs side by side") + 1 :][:2] == ["run (0)", "run (1)"]
    assert [chart.title for chart, _ in drawn] == [
        "Val accuracy",
        "Eval/val_2/top",
        "Eval/val/2_top",
    ]
    for chart, colors in drawn:
        assert [line.label for line in chart.series] == ["run (0)", "run (1)"]
        assert colors == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "name a run"), (["RUN", "--out=x.html"], "--out is for several runs")],
)
def test_what_report_cannot_do_is_one_line(workdir, arguments, message, capsys):
    named = [str(workdir) if one == "RUN" else one for one in arguments]
    assert main(["report", *named]) == 2
    assert message in capsys.readouterr().err


def test_the_classes_of_a_family_share_one_chart(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    for step in (1, 2):
        writer.write(step, {f"eval/val/iou/class {n}": step / 10 for n in range(40)})
    writer.close()
    source = write_report(tmp_path).read_text()
    assert len(drawings_in(source)) == 1
    page = Page(source)
    assert "Iou of each class" in page.texts
    assert "<bdi>val iou class 7" not in source  # Forty lines of legend help nobody.
    assert "Numbers" not in page.texts


def test_pictures_lie_beside_the_report(workdir):
    write_report(workdir)
    for name in ("curves.png", "confusion_matrix.png"):
        with Image.open(workdir / "report" / name) as picture:
            assert picture.width > 300
    assert "<svg" in (workdir / "report" / "confusion_matrix.svg").read_text()


def test_sections_of_before_drawings_are_shown(workdir):
    """Their figures had a twin for dark pages, and no drawing."""
    index = workdir / "report" / "sections.json"
    stored = json.loads(index.read_text())
    for name in ("drawing", "alt", "numbers"):
        del stored["sections"][0][name]
    stored["sections"][0]["dark_image"] = "confusion_matrix.dark.png"
    index.write_text(json.dumps(stored))
    assert '<img alt="Confusion matrix"' in write_report(workdir).read_text()


@pytest.mark.parametrize(
    "missing", ["config.json", "metrics.jsonl", "report/sections.json", "DONE", "everything"]
)
def test_missing_parts_are_left_out(workdir, missing):
    for name in ("config.json", "metrics.jsonl", "report/sections.json", "DONE"):
        if missing in (name, "everything"):
            (workdir / name).unlink()
    page = page_of(workdir)
    assert ("vit_digits on digits" in page.text) == (missing not in ("config.json", "everything"))
    assert ("Learning curves" in page.text) == (missing not in ("metrics.jsonl", "everything"))
    assert "digits_run" in page.text


def test_a_missing_picture_costs_that_picture_alone(workdir):
    for ending in ("png", "svg"):
        (workdir / "report" / f"confusion_matrix.{ending}").unlink()
    assert "Columns are predicted." in page_of(workdir).text


def test_an_unfinished_run_says_how_far_it_came(workdir):
    (workdir / "DONE").unlink()
    assert "up to step 100" in page_of(workdir).text
    assert "finished" in page_of(workdir, is_done=True).text


def test_a_run_cut_after_one_row_has_a_report(tmp_path):
    log_a_run(tmp_path, steps=[50])
    page = page_of(tmp_path)
    assert "up to step 50" in page.text
    assert "test accuracy, averaged parameters" in page.text


def test_values_that_are_not_finite_are_left_out_of_curves(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    for step, loss in ((1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)):
        writer.write(step, {"train/loss": loss, "eval/test/loss": math.nan})
    writer.close()
    source = write_report(tmp_path).read_text()
    assert "NaN" in Page(source).text
    assert not any(re.search(r'd="[^"]*(nan|inf)', drawing) for drawing in drawings_in(source))


def test_the_best_of_a_metric_is_by_its_declared_direction(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    for step, value in ((1, math.nan), (2, 4.0), (3, 2.0), (4, 3.0)):
        names = ("rmse", "gain", "unknown")
        writer.write(step, {f"eval/test/{name}": value for name in names})
    writer.close()
    info = {"rmse": Metric(higher_is_better=False), "gain": Metric(higher_is_better=True)}
    (tmp_path / "config.json").write_text(json.dumps({"metrics": as_json(info)}))
    source = write_report(tmp_path).read_text()
    rows = re.findall(r'<td class="mono">eval/test/(\w+)</td>(.*)</tr>', source)
    best = {name: re.findall(r'<td class="n">([^<]*)</td>', cells) for name, cells in rows}
    assert best == {"rmse": ["3", "2", "3"], "gain": ["3", "4", "2"], "unknown": ["3", "", ""]}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_cannot_break_the_page(tmp_path, name):
    check_page_with(name, tmp_path)


@settings(max_examples=10, deadline=None)
@given(names)
def test_no_name_breaks_the_page(name):
    with tempfile.TemporaryDirectory() as workdir:
        check_page_with(name, Path(workdir))


def check_page_with(name, workdir):
    hostile = f'"><script>alert(2)</script>{name}'
    writer = MetricsLog(workdir, resume_step=0)
    writer.write(1, {f"eval/{hostile}/accuracy": 0.5, f"eval/val/iou/{name}": 0.5})
    writer.close()
    config = {"config": {"model": {"name": hostile}, name: {name: name}}, "command": [name]}
    (workdir / "config.json").write_text(json.dumps(config))
    save_sections(workdir, [Section(hostile, hostile, small_picture(), [[hostile], [name]])])
    page = page_of(workdir)
    assert len(page.scripts) == 1  # Our own style.
    assert "alert" not in page.scripts[0]
    assert "confusion" not in page.text
    assert {path.name[-4:] for path in (workdir / "report").iterdir()} <= {".png", "json"}


def small_picture():
    return Image.new("RGB", (2, 2))


def test_without_a_workdir_the_user_is_told(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such directory"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "report/sections.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b"[]", b"5", None])
def test_a_broken_file_is_named_or_left_out(workdir, name, content):
    (workdir / name).unlink()
    if content is None:
        (workdir / name).mkdir()
    else:
        (workdir / name).write_bytes(content)
    if name == "metrics.jsonl" and content is not None:
        assert "nothing logged yet" not in page_of(workdir, is_done=True).text
        return
    with pytest.raises(UserError, match=name) as raised:
        write_report(workdir)
    assert "\n" not in str(raised.value)


@settings(max_examples=10, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["config", "headline", "metrics", "command", "commit", "packages", "x"]),
        ODD_VALUES,
    ),
    st.dictionaries(st.sampled_from(["model", "data", "batch_size"]), ODD_VALUES),
    st.dictionaries(
        st.sampled_from(
            [
                "train/images_per_sec",
                "train/mfu",
                "train/goodput",
                "train/loss",
                "time/train",
                "time/eval",
                "model/num_params",
                "eval/val/accuracy",
                "eval/val/num_examples",
            ]
        ),
        st.floats() | st.integers(),
    ),
)
def test_odd_values_never_end_the_report(stored, config, metrics):
    if "config" not in stored:
        stored["config"] = config
    rows = [{"step": 1, **metrics}]
    Page(render("run", stored, rows, [], is_done=False))


def test_a_chart_that_fails_costs_that_chart_alone(workdir, monkeypatch, caplog):
    draw = figures.learning_curve
    monkeypatch.setattr(figures, "learning_curves", lambda *_: 1 / 0)
    monkeypatch.setattr(
        figures,
        "learning_curve",
        lambda chart, colors: 1 / 0 if chart.title == "Loss" else draw(chart, colors),
    )
    assert len(drawings_in(write_report(workdir).read_text())) == 4 + 1
    assert len(caplog.records) == 2
