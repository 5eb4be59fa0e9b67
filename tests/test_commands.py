"""Every command as a user runs it, on three kinds of data; bad input; trainings that are killed."""

import json
import random
import re
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import polars
import pytest
import torch

import collab
import data

ROOT = Path(collab.__file__).parent


def titled(item):
    return f"Filmé {item}, A “{item % 7}”"


def write_some(folder, ratings):
    """A small part of ml-100k as a table of string ids under names of its own, and as Parquet."""
    some = ratings.filter(polars.col("user") <= 90, polars.col("item") <= 120)
    strings = some.select(
        kunde=polars.format("ü-{} {}", polars.col("user") % 2, "user"),
        ware=polars.format('{}-x,"{}"', "item", polars.col("item") % 3),
        sterne="rating",
        wann=polars.from_epoch("timestamp").dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    strings.write_csv(folder / "strings.csv")
    some.write_parquet(folder / "some.parquet")
    items = strings["ware"].unique(maintain_order=True)
    titles = [titled(int(item.split("-")[0])) for item in items]
    table = polars.DataFrame({"ware": items, "title": titles, "kind": [t[-2] for t in titles]})
    table.write_csv(folder / "titles.csv")


COLUMNS = ("--user-column", "kunde", "--item-column", "ware")
ALL_COLUMNS = (*COLUMNS, "--rating-column", "sterne", "--time-column", "wann")
SOURCES = {
    "ml-100k": ((), 196, 242, ()),
    "strings": (
        ("--ratings", "strings.csv", *ALL_COLUMNS, "--items", "titles.csv"),
        "ü-0 22",
        '50-x,"2"',
        ALL_COLUMNS,
    ),
    "parquet": (("--ratings", "some.parquet"), 22, 50, ()),
}


ENDINGS = {"ml-100k": "parquet", "strings": "csv", "parquet": "tsv"}  # of what is written


class Trained:
    """A model that the command line has trained, where it lies, and what of it is asked for."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.source, self.user, self.item, self.columns = SOURCES[name]

    def run(self, *arguments):
        done = subprocess.run(
            [sys.executable, ROOT / "collab.py", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, command, *arguments):
        return json.loads(self.run(command, "m.pt", *arguments, "--json"))


@pytest.fixture(scope="module", params=SOURCES)
def trained(request, tmp_path_factory, ratings):
    folder = tmp_path_factory.mktemp("commands")
    write_some(folder, ratings)
    trained = Trained(folder, request.param)
    short = ("--epochs", 2, "--save", "m.pt", "--metrics", "m.json")
    out = trained.run("train", *trained.source, *short)
    assert out.splitlines()[-1].startswith("test mse ")
    trained.model = collab.load_model(folder / "m.pt")
    return trained


def as_json(value):
    """A value as it comes back from JSON, NamedTuples as objects."""
    if isinstance(value, list):
        value = [each._asdict() for each in value]
    return json.loads(json.dumps(value))


def assert_same(found, expected):
    """Equal but for the last digits of floats, which go with the number of threads."""
    if isinstance(expected, dict | list):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        keys = expected if isinstance(expected, dict) else range(len(expected))
        for key in keys:
            assert_same(found[key], expected[key])
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if type(expected) is float else expected)


def test_evaluate(trained):
    found = trained.ask("evaluate", "--ranking", "-k", 5)
    assert_same(found, as_json(collab.evaluate(trained.model, k=5)))
    assert found["mse"] == pytest.approx(trained.model.figures["mse"], rel=1e-6)
    assert 0 < found["precision"] <= found["hit_rate"] < 1


def test_evaluate_other_ratings(trained, ml_100k):
    """The table that it was trained on, if one insists: the figures of the library."""
    path = trained.folder / trained.source[1] if trained.source else ml_100k / "u.data"
    arguments = ("--ratings", path, *trained.columns, "--allow-overlap")
    found = trained.ask("evaluate", *arguments)
    columns = dict(
        zip(("user", "item", "rating", "timestamp"), trained.columns[1::2], strict=False)
    )
    frame = data.read_ratings(path, columns=columns)
    assert_same(found, as_json(collab.evaluate(trained.model, frame, allow_overlap=True)))
    assert found["mse"] < trained.model.figures["mse"]
    assert found["n_test"] == len(frame)


def test_predict(trained):
    found = trained.ask("predict", "--user", trained.user, "--item", trained.item)
    (mean,), (deviation,) = collab.predict(trained.model, [trained.user], [trained.item])
    assert (found["user"], found["item"]) == (trained.user, trained.item)
    assert found["rating"] == pytest.approx(mean.item(), abs=1e-5)
    assert found["deviation"] == deviation.item() == 0


def test_predict_pairs(trained):
    ending = ENDINGS[trained.name]
    users, items = trained.model.user_ids[:40], trained.model.item_ids[-40:]
    asked = polars.DataFrame({"user": users, "item": items})
    asked.write_csv(trained.folder / "pairs.csv")
    output = trained.folder / f"predicted.{ending}"
    found = trained.ask("predict", "--pairs", "pairs.csv", "--output", output)
    assert found == {"n_pairs": 40, "output": str(output)}
    table = read_table(output).with_columns(polars.col("user", "item").cast(asked["user"].dtype))
    assert table.drop("rating").equals(asked)
    mean, _ = collab.predict(trained.model, users, items)
    assert table["rating"].to_list() == pytest.approx(mean.tolist(), abs=1e-5)


def read_table(path):
    if path.suffix == ".parquet":
        return polars.read_parquet(path)
    return polars.read_csv(path, separator="\t" if path.suffix == ".tsv" else ",")


def test_recommend(trained):
    found = trained.ask("recommend", "--user", trained.user, "-n", 7)
    assert found["user"] == trained.user
    assert_same(found["items"], as_json(collab.recommend(trained.model, trained.user, n=7)))
    ratings = [each["rating"] for each in found["items"]]
    assert ratings == sorted(ratings, reverse=True)
    row = collab.find_user(trained.model, trained.user)
    starts, rated = trained.model.rated[:2]
    seen = {trained.model.item_ids[i] for i in rated[starts[row] : starts[row + 1]].tolist()}
    assert not seen & {each["item"] for each in found["items"]}
    everything = collab.recommend(trained.model, trained.user, n=10**6, include_seen=True)
    assert {each.item for each in everything} == set(trained.model.item_ids)


def test_recommend_to_a_new_user(trained):
    """From ratings on the command line and in a file, the same."""
    items = trained.model.item_ids[:3]
    rated = [(item, rating) for item, rating in zip(items, (5, 1, 4), strict=True)]
    expected = as_json(collab.recommend(trained.model, rated=rated, n=5))
    polars.DataFrame(rated, ["item", "rating"], orient="row").write_csv(trained.folder / "mine.csv")
    assert_same(trained.ask("recommend", "--rated", "mine.csv", "-n", 5)["items"], expected)
    if trained.name == "ml-100k":
        text = ",".join(f"{item}:{rating}" for item, rating in rated)
        assert_same(trained.ask("recommend", "--rated", text, "-n", 5)["items"], expected)
    opposite = [(item, 6 - rating) for item, rating in rated]
    assert as_json(collab.recommend(trained.model, rated=opposite, n=5)) != expected


def test_recommend_to_all(trained):
    output = trained.folder / f"all.{ENDINGS[trained.name]}"
    out = trained.run("recommend", "m.pt", "--all-users", "--output", output, "-n", 3)
    n_users = len(trained.model.user_ids)
    assert out == f"up to 3 items for each of {n_users:,} users in {output}\n"
    table = read_table(output)
    assert len(table) == 3 * n_users
    for user in (trained.user, trained.model.user_ids[0], trained.model.user_ids[-1]):
        part = table.filter(polars.col("user") == user)
        expected = collab.recommend(trained.model, user, n=3)
        assert part["rank"].to_list() == [1, 2, 3]
        assert part["item"].to_list() == [each.item for each in expected]
        assert part["rating"].to_list() == pytest.approx([e.rating for e in expected], abs=1e-5)
    blocks = list(collab.recommend_all(trained.model, n=3, block=7))
    assert polars.concat(blocks)["item"].cast(table["item"].dtype).equals(table["item"])


def test_similar(trained):
    asked = trained.item
    if trained.model.titles is not None:  # a part of the title, in another case
        asked = trained.model.titles[collab.find_row(trained.model.item_ids, asked)][:-1].upper()
    found = trained.ask("similar", "--item", asked, "-n", 4)
    assert found["item"] == trained.item
    assert_same(found["items"], as_json(collab.find_similar(trained.model, trained.item, n=4)))
    assert 1 > found["items"][0]["similarity"] > found["items"][3]["similarity"] > -1


def test_info(trained):
    found = trained.ask("info")
    assert found == as_json(collab.describe_model(trained.model))
    assert found["mse"] == json.loads((trained.folder / "m.json").read_text())["mse"]


def test_interpret(trained):
    found = trained.ask("interpret", "-n", 5, "--output", "likings.png")
    most, least = collab.interpret(trained.model, n=5)
    assert_same(found, {"most": as_json(most), "least": as_json(least)})
    assert most[0].rating > most[4].rating > least[4].rating > least[0].rating
    assert_picture(trained.folder / "likings.png")


def test_map(trained):
    """SVG, of which the texts can be read back."""
    trained.run("map", "m.pt", "--output", "map.svg")
    counts = collab.count_ratings(trained.model)
    title = collab.shorten(collab.find_title(trained.model, counts.argmax().item()))
    assert title in read_comments(trained.folder / "map.svg")


def test_plot(trained):
    """Runs of one name in two folders are two curves."""
    (trained.folder / "other").mkdir()
    (trained.folder / "other" / "m.json").write_text((trained.folder / "m.json").read_text())
    trained.run("plot", "m.json", "other/m.json", "--output", "runs.svg")
    texts = read_comments(trained.folder / "runs.svg")
    assert {"epoch", "test MSE", "learning rate (solid)", "momentum (dotted)"} <= texts
    assert {"m.json", "other/m.json"} <= texts


def read_comments(path):
    """The texts of an SVG of matplotlib's, which says each in a comment beside its outlines."""
    text = path.read_text()
    xml.etree.ElementTree.fromstring(text)
    return {each.strip() for each in re.findall(r"<!-- (.*?) -->", text, re.DOTALL)}


def assert_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_lr_find(trained):
    arguments = ("lr-find", *trained.source, "--plot", "lr.png", "--json")
    found = json.loads(trained.run(*arguments))
    assert_picture(trained.folder / "lr.png")
    where = {"ratings": trained.folder / trained.source[1]} if trained.source else {}
    names = ("user", "item", "rating", "timestamp")
    where["columns"] = dict(zip(names, trained.columns[1::2], strict=False))
    curve = collab.find_lr(collab.set_up(collab.read(**where)))
    assert_same(found, as_json(curve))
    assert 1e-4 < found["valley"] < 1
    assert found["lrs"][0] == 1e-4


@pytest.mark.parametrize(
    "options",
    [(), ("--recipe", "best", "--ensemble", "2", "--n-factors", "4", "--batch-size", "512")],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path, ratings, options):
    """Real processes, `kill -9`: at random moments, and while a checkpoint is written."""
    write_some(tmp_path, ratings)
    command = [sys.executable, ROOT / "collab.py", "train"]
    fresh = ["--ratings", "some.parquet", "--epochs", "60", "--seed", "3", *options]

    def start(*arguments):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, *arguments], cwd=tmp_path, **quiet)

    assert start(*fresh, "--save", "whole.pt").wait() == 0
    arguments, n_done = [*fresh, "--checkpoint", "c.pt"], 0
    for moment in ("writing", "random"):
        process, before = start(*arguments), find_inode(tmp_path / "c.pt")
        while find_inode(tmp_path / "c.pt") == before:  # an epoch further than before
            assert process.poll() is None
            time.sleep(0.001)
        if moment == "random":
            time.sleep(random.random() / 10)
        else:
            while not list(tmp_path.glob(".*.part")):
                assert process.poll() is None
        process.kill()
        process.wait()
        assert n_done < read_rows(tmp_path / "c.pt") < 60
        n_done, arguments = read_rows(tmp_path / "c.pt"), ["--resume", "c.pt"]
    assert start("--resume", "c.pt", "--save", "parts.pt", "--metrics", "m.json").wait() == 0
    whole, parts = (collab.load_model(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    for ours, theirs in zip(whole.params, parts.params, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(json.loads((tmp_path / "m.json").read_text())["epochs"]) == 60
    assert whole.figures["mse"] == parts.figures["mse"]


def find_inode(path):
    """Which file a name is of: another one after each checkpoint."""
    return path.stat().st_ino if path.exists() else None


def read_rows(path):
    """How many epochs a checkpoint is after, 0 without one."""
    return len(collab.load_checkpoint(path)["rows"]) if path.exists() else 0
