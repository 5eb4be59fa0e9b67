import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import polars
import pytest
import torch
from click.testing import CliRunner

import collab
import data
import model
import train

ROOT = Path(collab.__file__).parent
UNSEEN = "without training ratings: 0 users, 2 items; predicted as average"
LINE = re.compile(r" +(\d+) \| +(\d\.\d{4})" + r" \| +(\d\.\d{4})" * 3 + r" \| +\d+\.\d\d s")


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.usefixtures("ml_100k")
def test_train_keeps_the_contract(run, tmp_path):
    done = run("train", "--metrics", "m.json", "--save", "m.pt")
    assert done.returncode == 0, done.stderr
    header, *lines, last = done.stdout.splitlines()
    assert header == "epoch | train_loss | test_mse | test_rmse | test_mae |    time"
    rows = [LINE.fullmatch(line).groups() for line in lines]
    assert {len(line) for line in lines} == {len(header)}
    source, about, unseen, mean, averages = done.stderr.splitlines()  # and no bar
    assert source.startswith("ml-100k: from the cache ")
    assert about == "943 users, 1,682 items, 100,000 ratings from 1 to 5"
    assert unseen == UNSEEN
    assert mean == "without a model, by the mean rating: mse 1.2589, rmse 1.1220, mae 0.9450"
    assert averages.startswith("without a model, by the averages of users and items: mse 0.9219")

    figures = read_json(tmp_path / "m.json")
    assert " ".join(figures) == (
        "recipe dataset split seed options n_users n_items n_train n_test baselines "
        "epochs "
        "mse rmse mae fit_seconds evaluate_seconds load_seconds"
    )
    options = collab.RECIPES["default"]
    assert figures["options"] == json.loads(json.dumps(options))
    assert (figures["n_users"], figures["n_items"]) == (943, 1682)
    assert (figures["n_train"], figures["n_test"]) == (90570, 9430)
    assert [int(row[0]) for row in rows] == list(range(1, options["epochs"] + 1))
    for row, epoch in zip(rows, figures["epochs"], strict=True):
        assert list(epoch) == ["epoch", "train_loss", "mse", "rmse", "mae", "seconds"]
        values = [f"{epoch[name]:.4f}" for name in ("train_loss", "mse", "rmse", "mae")]
        assert list(row[1:]) == values
    # The last epoch is the result, whatever the others were.
    for name in ("mse", "rmse", "mae"):
        assert figures[name] == figures["epochs"][-1][name]
        assert f"{name} {figures[name]:.4f}" in last
    assert figures["fit_seconds"] == pytest.approx(sum(e["seconds"] for e in figures["epochs"]))
    assert figures["mse"] < 0.853
    baselines = figures["baselines"]
    assert list(baselines) == ["mean", "averages"]
    assert figures["mse"] < baselines["averages"]["mse"] < baselines["mean"]["mse"]


