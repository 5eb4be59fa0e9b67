"""Bad input of every kind: one line that says what is wrong, and no file new, changed or gone."""

import gzip
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import polars
import pytest
import torch

import collab

# Ratings of nine users and eight items: a line added after them is line 56.
PAIRS = [(user, item) for user in range(1, 10) for item in range(1, 9) if (user + item) % 4]
LINES = [f"User {user},it{item},{1 + user * item % 5}" for user, item in PAIRS]
NEXT = len(LINES) + 2
TIMES = [f"{line},{880_000_000 + number}" for number, line in enumerate(LINES)]
TITLES = [f"it{item},Film {item} ({1990 + item}),{'AB'[item % 2]}" for item in range(1, 9)]


def table(*rows, header="user,item,rating", good=LINES):
    """A text of good lines and then these."""
    return "".join(f"{line}\n" for line in (header, *good, *rows))


def items(*rows, header="item,title,genre"):
    return table(*rows, header=header, good=TITLES)


def parquet(cut=None, **columns):
    """A writer of a Parquet file of some rows in which these columns are others."""
    whole = {"user": [1, 2, 3] * 8, "item": list(range(24)), "rating": [1.0, 2.0, 3.0] * 8}

    def write(path):
        polars.DataFrame({**whole, **columns}, strict=False).write_parquet(path)
        path.write_bytes(path.read_bytes()[:cut])

    return write


def zipped(content):
    """A writer of a file as torch makes one."""
    return lambda path: torch.save(content, path)


