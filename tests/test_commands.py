"""Every command on three kinds of data; processes that are killed, piped, or have no terminal."""

import json
import os
import random
import re
import subprocess
import sys
import time
import xml.etree.ElementTree
from functools import partial
from pathlib import Path
from signal import SIGINT as INT
from signal import SIGTERM as TERM
from types import SimpleNamespace

import numpy
import polars
import pytest
import torch
from conftest import COLUMNS, FLAGS, ROOT, call

import collab
import data

# What is trained, a user, an item, the columns, and the ending of what is written.
SOURCES = {
    "ml-100k": ((), 196, 242, (), ".parquet"),
    "strings": (("--ratings", "r.csv", "--items", "i.csv"), "ü-0 22", '50-x,"2"', FLAGS, ".csv"),
    "parquet": (("--ratings", "r.parquet", "--recipe", "best"), 22, 50, (), ".tsv"),
}


@pytest.fixture(scope="module", params=SOURCES)
def trained(request, tmp_path_factory, small, ml_100k):
    """A model, where it lies, and how it is asked by the command line."""
    source, user, item, flags, ending = SOURCES[request.param]
    out, source = tmp_path_factory.mktemp(request.param), (*source, *flags)
    results = ("--save", out / "m.pt", "--metrics", out / "m.json")
    done = call(small, "train", *source, "--epochs", 2, *results)
    assert done.stdout.splitlines()[-1].startswith("test mse "), done.stderr

    def ask(command, *arguments):
        done = call(small, command, out / "m.pt", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    about = {"user": user, "item": item, "flags": flags, "source": source, "folder": small}
    about |= {"out": out, "ending": ending, "path": small / source[1] if source else ml_100k}
    return SimpleNamespace(ask=ask, model=collab.load_model(out / "m.pt"), **about)


def as_json(value):
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=polars.DataFrame.to_dicts))


READ = {".csv": polars.read_csv, ".parquet": polars.read_parquet}
READ[".tsv"] = partial(polars.read_csv, separator="\t")


def test_evaluate_and_predict(trained):
    """On its test part, and on all that it was trained on, if one insists; and one pair."""
    model = trained.model
    expected = collab.evaluate(model) | {"k": 5} | collab.rank(model, k=5)
    assert trained.ask("evaluate", "--ranking", "-k", 5) == as_json(expected)
    frame = data.read_ratings(trained.path, columns=COLUMNS if trained.flags else None)
    found = trained.ask("evaluate", "--ratings", trained.path, *trained.flags, "--allow-overlap")
    assert found == as_json(collab.evaluate(model, frame, allow_overlap=True))
    pair = polars.DataFrame({"user": [trained.user], "item": [trained.item]})
    found = trained.ask("predict", "--user", trained.user, "--item", trained.item)
    assert found.pop("title") in model.titles
    assert found == as_json(collab.predict(model, pair).row(0, named=True))


def test_predict_pairs_streams_the_same(trained):
    """More pairs than are held at a time, in file order, each as `predict` alone has it."""
    generator, n_pairs = numpy.random.default_rng(0), 200_000 if trained.ending == ".tsv" else 300
    raw = zip(("user", "item"), trained.model.ids, strict=True)
    rows = {name: ids.gather(generator.integers(len(ids), size=n_pairs)) for name, ids in raw}
    asked, output = polars.DataFrame(rows), trained.out / f"predicted{trained.ending}"
    asked.write_csv(trained.out / "pairs.csv")
    found = trained.ask("predict", "--pairs", trained.out / "pairs.csv", "--output", output)
    assert found["output"] == str(output)
    answers, expected = READ[trained.ending](output), collab.predict(trained.model, asked)
    is_ensemble = trained.ending == ".tsv"
    assert answers.columns == expected.columns[: 3 + is_ensemble]
    for name in answers.columns[:2]:
        assert answers[name].cast(polars.String).equals(asked[name].cast(polars.String))
    for name in answers.columns[2:]:
        assert numpy.allclose(answers[name], expected[name], atol=1e-5)
    assert (expected["deviation"].max() > 0) == is_ensemble
    assert found["n_pairs"] == n_pairs