@pytest.mark.parametrize("recipe", ["default", "best"])
def test_the_saved_file_predicts_what_was_reported(main, tmp_path, prepared, recipe):
    short = ("--ensemble", 2, "--epochs", 1, "--batch-size", 2048)
    assert main("train", "--recipe", recipe, *short, "--save", "m.pt").returncode == 0
    saved = collab.load_model(tmp_path / "m.pt")
    task = prepared(collab.RECIPES[recipe]["features"])
    assert saved.user_ids == task.ids.users.to_list()
    assert saved.item_ids == task.ids.items.to_list()
    errors = collab.evaluate(saved)
    assert errors["mse"] == pytest.approx(saved.figures["mse"], rel=1e-6)
    head = collab.make_head(*saved.head)
    mean, spread = collab.predict_rows(saved.tables, *task.test[:2], head=head)
    assert mean.shape == spread.shape == (9430,)
    each = [model.predict(params, *task.test[:2], head=head) for params in saved.tables]
    assert torch.allclose(spread, (each[0] - each[1]).abs() / 2, atol=1e-5)
    assert spread.min() >= 0 < spread.max()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"PK\x03\x04 cut off",
        pickle.dumps(Bomb()),
        Bomb(),
        {"format": "collab 0"},
        {"format": "collab 3", "params": []},
        {"a": 1},
        5,
    ],
    ids=[
        "empty",
        "text",
        "cut off",
        "code",
        "zipped code",
        "other version",
        "half a model",
        "other file",
        "a number",
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"^{path}: not a model of this program: ") as caught:
        collab.load_model(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.usefixtures("ml_100k")
def test_fastais_result_is_reached(main, tmp_path):
    done = main("train", "--recipe", "fastai", "--seed", 3, "--metrics", "m.json")
    assert done.returncode == 0, done.stderr
    figures = read_json(tmp_path / "m.json")
    assert 0.888 < figures["mse"] < 0.908
    assert len(figures["epochs"]) == 10
    assert figures["options"] == {
        "fits_data": False,
        "features": ["id"],
        "loss": "mse",
        "y_range": [0.0, 5.5],
        "std": 0.01,
        "n_factors": 40,
        "dropout": 0.0,
        "ensemble": 1,
        "epochs": 10,
        "batch_size": 64,
        "drop_last": True,
        "lr_max": 0.01,
        "weight_decay": 0.1,
        "bias_decay": 0.1,
    }


@pytest.fixture(scope="module")
def prepared(ratings, ml_100k):
    """The task of a kind of features on ua, made once."""
    about = {"users": data.read_users(ml_100k), "items": data.read_items(ml_100k)}
    frames = data.split(ratings, "ua")

    @cache
    def prepared(kinds):
        return collab.prepare(*frames, kinds, **about)

    return prepared


@pytest.fixture(scope="module")
def one_epoch(prepared):
    """The parameters and the error of one short run, with one option or none changed."""

    def one_epoch(seed=0, recipe="default", **changed):
        options = collab.RECIPES[recipe] | {"epochs": 1, "batch_size": 2048} | changed
        *_, (epochs, row) = collab.fit(prepared(options["features"]), options=options, seed=seed)
        return [epoch.params for epoch in epochs], row["mse"]

    return one_epoch


def are_equal(members, others):
    pairs = zip(members, others, strict=True)
    return all(
        torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("recipe", ["default", "best"])
def test_the_same_seed_gives_the_same_bits(one_epoch, recipe):
    (first, first_mse), (again, again_mse) = (one_epoch(recipe=recipe, ensemble=2) for _ in "12")
    assert first_mse == again_mse
    assert are_equal(first, again)
    assert not torch.equal(first[0][0], first[1][0])


@pytest.fixture(scope="module")
def through_click(ml_100k, tmp_path_factory):
    """The figures of a short `train`, through click but in this process."""
    path = tmp_path_factory.mktemp("figures") / "m.json"

    @cache
    def through_click(*arguments):
        short = ("--epochs", "1", "--batch-size", "4096", "--ensemble", "1")
        command = ("train", *short, *arguments, "--metrics", str(path))
        result = CliRunner().invoke(collab.cli, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        figures = read_json(path)
        return [figures[name] for name in ("mse", "rmse", "mae", "n_test")]

    through_click.figures = lambda: read_json(path)
    return through_click


CHANGES = [
    "--seed 1",
    "--split ub",
    "--split random",
    "--holdout 0.2",
    "--n-factors 5",
    "--dropout 0.5",
    "--ensemble 2",
    "--epochs 2",
    "--batch-size 1024",
    "--drop-last",
    "--lr-max 0.005",
    "--weight-decay 20",
    "--bias-decay 20",
    "--features id,implicit",
]


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        *(("default", change) for change in (*CHANGES, "--loss ordinal", "--y-range 0 6")),
        *(("best", change) for change in CHANGES),
        ("best", "--features id,implicit,side"),
        ("best", "--features id,implicit,time"),
        ("best", "--loss mse --y-range 0 6"),
    ],
)
def test_every_option_matters(through_click, recipe, changed):
    before = through_click("--recipe", recipe)
    assert through_click("--recipe", recipe, *changed.split(" ")) != before


def test_the_seed_draws_the_random_parts(ratings):
    for options in ({"split": "random"}, {"split": "ua", "holdout": 0.1}):
        first, again, other = (collab.cut(ratings, seed=seed, **options)[1] for seed in (1, 1, 2))
        assert first.equals(again)
        assert not first.equals(other)


def test_features_and_the_head_are_of_the_training_part(ratings):
    """A pair that is only tested is in no implicit set, and the shares are of the ratings above."""
    frame, test = data.split(ratings, "ua")
    task = collab.prepare(frame, test, ("id", "implicit"))
    starts, columns, _ = task.features.matrix
    n_ids = [len(raw_ids) for raw_ids in task.ids]
    counts = [torch.bincount(task.train[side], minlength=n_ids[side]) + 1 for side in (0, 1)]
    assert torch.equal(starts.diff(), torch.cat(counts)), "the id, and what was rated"
    row = torch.repeat_interleave(torch.arange(sum(n_ids)), starts.diff())
    # Columns: users, items that they rated; items, users who rated them.
    for side, first in ((0, 0), (1, sum(n_ids))):
        implicit = (columns >= first + n_ids[side]) & (columns < first + sum(n_ids))
        rows, others = row[implicit] - side * n_ids[0], columns[implicit] - first - n_ids[side]
        pairs = set(zip(rows.tolist(), others.tolist(), strict=True))
        rated = (task.train[side].tolist(), task.train[1 - side].tolist())
        assert pairs == set(zip(*rated, strict=True))
    name, (levels, shares) = collab.choose_head(task.train[2], collab.RECIPES["best"])
    assert (name, levels) == ("ordinal", [1, 2, 3, 4, 5])
    above = [len(frame.filter(polars.col("rating") > level)) / len(frame) for level in (1, 2, 3, 4)]
    assert shares == pytest.approx(above)


@pytest.mark.parametrize("n_levels", [1, 2, 101])
def test_ratings_that_are_no_scale(n_levels):
    distinct = torch.linspace(1, 5, n_levels).repeat(2)
    with pytest.raises(ValueError, match=f"3 to 100 distinct .* part has {n_levels}$"):
        collab.choose_head(distinct, collab.RECIPES["best"])


@pytest.mark.parametrize("threads", [1, os.cpu_count()])
def test_threads(through_click, threads):
    through_click("--threads", str(threads))
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    assert found == threads


def test_predictions_are_clipped_to_the_training_ratings(prepared):
    """Not to those of the test part: here it has 1 and 5, the training part has not."""
    task = prepared(("id",))
    inner = (task.train[2] > 1) & (task.train[2] < 5)
    task = task._replace(train=tuple(column[inner] for column in task.train))
    options = collab.RECIPES["default"] | {"epochs": 1}
    *_, ((epoch,), row) = collab.fit(task, options=options, seed=0)
    head = collab.make_head(*collab.choose_head(task.train[2], options))
    params = collab.to_rows(epoch.params[0], None, ids=task.ids, seen=task.seen, head=head)
    errors = train.evaluate(
        lambda *rows: model.predict(params, *rows, head=head), *task.test, clip=(2, 4)
    )
    assert row["mse"] == errors.mse


def test_no_test_rating_reaches_training(ratings, ml_100k):
    """Turned about, the test ratings leave all that is trained bit for bit the same."""
    about = {"users": data.read_users(ml_100k), "items": data.read_items(ml_100k)}
    frame, test = data.split(ratings, "ua")
    turned = test.with_columns(test["rating"].shuffle(seed=0))
    options = collab.RECIPES["best"] | {"epochs": 2, "batch_size": 2048}
    results = []
    for part in (test, turned):
        task = collab.prepare(frame, part, options["features"], **about)
        *_, (epochs, row) = collab.fit(task, options=options, seed=0)
        results.append(([epoch.params for epoch in epochs], row["mse"]))
    (first, first_mse), (second, second_mse) = results
    assert are_equal(first, second)
    assert first_mse < 0.95 < 1.5 < second_mse


def test_a_holdout_never_reads_the_test_part(ratings):
    frame, test = data.split(ratings, "ua")
    rest, held = collab.cut(ratings, "ua", seed=3, holdout=0.2)
    assert polars.concat([rest, held]).sort("user", "item").equals(frame.sort("user", "item"))
    assert len(held) == 18_114
    assert not len(held.join(test, on=["user", "item"], how="semi"))


def test_an_ensemble_is_better_than_its_members(one_epoch):
    alone = [one_epoch(seed=seed, epochs=3)[1] for seed in range(2)]
    _, together = one_epoch(epochs=3, ensemble=4)
    assert together < min(alone)


@pytest.mark.parametrize("recipe", ["fastai", "default"])
def test_a_rating_out_of_the_y_range_is_refused(found, recipe):
    with pytest.raises(ValueError, match=r"ratings from 1 to 5 .* y_range 0 to 4\.5: give --y-"):
        collab.set_up(found, recipe=recipe, y_range=(0, 4.5))


@pytest.mark.usefixtures("ml_100k")
def test_best_in_short(main, tmp_path):
    arguments = ("--recipe", "best", "--ensemble", 1, "--epochs", 4, "--holdout", 0.1)
    done = main("train", *arguments, "--metrics", "m.json", "--save", "m.pt")
    assert done.returncode == 0, done.stderr
    figures = read_json(tmp_path / "m.json")
    assert (figures["holdout"], figures["n_train"], figures["n_test"]) == (0.1, 81_513, 9_057)
    assert figures["mse"] < 0.76
    assert "held_mse" in done.stdout
    assert "0.1 of the training part of ua" in done.stdout.splitlines()[-1]
    saved = collab.load_model(tmp_path / "m.pt").figures
    assert json.loads(json.dumps(saved)) == figures


@pytest.mark.usefixtures("ml_100k")
def test_the_unseen_are_counted_and_said(main):
    done = main("train", "--epochs", 1, "--batch-size", 5000)
    assert UNSEEN in done.stderr
    assert "nan" not in done.stdout
    done = main("train", "--features", "id,side", "--epochs", 1, "--batch-size", 5000)
    assert UNSEEN.replace("as average", "by their features") in done.stderr
    done = main("cross-validate", "--splits", "ua", "--epochs", 1, "--batch-size", 5000)
    assert f"ua: {UNSEEN}" in done.stderr


@pytest.mark.usefixtures("ml_100k")
def test_cross_validation(main, tmp_path):
    short = ("--epochs", 1, "--batch-size", 2048, "--metrics", "m.json")
    done = main("cross-validate", "--splits", "u2,u4", *short)
    assert done.returncode == 0, done.stderr
    header, *lines, last = done.stdout.splitlines()
    assert header.split() == ["fold", "|", "test_rmse", "|", "test_mae", "|", "time"]
    figures = read_json(tmp_path / "m.json")
    assert [fold["fold"] for fold in figures["folds"]] == ["u2", "u4"]
    for name in ("rmse", "mae"):
        values = [fold[name] for fold in figures["folds"]]
        assert figures[name] == pytest.approx(sum(values) / 2)
        assert figures[f"{name}_std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert f"{name} {figures[name]:.4f} +- {figures[f'{name}_std']:.4f}" in last
    for line, fold in zip(lines, figures["folds"], strict=True):
        assert f"{fold['rmse']:.4f}" in line
    for name, errors in figures["baselines"].items():
        for figure, value in errors.items():
            values = [fold["baselines"][name][figure] for fold in figures["folds"]]
            assert value == pytest.approx(sum(values) / 2)
    assert "\nwithout a model, by the averages of users and items: mse 0.8" in done.stderr
    # A fold is what `train` gives on the split, side information and all.
    short = (*short[:4], "--features", "id,side", "--metrics", "m.json")
    assert main("cross-validate", "--splits", "u2", *short).returncode == 0
    fold = read_json(tmp_path / "m.json")["folds"][0]
    assert main("train", "--split", "u2", *short).returncode == 0
    assert fold["mse"] == read_json(tmp_path / "m.json")["mse"]

    done = main("cross-validate", "--folds", 3, "--seed", 5, *short)
    assert done.returncode == 0, done.stderr
    figures = read_json(tmp_path / "m.json")
    assert [fold["fold"] for fold in figures["folds"]] == ["1/3", "2/3", "3/3"]


@pytest.mark.usefixtures("ml_100k")
@pytest.mark.parametrize("split", ["ub", "u3", "random"])
def test_every_kind_of_split_trains(tmp_path, split):
    metrics = tmp_path / "m.json"
    command = ["train", "--split", split, "--epochs", "1", "--seed", "5", "--metrics", str(metrics)]
    CliRunner().invoke(collab.cli, command, catch_exceptions=False)
    figures = read_json(metrics)
    assert figures["split"] == split
    assert figures["n_train"] + figures["n_test"] == 100_000
    assert 0.8 < figures["rmse"] < 1.2


# --- other data


@pytest.fixture
def half_stars(tmp_path):
    """Files of three formats, in the shape of ml-latest-small, with and without films and times."""
    rows = [
        (user * 7, item * 11, 1 + (user * item) % 10) for user in range(40) for item in range(25)
    ]
    table = polars.DataFrame(rows, schema=["userId", "movieId", "rating"], orient="row")
    table = table.with_columns(polars.col("rating") / 2, timestamp=polars.int_range(polars.len()))
    films = [f'{item * 11},"Film {item}, A ({1990 + item % 9})",Drama|War' for item in range(30)]
    with zipfile.ZipFile(tmp_path / "ml.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml/ratings.csv", table.write_csv())
        archive.writestr("ml/movies.csv", "\n".join(["movieId,title,genres", *films]))
    (tmp_path / "folder").mkdir()
    text = table.write_csv(include_header=False).replace(",", "::")
    (tmp_path / "folder" / "ratings.dat").write_text(text)
    untimed = table.drop("timestamp").write_csv(separator="\t", include_header=False)
    (tmp_path / "untimed.tsv").write_text(untimed)
    return tmp_path


def test_ratings_of_the_users_own(main, half_stars):
    done = main(
        "train", "--ratings", "ml.zip", "--epochs", 2, "--metrics", "m.json", "--save", "m.pt"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("40 users, 25 items, 1,000 ratings from 0.5 to 5\n")
    figures = read_json(half_stars / "m.json")
    assert (figures["dataset"], figures["split"]) == ("ml.zip", "random")
    assert (figures["n_users"], figures["n_items"]) == (40, 25)
    assert (figures["n_train"], figures["n_test"]) == (900, 100)
    assert collab.load_model(half_stars / "m.pt").user_ids == [user * 7 for user in range(40)]


@pytest.mark.parametrize(
    ("source", "recipe", "features"),
    [
        ("ml.zip", "best", ["id", "implicit", "side", "time"]),
        ("folder", "best", ["id", "implicit", "time"]),
        ("untimed.tsv", "best", ["id", "implicit"]),
        ("untimed.tsv", "default", ["id"]),
    ],
)
def test_best_uses_all_that_the_data_has(through_click, half_stars, source, recipe, features):
    through_click("--recipe", recipe, "--ratings", str(half_stars / source))
    assert through_click.figures()["options"]["features"] == features
    told = []
    collab.set_up(collab.read(ratings=half_stars / source), recipe=recipe, notice=told.append)
    lacks = {line.split(":")[0].split(" ")[-1] for line in told if "without the feature" in line}
    assert lacks == set(collab.RECIPES[recipe]["features"]) - set(features)
    assert through_click.figures()["n_test"] == 100


def test_every_form_of_a_file_gives_the_same_model(through_click, half_stars):
    sources = [str(half_stars / name) for name in ("ml.zip", "folder", "untimed.tsv")]
    first, *others = (through_click("--ratings", source) for source in sources)
    assert others == [first, first]
    assert through_click("--ratings", sources[0], "--split", "last2")[3] == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--ratings untimed.tsv --features id,time",
            "the feature time: the data has no timestamps",
        ),
        ("--ratings folder --features side", "the feature side: the data has no tables of users"),
        ("--ratings untimed.tsv --split last3", "the split last3 needs timestamps"),
        ("--ratings ml.zip --split u2", "the split u2 is of ml-100k's 100,000 ratings"),
        ("--ratings missing", "missing: No such file or directory"),
        ("--ratings empty", "empty: no ratings"),
        ("--ratings bad.csv", "bad.csv, line 3: could not parse rating 'x'"),
        ("--ratings words.zip", "words.zip: no good zip"),
        ("--ratings two\nlines", "two lines, line 1: no tab"),
        ("--ratings other", "other: no ratings.csv, ratings.dat, u.data in it"),
    ],
)
def test_wrong_data_is_one_line(half_stars, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(half_stars)
    (half_stars / "empty").touch()
    (half_stars / "two\nlines").write_text("text")
    (half_stars / "bad.csv").write_text("user,item,rating\n1,2,3\n1,3,x\n")
    (half_stars / "words.zip").write_text("words")
    (half_stars / "other").mkdir()
    monkeypatch.setattr(sys, "argv", ["collab.py", "train", *arguments.split(" ")])
    with pytest.raises(SystemExit) as caught:
        collab.main()
    assert caught.value.code == 1
    out, errors = capsys.readouterr()
    assert out == ""
    (line,) = errors.splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.usefixtures("offline")
def test_another_data_set_without_network(tmp_path, monkeypatch, capsys):
    command = ["collab.py", "train", "--dataset", "ml-32m", "--data-dir"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "new")])
    with pytest.raises(SystemExit) as caught:
        collab.main()
    assert caught.value.code == 1
    url = "https://files.grouplens.org/datasets/movielens/ml-32m.zip"
    notice, line = capsys.readouterr().err.splitlines()
    assert notice == f"ml-32m: downloading {url}"
    assert line.startswith(f"Error: ml-32m can't be had: {url}: can't be reached")
    assert os.listdir(tmp_path / "new") == []


