"""The tools, in small: no time is asserted, but what they measure is what they say."""

import json
import re
import sys
from pathlib import Path

import numpy
import polars
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

import bench
import common
import lists
import panel
import peers
import report
import scale

README = (Path(__file__).resolve().parent / "README.md").read_text()


def run(tool, *arguments):
    """Rows of the Markdown tables that a tool prints, as lists of cells; lines on stderr."""
    done = CliRunner().invoke(tool.main, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines], done.stderr.splitlines()


def test_a_synthetic_set_has_the_shape_it_says(tmp_path):
    n_ratings = 50_000
    scale.make(tmp_path / "a.csv", n_ratings)
    frame = polars.read_csv(tmp_path / "a.csv")
    assert frame.columns == ["userId", "movieId", "rating", "timestamp"]
    assert len(frame) == n_ratings == len(frame.unique(["userId", "movieId"]))
    assert frame.equals(frame.sort("userId", "movieId"))
    users, items = (frame[name].value_counts()["count"] for name in ("userId", "movieId"))
    assert (len(users), len(items)) == (326, 1000)  # 50,000 / 25,000,095 of 162,541, and the least
    assert min(users.max() / users.min(), items.max() / items.min()) > 3
    assert set((2 * frame["rating"]).unique()) <= set(map(float, range(1, 11)))
    scale.make(tmp_path / "b.csv", n_ratings)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_what_is_measured_takes_turns(capsys, monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 3)
    calls = []

    def measure(name, seconds):
        calls.append(name)
        return [{"system": name, "seconds": seconds[calls.count(name) - 1], "mse": 2.0}]

    measures = [lambda: measure("slow", [4, 2, 3]), lambda: measure("fast", [1, 2, 1])]
    bench.show(bench.take_turns(measures))
    assert calls == ["slow", "fast"] * 3
    *_, slow, fast = capsys.readouterr().out.splitlines()
    assert slow == "| slow | 3 | 2 to 4 | 2.0000 |  |"
    assert fast == "| fast | 1 | 1 to 2 | 2.0000 |  |"


def test_peers_are_judged_like_us():
    """Clipped to the training ratings, on four numbers."""
    train, test = numpy.array([2.0, 4.0]), numpy.array([1.0, 5.0, 3.0, 3.0])
    result = {"system": "x", "predictions": [0, 9, 3, 3.5], "seconds": 1}
    row = peers.judge(result, train, test)
    assert row["mse"] == pytest.approx((1 + 1 + 0 + 0.25) / 4)
    assert row["rmse"] == pytest.approx(row["mse"] ** 0.5)
    for predictions, message in (([1, 2, 3, numpy.nan], "1 predictions are not"), ([1], "shape")):
        with pytest.raises(ValueError, match=message):
            peers.judge(result | {"predictions": predictions}, train, test)
    assert common.spread([1.0, 2.0, 6.0], 2) == "3.00 ± 2.65"


PEER = """
import json, sys
name, folder, *arguments = sys.argv[1:]
n_test = len(open(folder + "/test.tsv").readlines())
result = {"system": " ".join([name, *arguments]), "predictions": [3.0] * n_test, "seconds": 9.0}
json.dump([result], open(folder + "/results.json", "w"))
"""