def test_recommend(trained):
    """To one, and to all: the highest predictions of what a user has not seen."""
    model, output = trained.model, trained.out / f"all{trained.ending}"
    trained.ask("recommend", "--all-users", "--output", output, "-n", 3, "--by", "rating")
    listed, tensors = READ[trained.ending](output), model.tensors
    assert listed["user"].is_in(model.ids.users.implode()).all()
    assert listed["user"].n_unique() > len(model.ids.users) * 0.8  # the others have rated all
    rows, columns = (
        torch.cat([tensors[f"{part}_{n}"] for part in ("train", "test")])
        for n in ("users", "items")
    )
    known = model.ids.items.filter(polars.Series(model.seen[1].numpy()))
    for user in (trained.user, *model.ids.users.sample(9, seed=0)):
        is_own = rows == model.ids.users.to_list().index(user)
        seen = model.ids.items.gather(columns[is_own].numpy())
        pairs = model.ids.items.filter(~model.ids.items.is_in(seen.implode())).to_frame("item")
        pairs = collab.predict(model, pairs.with_columns(user=polars.lit(user)))
        pairs = pairs.filter(pairs["item"].is_in(known.implode()))
        expected = pairs["rating"].top_k(3).sort(descending=True).to_list()
        own = listed.filter(polars.col("user") == user)
        assert not set(own["item"]) & set(seen)
        assert own["rank"].to_list() == [1, 2, 3][: len(expected)]
        assert own["rating"].to_list() == pytest.approx(expected, abs=1e-5)
        top = collab.recommend(model, user, n=3, by="rating")
        assert top["rating"].to_list() == pytest.approx(expected, abs=1e-5)
    found = trained.ask("recommend", "--user", user, "-n", 3, "--by", "rating")
    assert found == as_json({"user": user, "items": top.select("item", "title", "rating")})
    everything = collab.recommend(model, user, n=10**6, include_seen=True)
    assert set(everything["item"]) == set(known)
    found = trained.ask("recommend", "--user", user, "-n", 10**6, "--include-seen")["items"]
    assert found == as_json(everything.select("item", "title", "rating"))
    # A new user, by ratings on the command line and in a file.
    rated, answers = model.ids.items[:3].to_frame("item"), []
    for ratings in ([5, 1, 4], [1, 5, 2]):
        rated.with_columns(rating=polars.Series(ratings)).write_csv(trained.out / "mine.csv")
        answers.append(trained.ask("recommend", "--rated", trained.out / "mine.csv")["items"])
    assert answers[0] != answers[1]
    assert not {each["item"] for each in answers[0]} & set(rated["item"])
    if rated["item"].dtype != polars.String:  # there are commas in the others
        text = ",".join(map("{}:{}".format, rated["item"], (1, 5, 2)))
        assert trained.ask("recommend", "--rated", text)["items"] == answers[1]


def test_similar_info_and_interpret(trained):
    found = trained.ask("similar", "--item", trained.item, "-n", 4)
    expected = collab.find_similar(trained.model, trained.item, n=4)
    assert found.items() >= {"item": trained.item, "items": as_json(expected)}.items()
    items = collab.interpret(trained.model)
    expected = {"most": as_json(items.head(5)), "least": as_json(items.reverse().head(5))}
    assert trained.ask("interpret", "-n", 5) == expected
    figures = json.loads((trained.out / "m.json").read_text())
    assert (
        trained.ask("info").items() >= {n: v for n, v in figures.items() if n != "epochs"}.items()
    )


def test_pictures(trained):
    """SVG, of which the texts can be read back: matplotlib says each in a comment."""
    (trained.out / "b.json").write_text((trained.out / "m.json").read_text())
    most = collab.interpret(trained.model).sort("n_ratings")["title"][-1]
    texts = {"map m.pt": {most}, "plot m.json b.json": {"epoch", "test MSE", "m", "b"}}
    for command, expected in texts.items():
        done = call(trained.out, *command.split(), "--output", "x.svg")
        text = (trained.out / "x.svg").read_text()
        assert xml.etree.ElementTree.fromstring(text).tag.endswith("svg"), done.stderr
        found = {each.strip()[:33] for each in re.findall(r"<!--(.*?)-->", text, re.DOTALL)}
        assert {text[:33] for text in expected} <= found
    plot = ("lr-find", *trained.source, "--plot", trained.out / "lr.png")
    found = json.loads(call(trained.folder, *plot, "--json").stdout)
    assert (trained.out / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert 1e-4 == found["lrs"][0] < found["valley"] < 1
    if not trained.source:
        assert found == as_json(collab.find_lr(collab.prepare(collab.read())))


# Processes.


@pytest.fixture
def start(tmp_path):
    """Start `python collab.py ...`, or another beginning of a command, in an empty folder."""
    started = []

    def start(*arguments, program=(ROOT / "collab.py",), **environment):
        command = [sys.executable, *map(str, (*program, *arguments))]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options = {"cwd": tmp_path, "env": os.environ | environment, "text": True, **pipes}
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "options", ["", "--recipe best --ensemble 2 --n-factors 4 --batch-size 512"]
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path, small, start, options):
    """`kill -9` at random moments, and while a checkpoint is written."""
    fresh = ("train", "--ratings", small / "r.parquet", "--epochs", 60, *options.split())
    whole, arguments, before = start(*fresh, "--save", "whole.pt"), (*fresh, "--checkpoint", "c"), 0
    for moment in ("writing", "random"):
        process, path = start(*arguments), tmp_path / "c"
        while not path.exists() or path.stat().st_ino == before:  # an epoch further
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(random.random() / 10 * (moment == "random"))
        while moment == "writing" and not list(tmp_path.glob(".*.part")):
            assert process.poll() is None
        process.kill()
        process.wait()
        before, arguments = path.stat().st_ino, ("train", "--resume", "c")
    parts = start("train", "--resume", "c", "--save", "parts.pt")
    assert [len(each.communicate()[0].splitlines()) for each in (whole, parts)] == [62, 62]
    whole, parts = (collab.load_model(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    assert torch.equal(whole.tensors["tables"], parts.tensors["tables"])


WAITING = ["a pipe without a writer", "rank 0", "rank 1"]
IMPORTS = ["click._compat", "polars.dataframe", "torch._C", "torch.nn"]


@pytest.mark.parametrize(
    ("state", "signals"),
    [
        *((state, signals) for state in IMPORTS for signals in ((INT,), (TERM,))),
        *((state, signals) for state in WAITING[:2] for signals in ((INT,), (TERM, TERM))),
        *(("rank 1", (INT, INT)), ("training", (TERM,)), ("training", (INT, INT))),
    ],
)
def test_a_signal_stops_all_that_takes_time(start, tmp_path, small, state, signals):
    """In one line or none, and nothing is left half-written."""
    (tmp_path / "m.pt").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_000 + os.getpid() % 10_000)}
    where |= {"WORLD_SIZE": "2", "RANK": state[-1]} if "rank" in state else {}
    program = (
        ("-X", "importtime", ROOT / "collab.py") if state in IMPORTS else (ROOT / "collab.py",)
    )
    ratings = "pipe" if state in WAITING else small / "r.parquet"
    command = ("train", "--ratings", ratings, "--epochs", 10**6, "--save", "m.pt")
    process, times = start(*command, program=program, **where), []
    while state in IMPORTS and state not in process.stderr.readline():
        pass
    for _ in range(3 * (state == "training")):  # two epochs are through
        process.stdout.readline()
    while state in WAITING and (len(times) < 8 or times[-1] > times[-8]):  # it is at work
        time.sleep(0.1)
        figures = Path(f"/proc/{process.pid}/stat").read_text().split()
        times.append(sum(map(int, figures[13:15])))
    for each in signals:
        process.send_signal(each)
    lines = process.communicate(timeout=10)[1].splitlines()
    lines = [line for line in lines if not re.match("79 users|without a|import time:", line)]
    assert len(lines) <= 1, lines
    assert process.returncode in (130, 143, -15)
    assert sorted(os.listdir(tmp_path)) == ["m.pt", "pipe"]
    assert (tmp_path / "m.pt").read_text() == "old"