class Bomb:
    """What makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def tampered(change, source="m.pt"):
    """A writer of the model in the folder after `change` of its content."""

    def write(path):
        content = torch.load(path.parent / source, weights_only=True)
        change(content)
        torch.save(content, path)

    return write


def figures(**changes):
    """A writer of the metrics in the folder with these options, figures or ones of an epoch."""

    def write(path):
        content = json.loads((path.parent / "m.json").read_text())
        for name, value in changes.items():
            parts = (content["options"], content["epochs"][0], content)
            next(part for part in parts if name in part)[name] = value
        path.write_text(json.dumps(content))

    return write


def link(target):
    return lambda path: path.symlink_to(target)


def cut(source, n_bytes):
    return lambda path: path.write_bytes((path.parent / source).read_bytes()[:n_bytes])


class Case(NamedTuple):
    files: dict[str, str | bytes | Callable]  # by name: what is in it, or what writes it
    arguments: str  # as in a shell
    words: tuple[str, ...]  # that are in the line
    status: int = 1
    is_trained: bool = False  # whether epochs are printed before


def of(content, arguments, *words, **rest):
    """A case of `train --ratings` on a file of this content."""
    return Case({"r.csv": content}, f"train --epochs 1 --ratings r.csv {arguments}", words, **rest)


def beside(files, arguments, *words, **rest):
    """A case of `train` on good ratings with other files beside them."""
    files = {"r.csv": table(), **files}
    return Case(files, f"train --epochs 1 --ratings r.csv {arguments}", words, **rest)


def asked(arguments, *words, files=(), **rest):
    """A case of a command on a saved model."""
    return Case(dict(files), arguments, words, **rest)


RATINGS = {
    "empty": of("", "", "r.csv: no ratings"),
    "header only": of("user,item,rating\n", "", "r.csv: no ratings"),
    "empty lines": of("\n\n\n", "", "r.csv: no ratings"),
    "missing column": of("user,rating\n1,2\n", "", "r.csv, line 1", "no column item"),
    "one column": of("text\n", "", "r.csv, line 1: no tab, comma"),
    "text as rating": of(table("x,y,five"), "", f"line {NEXT}", "rating 'five'"),
    "nan": of(table("x,y,nan"), "", f"line {NEXT}", "'nan' is not finite"),
    "infinity": of(table("x,y,-inf"), "", f"line {NEXT}", "'-inf' is not finite"),
    "beyond float32": of(table("x,y,1e39"), "", f"line {NEXT}", "'1e39' is not finite"),
    "rating out of range": of(
        table("x,y,9"), "--rating-range 1 5", f"r.csv, line {NEXT}: rating '9' is not in 1 to 5"
    ),
    "too few fields": of(table("x,y"), "", f"line {NEXT}", "fields: 2, not 3"),
    "too many fields": of(table("x,y,3,4"), "", f"line {NEXT}", "fields: 4, not 3"),
    "empty rating": of(table("x,y,"), "", f"line {NEXT}", "missing (rating)"),
    "empty id": of(table(",y,3"), "", f"line {NEXT}", "missing (user)"),
    "utf-16": of(table().encode("utf-16"), "", "r.csv, line 1", "UTF-16"),
    "latin-1": of(table("é,y,3").encode("latin-1"), "", f"line {NEXT}: it is not UTF-8"),
    "unclosed quote": of(table('"x,y,3'), "", f"r.csv, line {NEXT}: a quote"),
    "truncated gzip": of(gzip.compress(table().encode())[:90], "", "r.csv: no good gzip"),
    "no gzip": of(b"\x1f\x8b is how one begins", "", "r.csv: no good gzip"),
    "broken gzip": of(gzip.compress(table().encode())[:-4] + b"1234", "", "r.csv: no good gzip"),
    "no zip": Case({"r.zip": table()}, "train --ratings r.zip", ("r.zip: no good zip",)),
    "boolean ids": of(parquet(user=[True, False] * 12), "", "'user'", "of type Boolean"),
    "text ratings": of(parquet(rating=["1", "2"] * 12), "", "'rating'", "of type String"),
    "null id": of(parquet(user=[1, 2, None] * 8), "", "r.csv, row 3: a value is missing (user)"),
    "null rating": of(parquet(rating=[1.0, None] * 12), "", "row 2", "missing (rating)"),
    "nan in parquet": of(parquet(rating=[1.0, float("nan")] * 12), "", "row 2", "not finite"),
    "truncated parquet": of(parquet(cut=500), "", "r.csv: no good Parquet"),
    "start of parquet": of(b"PAR1", "", "r.csv: no good Parquet"),
    "folder": Case({"d": Path.mkdir}, "train --ratings d", ("d: no ratings.csv",)),
    "missing": Case({}, "train --ratings r.csv", ("r.csv: No such file",)),
    "unreadable": Case({}, "train --ratings /proc/self/mem", ("/proc/self/mem: ",)),
    "one user": of(table(good=[f"7,{i},{i % 5}" for i in range(30)]), "", "r.csv", "one user, 7"),
    "one item": of(table(good=[f"{i},7,{i % 5}" for i in range(30)]), "", "r.csv", "one item, 7"),
    "one rating": of(table(good=["1,2,3"]), "", "0.1 of 1 ratings"),
    "two ratings": of(table(good=["1,2,3", "2,3,4"]), "", "0.1 of 2 ratings"),
    "all equal": of(table(good=[f"{a},{b},3" for a, b in PAIRS]), "", "r.csv", "are 3: "),
    "similar ids": of(table("user 1,it1,3"), "", "'User 1' and 'user 1' differ only in case"),
    "spaces in ids": of(table("User  1,it1,3"), "", "'User  1' and 'User 1' differ only in"),
    "unknown column": of(table(), "--user-column kunde", "line 1", "no column 'kunde' for user"),
    "column without header": of("1,2,3\n" * 9, "--user-column u", "no header, so no column 'u'"),
    "no time": of(
        table("x,y,3,noon", header="user,item,rating,time", good=TIMES),
        "",
        f"r.csv, line {NEXT}: could not parse timestamp 'noon'",
    ),
    "split of ml-100k": of(table(), "--split u1", "the split u1", f"{len(LINES)}"),
    "last without times": of(table(), "--split last10", "the split last10 needs timestamps"),
    "time without times": of(table(), "--features id,time", "the feature time", "no timestamps"),
    "side without tables": of(table(), "--features side", "the feature side", "no tables"),
    "range reversed": of(table(), "--rating-range 5 1", "5 is not below 1", status=2),
    "range of nan": of(table(), "--rating-range 1 nan", "nan is not a finite", status=2),
    "ordinal of two": of(
        table(good=[f"{a},{b},{a % 2}" for a, b in PAIRS]),
        "--recipe best --loss ordinal",
        "--loss ordinal",
    ),
    "range beyond float32": of(table(), "--rating-range -1e308 1e308", "1e+308", status=2),
    "lr beyond float32": of(
        table(),
        "--lr-max 1e300 --weight-decay 0 --bias-decay 0",
        "1e+300",
        status=2,
    ),
    "folds of few": Case(
        {"r.csv": table()},
        "cross-validate --ratings r.csv --folds 999",
        ("into 999 folds",),
    ),
    "result over ratings": of(table(), "--save r.csv", "r.csv", status=2),
}
BESIDE = {
    "test shares pairs": beside(
        {"t.csv": table(good=LINES[:3])}, "--test t.csv", "3 of the test part's", "User 1"
    ),
    "test missing": beside({}, "--test t.csv", "t.csv: No such file"),
    "test empty": beside({"t.csv": ""}, "--test t.csv", "t.csv: no ratings"),
    "test with split": beside(
        {"t.csv": table()}, "--test t.csv --split random", "--split random and --test", status=2
    ),
    "test with holdout": beside(
        {"t.csv": table(good=["User 1,new,3"])},
        "--test t.csv --holdout 0.5",
        "--holdout 0.5 and --test",
        status=2,
    ),
    "test out of range": beside(
        {"t.csv": table(good=["x,y,9"])}, "--test t.csv --rating-range 1 5", "t.csv, line 2", "'9'"
    ),
    "item twice": beside({"i.csv": items("it1,x,A")}, "--items i.csv", "i.csv: the item 'it1'"),
    "items without ids": beside(
        {"i.csv": items(header="code,title,genre")}, "--items i.csv", "i.csv, line 1", "item"
    ),
    "items missing": beside({}, "--items i.csv", "i.csv: No such file"),
    "items empty": beside({"i.csv": ""}, "--items i.csv", "i.csv: no items"),
    "items of a folder": beside({"d": Path.mkdir}, "--items d", "d: no "),
    "film twice": beside(
        {"movies.csv": "movieId,title,genres\n1,x,A\n1,y,B\n"},
        "--items movies.csv",
        "movies.csv: the item 1 ",
    ),
    "save to a folder": beside({"d": Path.mkdir}, "--save d", "d cannot be written"),
    "save to no folder": beside({}, "--save d/m.pt", "d/m.pt cannot be written"),
    "save and checkpoint": beside({}, "--save x --checkpoint ./x", "both x", status=2),
    "full: save": beside({}, "--save /dev/full", "/dev/full", "No space", is_trained=True),
    "full: metrics": beside({}, "--metrics /dev/full", "/dev/full", "No space", is_trained=True),
    "full: checkpoint": beside(
        {}, "--checkpoint /dev/full", "/dev/full", "No space", is_trained=True
    ),
    "lr-find: ending": Case({}, "lr-find --plot x.gif", ("'x.gif'", ".png or .svg"), 2),
}
MODELS = {
    "model missing": asked("info x.pt", "x.pt: No such file"),
    "model a folder": asked("info d", "d: Is a directory", files={"d": Path.mkdir}),
    "model truncated": asked("info x.pt", "x.pt: not a model", files={"x.pt": cut("m.pt", 4000)}),
    "model of text": asked("map x.pt --output x.png", "x.pt: not a model", files={"x.pt": "text"}),
    "model of metrics": asked("interpret m.json", "m.json: not a model"),
    "another version": asked(
        "info x.pt",
        "x.pt",
        "'collab 1', not 'collab 3'",
        files={"x.pt": zipped({"format": "collab 1"})},
    ),
    "a tensor": asked(
        "info x.pt", "x.pt: not a model", files={"x.pt": zipped({"a": torch.ones(3)})}
    ),
    "pickled code": asked(
        "info x.pt",
        "x.pt: not a model",
        files={"x.pt": lambda p: p.write_bytes(pickle.dumps(Bomb()))},
    ),
    "zipped code": asked("info x.pt", "x.pt: not a model", files={"x.pt": zipped(Bomb())}),
    "item out of the table": asked(
        "recommend x.pt --all-users --output o.csv",
        "x.pt: not a model",
        "do not fit",
        files={"x.pt": tampered(lambda model: model["rated"][1].add_(9)), "o.csv": "old"},
    ),
    "item below the table": asked(
        "similar x.pt --item it1",
        "x.pt: not a model",
        files={"x.pt": tampered(lambda model: model["rated"][1].sub_(9))},
    ),
    "tables of two sizes": asked(
        "info x.pt",
        "x.pt: not a model",
        files={"x.pt": tampered(lambda model: model["params"][0]["user_factors"].resize_(3, 2))},
    ),
    "a part is missing": asked(
        "info x.pt", "x.pt: not a model", files={"x.pt": tampered(lambda model: model.pop("seen"))}
    ),
    "figures missing": asked(
        "evaluate x.pt",
        "x.pt: not a model",
        files={"x.pt": tampered(lambda model: model["figures"].clear())},
    ),
    "items as floats": asked(
        "similar x.pt --item it1",
        "x.pt: not a model",
        files={
            "x.pt": tampered(
                lambda model: model.update(rated=(model["rated"][0], model["rated"][1].float()))
            )
        },
    ),
    "titles as numbers": asked(
        "recommend x.pt --user 'User 1'",
        "x.pt: not a model",
        files={"x.pt": tampered(lambda model: model.update(titles=[1] * 8))},
    ),
    "unknown user": asked("recommend m.pt --user 99", "no user '99' in the model"),
    "user in another case": asked("recommend m.pt --user 'user 1'", "'user 1'", "is 'User 1'"),
    "unknown item": asked("similar m.pt --item nope", "no item 'nope'", "in no title"),
    "item in another case": asked("similar m.pt --item IT3", "'IT3'", "there is 'it3'"),
    "ambiguous title": asked("similar m.pt --item film", "'film' is in 8 titles", "it3 'Film 3 "),
    "empty item": asked("similar m.pt --item ''", "no item ''"),
    "user of many digits": asked(
        f"recommend x.pt --user {'9' * 5000}",
        "no user '99",
        files={
            "x.pt": tampered(lambda model: model.update(user_ids=list(range(9))))  # of numbers
        },
    ),
    "no number": asked("recommend m.pt --user 'User 1' -n 0", "'-n': 0 is not", status=2),
    "negative number": asked("interpret m.pt -n -3", "'-n': -3 is not", status=2),
    "huge number": asked(f"similar m.pt --item it1 -n 1{'0' * 30}", "'-n': 10000", status=2),
}
EVALUATE = {
    "pairs of the training": asked(
        "evaluate m.pt --ratings r.csv", "r.csv: ", "training part", files={"r.csv": table()}
    ),
    "unknown user of ratings": asked(
        "evaluate m.pt --ratings r.csv",
        "no user 'x' in the model",
        files={"r.csv": table("x,it1,3")},
    ),
    "line of an unknown user": asked(
        "evaluate m.pt --ratings r.csv",
        f"r.csv, line {NEXT}: no user 'x' in the model",
        files={"r.csv": table("x,it1,3")},
    ),
    "nobody known": asked(
        "evaluate m.pt --ratings r.csv --allow-unknown --ranking -k 3",
        "no rating",
        files={"r.csv": table(good=["x,it1,3"])},
    ),
    "k of too many": asked("evaluate m.pt --ranking -k 9", "8 items, not 9"),
    "no rating so high": asked("evaluate m.pt --ranking -k 3 --min-rating 99", "at least 99"),
    "ratings of a model": asked("evaluate m.pt --ratings m.pt", "m.pt: no ratings.csv"),
}
PREDICT = {
    "unknown id of a pair": asked(
        "predict m.pt --pairs p.csv --output o.csv",
        "p.csv, line 4: no item 'nope'",
        files={"p.csv": "user,item\nUser 1,it1\nUser 2,it2\nUser 3,nope\n", "o.csv": "old"},
    ),
    "unknown id to Parquet": asked(
        "predict m.pt --pairs p.csv --output o.parquet",
        "p.csv, line 2: no user 'x'",
        files={"p.csv": "user,item\nx,it1\n"},
    ),
    "pairs empty": asked(
        "predict m.pt --pairs p.csv --output o.csv", "p.csv: no pairs", files={"p.csv": ""}
    ),
    "pairs of a header": asked(
        "predict m.pt --pairs p.csv --output o.csv",
        "p.csv: no pairs",
        files={"p.csv": "user,item\n"},
    ),
    "pairs missing": asked("predict m.pt --pairs p.csv --output o.csv", "p.csv: No such file"),
    "pairs written over": asked(
        "predict m.pt --pairs p.csv --output p.csv",
        "p.csv is read, and would be written over",
        files={"p.csv": "user,item\nx,it1\n"},
        status=2,
    ),
    "output of another ending": asked(
        "predict m.pt --pairs p.csv --output o.txt", "'o.txt' does not end in .csv", status=2
    ),
    "output in no folder": asked(
        "predict m.pt --pairs p.csv --output d/o.csv", "d/o.csv cannot be written"
    ),
    "pairs without output": asked("predict m.pt --pairs p.csv", "--output", status=2),
    "output without pairs": asked(
        "predict m.pt --user x --item y --output o.csv", "--output goes with --pairs", status=2
    ),
    "user without item": asked("predict m.pt --user 'User 1'", "--item", status=2),
    "full: csv": asked(
        "predict m.pt --pairs p.csv --output o.csv",
        "o.csv cannot be written: No space",
        files={"p.csv": "user,item\nUser 1,it1\n", "o.csv": link("/dev/full")},
    ),
    "full: parquet": asked(
        "recommend m.pt --all-users --output o.parquet",
        "o.parquet cannot be written",
        files={"o.parquet": link("/dev/full")},
    ),
}
RECOMMEND = {
    "rated nonsense": asked("recommend m.pt --rated nonsense", "--rated nonsense: neither"),
    "rated without rating": asked("recommend m.pt --rated it1:", "--rated it1:: neither"),
    "rated without item": asked("recommend m.pt --rated :3", "--rated :3: neither"),
    "rated out of range": asked("recommend m.pt --rated it1:9", "rating 9 of item 'it1'", "1 to 5"),
    "rated nan": asked("recommend m.pt --rated it1:nan", "rating nan of item 'it1'"),
    "rated unknown": asked("recommend m.pt --rated it1:3,nope:3", "no item 'nope'"),
    "rated nothing": asked("recommend m.pt --rated ''", "--rated"),
    "rated of a comma": asked("recommend m.pt --rated ,", "--rated ,: neither"),
    "rated empty file": asked("recommend m.pt --rated r", "r: no ratings", files={"r": ""}),
    "rated without column": asked(
        "recommend m.pt --rated r", "r, line 1", files={"r": "item,title\nit1,x\n"}
    ),
    "user and rated": asked("recommend m.pt --user x --rated it1:3", "Give one of", status=2),
    "nobody": asked("recommend m.pt", "Give one of --user", status=2),
    "all without output": asked("recommend m.pt --all-users", "--output go together", status=2),
    "similar to nothing": asked("similar m.pt", "Missing option '--item'", status=2),
}
PICTURES = {
    "metrics of text": asked("plot x.json --output x.png", "x.json", files={"x.json": "text"}),
    "metrics of another kind": asked(
        "plot x.json --output x.png", "x.json: not the figures", files={"x.json": "{}"}
    ),
    "metrics of a model": asked("plot m.pt --output x.png", "m.pt: not the figures"),
    "metrics with nan": asked(
        "plot m.json x.json --output x.png",
        "x.json: not the figures of a training: nan",
        files={"x.json": figures(mse=float("nan"))},
    ),
    "metrics with text": asked(
        "plot x.json --output x.png", "x.json: not", files={"x.json": figures(lr_max="high")}
    ),
    "metrics missing": asked("plot x.json --output x.png", "x.json: No such file"),
    "metrics with a huge number": asked(
        "plot x.json --output x.png",
        "x.json: not the figures",
        files={"x.json": figures(n_train=10**400)},
    ),
    "metrics with half a rating": asked(
        "plot x.json --output x.png",
        "x.json: not the figures",
        files={"x.json": figures(n_train=9.5)},
    ),
    "metrics of no epochs": asked(
        "plot x.json --output x.png",
        "x.json: not the figures",
        files={"x.json": figures(epochs=0)},
    ),
    "metrics of no ratings": asked(
        "plot x.json --output x.png",
        "x.json: not the figures",
        files={"x.json": figures(n_train=0)},
    ),
    "picture of another ending": asked("map m.pt --output x.pdf", "'x.pdf'", status=2),
    "picture in no folder": asked("interpret m.pt --output d/x.svg", "d/x.svg cannot be written"),
    "full: picture": asked(
        "map m.pt --output x.svg", "x.svg cannot be written", files={"x.svg": link("/dev/full")}
    ),
}
RESUME = {
    "resume from nothing": asked("train --resume x", "x: No such file"),
    "resume from garbage": asked("train --resume x", "x: not a checkpoint", files={"x": "garbage"}),
    "resume from a half": asked(
        "train --resume x", "x: not a checkpoint", files={"x": cut("k.pt", 9000)}
    ),
    "resume from a model": asked("train --resume m.pt", "m.pt: not a checkpoint", "'collab 3'"),
    "resume with an option": asked("train --resume k.pt --epochs 9", "--epochs is the", status=2),
    "resume with ratings": asked("train --resume k.pt --ratings x", "--ratings is the", status=2),
    "resume and save to one": asked("train --resume k.pt --save k.pt", "both k.pt", status=2),
    "resume on another seed": asked(
        "train --resume x",
        "x: the data is not that",
        files={"x": tampered(lambda point: point["arguments"].update(seed=5), "k.pt")},
    ),
    "resume without options": asked(
        "train --resume x",
        "x: not a checkpoint",
        files={"x": tampered(lambda point: point["arguments"].clear(), "k.pt")},
    ),
    "resume on other ratings": asked(
        "train --resume x",
        "x: the data is not that",
        files={
            "r.csv": table(),
            "x": lambda path: checkpoint(path, "--ratings", path.parent / "r.csv"),
            "./r.csv": table("new,it1,3"),
        },
    ),
}
CASES = RATINGS | BESIDE | MODELS | EVALUATE | PREDICT | RECOMMEND | PICTURES | RESUME
# Code, a broken file, a device, and an answer that is begun.
AS_PROCESSES = ("zipped code", "truncated parquet", "full: save", "unknown id of a pair")
NOTICES = re.compile(
    "ml-100k: from the cache |[0-9,]+ users, |without |this is worse |8 of 10 |loss mse, "
)

ACCEPTED = {
    "similar ids": of(table("user 1,it1,3"), "--allow-similar-ids"),
    "test shares pairs": beside({"t.csv": table(good=LINES[:3])}, "--test t.csv --allow-overlap"),
    "evaluate on the training": asked(
        "evaluate m.pt --ratings r.csv --allow-overlap", files={"r.csv": table()}
    ),
    "pairs of unknown users": asked(
        "predict m.pt --pairs p.csv --output o.csv --allow-unknown",
        files={"p.csv": "user,item\nx,it1\n"},
    ),
    "more than there are": asked("recommend m.pt --user 'User 1' -n 1000000"),
    "titles of formulas": asked(
        r"map x.pt --output x.svg",
        files={"x.pt": tampered(lambda model: model.update(titles=[r"$\frac{ 100% _^"] * 8))},
    ),
    "a file name of lines": asked(
        "plot 'two\nlines.json' --output x.svg", files={"two\nlines.json": figures()}
    ),
    "a file name of a formula": asked(
        r"plot '$\frac{$.json' --output x.svg",
        files={r"$\frac{$.json": figures()},
    ),
    "a hidden file name": asked(
        "plot _x.json --output x.svg",
        files={"_x.json": figures()},
    ),
    "everything is rated": asked(
        f"recommend m.pt --rated {','.join(f'it{item}:3' for item in range(1, 9))}",
    ),
    "a long list of ratings": asked(f"recommend m.pt --rated {','.join(['it1:3'] * 60)}"),
    "resume on ratings of one's own": asked(
        "train --resume x",
        files={
            "r.csv": table(),
            "x": lambda path: checkpoint(path, "--ratings", path.parent / "r.csv"),
        },
    ),
}


def as_params(cases):
    return [pytest.param(case, id=name) for name, case in cases.items()]


def checkpoint(path, *arguments):
    """Write what a training of an epoch leaves."""
    command = ["train", "--epochs", "1", "--checkpoint", path, *arguments]
    collab.cli([str(part) for part in command], standalone_mode=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with titles, m.pt, and its figures, m.json."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "r.csv").write_text(table())
    (folder / "i.csv").write_text(items())
    command = ["train", "--epochs", 1, "--ratings", folder / "r.csv", "--items", folder / "i.csv"]
    command += ["--save", folder / "m.pt", "--metrics", folder / "m.json"]
    collab.cli([str(part) for part in command], standalone_mode=False)
    return folder


@pytest.fixture(scope="module")
def point(tmp_path_factory, ml_100k):
    """A checkpoint of ml-100k."""
    path = tmp_path_factory.mktemp("point") / "k.pt"
    checkpoint(path)
    return path


@pytest.fixture
def prepare(folder, tmp_path, monkeypatch, request):
    """Write the files of a case into the folder, and return what the command gets."""

    def prepare(case):
        monkeypatch.chdir(tmp_path)
        for name in ("m.pt", "m.json"):
            shutil.copy(folder / name, name)
        arguments = shlex.split(case.arguments)
        if case in RESUME.values():
            shutil.copy(request.getfixturevalue("point"), "k.pt")
        for device in ("/dev/full", "/proc/self/mem"):
            if device in arguments and not os.path.exists(device):
                pytest.skip(f"no {device} here")
        for name, content in case.files.items():
            path = tmp_path / name
            if callable(content):
                content(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return arguments

    return prepare


def look(folder):
    """All that is in a folder, hidden files too."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def assert_refused(done, case):
    """One line with the words, the exit status, and nothing printed but the epochs."""
    lines = [line for line in done.stderr.splitlines() if not NOTICES.match(line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Error: ")
    for words in case.words:
        assert words in lines[0]
    assert "None" not in lines[0]
    assert done.returncode == case.status
    assert done.stdout.startswith("epoch | " if case.is_trained else "")
    assert bool(done.stdout) == case.is_trained


@pytest.mark.parametrize("case", as_params(CASES))
def test_one_line_and_nothing_half_written(case, prepare, main, tmp_path, capsys):
    arguments, before = prepare(case), look(tmp_path)
    capsys.readouterr()  # what the writers printed
    assert_refused(main(*arguments), case)
    assert look(tmp_path) == before


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_the_same_of_a_process(name, prepare, run, tmp_path):
    arguments, before = prepare(CASES[name]), look(tmp_path)
    assert_refused(run(*arguments), CASES[name])
    assert look(tmp_path) == before


@pytest.mark.parametrize("case", as_params(ACCEPTED))
def test_what_is_unusual_or_allowed_goes(case, prepare, main, capsys):
    arguments = prepare(case)
    capsys.readouterr()
    done = main(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "map m.pt --output x.png",
        "interpret m.pt --output x.png",
        "plot m.json --output x.svg",
        "lr-find --ratings r.csv --plot x.png",
    ],
)
def test_pictures_without_matplotlib(command, prepare, main, monkeypatch, tmp_path):
    case = Case({"r.csv": table()}, command, ("pip install matplotlib",))
    arguments, before = prepare(case), look(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it is an ImportError
    assert_refused(main(*arguments), case)
    assert look(tmp_path) == before


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 KiB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path / "disk")]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("option", ["--save", "--checkpoint"])
def test_a_full_disk_keeps_the_old_file(option, disk, prepare, main):
    case = beside({}, f"--n-factors 2000 {option} disk/old.pt", "disk/old.pt", "No space")
    (disk / "old.pt").write_bytes(b"old")
    arguments, before = prepare(case), look(disk)
    assert_refused(main(*arguments), case._replace(is_trained=True))
    assert look(disk) == before