def test_folds_of_the_users_own_ratings(half_stars):
    command = ("cross-validate", "--ratings", str(half_stars / "folder"), "--epochs", "1")
    result = CliRunner().invoke(collab.cli, (*command, "--folds", "2"), catch_exceptions=False)
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["1/2", "2/2"]
    with pytest.raises(ValueError, match="the split u1 is of ml-100k's"):
        CliRunner().invoke(collab.cli, command, catch_exceptions=False)


def test_the_names_are_those_of_data():
    assert data.FEATURES == collab.FEATURES
    assert ("ml-100k", *data.DATASETS) == collab.DATASETS
    assert (*data.PUBLISHED_SPLITS, "random") == collab.SPLITS


def test_recipes_have_the_same_options():
    """Each is a set of defaults for the same options of `train`."""
    default, fastai = collab.RECIPES["default"], collab.RECIPES["fastai"]
    parameters = {parameter.name for parameter in collab.train_command.params}
    assert list(default) == list(fastai)
    assert set(default) - {"fits_data", "std"} < parameters


USAGE = {
    "unknown command": ["fit"],
    "unknown option": ["train", "--speed"],
    "unknown split": ["train", "--split", "u9"],
    "split of none": ["train", "--split", "last0"],
    "two data sets": ["train", "--ratings", "x", "--dataset", "ml-1m"],
    "unknown recipe": ["train", "--recipe", "sota"],
    "unknown data set": ["train", "--dataset", "netflix"],
    "no epochs": ["train", "--epochs", "0"],
    "text": ["train", "--epochs", "ten"],
    "no factors": ["train", "--n-factors", "0"],
    "no batch": ["train", "--batch-size", "-1"],
    "negative lr": ["train", "--lr-max", "-0.01"],
    "lr 0": ["train", "--lr-max", "0"],
    "lr nan": ["train", "--lr-max", "nan"],
    "lr inf": ["train", "--lr-max", "inf"],
    "negative decay": ["train", "--weight-decay", "-1"],
    "decay nan": ["train", "--bias-decay", "nan"],
    "decay beyond 1 / lr": ["train", "--lr-max", "0.5", "--weight-decay", "2"],
    "too many factors": ["train", "--n-factors", "9" * 30],
    "too many epochs": ["train", "--epochs", "1" + "0" * 400],
    "too large a batch": ["train", "--batch-size", "9" * 30],
    "too many threads": ["train", "--threads", "5000"],
    "one file for both": ["train", "--save", "x", "--metrics", "./x"],
    "range reversed": ["train", "--y-range", "5", "0"],
    "range empty": ["train", "--y-range", "3", "3"],
    "range nan": ["train", "--y-range", "0", "nan"],
    "range inf": ["train", "--y-range", "0", "inf"],
    "range of one": ["train", "--y-range", "5"],
    "unknown feature": ["train", "--features", "id,age"],
    "feature twice": ["train", "--features", "id,id"],
    "no feature": ["train", "--features", ""],
    "unknown loss": ["train", "--loss", "huber"],
    "range for ordinal": ["train", "--recipe", "best", "--y-range", "0", "6"],
    "dropout 1": ["train", "--dropout", "1"],
    "no model": ["train", "--ensemble", "0"],
    "holdout 0": ["train", "--holdout", "0"],
    "holdout 1": ["train", "--holdout", "1"],
    "folds and splits": ["cross-validate", "--splits", "ua", "--folds", "2"],
    "one fold": ["cross-validate", "--folds", "1"],
    "unknown fold": ["cross-validate", "--splits", "u1,u7"],
    "negative seed": ["train", "--seed", "-1"],
    "no threads": ["train", "--threads", "0"],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_2_with_the_value(main, arguments):
    done = main(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in line
    words = ("--splits and --folds", "requires 2", "a decay of 2", "--y-range", "''", "both x")
    assert arguments[-1].split(",")[-1] in line or any(word in line for word in words)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train --split u1 --test x", "--split u1 and --test do not go together."),
        ("lr-find --split random --test x", "--split random and --test do not go together."),
        ("train --save x --checkpoint ./x", "two of the results are both x."),
        ("train --rating-range 5 nan", "'--rating-range': nan is not a finite number."),
        ("predict m --user 5", "Give --user and --item, or --pairs and --output."),
        ("predict m --pairs x", "--pairs goes with --output, not with --user and --item."),
        ("predict m --user 5 --item 5 --output x.csv", "--output goes with --pairs."),
        ("predict m --pairs x --output x.txt", "does not end in .csv or .tsv or .parquet."),
        ("recommend m", "Give one of --user, --rated and --all-users."),
        ("recommend m --user 5 --rated 1:2", "Give one of --user, --rated and --all-users."),
        ("recommend m --all-users", "--all-users and --output go together."),
        ("recommend m --user 5 --output x.csv", "--all-users and --output go together."),
        ("recommend m --user 5 -n 0", "0 is not in the range 1<=x<=1000000."),
        ("similar m", "Missing option '--item'."),
        ("map m --output x.jpg", "'x.jpg' does not end in .png or .svg."),
        ("plot --output x.png", "Missing argument 'FILE.json...'."),
    ],
)
def test_what_does_not_go_together_exits_2(main, tmp_path, arguments, line):
    done = main(*arguments.split(" "))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.endswith(f"{line}\n")
    assert os.listdir(tmp_path) == []


