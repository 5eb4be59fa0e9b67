"""The panel: small real runs of `tests/panel.py`, their table and their exit status."""

import json
import sys
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent))

import panel

HEADS = ["set", "ratings", "ratings a row", "mean", "averages", "default / averages"]


def run(*arguments):
    """Exit status, rows of the table as lists of cells, lines on stderr."""
    arguments = ["--recipe", "default", *map(str, arguments)]
    done = CliRunner().invoke(panel.main, arguments, catch_exceptions=False)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert rows[0] == HEADS
    assert rows[1] == ["---" + "|---" * (len(HEADS) - 1)]
    return done.exit_code, rows[2:], done.stderr.splitlines()


def write(path, *, n_users=20, names="user,item,rating"):
    """A table of what 20 items get from users, some kind, some not; a third is missing."""
    rng = numpy.random.default_rng(0)
    stars = rng.normal(3, 1, (n_users, 1)) + rng.normal(0, 1, (1, 20))
    pairs = numpy.argwhere(rng.random((n_users, 20)) < 2 / 3)
    lines = [f"{user},{item},{stars[user, item].round().clip(1, 5)}" for user, item in pairs]
    path.write_text("\n".join([names, *lines]) + "\n")
    return len(pairs)


@pytest.mark.usefixtures("ml_100k")
def test_ml_100k_cut_to_500_ratings():
    status, (row,), _ = run("--sizes", "500", "--seeds", "1")
    assert status == 0
    assert row[:3] == ["ml-100k, 500", "500", "0.7"]
    mean, averages, ratio = map(float, row[3:])
    assert 1.08 < averages < mean < 1.14
    assert 0.9 < ratio <= 1.01


def test_a_folder_of_tables(tmp_path):
    n_ratings = write(tmp_path / "a.csv")
    write(tmp_path / "b.csv", names="user,place,rating")
    write(tmp_path / "c_train.csv")
    (tmp_path / "c_test.tsv").write_text("30\t1\t3\n30\t2\t4\n")
    (tmp_path / "d.csv").write_text("no table\n")
    (tmp_path / "e.csv").write_text("1,2,3\n1,3,4\n1,4,5\n")
    (tmp_path / "options.json").write_text(json.dumps({"b.csv": {"columns": {"item": "place"}}}))
    status, rows, lines = run(tmp_path, "--seeds", "2")
    n_train = n_ratings - n_ratings // 10
    assert [row[:3] for row in rows] == [
        ["a.csv", str(n_train), f"{n_train / 40:.1f}"],
        ["b.csv", str(n_train), f"{n_train / 40:.1f}"],
        ["c.csv", str(n_ratings), f"{n_ratings / 40:.1f}"],  # user 30 is of the test part
    ]
    assert rows[0][1:] == rows[1][1:]
    assert float(rows[0][4]) < float(rows[0][3])
    assert [line.split(": ")[:2] for line in lines] == [["d.csv", "skipped"], ["e.csv", "skipped"]]
    assert status == (max(float(row[5]) for row in rows) > 1.01)
    assert run(tmp_path, "--seeds", "1", "--at-most", "0.1")[0] == 1


def test_a_folder_without_a_set(tmp_path):
    (tmp_path / "a.csv").write_text("no table\n")
    status, rows, (line,) = run(tmp_path)
    assert (status, rows) == (1, [])
    assert line.startswith(f"a.csv: skipped: {tmp_path}/a.csv, line 1: ")
