"""The benchmark's parts: no time is asserted, but what they measure is what they say."""

import json
import sys
from pathlib import Path

import numpy
import polars
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench
import scale


def test_a_synthetic_set_has_the_shape_it_says(tmp_path):
    n_ratings = 50_000
    scale.make(tmp_path / "a.csv", n_ratings)
    frame = polars.read_csv(tmp_path / "a.csv")
    assert frame.columns == ["userId", "movieId", "rating", "timestamp"]
    assert len(frame) == n_ratings == len(frame.unique(["userId", "movieId"]))
    assert frame.equals(frame.sort("userId", "movieId"))
    users, items = (frame[name].value_counts()["count"] for name in ("userId", "movieId"))
    assert (len(users), len(items)) == (326, 1000)  # 50,000 / 25,000,095 of 162,541, and the least
    assert users.max() > 3 * users.min()
    assert items.max() > 3 * items.min()
    assert set((2 * frame["rating"]).unique()) <= set(map(float, range(1, 11)))
    assert 0.8 < frame["rating"].std() < 1.3
    scale.make(tmp_path / "b.csv", n_ratings)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_measures_take_turns_after_a_warm_up():
    calls = []

    def measure(name):
        calls.append(name)
        return float(len(calls))

    seconds = bench.alternate({n: lambda n=n: measure(n) for n in "ab"}, 2)
    assert "".join(calls) == "ababab"
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_line_has_median_range_and_ratio(capsys):
    bench.show({"slow": [0.4, 0.2, 0.3], "fast": [0.1, 0.2, 0.1]}, "slow")
    slow, fast = capsys.readouterr().out.splitlines()
    assert slow.split()[1:] == ["300.00", "ms", "200.00", "to", "400.00"]
    assert fast.split()[-2:] == ["3.00", "x"]


def test_the_scale_series_in_small(tmp_path):
    arguments = ["--scale", "--sizes", "30000", "--repeats", "1", "--folder", tmp_path]
    arguments += ["--venvs", tmp_path / "none", "--metrics", tmp_path / "m.json"]
    done = CliRunner().invoke(bench.main, list(map(str, arguments)), catch_exceptions=False)
    bench.torch.set_num_threads(1)  # as conftest.py has it
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "m.json").read_text())["30000"]
    trained = figures["train"]
    assert trained["n_train"] == 27_000
    assert trained["mse"] < 1.5
    assert trained["peak_mib"] > 100
    steps = figures["steps"]
    assert len(steps) == 3
    assert all(0 < numpy.median(seconds) < 1 for seconds in steps.values())
    assert "x faster" in done.output
    assert "up to 10 items for each of 196 users in a file: " in done.output
    assert figures["recommend"]["peak_mib"] > 100


def test_an_error_that_is_not_reached(ua):
    class Seeds:
        def __next__(self):
            return 0

    part, test, ids = ua
    task = bench.collab.Task(part, test, ids, bench.data.find_seen(part, ids), None)
    assert bench.time_to(task, 2.0, Seeds()) > 0
    with pytest.raises(ValueError, match=r"ends at 0\.8\d+, above 0\.1"):
        bench.time_to(task, 0.1, Seeds())


def test_both_ways_of_fastais_settings_are_measured(ua, capsys):
    part, test, ids = ua
    few = tuple(column[:1000] for column in part)
    task = bench.collab.Task(few, test, ids, bench.data.find_seen(part, ids), None)
    seconds = bench.compare_loops(task, 1, 2)
    ways, evaluation = list(seconds)[:2], list(seconds)[2:]
    assert [name.split(", ")[1] for name in ways] == ["the notebook's way", "ours"]
    assert [len(seconds[name]) for name in ways] == [2, 2]
    assert evaluation == ["evaluation, 9,430 rows, threads 1"]
    assert len(capsys.readouterr().out.splitlines()) == 3