def test_no_command_shows_the_help(run):
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: collab.py")
    assert "train" in done.stderr


def assert_one_line(done, *parts):
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith("ml-100k: from the cache")]
    for part in ("Error: ", *parts):
        assert part in line


def test_a_result_that_cannot_be_written_is_said_before_training(main, tmp_path):
    (tmp_path / "folder").mkdir()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write everywhere but to the kernel's own files
        closed = Path("/proc")
    for option, path in (
        ("--save", "missing/file"),
        ("--metrics", "folder"),
        ("--save", closed / "file"),
    ):
        assert_one_line(main("train", option, path), str(path), "cannot be written")


@pytest.mark.usefixtures("ml_100k")
def test_a_range_that_cannot_reach_a_rating_is_refused(main, tmp_path):
    (tmp_path / "m.json").write_text("old")
    done = main("train", "--y-range", "0", "4", "--metrics", "m.json")
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    told = "Error: ratings from 1 to 5 are not all within y_range 0 to 4: give --y-range LOW HIGH"
    assert line == told
    assert (tmp_path / "m.json").read_text() == "old"


@pytest.mark.usefixtures("offline")
def test_no_network_and_no_cache(run, tmp_path):
    done = run("train", "--data-dir", "empty")
    assert_one_line(done, "files.grouplens.org", "recbole==1.2.1 through pip")
    assert_one_line(run("train", HOME="", XDG_CACHE_HOME=str(tmp_path / "x")), "files.grouplens")


