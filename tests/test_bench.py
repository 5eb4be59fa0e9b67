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


def test_the_scale_series_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "THREADS", 1)  # two only get in each other's way here
    monkeypatch.setattr(bench, "JOB_SIZE", 30_000)
    monkeypatch.setattr(bench, "LARGE_OPTIONS", "--n-factors 12 --epochs 1 --lr-max 0.02")
    monkeypatch.setitem(bench.LARGE_JOBS, 30_000, {"cmfrec": (12, 6)})
    arguments = ["--scale", "--sizes", "30000", "--repeats", "1", "--folder", tmp_path]
    arguments += ["--venvs", tmp_path / "none", "--metrics", tmp_path / "m.json"]
    done = CliRunner().invoke(bench.main, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "m.json").read_text())["30000"]
    trained = figures["train"]
    assert trained["n_train"] == 27_000
    assert trained["mse"] < 1.5
    assert trained["peak_mib"] > 100
    steps = figures["steps"]
    assert list(steps) == [
        "a step of 182 ratings, autograd and AdamW(fused=True)",
        "a step of 182 ratings, ours",
    ]
    assert all(0 < numpy.median(seconds) < 1 for seconds in steps.values())
    assert "up to 10 items for each of 196 users in a file: " in done.output
    assert figures["recommend"]["peak_mib"] > 100
    (ours,) = figures["jobs"]["ours"]
    assert ours["options"]["n_factors"] == 12
    assert len(ours["epochs"]) == 1
    assert "cmfrec: skipped" in done.output


def test_a_table_of_ones_own_beside_a_peers_job(tmp_path, monkeypatch):
    source, job = tmp_path / "ratings.csv", tmp_path / "cmfrec_job.py"
    scale.make(source, 20_000)
    job.write_text(
        "import json, sys\n"
        "train = open(sys.argv[1] + '/train.csv').read().splitlines()\n"
        "result = {'system': ' '.join([train[0], str(len(train)), *sys.argv[3:]]), 'mse': 2.0}\n"
        "result |= {'seconds': 3.0, 'fit_seconds': 100.0}\n"
        "json.dump(result, open(sys.argv[1] + '/results.json', 'w'))\n"
    )
    (tmp_path / "cmfrec" / "bin").mkdir(parents=True)
    (tmp_path / "cmfrec" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(bench.peers, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "THREADS", 1)
    arguments = ["--ratings", source, "--repeats", "1", "--venvs", tmp_path]
    done = CliRunner().invoke(bench.main, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    name = "user,item,rating 18001 40 8"  # a header and nine tenths
    assert lines[1].startswith(f"{name}, file to model ")
    assert lines[3].split()[-5:] == ["100000.00", "ms", "100000.00", "to", "100000.00"]
    assert lines[4].startswith("ours, fit alone ")
    assert float(lines[4].split()[-2]) > 10
    assert lines[5] == f"{name:58} test MSE 2.0000"
    assert "test MSE 0." in lines[6]
    assert lines[6].endswith(" MiB")


def test_an_error_that_is_not_reached(ml_100k):
    class Seeds:
        def __next__(self):
            return 0

    training = bench.collab.set_up(bench.collab.read(ratings=ml_100k), split="ua")
    assert bench.time_to(training, 2.0, Seeds()) > 0
    with pytest.raises(ValueError, match=r"default ends at 0\.8\d+, above 0\.1"):
        bench.time_to(training, 0.1, Seeds())


def test_both_ways_of_fastais_settings_are_measured(ratings, capsys):
    train, test = bench.data.split(ratings, "ua")
    task = bench.collab.prepare(train[:1000], test, ("id",))
    seconds = bench.compare_loops(task, 1, 2)
    ways, evaluation = list(seconds)[:2], list(seconds)[2:]
    assert [name.split(", ")[1] for name in ways] == ["the notebook's way", "ours"]
    assert [len(seconds[name]) for name in ways] == [2, 2]
    assert evaluation == ["evaluation, 9,430 rows, threads 1"]
    assert len(capsys.readouterr().out.splitlines()) == 3
