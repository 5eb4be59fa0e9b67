"""Bad input of every kind: one line that says what is wrong, and no file new, changed or gone."""

import gzip
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import polars
import pytest
import torch
from conftest import call
from hypothesis import given
from hypothesis import strategies as st

import collab

# Ratings of nine users and eight items: a line added after them is line 56.
PAIRS = [(user, item) for user in range(1, 10) for item in range(1, 9) if (user + item) % 4]
LINES = [f"User {user},it{item},{1 + user * item % 5}" for user, item in PAIRS]
TITLES = [rf"it{item},Film $\frac{{ {item} _^ 100%,{'AB'[item % 2]}" for item in range(1, 9)]


def table(*rows, header="user,item,rating", good=LINES):
    """A text of good lines and then these."""
    return "".join(f"{line}\n" for line in (header, *good, *rows))


def parquet(**columns):
    """A Parquet file of some rows in which these columns are others."""
    buffer = io.BytesIO()
    whole = {"user": [1, 2, 3] * 8, "item": list(range(24)), "rating": [1.0, 2.0, 3.0] * 8}
    polars.DataFrame({**whole, **columns}, strict=False).write_parquet(buffer)
    return buffer.getvalue()


class Bomb:
    """What makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def zipped(content):
    """A file as torch makes one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# By name: a line after the good ones.
LAST = """
five.csv x,y,five; nan.csv x,y,nan; inf.csv x,y,-inf; 1e39.csv x,y,1e39; 9.csv x,y,9; few.csv x,y
many.csv x,y,3,4; unrated.csv x,y,; noone.csv ,y,3; quote.csv "x,y,3; unknown.csv x,it1,3"""
# By name: lines, with a stroke between.
WHOLE = """
header.csv user,item,rating; lacks.csv user,rating/1,2; text.csv text; empty.json {}; old.csv old
noon.csv user,item,rating,time/x,y,3,noon; one.csv user,item,rating/1,2,3; start.pq PAR1
nobody.csv user,item/x,it1; two.csv user,item,rating/1,2,3/2,3,4; titles.csv item,title/it1,x
movies.csv movieId,title,genres/1,x,A/1,y,B; new.csv user,item,rating/x,it1,3; no.zip text
pairs.csv user,item/User 1,it1/User 2,it2/User 3,nope; film.csv item,rating/Film,3"""


def cases(text):
    return [case for case in re.split(r";\s*|\n", text) if case]


FILES = {name: table(line) for name, line in map(str.split, cases(LAST))}
for name, _, text in (case.partition(" ") for case in cases(WHOLE)):
    FILES[name] = text.replace("/", "\n") + "\n"