@pytest.mark.parametrize("end", ["1>&-", "2>&-", "| head -n 1", "2>&1 | head -n 0"])
def test_a_stream_that_is_closed_is_no_failure(tmp_path, small, end):
    command = f"'{sys.executable}' '{ROOT / 'collab.py'}' train --ratings '{small / 'r.parquet'}'"
    command = f"set -o pipefail; {command} --epochs 30 --save m.pt --metrics m.json {end}"
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", command], **options)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert json.loads((tmp_path / "m.json").read_text())["n_users"] == 79
    assert collab.load_model(tmp_path / "m.pt")


def test_a_terminal_of_another_encoding_is_no_failure(tmp_path, start):
    """What cp1252 lacks is escaped; JSON is ASCII."""
    title = polars.format("片 Film {}", "item")
    frame = polars.DataFrame(
        {"user": [1, 1, 2, 2] * 9, "item": [*range(36)], "rating": [1, 2] * 18}
    )
    items = frame.select("item", title=title)
    trained = collab.train_model(collab.prepare(collab.read(frame, items=items), epochs=1))
    collab.save_model(tmp_path / "m.pt", trained)
    recommend = ("recommend", "m.pt", "--user", 1, "-n", 1)
    out, errors = start(*recommend, PYTHONIOENCODING="cp1252:strict").communicate()
    assert "\\u7247 Film" in out, errors
    out, _ = start(*recommend, "--json", PYTHONIOENCODING="ascii").communicate()
    assert json.loads(out)["items"][0]["title"].startswith("片 Film ")


@pytest.mark.parametrize(("name", "flags"), [(b"r.csv", FLAGS), (b"r.parquet", ())])
def test_a_file_of_any_name(tmp_path, small, start, name, flags):
    """A name that is no UTF-8: the model is saved, loaded, and told of."""
    path = tmp_path / os.fsdecode(b"\xff\xfe" + name)
    path.write_bytes((small / os.fsdecode(name)).read_bytes())
    train = ("train", "--ratings", path.name, "--epochs", 1, "--save", "m.pt", "--checkpoint", "c")
    for command in ((*train, *flags), ("info", "m.pt"), ("train", "--resume", "c")):
        process = start(*command)
        assert (process.communicate()[1].count("Traceback"), process.returncode) == (0, 0)


@pytest.mark.parametrize("command", [(), ("--help",), ("train", "--help")])
def test_help_imports_nothing_heavy(start, command):
    code = "import sys, collab, atexit; sys.argv[0] = 'collab.py'; heavy = {'numpy', 'torch._C'}\n"
    code += "atexit.register(lambda: print(*heavy & {*sys.modules}))\ncollab.main()"
    out, errors = start(*command, program=("-c", code), PYTHONPATH=str(ROOT)).communicate()
    assert (out or errors).startswith("Usage: collab.py") or errors.startswith("Usage: collab.py")
    assert out.splitlines()[-1] == ""