def test_large_sets_beside_a_peer(tmp_path, monkeypatch):
    (tmp_path / "peers" / "cmfrec" / "bin").mkdir(parents=True)
    (tmp_path / "peers" / "cmfrec" / "bin" / "python").symlink_to(sys.executable)
    for name in ("cmfrec.txt", "peers/cmfrec/installed.txt"):
        (tmp_path / name).write_text("cmfrec\n")
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setenv("COLLAB_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    for name, value in (("THREADS", 1), ("REPEATS", 1), ("SIZES", {20_000: True})):
        monkeypatch.setattr(bench, name, value)
    (_, ours, theirs), _ = run(bench, "--scale")
    assert theirs[:2] == ["20,000 ratings: cmfrec 12 6", "9"]
    assert 0.5 < float(ours[3]) < float(theirs[3]) < 2, "ours is better than threes"
    assert int(ours[4]) > 100
    path = tmp_path / "scale" / "ratings-20000.csv"
    rows, _ = run(bench, "--ratings", path)
    assert [row[0] for row in rows[1:]] == ["ours", "cmfrec 40 8"]
    monkeypatch.setattr(peers, "OURS", ("default",))
    (_, theirs, ours), _ = run(peers, "--ratings", path)
    assert (theirs[0], ours[0], theirs[2]) == ("cmfrec", "`default`", "9.0 ± 0.0")
    mean, deviation = map(float, ours[1].split(" ± "))
    assert 0.5 < mean < float(theirs[1].split(" ± ")[0])
    assert 0 < deviation < 0.1, "three splits"


def write(path, names="user,item,rating"):
    """A table of what 20 items get from 20 users, some kind, some not; a third is missing."""
    rng = numpy.random.default_rng(0)
    stars = rng.normal(3, 1, (20, 1)) + rng.normal(0, 1, (1, 20))
    pairs = numpy.argwhere(rng.random((20, 20)) < 2 / 3)
    lines = [f"{user},{item},{stars[user, item].round().clip(1, 5)}" for user, item in pairs]
    path.write_text("\n".join([names, *lines]) + "\n")
    return len(pairs)


def test_a_panel_of_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(panel, "SEEDS", 2)
    monkeypatch.setattr(panel, "RECIPES", {"default": {}})
    n_ratings = write(tmp_path / "a.csv")
    write(tmp_path / "b.csv", names="user,place,rating")
    write(tmp_path / "c_train.csv")
    (tmp_path / "c_test.tsv").write_text("30\t1\t3\n30\t2\t4\n")
    (tmp_path / "d.csv").write_text("no table\n")
    (tmp_path / "options.json").write_text(json.dumps({"b.csv": {"columns": {"item": "place"}}}))
    (_, a, b, c), (skipped,) = run(panel, tmp_path)
    n_train = n_ratings - n_ratings // 10
    assert a[:3] == ["a.csv", str(n_train), f"{n_train / 40:.1f}"]
    assert b == ["b.csv", *a[1:]]
    assert c[:3] == ["c_train.csv", str(n_ratings), f"{n_ratings / 40:.1f}"]  # 30 is of the test
    assert float(a[4]) < float(a[3])
    assert skipped.startswith("d.csv: skipped: ")


@pytest.mark.usefixtures("ml_100k")
def test_lists_beat_the_most_rated_and_ease():
    """And are as tests/README.md says."""
    (_, *rows), _ = run(lists, "--splits", "ua", "--recipes", "default")
    ndcg = {row[1]: float(row[2]) for row in rows}
    assert ndcg["default"] > ndcg["EASE"] > 2 * ndcg["the number of ratings"]
    for row in rows[:4]:
        (told,) = re.findall(rf"\| {re.escape(' | '.join(row[:2]))} \| ([\d.]+)", README)
        assert float(row[2]) == pytest.approx(float(told), abs=2e-3)


SHOWN = "| set | RMSE | seconds |\n|---|---|---|\n| a, 1,000 | 0.9012 ± 0.0010 | 3.2 |\n"


@pytest.mark.parametrize(
    ("printed", "n_differences"),
    [
        (SHOWN, 0), (f"torch 2\n\n{SHOWN}", 0), (SHOWN.replace("3.2", "4.7"), 0),
        (SHOWN.replace("0.9012", "0.9019"), 0), (SHOWN.replace("0.9012", "0.9042"), 1),
        (SHOWN.replace("a,", "b,"), 1), (SHOWN.replace("1,000", "1,001"), 1),
        (SHOWN.replace("| 3.2 |", ""), 1), (f"{SHOWN}| b | 1 | 2 |\n", 1), ("", 1),
    ],
)  # fmt: skip
def test_what_differs_from_a_readme_is_told(printed, n_differences):
    assert len(list(report.find_differences(SHOWN, printed, tolerance=2e-3))) == n_differences


README_LIKE = """
```sh
pip install x && python tests/tools/hello.py 1
```

```text
1 of 3
```

```sh
python tests/tools/hello.py 2
```

| a | b |
|---|---|
| 1 | 0.5 |

```sh
python tests/tools/hello.py 3
```

Some text, `python collab.py`.
"""
HELLO = """
import sys
print({"1": "1 of 2", "2": "| a | b |\\n|---|---|\\n| 1 | 0.7 |"}.get(sys.argv[1]) or sys.exit(3))
"""


@pytest.mark.usefixtures("ml_100k")
def test_a_report_says_what_differs_and_writes_it(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(README_LIKE)
    (tmp_path / "tests" / "tools").mkdir(parents=True)
    (tmp_path / "tests" / "tools" / "hello.py").write_text(HELLO)
    monkeypatch.setattr(report, "READMES", [path])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for arguments, n_differ in ((["--write"], 3), ([], 1), (["hello.py 2"], 0)):
        done = CliRunner().invoke(report.main, arguments)
        assert (done.exit_code, done.stdout.splitlines()[-1]) == (
            n_differ > 0,
            f"{n_differ} differ",
        )
        if n_differ == 3:
            assert "- 1 of 3\n+ 1 of 2\n" in done.stdout
            assert "hello.py 3\nexit status 3\n" in done.stdout
    assert path.read_text() == README_LIKE.replace("of 3", "of 2").replace("0.5", "0.7")