FILES |= {
    "r.csv": table(),
    "n.csv": re.sub("User |(?<=,)it(?!em)", "", table()),  # of numbers
    "i.csv": table(header="item,title,genre", good=TITLES),
    "twice.csv": table("it1,x,A", header="item,title,genre", good=TITLES),
    "code.csv": table(header="code,title,genre", good=TITLES),
    "no.csv": "",
    "two\nlines": "text",
    "blank.csv": "\n\n\n",
    "no.gz": b"\x1f\x8b is how one begins",
    "utf16.csv": table().encode("utf-16"),
    "latin.csv": table("é,y,3").encode("latin-1"),
    "cut.gz": gzip.compress(table().encode())[:90],
    "broken.gz": gzip.compress(table().encode())[:-4] + b"1234",
    "bool.pq": parquet(user=[True, False] * 12),
    "text.pq": parquet(rating=["a", "2"] * 12),
    "null.pq": parquet(user=[1, 2, None] * 8),
    "unrated.pq": parquet(rating=[1.0, None] * 12),
    "nan.pq": parquet(rating=[1.0, float("nan")] * 12),
    "cut.pq": parquet()[:500],
    "equal.csv": table(good=[f"{a},{b},3" for a, b in PAIRS]),
    "bare.csv": "1,2,3\n" * 9,
    "binary.csv": table(good=[f"{a},{b},{a % 2}" for a, b in PAIRS]),
    "known.csv": "user,item\n" + "User 2,it2\n" * 9_000,
    "old.pt": zipped({"format": "collab 1"}),
    "tensor.pt": zipped({"a": torch.ones(3)}),
    "number.pt": zipped(5),
    "code.pt": pickle.dumps(Bomb()),
    "code.zip": zipped(Bomb()),
    "user.csv": table(good=[f"7,{item},{item}" for item in range(30)]),
    "item.csv": table(good=[f"{user},7,{user}" for user in range(30)]),
}
# Commands and words of the line on each, in which the last argument is if it names a file. What
# begins with an option is of `train` on a good table. Beside the files above there are m.pt, a
# model of r.csv and i.csv, n.pt, one of n.csv, m.json, figures, k.pt, a checkpoint, files made of
# these, d.d, a folder, and full.csv, full.parquet and full.svg, links to a full device.
REFUSED = r"""
--ratings no.csv | no ratings; --ratings header.csv | no ratings; --ratings lacks.csv | 1 item
--ratings blank.csv | no ratings; --ratings text.csv | 1 tab comma; --ratings inf.csv | 56 -inf
--ratings 'two\nlines' | two lines; --ratings five.csv | 56 rating five; --ratings cut.gz | read
--ratings nan.csv | 56 rating nan; --ratings 1e39.csv | 56 rating 1e39; --ratings no.gz | read
--rating-range 1 5 --ratings 9.csv | 56 '9' 1 5; --ratings few.csv | 56 2 3; --ratings no.zip |
--ratings many.csv | 56 4 3; --ratings unrated.csv | 56 missing rating; --ratings nan.pq | 2 nan
--ratings noone.csv | 56 missing user; --ratings quote.csv | 56 quote; --ratings broken.gz | read
--ratings utf16.csv | UTF-16; --ratings latin.csv | UTF-8; --ratings bool.pq | user Boolean
--ratings text.pq | 1 rating 'a'; --ratings null.pq | 3 missing user; --ratings cut.pq | read
--ratings unrated.pq | 2 missing rating; --ratings start.pq | read; --ratings d.d | ratings.csv
--ratings m.pt | ratings.csv; --ratings x.csv | No such file; --ratings /proc/self/mem |
--ratings one.csv --seed 1 | 1; --ratings two.csv --seed 1 | 2; --ratings equal.csv | 3
--user-column kunde | r.csv 1 kunde user; --user-column u --ratings bare.csv | 1 'u' --user-column
--time-column time --ratings noon.csv | 2 noon; --split u1 | u1 54
--split last10 | last10 timestamps; --split by-date | by-date timestamps
--features id,time | time timestamps; --features side | side tables
--y-range 0 4.5 | 1 5 --y-range; --test x.csv | No such file; --test r.csv --seed 1 | 54 User
--ratings binary.csv --recipe best --loss ordinal | --loss ordinal; --test no.csv | no ratings
--ratings 9.csv --recipe fastai | 1 9 5.5 --y-range; --rating-range 1 5 --test 9.csv | 56 '9'
--weight-decay 0 --bias-decay 0 --lr-max 1e30 | loss; --items twice.csv | it1; --items d.d |
--items code.csv | 1 item; --items x.csv | No such file; --items no.csv | no items
--items movies.csv | 1; --save d.d | written; --save x/m.pt | written; --save /dev/full | written
--metrics /proc/m.json | written; --metrics /dev/full | written; --checkpoint /dev/full | written
cross-validate --ratings r.csv --folds 999 | 999; info x.pt | No such file; info d.d | directory
cross-validate --seed 1 --ratings r.csv --splits u1 | u1 54; info cut.pt | model
map --output x.png text.csv | model; info no.csv | model; interpret m.json | model
evaluate k.pt | model checkpoint; info old.pt | model; info tensor.pt | model
info number.pt | model; info code.pt | model; info code.zip | model; plot --output x.png m.pt |
recommend m.pt --user 99 | user '99'; recommend m.pt --user 'user 1' | user 'user 1'
recommend n.pt --user DIGITS | user '99; similar m.pt --item nope | item 'nope'
similar m.pt --item film | 'film' 8 it3 'Film; similar m.pt --item '' | item ''
evaluate m.pt --ratings r.csv --json | training User; evaluate m.pt --ranking -k 9 | 8 9
evaluate m.pt --ratings unknown.csv | 56 user 'x'; evaluate m.pt --ratings m.pt |
evaluate m.pt --ratings new.csv --allow-unknown --ranking -k 3 | rating
evaluate m.pt --ranking -k 3 --min-rating 99 | rating; recommend m.pt --rated nonsense | nonsense
predict m.pt --output old.csv --pairs pairs.csv | 4 nope; recommend m.pt --rated it1: | it1:
predict m.pt --output x.parquet --pairs nobody.csv | 2 user 'x'; recommend m.pt --rated :3 | :3
predict m.pt --output x.csv --pairs no.csv | no pairs; recommend m.pt --rated it1:9 | 9 it1 1 5
predict m.pt --output x.csv --pairs header.csv | no pairs; recommend m.pt --rated '' | --rated
predict m.pt --output x.csv --pairs y.csv | No such file; recommend m.pt --rated , | --rated
predict m.pt --pairs known.csv --output x/o.csv | written; plot --output x.png text.csv |
predict m.pt --pairs known.csv --output full.csv | written; plot --output x.png empty.json |
recommend m.pt --all-users --output full.parquet | written; plot --output x.png m.json nan.json |
recommend m.pt --rated it1:nan | nan it1; recommend m.pt --rated it1:3,nope:3 | nope
recommend m.pt --rated no.csv | no ratings; recommend m.pt --rated titles.csv | 2 rating
recommend m.pt --user 'User 1' --candidates d.d | path d.d
recommend m.pt --users d.d | path d.d
recommend m.pt --rated film.csv | item Film; plot --output x.png x.json | No such file
plot --output x.svg word.json |; plot --output x.svg huge.json |; plot --output x.svg none.json |
map m.pt --output x/x.svg | written; map m.pt --output full.svg | written
train --resume x.pt | No such file; train --resume text.csv | checkpoint
train --resume half.pt | checkpoint; train --resume m.pt | checkpoint
train --resume seed.pt | data; train --resume without.pt |
--ratings loop.csv | loop.csv; --save loop.csv | loop.csv; --y-range -1e17 6 | mean"""
# Wrong usage, of which the exit status is 2: a word of each is in the line.
USAGE = """
fit; --speed; --split u9; --ratings x --dataset ml-1m; --recipe sota; --dataset netflix
--epochs 0; --lr-max -0.01; --lr-max nan; --lr-max inf; --holdout 1
--lr-max 1e300 --weight-decay 0 --bias-decay 0; --lr-max 0.5 --weight-decay 2 --bias-decay 0
--epochs DIGITS; --threads 5000; --save x --metrics ./x; --save r.csv; --y-range 5 0
--y-range 0 nan; --y-range 5; --rating-range 1 nan; --rating-range -1e308 1e308
--features id,age; --features id,id; --loss huber; --recipe best --y-range 0 6
--test r.csv --split u1; train --time-column x; --test r.csv --holdout 0.5
train r.csv; train --resume k.pt --checkpoint c.pt --save k.pt; train --resume k.pt --epochs 9
train --resume k.pt --seed 0; train --resume k.pt --save k.pt
cross-validate --splits ua --folds 1; cross-validate --folds 2 --by-date 2
lr-find --plot x.gif; lr-find --epochs 2
evaluate m.pt --user-column x; predict m.pt --user 5; predict m.pt --pairs p.csv
predict m.pt --user 5 --item 5 --output x.csv; predict m.pt --pairs p.csv --output x.txt
predict m.pt --pairs p.csv --output p.csv; recommend m.pt; recommend m.pt --user 5 --rated 1:2
recommend m.pt --all-users
recommend m.pt --rate it1 3 --rated it1:3; interpret m.pt -n -3; similar m.pt
map m.pt --output x.jpg; map m.pt; plot --output x.png"""
ALLOWED = r"""
--test r.csv --allow-overlap; --ratings user.csv; --ratings item.csv; map m.pt --output o.svg
evaluate m.pt --ratings r.csv --allow-overlap; recommend m.pt --user 'User 1' -n 1000000
predict m.pt --pairs nobody.csv --output o.csv --allow-unknown; recommend m.pt --rated MANY
recommend m.pt --rated it1:3,it2:3,it3:3,it4:3,it5:3,it6:3,it7:3,it8:3; train --resume k.pt
plot 'two\nlines.json' '$\frac{$.json' _x.json --output o.svg"""
NOTICES = (
    "ml-100k: from the cache |[0-9,]+ users, |without |this is worse |8 of 10 |loss mse, |rated|"
    ".*: (times from|user is|item is) "
)