@pytest.mark.usefixtures("offline")
def test_a_broken_cache_without_network_is_said_and_left(run, tmp_path, ml_100k):
    folder = tmp_path / "data" / "ml-100k"
    folder.mkdir(parents=True)
    for name in data.ML_100K_FILES:
        (folder / name).write_bytes((ml_100k / name).read_bytes())
    changed = (folder / "u.data").read_bytes().replace(b"\t3\t", b"\t4\t", 1)
    (folder / "u.data").write_bytes(changed)
    done = run("train", COLLAB_DATA_DIR=str(tmp_path / "data"))
    assert_one_line(done, f"u.data in {folder} failed the checksum")
    assert (folder / "u.data").read_bytes() == changed
    assert sorted(os.listdir(folder)) == sorted(data.ML_100K_FILES)


@pytest.mark.usefixtures("ml_100k")
def test_no_memory_is_one_line(run, tmp_path):
    """A limit of the system, where the machine may have any size."""
    code = (
        "import resource, runpy, sys, torch, polars; size = 3 << 30;"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size)); sys.argv = sys.argv[1:];"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, ROOT / "collab.py", "train", "--n-factors", "65536"]
    environment = os.environ | {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: not enough memory for these options"
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("ml_100k")
@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream_is_no_failure(tmp_path, stream):
    command = (
        f"'{sys.executable}' '{ROOT / 'collab.py'}' train --epochs 1 --metrics m.json {stream}>&-"
    )
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert read_json(tmp_path / "m.json")["n_test"] == 9430


@pytest.mark.usefixtures("ml_100k")
def test_a_loss_that_is_not_finite_is_one_line(main, tmp_path):
    done = main(
        "train", "--lr-max", "1e30", "--bias-decay", 0, "--weight-decay", 0, "--metrics", "m"
    )
    assert done.returncode == 1
    assert re.fullmatch("Error: the loss is nan in epoch 1: .*", done.stderr.splitlines()[-1])
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("ml_100k")
def test_ctrl_c_exits_130_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "m.pt").write_text("old")
    command = [sys.executable, ROOT / "collab.py", "train", "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--save", "m.pt", "--metrics", "m.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for _ in range(3):  # two epochs are through
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["m.pt"]
    assert (tmp_path / "m.pt").read_text() == "old"


def test_a_reader_that_goes_away_is_no_traceback(run, tmp_path, ml_100k):
    command = f"'{sys.executable}' '{ROOT / 'collab.py'}' train --epochs 3 2> errors | head -n 1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("epoch |")
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_terminal_gets_a_bar(tmp_path, ml_100k):
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "collab.py", "train", "--epochs", "2"],
        stdout=subprocess.PIPE,
        stderr=follower,
        cwd=tmp_path,
    )
    output, _ = process.communicate(timeout=60)
    os.close(follower)
    drawn = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert process.returncode == 0
    assert "100%" in drawn
    assert len(output.splitlines()) == 4


