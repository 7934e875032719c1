"""What is wrong in a table of images is named by file, row and column."""

import json
import re

import numpy as np
import pytest
from image_tables import lines, numbers, open_table, png, write

from vit_jax.errors import UserError

BAD = {
    "an empty label": ("t.csv", "path,label\na,b\nc,\n", {}, "line 3, column 'label': has no"),
    "no file": ("t.jsonl", '{"image": 3, "label": 1}', {}, "line 1, column 'image': names no file"),
    "a file outside": ("t.csv", "path,label\n../x,b\n", {}, r"column 'path' names the file '../x'"),
    "a wrong weight": ("t.csv", "path,label,w\na,b,-1\n", {"weight": "w"}, "'-1' is no weight"),
    "no weight": ("t.csv", "path,label,w\na,b,nan\n", {"weight": "w"}, "'nan' is no weight"),
    "no group": ("t.csv", "path,label,g\na,b,\n", {"group": "g"}, "line 2, column 'g': names no"),
    "a wrong column": ("t.csv", "path,label\na,b\n", {"label": "labels"}, "did you mean 'label'"),
    "no label column": ("t.csv", "path,class\na,b\n", {}, r"has path, class; name the column of"),
    "neither 0 nor 1": ("t.csv", "path,x,y\na,2,0\n", {"label": ["x", "y"]}, "'2' is neither"),
    "a column twice": ("t.csv", "path,label,label\na,b,c\n", {}, "names 2 columns 'label'"),
    "an open quote": ("t.csv", 'path,label\na.png,"b\nc.png,d\n', {}, "quote mark"),
    "too many cells": ("t.csv", "path,label\na,b,c\n", {}, "line 2 has 3 cells"),
    "no object": ("t.jsonl", "[1]", {}, r"line 1 is no object"),
    "broken JSON": ("t.jsonl", '{"image": "a", "label": 1}\n{', {}, "line 2 is no JSON"),
    "another kind": ("t.xlsx", "x", {}, r"ends in .csv, .tsv, .jsonl, .parquet"),
    "no Parquet": ("t.parquet", "PAR1 is this", {}, r"t.parquet: .*[Pp]arquet"),
    "numbers as images": ("t.parquet", {"image": [1], "label": [2]}, {}, "holds int64, which is"),
    "two labels": ("t.csv", "path,label\na,b\na,c\n", {}, "line 3, .*: a has another .*line 2"),
    "no rows": ("t.csv", "path,label\n", {}, "has no examples"),
    "no lines": ("t.csv", "", {}, "has no columns"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_by_file_row_and_column(folder, case):
    name, content, args, message = BAD[case]
    with pytest.raises(UserError, match=message) as raised:
        open_table(write(folder, name, content), **args)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "spellings",
    [
        ("a.png", "./a.png"),
        ("x/../a.png", "a.png"),
        ("é.png", "e\u0301.png"),
        ("a.png", "{}/a.png"),
    ],
)
@pytest.mark.parametrize("separator", ["", "|"])
def test_no_spelling_gives_an_image_other_labels_or_groups(folder, spellings, separator):
    first, second = (one.format(folder) for one in spellings)
    args = {"separator": separator} if separator else {}
    for label, group, message in (("c", "g", "has another label in .*line 2, "),
                                  ("b", "h", "has another group in .*line 2, ")):  # fmt: skip
        rows = [("path", "label", "who"), (first, "b", "g"), (second, label, group)]
        with pytest.raises(UserError, match=rf"line 3, .*{message}"):
            open_table(write(folder, "t.csv", lines(*rows)), group="who", **args)


def test_folds_keep_equal_rows_together_and_a_warning_names_them(folder, caplog):
    rows = [(f"{i % 20}.png", "ab"[i % 2]) for i in range(40)]
    name = write(folder, "t.csv", lines(("path", "label"), *rows))
    alone = write(folder, "alone.csv", lines(("path", "label"), *rows[:20]))
    for fold in range(1, 5):
        held, rest = (open_table(name, f"train[{x}fold {fold} of 4]") for x in ("", "all but "))
        images = [
            {one.describe(i).partition(" (")[0] for i in range(len(one))} for one in (held, rest)
        ]
        assert not set.intersection(*images)
        assert len(held) + len(rest) == 40
    message = r"20 rows name an image .* \S+t.csv: line 2, .* and \S+t.csv: line 22, column 'path'"
    assert re.search(message, caplog.text)
    caplog.clear()
    assert len(open_table(alone, "train[fold 1 of 4]")) == 5
    assert not caplog.records


def test_a_cell_of_another_part_may_name_no_file(folder):
    rows = [{"image": image, "label": 1} for image in ("e.png", ["f.png"], None, {"a": 1})]
    name = write(folder, "t.jsonl", "\n".join(map(json.dumps, rows)))
    assert numbers(open_table(name, "train[:1]")) == [3]
    with pytest.raises(UserError, match="line 2, column 'image': names no file"):
        open_table(name)


def test_no_table_is_named(folder):
    with pytest.raises(UserError, match=r"x/\*.csv: no such file"):
        open_table(folder / "x/*.csv")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no Parquet files; write the name of a table"):
        open_table(folder / "empty")


def test_a_bad_image_is_an_error_that_names_it(folder):
    write(folder, "t.parquet", {"image": [png(1), b""], "label": [0, 1]})
    with pytest.raises(OSError, match="the row has no image"):
        open_table(folder / "t.parquet").fetch(np.array([1]))
    source = open_table(write(folder, "t.csv", lines(("path", "label"), ("gone.png", "a"))))
    with pytest.raises(OSError, match="No such file"):
        source.fetch(np.array([0]))
    assert source.describe(0) == f"{folder}/gone.png ({folder}/t.csv: line 2, column 'path')"