def split(case):
    """The arguments of a case, and the words."""
    command, _, words = case.partition(" |")
    for short, whole in ((r"\n", "\n"), ("DIGITS", "9" * 5000), ("MANY", "it1:3," * 60 + "it1:3")):
        command = command.replace(short, whole)
    if command.startswith("--"):
        ratings = "" if "--ratings" in command else "--ratings r.csv "
        command = f"train --epochs 1 {ratings}{command}"
    arguments = shlex.split(command)
    is_file = re.fullmatch(r"[\w/]+\.\w+|/\w+/\w+", arguments[-1])
    return arguments, words.split() + [arguments[-1]] * bool(is_file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all these files."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "d.d").mkdir()
    (folder / "loop.csv").symlink_to("loop.csv")
    for name in ("full.csv", "full.parquet", "full.svg"):
        (folder / name).symlink_to("/dev/full")
    for name, content in FILES.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    train = ("train", "--epochs", 1, "--ratings")
    results = ("--save", "m.pt", "--metrics", "m.json", "--checkpoint", "k.pt")
    assert call(folder, *train, "r.csv", "--items", "i.csv", *results).returncode == 0
    assert call(folder, *train, "n.csv", "--save", "n.pt").returncode == 0
    for name, source in (("cut.pt", "m.pt"), ("half.pt", "k.pt")):
        (folder / name).write_bytes((folder / source).read_bytes()[:4000])
    for name, change in (("seed.pt", {"seed": 5}), ("without.pt", None)):
        content = torch.load(folder / "k.pt", weights_only=True)
        about = json.loads(content["about"])
        about["arguments"] = change and about["arguments"] | change
        torch.save(content | {"about": json.dumps(about)}, folder / name)
    text = (folder / "m.json").read_text()
    figures = json.loads(text)
    options, (epoch,) = figures["options"], figures["epochs"]
    changes = {"nan": {"epochs": [epoch | {"mse": float("nan")}]}, "none": {"epochs": []}}
    changes |= {"word": {"options": options | {"lr_max": "high"}}, "_x": {}, "two\nlines": {}}
    changes |= {"huge": {"options": options | {"lr_max": 10**400}}, r"$\frac{$": {}}
    for name, change in changes.items():
        (folder / f"{name}.json").write_text(json.dumps(figures | change))
    return folder


def look(folder):
    """All that is in a folder, hidden files too."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def assert_refused(done, words, status=1):
    """One line with the words, the exit status, and nothing printed but the epochs."""
    lines = [line for line in done.stderr.splitlines() if not re.match(NOTICES, line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Error: ")
    assert [word for word in words if word not in lines[0]] == []
    assert " None " not in lines[0]
    assert done.returncode == status, lines[0]
    assert not done.stdout or done.stdout.lstrip().startswith(("epoch |", "fold |"))


@pytest.mark.parametrize("case", cases(REFUSED) + cases(USAGE))
def test_one_line_and_nothing_half_written(case, folder):
    (arguments, words), before = split(case), look(folder)
    is_usage = case in cases(USAGE)
    done = call(folder, *arguments)
    assert_refused(done, [] if is_usage else words, 1 + is_usage)
    assert any(word.strip("-./")[:40] in done.stderr for word in [*case.split(" "), "--", "FILE"])
    assert look(folder) == before


@pytest.mark.parametrize("case", cases(ALLOWED))
def test_what_is_unusual_or_allowed_goes(case, folder):
    done = call(folder, *split(case)[0])
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


@pytest.mark.parametrize("case", ["map m.pt --output", "plot m.json --output", "lr-find --plot"])
def test_pictures_without_matplotlib(case, folder, monkeypatch):
    before = look(folder)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it is an ImportError
    ratings = ["--ratings", "r.csv"] if "find" in case else []
    assert_refused(call(folder, *case.split(), "x.png", *ratings), ["pip install matplotlib"])
    assert look(folder) == before


@pytest.mark.parametrize("end", ["train --save", "train --checkpoint", "predict m.pt --output"])
def test_a_full_disk_keeps_the_old_file(end, folder):
    disk, ratings = folder / "disk", "--n-factors 2000 --epochs 1 --ratings r.csv"
    rest = "--pairs known.csv" if "predict" in end else ratings
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted")
    try:
        (disk / "o.csv").write_bytes(b"old")
        done = call(folder, *f"{end} disk/o.csv {rest}".split())
        assert_refused(done, ["disk/o.csv", "No space"])
        assert look(disk) == {disk / "o.csv": b"old"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Files that were tampered with.


@pytest.fixture(scope="module", params=["model", "checkpoint"])
def whole(request, small, tmp_path_factory):
    """A file with all that one may have, its content, and what asserts that another is refused."""
    folder = tmp_path_factory.mktemp("whole")
    command = ("train", "--ratings", small / "r.parquet", "--recipe", "best", "--epochs", 1)
    results = ("--n-factors", 2, "--ensemble", 2, "--save", "model", "--checkpoint", "checkpoint")
    assert call(folder, *command, *results).returncode == 0
    command = {"model": ["info"], "checkpoint": ["train", "--resume"]}[request.param]

    def ask(content):
        if not isinstance(content, bytes):
            about = content.get("about")
            text = about if isinstance(about, str | None) else json.dumps(about)
            content = zipped(content if about is None else content | {"about": text})
        (folder / "changed").write_bytes(content)
        return call(folder, *command, "changed")

    def refuse(content):
        assert_refused(ask(content), ["changed:", request.param])

    content = torch.load(folder / request.param, weights_only=True)
    content["about"] = json.loads(content["about"])
    return SimpleNamespace(path=folder / request.param, content=content, ask=ask, refuse=refuse)


def set_last(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


ROWS = (torch.int32, torch.int64)
FAULTS = {  # what a tensor becomes; None where that is no fault of it
    "another dtype": lambda t: t.half() if t.is_floating_point() else t.float(),
    "another size": lambda t: t.narrow(min(t.ndim, 2) - 1, 0, 1).clone(),
    "no rows": lambda t: t[:0].clone(),
    "a part of a larger one": lambda t: torch.cat([t, t])[: len(t)],
    "one that takes no memory": lambda t: t.flatten()[:1].clone().expand(10**12),
    "sparse": lambda t: t.to_sparse(),
    "code": lambda t: Bomb(),
    "beyond the last row": lambda t: set_last(t, 10**6) if t.dtype in ROWS else None,
    "below the first row": lambda t: set_last(t, -1) if t.dtype in ROWS else None,
    "nan": lambda t: set_last(t, float("nan")) if t.is_floating_point() else None,
    "infinity": lambda t: set_last(t, float("-inf")) if t.is_floating_point() else None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_is_wrong_is_refused(fault, whole):
    for name, tensor in whole.content.items():
        if name != "about" and (name != "train_times" or "row" not in fault):
            wrong = FAULTS[fault](tensor)
            if wrong is not None:
                whole.refuse(whole.content | {name: wrong})


def test_a_file_of_other_parts_is_refused(whole):
    for name in whole.content:
        whole.refuse({n: part for n, part in whole.content.items() if n != name})
    whole.refuse(whole.content | {"more": torch.ones(2)})
    about = whole.content["about"]
    for name in {"user_ids", "item_ids"} & set(about):  # which are in order
        for ids in (about[name][::-1], about[name][:-1], ["x", *about[name][1:]]):
            whole.refuse(whole.content | {"about": about | {name: ids}})
    for is_compressed in (True, False):
        buffer = io.BytesIO()
        # A tensor of 77,777 numbers that claims to have many more, or all as it was but compressed.
        content = whole.content | ({} if is_compressed else {"tables": torch.zeros(77_777)})
        content["about"] = json.dumps(content["about"])
        with (
            zipfile.ZipFile(io.BytesIO(zipped(content))) as old,
            zipfile.ZipFile(buffer, "w") as new,
        ):
            for name in old.namelist():
                claims = (77_777).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")
                part = old.read(name).replace(*claims) if name.endswith("pkl") else old.read(name)
                new.writestr(name, part, 8 if is_compressed else 0)
        whole.refuse(buffer.getvalue())


def replacements(value, other):
    """The JSON with each value in turn, of a list the first alone, replaced by another."""
    yield other
    keys = list(value)[:99] if isinstance(value, dict) else [0] if isinstance(value, list) else []
    for key in keys if value else []:
        for part in replacements(value[key], other):
            yield value | {key: part} if isinstance(value, dict) else [part, *value[1:]]


@pytest.mark.parametrize("wrong", ["null", '"x"', "[]", "{}", "0", "-1", "1e30", "NaN", "1e400"])
def test_json_that_is_wrong_is_no_traceback(wrong, whole):
    """Each value in turn: what is not refused has answers."""
    for about in replacements(whole.content["about"], "WRONG"):
        done = whole.ask(whole.content | {"about": json.dumps(about).replace('"WRONG"', wrong)})
        is_model = whole.path.name == "model"
        if done.returncode:
            assert_refused(done, ["changed"] * is_model, done.returncode)
        elif is_model:
            trained = collab.load_model(whole.path.with_name("changed"))
            rated = polars.DataFrame({"item": trained.ids.items[:1], "rating": [3]})
            assert len(collab.recommend(trained, trained.ids.users[0], n=2, include_seen=True)) == 2
            assert len(collab.recommend(trained, rated=rated, n=2)) == 2
            assert len(collab.find_similar(trained, trained.ids.items[0], n=2)) == 2
            assert collab.evaluate(trained)["mse"] > 0


@given(st.text('1x,;"\n. \té-', max_size=40), st.booleans())
def test_any_text_is_no_traceback(tmp_path_factory, text, is_after_a_table):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(table() + text if is_after_a_table else text)
    done = call(path.parent, "train", "--epochs", 1, "--ratings", path)
    assert done.returncode == 0 or done.stderr.splitlines()[-1].startswith("Error: ")