def test_help_imports_nothing_heavy():
    code = (
        "import sys, collab; from click.testing import CliRunner;"
        "result = CliRunner().invoke(collab.cli, ['train', '-h']);"
        "assert result.exit_code == 0 and '--lr-max' in result.output;"
        "print(sorted({'torch', 'polars', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


def test_a_recipe_fits_the_data():
    """On ua it gives its own values; else as many steps, and decays that go with ratings a row."""
    levels = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    def fit(n_ratings, n_rows, recipe="default", given=None, scale=levels, clip=(1.0, 5.0)):
        told, ratings = [], scale.repeat(n_ratings // len(scale))
        options = collab.RECIPES[recipe] | (given or {})
        about = {"ratings": ratings, "n_rows": n_rows, "clip": clip, "notice": told.append}
        return collab.fit_recipe(options, given or {}, **about), told

    for recipe in collab.RECIPES:
        fitted, told = fit(90_570, 2_623, recipe)
        assert fitted.pop("y_range", None) == pytest.approx(collab.RECIPES[recipe]["y_range"])
        assert fitted == {n: v for n, v in collab.RECIPES[recipe].items() if n != "y_range"}
        assert told == []
    default = collab.RECIPES["default"]
    larger, _ = fit(905_700, 26_230)
    assert larger.pop("y_range") == pytest.approx(default["y_range"])
    assert larger == {n: v for n, v in default.items() if n != "y_range"} | {"batch_size": 6_120}
    thinner, _ = fit(9_060, 2_623)
    assert thinner["batch_size"] == 61
    assert thinner["weight_decay"] == pytest.approx(default["weight_decay"] * 10**0.7, rel=1e-3)
    assert thinner["bias_decay"] == pytest.approx(default["bias_decay"] * 10**0.7, rel=1e-3)
    given = {"weight_decay": 0.3, "y_range": (0.0, 6.0), "batch_size": 7}
    assert fit(9_060, 2_623, given=given)[0].items() >= given.items()
    assert fit(9_060, 2_623, "fastai")[0] == collab.RECIPES["fastai"]
    assert fit(50, 20)[0]["batch_size"] == 2

    wide, _ = fit(9_000, 2_626, scale=25 * (levels - 1), clip=(0.0, 100.0))
    assert wide["y_range"] == pytest.approx((-12.5, 112.5))
    rare = torch.tensor([1.0] * 99 + [100.0])  # within four deviations of the mean
    far, _ = fit(9_000, 2_626, scale=rare, clip=(1.0, 100.0))
    mean, deviation = rare.mean().item(), rare.std(correction=0).item()
    assert far["y_range"] == pytest.approx((1 - 99 / 8, mean + 4 * deviation), rel=1e-4)

    for n_levels in (2, 101):
        many, told = fit(9_090, 2_626, "best", scale=torch.linspace(1, 5, n_levels))
        assert (many["loss"], many["y_range"]) == ("mse", pytest.approx((0.5, 5.5)))
        assert told == [f"loss mse, not ordinal, for {n_levels} distinct ratings"]


@pytest.mark.parametrize("recipe", ["default", "best"])
@pytest.mark.parametrize(("factor", "constant"), [(1e-6, 0), (1e6, 0), (1, 100), (-1, 6)])
def test_the_scale_of_ratings_changes_the_unit_alone(ratings, recipe, factor, constant):
    options = {"n_factors": 8, "epochs": 2, "ensemble": 1, "features": ("id", "implicit")}

    def errors(ratings):
        found = collab.Data(None, "r", ratings.sample(5_000, seed=0), None, None, None, None)
        figures = collab.train_model(found, recipe=recipe, **options).figures
        names = ("mse", "rmse", "mae")
        return [figures[n] for n in names] + [figures["baselines"]["averages"][n] for n in names]

    plain = errors(ratings.drop("timestamp"))
    moved = ratings.with_columns(polars.col("rating") * factor + constant).drop("timestamp")
    unit = abs(factor)
    expected = [error * unit**power for error, power in zip(plain, (2, 1, 1) * 2, strict=True)]
    assert errors(moved) == pytest.approx(expected, rel=2e-3)


def test_answers_have_the_digits_of_their_scale(main, tmp_path, ratings):
    """`predict` and `recommend` on ratings of a thousandth: the same digits, three places on."""
    few = ratings.head(20_000).drop("timestamp")
    command = ("train", "--epochs", 2, "--ratings")
    lines = []
    for name, unit in (("one", 1.0), ("milli", 1e-3)):
        few.with_columns(polars.col("rating") * unit).write_csv(tmp_path / f"{name}.csv")
        assert main(*command, f"{name}.csv", "--save", name).returncode == 0
        answers = main("predict", name, "--user", 196, "--item", 242), main("interpret", name)
        answers += (main("recommend", name, "--user", 196), main("evaluate", name))
        lines.append("".join(answer.stdout for answer in answers))
    one, milli = (re.findall(r"\d+\.\d+", text) for text in lines)
    assert len(one) == len(milli) > 30
    for number, small in zip(one[1:-3], milli[1:-3], strict=True):
        assert len(small) == len(number) + 3
        assert float(small) == pytest.approx(float(number) / 1000, abs=3e-6)


def test_figures_have_the_digits_of_their_scale():
    errors = {"mse": 0.85051, "rmse": 0.92223, "mae": 0.73477}
    assert collab.format_errors(errors, (1, 5)) == "mse 0.8505, rmse 0.9222, mae 0.7348"
    tiny = {"mse": 0.85051e-6, "rmse": 0.92223e-3, "mae": 0.73477e-3}
    assert collab.format_errors(tiny, (1e-3, 5e-3)) == (
        "mse 8.5051e-07, rmse 0.0009222, mae 0.0007348"
    )
    large = {"mse": 0.85051e12, "rmse": 0.92223e6, "mae": 0.73477e6}
    assert (
        collab.format_errors(large, (1e6, 5e6)) == "mse 8.5051e+11, rmse 9.2223e+05, mae 7.3477e+05"
    )
    assert collab.format_number(1234.5678, 2) == "1234.57"


SMALL = {  # none of which may end worse than the averages
    "one hated item": [(u, i, 1 if i == 19 else 5) for u in range(20) for i in range(20)],
    "an outlier": [
        (u, i, 50_000 if u == i == 7 else 3 + u * i % 3) for u in range(200) for i in range(100)
    ],
    "mostly fives": [
        (u, i, 5 if (u * 31 + i * 17) % 20 else 1) for u in range(100) for i in range(50)
    ],
    "counts": [(u, i, int(1.0625 ** ((u * u + i) % 210))) for u in range(100) for i in range(40)],
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("recipe", ["default", "best"])
def test_small_and_odd_ratings_end_no_worse_than_averages(main, tmp_path, name, recipe):
    polars.DataFrame(SMALL[name], ["user", "item", "rating"], orient="row").write_csv(
        tmp_path / "r.csv"
    )
    done = main("train", "--ratings", "r.csv", "--recipe", recipe, "--metrics", "m.json")
    assert done.returncode == 0, done.stderr
    figures = read_json(tmp_path / "m.json")
    ratio = figures["rmse"] / figures["baselines"]["averages"]["rmse"]
    assert ratio < 1.01
    assert ("this is worse than the averages" in done.stderr) == (ratio > 1)
    assert "\n8 of 10 ratings are " in done.stderr


@pytest.fixture
def torchrun(tmp_path):
    """Run `torchrun collab.py ...` with two processes in an empty folder."""

    def torchrun(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.run(
            [*command, "--nproc-per-node", "2", ROOT / "collab.py", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=100,
        )

    return torchrun


@pytest.mark.usefixtures("ml_100k")
def test_two_processes_train_as_one_does(torchrun, tmp_path):
    """Features, context, dropout, Q outputs and two models; 90,570 ratings are 11 batches, the last
    of 458, of which each process has its own part."""
    command = ("train", "--recipe", "best", "--ensemble", "2", "--epochs", "2")
    command += ("--batch-size", "8192", "--metrics", "m.json", "--save", "m.pt")
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    header, *lines, last = done.stdout.splitlines()
    assert header.startswith("epoch | train_loss")
    assert [LINE.fullmatch(line).group(1) for line in lines] == ["1", "2"]
    assert last.startswith("test mse ")
    figures, saved = read_json(tmp_path / "m.json"), collab.load_model(tmp_path / "m.pt")
    assert figures.pop("processes") == 2

    names = [str(tmp_path / name) if name in ("m.json", "m.pt") else name for name in command]
    CliRunner().invoke(collab.cli, names, catch_exceptions=False)
    alone, saved_alone = read_json(tmp_path / "m.json"), collab.load_model(tmp_path / "m.pt")
    for name in ("fit_seconds", "evaluate_seconds", "load_seconds"):
        del figures[name], alone[name]
    for ours, theirs in zip(figures.pop("epochs"), alone.pop("epochs"), strict=True):
        del ours["seconds"], theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert figures.items() >= {"recipe": "best", "n_train": 90570, "n_test": 9430}.items()
    for name in ("mse", "rmse", "mae"):
        assert figures.pop(name) == pytest.approx(alone.pop(name), rel=1e-6)
    assert figures == alone
    for ours, theirs in zip(saved.tables, saved_alone.tables, strict=True):
        for table, other in zip(ours, theirs, strict=True):
            # Sums in another order: eps is 1.2e-7, tables reach 0.5 and most changes are far
            # smaller; but Adam makes a step of lr of a gradient of rounding errors.
            torch.testing.assert_close(table, other, rtol=0, atol=1e-4)
            assert (table - other).abs().mean() < 1e-7


@pytest.mark.usefixtures("ml_100k")
def test_bad_input_of_two_processes_is_one_line(torchrun, tmp_path):
    done = torchrun("train", "--y-range", "0", "4", "--metrics", "m.json")
    assert done.returncode == 1
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    line = "Error: ratings from 1 to 5 are not all within y_range 0 to 4: give --y-range LOW HIGH"
    assert told == [line]
    assert "collab.py" not in re.sub("collab.py FAILED", "", done.stderr), "no traceback of ours"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("rank", "size", "lines"), [("0", "2", 1), ("1", "2", 0), ("3", "1", 1), ("x", "2", 1)]
)
def test_the_first_process_speaks_for_all(main, monkeypatch, rank, size, lines):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    done = main("cross-validate", "--folds", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == lines


def test_folds_are_of_one_process(main, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = main("cross-validate")
    assert done.stderr == "Error: cross-validate is of one process, not of 2.\n"


@pytest.fixture(scope="module")
def found(ratings, ml_100k):
    """ml-100k as `collab.read` gives it."""
    tables = data.read_users(ml_100k), data.read_items(ml_100k)
    return collab.Data("ml-100k", "ml-100k", ratings, None, *tables, None)


@pytest.fixture(scope="module")
def timed(found):
    """A model with all features, two members."""
    short = {"epochs": 2, "ensemble": 2, "n_factors": 8}
    return collab.train_model(found, recipe="best", **short)


def test_a_model_with_times_knows_the_moment_of_a_rating(timed, ratings):
    """The test part as other ratings: the same errors, from the times that the model has kept."""
    test = data.split(ratings, "ua")[1]
    expected = {name: timed.figures[name] for name in ("n_test", "mse", "rmse", "mae")}
    assert collab.evaluate(timed, test) == pytest.approx(expected, rel=1e-5)
    assert collab.evaluate(timed) == pytest.approx(expected, rel=1e-6)
    timeless = collab.evaluate(timed, test.drop("timestamp"))
    assert timeless["mse"] > expected["mse"] + 0.01


def test_what_a_new_user_rated_tells_by_all_that_the_model_has(timed):
    """Implicit features, times and both outputs of an ensemble: nearer to the user than average."""
    row = collab.find_user(timed, 22)
    starts, items, ratings, times = timed.rated
    own = slice(*starts[row : row + 2].tolist())
    rows, ratings, times = items[own].long(), ratings[own], times[own]
    head = collab.make_head(*timed.head)

    def error(tables, user, *context):
        users = torch.full_like(rows, user)
        mean, _ = collab.predict_rows(tables, users, rows, *context, head=head)
        return (mean - ratings).square().mean().item()

    folded = collab.fold_in(timed, rows, ratings, times)
    context = collab.find_new_context(timed, rows, ratings, times)
    average = collab.add_average(timed).tables
    assert [len(tables.user_bias) for tables in folded] == [1 + 4] * 2
    assert error(folded, 0, context) < error(timed.tables, row, context) + 0.1
    assert error(folded, 0, context) < error(average, len(timed.user_ids)) - 0.2
    timeless = collab.fold_in(timed, rows, ratings)
    assert not torch.equal(timeless[0].user_bias, folded[0].user_bias)


@pytest.fixture(scope="module")
def plain(found):
    return collab.train_model(found, epochs=1)


def test_unknown_ids_are_average_ones_on_request(plain):
    with pytest.raises(ValueError, match=r"^predict: no user '0' in the model$"):
        collab.predict(plain, [0], [1])
    (mean,), _ = collab.predict(plain, [0], [10**9], allow_unknown=True)
    seen_users, seen_items = plain.seen
    p, q, b, c = (
        table[seen].mean(0)
        for table, seen in zip(plain.tables[0], (seen_users, seen_items) * 2, strict=True)
    )
    predicted = collab.make_head(*plain.head).predict(p @ q + b + c)
    assert mean.item() == pytest.approx(predicted.item(), rel=1e-5)
    known, _ = collab.predict(plain, [22, 0], [50, 50], allow_unknown=True)
    assert known[0] == collab.predict(plain, [22], [50])[0][0]


def test_ids_are_found_as_they_are(plain):
    assert collab.find_row(plain.user_ids, 22) == collab.find_row(plain.user_ids, "22") == 21
    for raw in ("022", "+22", "22.0", " 22", "", "x", -22, 944, 10**30):
        assert collab.find_row(plain.user_ids, raw) is None
    texts = ["", "Ann", "ann", "ü"]
    assert [collab.find_row(texts, text) for text in ("ann", "ü", "", "Ann ")] == [2, 3, 0, None]
    with pytest.raises(ValueError, match=r"^no user ' 22' in the model; there is '22'$"):
        collab.find_user(plain, " 22")


def test_titles_are_found_by_a_part_that_is_alone(plain):
    assert plain.item_ids[collab.find_item(plain, "STAR WARS")] == 50
    assert plain.item_ids[collab.find_item(plain, "Alien (1979)")] == 183  # a whole one
    assert plain.item_ids[collab.find_item(plain, 183)] == 183
    with pytest.raises(ValueError, match=r"^'alien' is in \d+ titles: 183 'Alien \(1979\)', ") as e:
        collab.find_item(plain, "alien")
    assert "\n" not in str(e.value)
    for text in ("no such film", " ", ""):
        with pytest.raises(ValueError, match=r"no item .* in the model and in no title"):
            collab.find_item(plain, text)


def test_ratings_of_the_same_pair_in_training_are_refused(plain, ratings):
    part = ratings.filter(polars.col("user") == 7)
    with pytest.raises(
        ValueError, match=r"^mine: \d+ of the \(user, item\) pairs are in the model"
    ):
        collab.evaluate(plain, part, source="mine")
    assert collab.evaluate(plain, part, allow_overlap=True)["n_test"] == len(part)


def test_likings_by_hand(plain):
    most, least = collab.interpret(plain, n=2000)
    params, counts = plain.tables[0], collab.count_ratings(plain)
    assert len(most) == len(least) == (counts > 0).sum() == 1680
    assert most == least[::-1]
    row = collab.find_row(plain.item_ids, most[0].item)
    assert row == params.item_bias.masked_fill(counts == 0, -9).argmax()
    z = params.user_bias.mean() + params.item_bias[row]
    predicted = collab.make_head(*plain.head).predict(z)
    assert most[0].rating == pytest.approx(predicted.item(), rel=1e-5)
    assert most[0].n_ratings == counts[row]


def test_a_rating_of_a_new_user_that_is_out_of_range(plain):
    for rating in (0.5, 6, float("nan")):
        with pytest.raises(ValueError, match=r"^rating .* of item 50 is not within 1 to 5$"):
            collab.recommend(plain, rated=[(50, rating)])


def test_ranking_figures_are_of_what_is_recommended(plain):
    """Hits counted from `recommend`'s own lists."""
    k, users, items, ratings = 10, *plain.test
    found = collab.evaluate(plain, k=k, min_rating=4)
    hits, n_users = 0, 0
    for row in range(0, 943):
        wanted = {plain.item_ids[i] for i in items[(users == row) & (ratings >= 4)].tolist()}
        n_users += bool(wanted)
        if wanted:
            listed = collab.recommend(plain, plain.user_ids[row], n=k)
            hits += len(wanted & {each.item for each in listed})
    assert found["n_users"] == n_users
    assert found["precision"] == pytest.approx(hits / k / n_users)


@pytest.mark.usefixtures("ml_100k")
def test_a_test_file_of_ones_own(main, tmp_path, ratings):
    """ua's two parts as files give what the split gives; shared pairs are refused."""
    train_part, test_part = data.split(ratings, "ua")
    data.write_ratings(train_part, tmp_path / "ua.base")
    data.write_ratings(test_part, tmp_path / "ua.test")
    data.write_ratings(ratings, tmp_path / "all")
    short = ("--epochs", 1, "--metrics", "m.json")
    assert main("train", "--ratings", "ua.base", "--test", "ua.test", *short).returncode == 0
    ours = read_json(tmp_path / "m.json")
    assert main("train", *short).returncode == 0
    theirs = read_json(tmp_path / "m.json")
    assert (ours["split"], theirs["split"]) == ("test file", "ua")
    assert [ours[n] for n in ("mse", "n_train")] == [theirs[n] for n in ("mse", "n_train")]
    done = main("train", "--ratings", "all", "--test", "ua.test", *short)
    assert_one_line(done, "9430 of the test part's (user, item) pairs are in the training part")
    done = main("train", "--ratings", "all", "--test", "ua.test", "--allow-overlap", *short)
    assert done.returncode == 0
    assert read_json(tmp_path / "m.json")["n_train"] == 100_000


def test_of_several_ratings_of_a_pair_the_latest_counts(main, tmp_path):
    rows = [f"u{user},i{item},{1 + user * item % 5},7" for user in range(9) for item in range(9)]
    (tmp_path / "r.csv").write_text("\n".join([*rows, "u1,i1,1,9", "u1,i1,5,8", "u2,i2,3,8"]))
    found = collab.read(ratings=tmp_path / "r.csv")
    pairs = {(user, item): rating for user, item, rating, _ in found.ratings.iter_rows()}
    assert (len(found.ratings), pairs["u1", "i1"], pairs["u2", "i2"]) == (81, 1, 3)
    done = main("train", "--ratings", "r.csv", "--epochs", 1)
    left_out, about, *_ = done.stderr.splitlines()
    assert left_out == "r.csv: 3 earlier ratings of the same user and item are left out"
    assert about == "9 users, 9 items, 81 ratings from 1 to 5"


@pytest.mark.usefixtures("ml_100k")
def test_nothing_is_left_to_resume(main, tmp_path):
    assert main("train", "--epochs", 2, "--checkpoint", "c.pt", "--save", "m.pt").returncode == 0
    done = main("train", "--resume", "c.pt", "--save", "again.pt")
    assert done.stderr.splitlines()[-1] == "c.pt: going on after epoch 2 of 2"
    assert len(done.stdout.splitlines()) == 4
    ours, again = (collab.load_model(tmp_path / name) for name in ("m.pt", "again.pt"))
    assert are_equal(ours.params, again.params)


@pytest.mark.usefixtures("ml_100k")
def test_a_checkpoint_fixes_all_that_the_result_depends_on(main, tmp_path):
    assert main("train", "--epochs", 1, "--checkpoint", "c.pt").returncode == 0
    for option in (("--seed", 0), ("--n-factors", 40), ("--split", "ua"), ("--recipe", "default")):
        done = main("train", "--resume", "c.pt", *option)
        assert done.returncode == 2
        assert done.stderr == f"Error: {option[0]} is the checkpoint's, with --resume.\n"
    before = (tmp_path / "c.pt").read_bytes()
    done = main("evaluate", "c.pt")
    assert_one_line(done, "c.pt: not a model of this program: format 'collab checkpoint 2'")
    assert (tmp_path / "c.pt").read_bytes() == before


def write_own(folder, *, tail="u1,i2,3", kinds="AB"):
    """A table of ratings and one of items, of which every other is of another kind."""
    rows = [f"u{user},i{item},{1 + user * item % 5}" for user in range(9) for item in range(9)]
    (folder / "r.csv").write_text("\n".join([*rows, tail]))
    items = [f"i{item},Film {item},{kinds[item % 2]}" for item in range(9)]
    (folder / "i.csv").write_text("\n".join(["item,title,kind", *items]))


@pytest.mark.parametrize("changed", [{"tail": "u1,i2,4"}, {"kinds": "AA"}, {"tail": "u1,j2,3"}])
def test_a_checkpoint_goes_with_its_data(main, tmp_path, changed):
    write_own(tmp_path)
    own = ("--ratings", "r.csv", "--items", "i.csv", "--features", "id,side", "--epochs", 1)
    assert main("train", *own, "--checkpoint", "c.pt").returncode == 0
    assert main("train", "--resume", "c.pt").returncode == 0
    write_own(tmp_path, **changed)
    done = main("train", "--resume", "c.pt")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "Error: c.pt: the data is not that which it was trained on"


def test_a_training_rating_is_left_out_of_its_own_moment(timed):
    """Asked about the training part, the context is that of training."""
    starts, items, _, times = timed.rated
    users = torch.repeat_interleave(torch.arange(943), starts.diff())
    (context,) = collab.find_context(timed, users, items.long(), times)
    history = collab.frame_ratings(timed)
    assert torch.allclose(context, data.time_context(history, history.clear())[0])
    (test_context,) = collab.find_context(timed, *timed.test[:2], torch.zeros(9430).long())
    assert not torch.allclose(test_context, timed.test[3])


def test_what_a_new_user_rated_twice_counts_once(plain):
    alone = collab.recommend(plain, rated=[(50, 1), (172, 4)])
    assert collab.recommend(plain, rated=[(50, 5), (172, 4), (50, 1)]) == alone
    assert collab.recommend(plain, rated=[(50, 1, 9), (50, 5, 8), (172, 4, 7)]) == alone
    average = collab.recommend(plain, rated=[], include_seen=True)
    assert {each.item for each in average} & {each.item for each in alone}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a user or what one has rated"),
        ({"user": 1, "rated": [(50, 5)]}, "give a user or what one has rated"),
        ({"user": 1, "n": -1}, "n above 0, not -1"),
        ({"rated": [(50, 5), (172, 4, 9)]}, r"\(item, rating\) or \(item, rating, timestamp\)"),
        ({"rated": [(50,)]}, r"\(item, rating\) or \(item, rating, timestamp\)"),
    ],
)
def test_the_librarys_errors_are_its_own(plain, arguments, message):
    with pytest.raises(ValueError, match=message):
        collab.recommend(plain, **arguments)


def test_no_pairs_are_no_predictions(plain):
    mean, deviation = collab.predict(plain, [], [])
    assert mean.shape == deviation.shape == (0,)
    with pytest.raises(ValueError, match="1 users and 2 items are no pairs"):
        collab.predict(plain, [22], [50, 51])


def test_misspelt_settings_are_refused(found):
    with pytest.raises(ValueError, match=r"no option \['n_factor'\]"):
        collab.set_up(found, n_factor=8)
    with pytest.raises(ValueError, match="no recipe 'x'"):
        collab.set_up(found, recipe="x")
    with pytest.raises(ValueError, match="no loss 'x': it is mse or ordinal"):
        collab.set_up(found, loss="x")


def test_nothing_is_similar_to_what_nobody_rated(plain):
    unrated = plain.item_ids[(~plain.seen[1]).nonzero()[0, 0]]
    with pytest.raises(ValueError, match=f"nothing is known of item {unrated}"):
        collab.find_similar(plain, unrated)


@pytest.mark.usefixtures("ml_100k")
def test_a_held_out_part_is_called_so(main):
    assert main("train", "--epochs", 1, "--holdout", 0.1, "--save", "m.pt").returncode == 0
    assert main("evaluate", "m.pt").stdout.endswith(
        "9,057 ratings of 0.1 of the training part of ua\n"
    )


@pytest.mark.usefixtures("ml_100k")
def test_a_file_of_a_new_users_ratings_has_ids_not_titles(main, tmp_path):
    assert main("train", "--epochs", 1, "--save", "m.pt").returncode == 0
    (tmp_path / "mine.csv").write_text("item,rating\n2001,5\n50,4\n")
    done = main("recommend", "m.pt", "--rated", "mine.csv")
    assert_one_line(done, "mine.csv: no item '2001' in the model")
    done = main("recommend", "m.pt", "--rated", "2001:5")
    assert done.stderr == "rated: 2001: A Space Odyssey (1968)\n"
    unknown = main("predict", "m.pt", "--user", "x", "--item", "star wars", "--allow-unknown")
    assert unknown.stdout.endswith(" by x for Star Wars (1977)\n")


@pytest.mark.usefixtures("ml_100k")
def test_the_library_trains_as_the_command_line_does(found, main, tmp_path):
    torch.set_num_threads(2)
    saved = collab.train_model(found, epochs=2, seed=5)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert main("train", "--epochs", 2, "--seed", 5, "--save", "m.pt").returncode == 0
    theirs = collab.load_model(tmp_path / "m.pt")
    assert are_equal(saved.params, theirs.params)
    for name, value in saved.figures.items():
        if name not in ("epochs", "fit_seconds", "evaluate_seconds", "options"):
            assert theirs.figures[name] == value
