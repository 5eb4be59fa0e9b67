import datetime
import gzip
import hashlib
import http.server
import io
import itertools
import math
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy
import polars
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data

# MD5 of the fourteen files GroupLens publishes.
SPLIT_MD5 = {
    "ua": ("346eb46a756be3b382bdef4f7dcf3a01", "52e5d0355092dc1596899855b220508f"),
    "ub": ("e4ce94f6e01e45f65b91a70bb9e8da2f", "5292d1e388d156aa0c19c384cdf35aca"),
    "u1": ("4325f44281c9f8c119a3694662d63fc2", "62d5d837e7c8e36550cc956b09c2ecc8"),
    "u2": ("79541afecccbd5365bb2c09b123a01c7", "1951a71b7e1f4ed254508007fa2f6b70"),
    "u3": ("55c67a63f516fa9e593d68c3be779970", "cb3e4d0a9152041772285232ca002d4f"),
    "u4": ("66f64a75eeeffd20ff09533bcd31adcf", "328acfca94e85d01b1d7e92c7d73df3b"),
    "u5": ("0becb3392339231c08ba316944c79095", "bec898f7091dba3b7bdf793d1998d2d6"),
}


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.mark.parametrize("name", SPLIT_MD5)
def test_splits_are_grouplenss_byte_for_byte(ratings, tmp_path, name):
    for part, expected in zip(data.split(ratings, name), SPLIT_MD5[name], strict=True):
        data.write_ratings(part, tmp_path / "part")
        assert md5((tmp_path / "part").read_bytes()) == expected


def test_the_random_split_is_a_seeded_tenth(ratings):
    train, test = data.split(ratings, "random", seed=3)
    assert (len(train), len(test)) == (90_000, 10_000)
    assert polars.concat([train, test]).sort("user", "item").equals(ratings.sort("user", "item"))
    assert data.split(ratings, "random", seed=3)[1].equals(test)
    assert not data.split(ratings, "random", seed=4)[1].equals(test)


def test_an_unknown_split_is_named(ratings):
    with pytest.raises(ValueError, match="no split 'u6'"):
        data.split(ratings, "u6")


def test_the_side_information(ml_100k):
    items, users = data.read_items(ml_100k), data.read_users(ml_100k)
    assert items.row(0) == (1, "Toy Story (1995)", 1995, ["Animation", "Children's", "Comedy"])
    assert items.row(266) == (267, "unknown", None, ["unknown"])
    assert items.row(542)[1] == "Misérables, Les (1995)"
    third = "Land Before Time III: The Time of the Great Giving (1995) (V)"
    assert items.row(1411) == (1412, third, 1995, ["Animation", "Children's"])
    assert items["item"].to_list() == list(range(1, 1683))
    assert items["year"].null_count() == 1
    assert set(items["genres"].explode()) == set(data.ML_100K_GENRES)
    assert users.row(0) == (1, 24, "M", "technician", "85711")
    assert users["user"].to_list() == list(range(1, 944))
    assert users.null_count().row(0) == (0,) * 5


# --- other splits


@pytest.mark.parametrize("name", ["ua", "u1"])
def test_a_published_split_is_of_ml_100k(ratings, name):
    with pytest.raises(ValueError, match=f"{name} is of ml-100k's .* here are 99,999: random"):
        data.split(ratings[1:], name)


TIMED = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=30)


@given(rows=TIMED, n_last=st.integers(1, 12))
def test_the_last_n_are_the_last_by_time(rows, n_last):
    """Against a sort of each user's ratings: times tie, and the first of a user is never tested."""
    table = frame([(user, item, 3) for item, (user, _) in enumerate(rows)])
    table = table.with_columns(timestamp=polars.Series([time_ for _, time_ in rows]))
    train, test = data.split(table, f"last{n_last}")
    expected = []
    for user in range(1, 5):
        places = [place for place, row in enumerate(rows) if row[0] == user]
        places.sort(key=lambda place: rows[place][1])  # stable: of one time, by the file's order
        expected += sorted((user, place) for place in places[1:][-n_last:])
    assert test.select("user", "item").rows() == expected
    assert train.equals(train.sort("user", "item"))
    assert polars.concat([train, test]).sort("user", "item").equals(table.sort("user", "item"))


@pytest.mark.parametrize("name", ["last", "last0", "last-1", "last1.5", "LAST1"])
def test_last_needs_a_number_and_times(name):
    with pytest.raises(ValueError, match=f"no split '{name}'"):
        data.split(frame([(1, 2, 3)]), name)
    with pytest.raises(ValueError, match="last2 needs timestamps"):
        data.split(frame([(1, 2, 3)]).drop("timestamp"), "last2")


# --- every format


def as_tabs(table):
    return table.write_csv(separator="\t", include_header=False)


def as_colons(table):
    return as_tabs(table).replace("\t", "::")


def as_csv(table):
    return table.rename({"user": "userId", "item": "movieId"}).write_csv()


FORMATS = {"u.data": as_tabs, "ratings.dat": as_colons, "ratings.csv": as_csv}
IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(1, 200)
ROWS = st.lists(st.tuples(IDS, IDS, st.integers(1, 10), st.integers(0, 2**33)), min_size=1)


def read_in_blocks(path, size=64):
    """Of a few lines, where a file of a test has but one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BLOCK", size)
        return data.read_ratings(path)


def try_reading(read, path):
    """What is read and None, or None and the line that says why not."""
    try:
        return read(path), None
    except ValueError as error:
        line = str(error)
    assert line.startswith(str(path))
    assert len(line.splitlines()) == 1
    return None, line


def read_all_pairs(path):
    return polars.concat(data.read_pairs(path))


def assert_refused(path, message, block=64):
    with pytest.raises(ValueError, match=f"^{path}") as caught:
        read_in_blocks(path, block)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@given(rows=ROWS, is_timed=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]))
def test_every_format_is_read_as_it_was_written(tmp_path_factory, name, rows, is_timed, newline):
    folder = tmp_path_factory.getbasetemp() / name / "ml"
    folder.mkdir(parents=True, exist_ok=True)
    schema = dict.fromkeys(("user", "item", "rating", "timestamp"), polars.Int64)
    table = polars.DataFrame(rows, schema=schema, orient="row")
    table = table.with_columns((polars.col("rating") / 2).cast(polars.Float32))
    if not is_timed:
        table = table.drop("timestamp")
    content = FORMATS[name](table).replace("\n", newline).encode()
    (folder / name).write_bytes(content)
    (folder / "open").write_bytes(b"\xef\xbb\xbf" + content.removesuffix(newline.encode()))
    archive = folder.parent / "ml.zip"
    archive.write_bytes(zipped({"ml/README": b"no", f"ml/{name}": content}))
    for path in (folder / name, folder / "open", folder, archive):
        assert read_in_blocks(path).equals(table)


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"1,2,3\n1,4,5\n",))
    writer.start()
    assert data.read_ratings(tmp_path / "pipe").rows() == [(1, 2, 3.0), (1, 4, 5.0)]
    writer.join()


@given(content=st.binary(max_size=60) | st.text('12.,:;"\t\r\n-exan', max_size=60).map(str.encode))
def test_any_bytes_are_a_frame_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    read, error = try_reading(lambda path: read_in_blocks(path, 16), path)
    if error is None:
        if b'"' not in content:
            assert len(read) == len(content.removesuffix(b"\n").split(b"\n"))
        assert sum(read.null_count().row(0)) == 0
        assert read["rating"].is_finite().all()
    for read in (read_all_pairs, data.read_users, data.read_items):
        try_reading(read, path)


@pytest.mark.parametrize(
    "text",
    [
        "title,Rating,Movie_ID,user\nHeat,4.5,7,3\nIt,1,8,4\n",
        "user_id:token\titem_id:token\trating:float\n3\t7\t4.5\n4\t8\t1\n",
        "3,7,4.5\r\n4,8,1",
    ],
    ids=["other order", "RecBole", "no header"],
)
def test_files_of_anybody(tmp_path, text):
    (tmp_path / "any.txt").write_text(text)
    read = data.read_ratings(tmp_path / "any.txt")
    assert read.rows() == [(3, 7, 4.5), (4, 8, 1.0)]
    assert dict(read.schema) == dict(frame([]).drop("timestamp").schema)


@pytest.mark.parametrize("n_before", [0, 50])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2", "fields: 2, not 4"),
        ("1,2,3,4,5", "fields: 5, not 4"),
        ("", "fields: 1, not 4"),
        ("1,,3,4", "a value is missing (item)"),
        ("1,2,3,", "a value is missing (timestamp)"),
        ("1,2,good,4", "could not parse rating 'good'"),
        ("1,2,nan,4", "rating 'nan' is not finite"),
        ("1,2,-inf,4", "rating '-inf' is not finite"),
        ("1,2,1e39,4", "rating '1e39' is not finite"),
        ('1,2,"3,4', "a quote that neither begins nor ends a field"),
        ('1,"2"x,3,4', "a quote that neither begins nor ends a field"),
        ('1,a "2" b,3,4', "a quote that neither begins nor ends a field"),
        ('1,"2\n3",bad,4', "could not parse rating 'bad'"),
        ('1,"2\n3",4', "fields: 3, not 4"),
        ('"",2,3,4', "a value is missing (user)"),
        ("x,2,_,4", "could not parse rating '_'"),
        ("x,2,1_0,4", "could not parse rating '1_0'"),
        (f"1,2,3,{2**63}", f"could not parse timestamp '{2**63}'"),
        ("1,2,3,2021-02-29", "could not parse timestamp '2021-02-29'"),
        ("1,2,3,noon", "could not parse timestamp 'noon'"),
        ("1::2::3::4", "fields: 1, not 4"),
        ("1,2,\udcff,4", "it is not UTF-8"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, n_before, line, message):
    good = "7,8,3.5,9\r\n7,9,4,9\n"
    text = "userId,movieId,rating,timestamp\n" + good * (1 + n_before) + line + "\n" + good
    path = tmp_path / "ratings.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(path, f"{path}, line {2 + 2 * (1 + n_before)}: {message}")


@pytest.mark.parametrize(
    "line", ["1::2:3::4", "1:x:2::3::4", "1::2::3", "1::2::3::4::5", "1:2:3:4", "1\t2\t3\t4"]
)
def test_a_wrong_line_of_colons(tmp_path, line):
    path = tmp_path / "ratings.dat"
    path.write_text(f"1::1::3::4\n{line}\n1::3::3::4\n")
    assert_refused(path, f"{path}, line 2: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no ratings"),
        (b"\xef\xbb\xbf", "no ratings"),
        (b"\n1,2,3\n", "no ratings in line 1"),
        (b"userId,movieId,rating,timestamp\n", "no ratings"),
        (b"userId,movieId,rating", "no ratings"),
        (b"userId,rating,timestamp\n1,2,3\n", "line 1: the header has no column item"),
        (b"a,b,c\n1,2,3\n", "line 1: the header has no column user, item, rating"),
        (b"a film\n", "line 1: no tab, comma, ';', '|' or '::' between user, item and rating"),
        (b"1,2\n", "line 1: 2 fields, not user, item"),
        (b"1,2,3,4,5\n", "line 1: 5 fields, not user, item"),
        ("1,2,3\n".encode("utf-16"), "line 1: it is not UTF-8 but UTF-16"),
        ("1,2,3\n".encode("utf-16-le"), "line 1: the header has no column user"),
        (b"1,2,3\n1,2," + b"3" * 200_000, "a line of 65,536 bytes or more"),
    ],
)
def test_a_file_without_ratings(tmp_path, content, message):
    path = tmp_path / "ratings"
    path.write_bytes(content)
    assert_refused(path, message, 1 << 16)


def encrypted(content):
    """The flag alone: nobody has the password."""
    return content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: b"no zip", "no good zip (File is not a zip file)"),
        (lambda good: b"", "no good zip (File is not a zip file)"),
        (lambda good: good[:-30], "no good zip (File is not a zip file)"),
        (lambda good: good.replace(b"1,2,3", b"1,2,4"), "no good zip (Bad CRC-32"),
        (encrypted, "is encrypted"),
        (lambda good: zipped({"ml/README": b"", "ml/x.csv": b""}), "no ratings.csv, ratings.dat"),
        (lambda good: zipped({"a/ratings.csv": b"u,i,r\n"}), "a/ratings.csv, line 1: the header"),
        (lambda good: zipped({"a\nb/ratings.csv": b""}), r"'a\nb/ratings.csv': no ratings"),
        (lambda good: zipped({"ratings.csv": b"1,2,3\n" * 99}), "more than 500 bytes"),
    ],
)
def test_a_wrong_zip_is_one_line(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(data, "LARGEST_MEMBER", 500)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml/ratings.csv", "userId,movieId,rating\n1,2,3\n")
    path = tmp_path / "ml.zip"
    path.write_bytes(content(buffer.getvalue()))
    assert_refused(path, message)


def test_a_zip_that_escapes_is_only_read(tmp_path):
    path = tmp_path / "a" / "ml.zip"
    path.parent.mkdir()
    path.write_bytes(zipped({"../../ratings.csv": b"1,2,3\n", "/tmp/movies.csv": b"m,t,g\n1,A,\n"}))
    assert data.read_ratings(path).rows() == [(1, 2, 3)]
    assert data.read_items(path).rows() == [(1, "A", None, [])]
    assert list(tmp_path.rglob("*")) == [path.parent, path]


FILMS = [
    (1, "Toy Story (1995)", 1995, ["Adventure", "Animation"]),
    (2, "Cité des enfants perdus, La (1995)", 1995, ["Drama"]),
    (3, '"Great" 12 (1st) (2001) Cut (2003)', 2003, ["Sci-Fi"]),
    (4, "Babylon 5", None, []),
]


def movies_csv():
    lines = ["movieId,title,genres"]
    for item, title, _, genres in FILMS:
        quoted = title.replace('"', '""')
        lines.append(f'{item},"{quoted} ",{"|".join(genres) or "(no genres listed)"}')
    return ("\r\n".join(lines) + "\r\n").encode()


def movies_dat():
    return "".join(f"{i}::{title}::{'|'.join(genres)}\n" for i, title, _, genres in FILMS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("movies.csv", movies_csv()),
        ("movies.dat", movies_dat().encode()),
        ("movies.dat", movies_dat().encode("latin-1")),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_films_of_the_others(tmp_path, name, content, is_zip):
    path = tmp_path
    if is_zip:
        path = tmp_path / "ml.zip"
        path.write_bytes(zipped({f"ml/{name}": content}))
    else:
        (path / name).write_bytes(content)
    items = data.read_items(path)
    assert items.rows() == FILMS
    assert items.columns == ["item", "title", "year", "genres"]
    assert items.schema["year"] == polars.Int64
    assert data.read_users(path) is None


def test_people_of_ml_1m(tmp_path):
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-12\n")
    users = data.read_users(tmp_path)
    assert users.rows() == [(1, 1, "F", "10", "48067"), (2, 56, "M", "16", "70072-12")]
    assert users.columns == ["user", "age", "gender", "occupation", "zip_code"]
    assert data.read_items(tmp_path) is None
    assert data.read_users(tmp_path / "users.dat").equals(users)
    (tmp_path / "users.dat").write_text("1::F::young::10::48067\n")
    with pytest.raises(ValueError, match=r"users\.dat: not a table of .* `young`"):
        data.read_users(tmp_path)


def test_grouplenss_zip_of_ml_100k_is_read_as_the_cache(good_zip, ml_100k, tmp_path):
    (tmp_path / "ml-100k.zip").write_bytes(good_zip)
    for read in (data.read_ratings, data.read_items, data.read_users):
        assert read(tmp_path / "ml-100k.zip").equals(read(ml_100k))
    (tmp_path / "u.item").write_text("1|Toy Story\n")
    with pytest.raises(ValueError, match=r"u\.item: not item\|title\|"):
        data.read_items(tmp_path)


# --- files of anybody's


def as_parquet(table):
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    return buffer.getvalue()


WRITERS = {
    "csv": lambda table: table.write_csv().encode(),
    "tsv": lambda table: table.write_csv(separator="\t").encode(),
    "semicolons": lambda table: table.write_csv(separator=";").encode(),
    "bars": lambda table: table.write_csv(separator="|").encode(),
    "no header": lambda table: table.write_csv(include_header=False).encode(),
    "quoted": lambda table: table.write_csv(quote_style="always", line_terminator="\r\n").encode(),
    "parquet": as_parquet,
    "gzip": lambda table: gzip.compress(table.write_csv().encode()),
}
# What a file of text is made of, more often than at random.
LETTERS = st.sampled_from(',;|\t"\n :aAé0') | st.characters(exclude_categories=["Cs", "Cc"])
TEXT_IDS = st.text(LETTERS, min_size=1, max_size=6)
ANY_IDS = st.sampled_from([st.integers(-(2**63), 2**63 - 1).map(str), TEXT_IDS])
HALVES = st.lists(st.integers(-10, 10), min_size=1)


def as_ids(texts):
    """The rule: Int64 where each is as Python prints it, else as it is."""
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    is_integer = [*map(str, numbers)] == texts and all(-(2**63) <= n < 2**63 for n in numbers)
    return polars.Series(numbers if is_integer else texts)


@pytest.mark.parametrize("name", WRITERS)
@given(source=st.data())
def test_any_ids_are_read_as_they_were_written(tmp_path_factory, name, source):
    users, items = (
        source.draw(st.lists(source.draw(ANY_IDS), min_size=3, max_size=8)) for _ in range(2)
    )
    users, items = users[: len(items)], items[: len(users)]
    halves = source.draw(HALVES)
    table = polars.DataFrame({"user": users, "item": items}).with_columns(
        rating=polars.Series([halves[i % len(halves)] / 2 for i in range(len(users))])
    )
    if source.draw(st.booleans()):
        table = table.with_columns(timestamp=polars.int_range(polars.len()) - 1)
    path = tmp_path_factory.getbasetemp() / "anybody"
    path.write_bytes(WRITERS[name](table))
    read = read_in_blocks(path, 16)
    expected = table.with_columns(
        as_ids(users).alias("user"),
        as_ids(items).alias("item"),
        table["rating"].cast(polars.Float32),
    )
    assert read.equals(expected)
    assert read.schema == expected.schema
    pairs = read_all_pairs(path)
    assert pairs.drop("line").equals(table.drop("rating"))
    if name == "csv":
        lines = table.with_columns(
            polars.col("user", "item").str.count_matches("\n", literal=True)
        ).select((polars.col("user") + polars.col("item") + 1).cum_sum().shift(fill_value=0) + 2)
        assert pairs["line"].to_list() == lines.to_series().to_list()
    survives_tensors(read)


def survives_tensors(table):
    once = data.drop_repeats(table)
    expected = {(user, item): rating for user, item, rating, *_ in table.rows()}
    assert [row[:3] for row in once.sort("user", "item").rows()] == sorted(
        (*pair, rating) for pair, rating in expected.items()
    )
    if len(once) < 2:
        return
    part, test_part, ids = data.to_tensors(*data.hold_out(once, 0.5, seed=0))
    back = {
        (ids.users[user], ids.items[item]): rating
        for users, items, ratings in (part, test_part)
        for user, item, rating in zip(users.tolist(), items.tolist(), ratings.tolist(), strict=True)
    }
    assert back == expected


def mutations(content, n):
    """Cut off, with bytes changed, and both; seeded, for some would have polars end the process."""
    random = numpy.random.default_rng(0)
    for _ in range(n):
        changed = bytearray(content)
        for place in random.integers(4, len(content), random.integers(0, 4)):
            changed[place] = random.integers(256)
        yield bytes(changed[: random.choice([len(content), random.integers(5, len(content))])])


@pytest.mark.parametrize("name", ["parquet", "gzip", "quoted"])
def test_a_broken_file_is_a_frame_or_one_line(tmp_path, name):
    table = polars.DataFrame(
        {"user": [1, 2, 3] * 9, "item": [*map(str, range(26)), "é"], "rating": [1.5, 2, 3] * 9}
    )
    path = tmp_path / "broken"
    for content in mutations(WRITERS[name](table), 60):
        path.write_bytes(content)
        for read in (data.read_ratings, data.read_users, read_all_pairs):
            try_reading(read, path)


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("who,what,stars\na,b,1\n", {"user": "who", "item": "what", "rating": "stars"}, ["a", "b"]),
        ("User,item,userId,rating\na,b,c,1\n", {"user": "user"}, ["a", "b"]),
        ("User,item,user,rating\na,b,c,1\n", {"user": "user"}, ["c", "b"]),
        ("user,item,rating\na,b,1\n", {"user": "item", "item": "user"}, ["b", "a"]),
        ("user_name,user_id,movieTitle,movieId,rating\na,b,c,d,1\n", None, ["b", "d"]),
        ("customer;product;score\na,1;b|;1\n", None, ["a,1", "b|"]),
        ('"a\nuser","item, or so",rating\na,b,1\n', {"user": "a\nuser"}, ["a", "b"]),
        ("2024,item,rating\na,b,1\n", {"user": "2024"}, ["a", "b"]),
        ("007,é ,1\n", None, ["007", "é "]),
        ("\ufeff007,b,1\n", None, ["007", "b"]),
        ("\ufeff007,8,1\n", None, ["007", 8]),
        ('a::b|"c::1\n', None, ["a", 'b|"c']),
        ("+1, 1,1\n", None, ["+1", " 1"]),
        ("-0,1.0,1\n", None, ["-0", "1.0"]),
        ("7\r,8,1\n", None, ["7\r", 8]),
        ("a\r,\rb,1\n", None, ["a\r", "\rb"]),
        (f"{2**63},1_0,1\n", None, [str(2**63), "1_0"]),
        ("nan,null,1\n", None, ["nan", "null"]),
    ],
)
def test_columns_are_told_or_known(tmp_path, text, columns, expected):
    path = tmp_path / "ratings"
    path.write_bytes(text.encode())
    assert data.read_ratings(path, columns=columns).rows() == [(*expected, 1.0)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"user": "who"},
            "line 1: the header has no column 'who' for user, but user, item, rating",
        ),
        ({"user": "item", "item": "item"}, "line 1: the header has no column 'item' for item"),
        ({"film": "item"}, "columns: no column 'film': it is user, item, rating, timestamp"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, message):
    path = tmp_path / "ratings"
    path.write_text("user,item,rating\n1,2,3\n")
    with pytest.raises(ValueError, match=message):
        data.read_ratings(path, columns=columns)
    path.write_text("1,2,3\n")
    with pytest.raises(ValueError, match=r"line 1: no header, so no column 'who'"):
        data.read_ratings(path, columns={"user": "who"})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("978300760", 978300760),
        ("978300760.9", 978300760),
        ("-0.5", -1),
        (" 1e3", 1000),
        ("1970-01-02", 86_400),
        ("1970-01-01T00:00:01", 1),
        ("1970-01-01 00:01", 60),
        ("1970-01-01T00:00:01.999Z", 1),
        ("1969-12-31T23:59:59.5", -1),
        ("1970-01-01T02:00:00+02:00", 0),
        ("1970-01-01T00:00:00-0130", 5_400),
        ("1970-01-01T05+05", None),
        ("2001-02-29", None),
        ("01/02/2003", None),
        ("1e300", None),
        ("nan", None),
    ],
)
def test_times(tmp_path, text, seconds):
    path = tmp_path / "ratings"
    path.write_text(f"user,item,rating,date\na,b,1,1\na,c,1,{text}\n")
    read, error = try_reading(data.read_ratings, path)
    if seconds is None:
        assert error == f"{path}, line 3: could not parse timestamp {text!r}"
    else:
        assert read["timestamp"].to_list() == [1, seconds]


def test_a_rating_out_of_range_is_named(tmp_path):
    path = tmp_path / "ratings"
    path.write_text("1,2,0.1\n1,3,5\n")
    assert len(data.read_ratings(path, rating_range=(0.1, 5))) == 2
    with pytest.raises(ValueError, match=r"ratings, line 2: rating '5' is not in 0.1 to 4.5$"):
        data.read_ratings(path, rating_range=(0.1, 4.5))


NOON = datetime.datetime(1970, 1, 1, 12)
PARQUET = {"user": ["a"], "item": [7], "rating": [4], "time": [0]}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (polars.Series("user", ["7"]), 7),
        (polars.Series("user", ["7", "07"][1:], polars.Categorical), "07"),
        (polars.Series("user", ["u"], polars.Enum(["u"])), "u"),
        (polars.Series("user", [2**63], polars.UInt64), str(2**63)),
        (polars.Series("rating", [0.1], polars.Float64), numpy.float32(0.1)),
        (polars.Series("time", [-0.5]), -1),
        (polars.Series("time", [NOON.date()]), 0),
        (polars.Series("time", [NOON], polars.Datetime("ns")), 43_200),
        (polars.Series("time", [NOON], polars.Datetime("ms", "Europe/Paris")), 43_200),
        (polars.Series("user", [1.0]), "the column 'user' for user is of type Float64"),
        (polars.Series("item", [True]), "the column 'item' for item is of type Boolean"),
        (polars.Series("rating", ["4"]), "the column 'rating' for rating is of type String"),
        (
            polars.Series("time", ["1970-01-01"]),
            "the column 'time' for timestamp is of type String",
        ),
        (polars.Series("user", [None], polars.String), "row 1: a value is missing (user)"),
        (polars.Series("user", [""]), "row 1: a value is missing (user)"),
        (polars.Series("rating", [math.inf]), "row 1: rating inf is not finite"),
        (polars.Series("rating", [9]), "row 1: rating 9 is not in 0.1 to 5"),
        (polars.Series("time", [math.nan]), "row 1: could not parse timestamp nan"),
    ],
)
def test_types_of_parquet(tmp_path, column, expected):
    path = tmp_path / "any"
    polars.DataFrame(PARQUET).with_columns(column).write_parquet(path)
    name = "timestamp" if column.name == "time" else column.name
    low = 0.1 if column.name == "rating" else 1
    read, error = try_reading(lambda path: data.read_ratings(path, rating_range=(low, 5)), path)
    if error is None:
        assert read[name].to_list() == [expected]
    else:
        assert error.endswith(str(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ann,titanic\nbob,heat\n", [("ann", "titanic", 1), ("bob", "heat", 2)]),
        ("user1,item1\n", [("user1", "item1", 1)]),
        ("item,user\n7,007\n", [("007", "7", 2)]),
        ("1::2::x\n", [("1", "2", 1)]),
        ("1,2,,60\n", [("1", "2", 60, 1)]),
        ("rating;user;time;item\n;a;1970-01-02;b\n", [("a", "b", 86_400, 2)]),
        ("user,sku\na,b\n", "line 1: the header has no column item, but user, sku"),
        ("1,2,3,4,5\n", "line 1: 5 fields, not user, item[, rating, timestamp]"),
        ("1,2\n1,\n", "line 2: a value is missing (item)"),
        ("user,item\n", "no pairs"),
        ("", "no pairs"),
    ],
)
def test_pairs(tmp_path, text, expected):
    path = tmp_path / "pairs"
    path.write_text(text)
    read, error = try_reading(read_all_pairs, path)
    if error is None:
        assert read.rows() == expected
    else:
        assert error.endswith(str(expected))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_pairs_come_in_blocks(tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    data.write_frames(path, (polars.DataFrame({"user": [n], "item": [n]}) for n in range(10)))
    frames = list(data.read_pairs(path, block=4))
    assert [len(frame) for frame in frames] == [4, 4, 2]
    assert polars.concat(frames)["user"].to_list() == [*map(str, range(10))]
    assert frames[-1]["line"].to_list() == ([10, 11] if ending == "csv" else [9, 10])


# --- tables of anybody's


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "things.csv"
    path.write_text(
        ',Name,price,item,tags,ID,sold\n0,"Pen, red",1.5,x,office|red,007,3\n1,Cup,,y,,a b,\n'
    )
    items = data.read_items(path)
    assert items.columns == ["item", "title", "price", "tags", "ID", "sold"]
    items = data.read_items(path, column="ID")
    assert items.columns == ["item", "title", "price", "item_", "tags", "sold"]
    assert items.rows() == [
        ("007", "Pen, red", 1.5, "x", ["office", "red"], 3),
        ("a b", "Cup", None, "y", None, None),
    ]
    data.write_frames(tmp_path / "things.parquet", [items])
    assert data.read_items(tmp_path / "things.parquet").equals(items)
    (tmp_path / "things.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert data.read_items(tmp_path / "things.csv.gz", column="ID").equals(items)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("a,b\n1,2\n", None, "line 1: the header has no column user, but a, b"),
        ("a,b\n1,2\n", "c", "line 1: the header has no column 'c' for user, but a, b"),
        ("id,b\n1,2\n2,\n1,3\n", None, "the user 1 is there twice"),
        ("user,b\na,2\n,3\n", None, "line 3: a value is missing (user)"),
        ("user,b\na,2,3\n", None, "line 2: fields: 3, not 2"),
        ("user,b\n", None, "no users"),
        ("user\n1\n", None, "line 1: no tab, comma, ';', '|' or '::' between user and the others"),
    ],
)
def test_a_table_that_is_none(tmp_path, text, column, message):
    path = tmp_path / "people"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}") as caught:
        data.read_users(path, column=column)
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "no header"])
def test_a_table_may_have_any_columns(tmp_path, name):
    names = ["rating", "_1", "timestamp", "user_id", "item", "line", "user", "0", "value"]
    path = tmp_path / "people"
    path.write_bytes(WRITERS[name](polars.DataFrame({name: ["a", "b"] for name in names})))
    users = data.read_users(path)
    assert sorted(users.columns) == sorted({*names, "user_"} - {"user_id"})
    assert users["user_"].to_list() == ["a", "b"]
    assert len(data.describe(users.vstack(users), "user")) == 4 * (len(names) - 1)


def test_types_of_a_table_of_parquet(tmp_path):
    path = tmp_path / "people.parquet"
    people = polars.DataFrame(
        {
            "user_id": [3, 4],
            "born": [NOON.date(), None],
            "zip": ["07", ""],
            "is_new": [True, False],
            "height": [1.8, math.nan],
            "likes": [["tea"], None],
        }
    )
    people.write_parquet(path)
    users = data.read_users(path)
    assert users.rows() == [
        (3, 0, "07", "true", 1.8, ["tea"]),
        (4, None, None, "false", None, None),
    ]
    assert len(data.describe(users, "user"))
    people.with_columns(odd=polars.struct("zip")).write_parquet(path)
    with pytest.raises(ValueError, match="the column 'odd' is of type Struct"):
        data.read_users(path)
    people.rename({"user_id": "id", "likes": "name"}).write_parquet(path)
    with pytest.raises(ValueError, match="the column 'name' for title is of type List"):
        data.read_items(path)


def test_a_column_of_any_name_is_described():
    about = polars.DataFrame({"user": [1, 2], "*": [1, 2], "^u.*$": [3, 4], "share": [5, 5]})
    assert data.describe(about, "user")["feature"].to_list() == [0, 1, 2, 3, 4, 4]


# --- tensors


def frame(rows):
    schema = {"user": polars.Int64, "item": polars.Int64, "rating": polars.Float32}
    table = polars.DataFrame(rows, schema=schema, orient="row")
    return table.with_columns(timestamp=polars.lit(0, polars.Int64))


def test_tensors_by_hand():
    train, test = frame([(70, 5, 3.5), (9, 8, 1), (70, 8, 2)]), frame([(9, 400, 5)])
    part, test_part, ids = data.to_tensors(train, test)
    assert ids.users.to_list() == [9, 70]
    assert ids.items.to_list() == [5, 8, 400], "an item of the test part alone has a row too"
    assert [column.tolist() for column in part] == [[1, 0, 1], [0, 1, 1], [3.5, 1, 2]]
    assert [column.tolist() for column in test_part] == [[0], [2], [5]]
    assert [column.dtype for column in part] == [torch.int64, torch.int64, torch.float32]


def test_ua_counts(ua):
    part, test_part, ids = ua
    assert (len(ids.users), len(ids.items)) == (943, 1682)
    unseen = set(test_part.items.tolist()) - set(part.items.tolist())
    assert len(unseen) == 2


def test_shared_pairs_are_refused():
    train, test = frame([(1, 2, 3), (1, 3, 3)]), frame([(5, 5, 1), (1, 3, 4)])
    with pytest.raises(ValueError, match=r"1 of the test part's .* the first is \(1, 3\)"):
        data.to_tensors(train, test)


SPARSE = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1)


@pytest.mark.parametrize("size", [2, 1 << 18])
@given(pairs=SPARSE, test_pairs=SPARSE, far=st.sampled_from([1, 10**9]))
def test_tensors_against_the_loop(size, pairs, test_pairs, far):
    """In any order, with pairs twice, for ids near each other and far apart, slice by slice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SLICE", size)
        check_tensors(pairs, test_pairs, far)


def check_tensors(pairs, test_pairs, far):
    train, test = (frame([(u * far, i * far, 3) for u, i in part]) for part in (pairs, test_pairs))
    shared = [pair for pair in test_pairs if pair in pairs]
    if shared:
        first = f"({shared[0][0] * far}, {shared[0][1] * far})"
        with pytest.raises(ValueError, match=f"^{len(shared)} of the test") as caught:
            data.to_tensors(train, test)
        assert str(caught.value).endswith(f"the first is {first}")
        return
    part, test_part, ids = data.to_tensors(train, test)
    for number, raw in enumerate(ids):
        known = sorted({pair[number] * far for pair in pairs + test_pairs})
        assert raw.to_list() == known
        for table, tensors in ((pairs, part), (test_pairs, test_part)):
            assert tensors[number].tolist() == [known.index(p[number] * far) for p in table]


@pytest.mark.parametrize("part", [0, 1])
def test_an_empty_part_is_refused(part):
    parts = [frame([(1, 2, 3)]), frame([(1, 4, 3)])]
    parts[part] = parts[part].clear()
    with pytest.raises(ValueError, match=f"the {['training', 'test'][part]} part has no ratings"):
        data.to_tensors(*parts)


PAIRS = st.lists(
    st.tuples(st.integers(-(2**62), 2**62), st.integers(0, 40)), min_size=12, unique=True
)


@given(pairs=PAIRS, halves=st.lists(st.integers(1, 10), min_size=1), seed=st.integers(0, 99))
def test_any_table_survives_the_way_to_tensors_and_back(tmp_path_factory, pairs, halves, seed):
    rows = [(*pair, halves[i % len(halves)] / 2) for i, pair in enumerate(pairs)]
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    data.write_ratings(frame(rows), path)
    read = data.read_ratings(path)
    assert read.equals(frame(rows))
    part, test_part, ids = data.to_tensors(*data.split(read, "random", seed=seed))
    back = [
        (ids.users[user], ids.items[item], rating)
        for users, items, ratings in (part, test_part)
        for user, item, rating in zip(users.tolist(), items.tolist(), ratings.tolist(), strict=True)
    ]
    assert sorted(back) == sorted(rows)


def test_hold_out_is_a_seeded_share(ratings):
    rest, held = data.hold_out(ratings, 0.25, seed=1)
    assert (len(rest), len(held)) == (75_000, 25_000)
    assert polars.concat([rest, held]).sort("user", "item").equals(ratings.sort("user", "item"))
    assert data.hold_out(ratings, 0.25, seed=1)[1].equals(held)
    assert not data.hold_out(ratings, 0.25, seed=2)[1].equals(held)
    drawn = numpy.random.default_rng(1).permutation(100_000) < 25_000
    assert ratings.filter(drawn).sort("user", "item").equals(held), "quoted figures rest on it"


def test_every_rating_is_tested_in_one_fold():
    table = frame([(user, item, 1 + user % 5) for user in range(20) for item in range(5)][:-1])
    parts = list(data.fold(table, 7, seed=0))
    assert sorted(len(test) for _, test in parts) == [14, 14, 14, 14, 14, 14, 15]
    tested = polars.concat([test for _, test in parts])
    assert tested.sort("user", "item").equals(table)
    for train, test in parts:
        assert polars.concat([train, test]).sort("user", "item").equals(table)
    with pytest.raises(ValueError, match="99 ratings into 100 folds"):
        next(data.fold(table, 100, seed=0))


# --- features


def dense(matrix, n_columns):
    """A `Sparse` as a list of rows."""
    rows = []
    for start, end in zip(matrix.starts[:-1], matrix.starts[1:], strict=True):
        row = [0.0] * n_columns
        for column, value in zip(matrix.columns[start:end], matrix.values[start:end], strict=True):
            row[column] += value.item()
        rows.append(row)
    return rows


SMALL_TRAIN = frame([(70, 5, 3), (9, 8, 1), (70, 8, 2), (30, 8, 4)])
SMALL_TEST = frame([(9, 400, 5), (40, 5, 2)])
SMALL_USERS = polars.DataFrame(
    {
        "user": [9, 30, 40, 70],
        "name": ["Ann", "Bo", "Cy", "Di"],
        "job": ["cook", "cook", None, "pilot"],
        "likes": [["tea", "rum"], ["tea"], [], None],
    }
)


def join_rows(users, items):
    """The rows of users, then those of items, each with zeros for the features of the others."""
    n_user, n_item = len(users[0]), len(items[0])
    return [[*row, *[0] * n_item] for row in users] + [[*[0] * n_user, *row] for row in items]


def identity(n):
    return [[float(row == column) for column in range(n)] for row in range(n)]


def test_id_and_implicit_features_by_hand():
    _, _, ids = data.to_tensors(SMALL_TRAIN, SMALL_TEST)
    matrix, _, counts = data.features(SMALL_TRAIN, ids, ("id", "implicit"))
    half, third = pytest.approx(0.5**0.5), pytest.approx(3**-0.5)
    # users 9, 30, 40, 70; then the items 5, 8, 400 that they rated in training
    users = [
        [1, 0, 0, 0, 0, 1, 0],
        [0, 1, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, half, half, 0],
    ]
    items = [
        [1, 0, 0, 0, 0, 0, 1],
        [0, 1, 0, third, third, 0, third],
        [0, 0, 1, 0, 0, 0, 0],
    ]
    assert counts == (7, 7)
    assert dense(matrix, 14) == join_rows(users, items)


def test_side_and_time_features_by_hand():
    _, _, ids = data.to_tensors(SMALL_TRAIN, SMALL_TEST)
    matrix, _, counts = data.features(SMALL_TRAIN, ids, ("id", "side", "time"), users=SMALL_USERS)
    half, zeros = pytest.approx(0.5**0.5), [0] * 4
    # four ids; cook, pilot; rum, tea; then a row and a column for each feature of the time
    users = [
        [1, 0, 0, 0, 1, 0, half, half, *zeros],
        [0, 1, 0, 0, 1, 0, 0, 1, *zeros],
        [0, 0, 1, 0, 0, 0, 0, 0, *zeros],
        [0, 0, 0, 1, 0, 1, 0, 0, *zeros],
        *([*[0] * 8, *row] for row in identity(4)),
    ]
    assert counts == (12, 3), "nothing is told of items: their ids alone"
    assert dense(matrix, 15) == join_rows(users, identity(3))


@pytest.mark.parametrize("kinds", [("id",), ("implicit", "time"), data.FEATURES])
def test_the_second_matrix_of_features_is_the_transpose(kinds):
    _, _, ids = data.to_tensors(SMALL_TRAIN, SMALL_TEST)
    matrix, transposed, counts = data.features(SMALL_TRAIN, ids, kinds, users=SMALL_USERS)
    n_rows, n_features = 4 + 3 + 4 * ("time" in kinds), sum(counts)
    assert (len(matrix.starts), len(transposed.starts)) == (n_rows + 1, n_features + 1)
    columns = zip(*dense(matrix, n_features), strict=True)
    assert dense(transposed, n_rows) == [list(column) for column in columns]


def test_numbers_are_described_by_tenths():
    ages = polars.DataFrame({"user": range(100), "age": range(100), "stars": [1, 2] * 50})
    told = data.describe(ages, "user").sort("user", "feature")
    assert told["value"].to_list() == [1.0] * 200
    assert told.filter(polars.col("feature") < 10)["feature"].to_list() == [
        user // 10 for user in range(100)
    ]
    assert told.filter(polars.col("feature") >= 10)["feature"].to_list() == [10, 11] * 50


def test_nothing_told_is_no_feature():
    _, _, ids = data.to_tensors(SMALL_TRAIN, SMALL_TEST)
    names = SMALL_USERS.select("user", "name")
    assert len(data.describe(names, "user")) == 0
    matrix, *_ = data.features(SMALL_TRAIN, ids, ("id", "side"), users=names)
    assert dense(matrix, 7) == identity(7)
    with pytest.raises(ValueError, match="the features side say nothing of the users"):
        data.features(SMALL_TRAIN, ids, ("side",), users=names)


@pytest.mark.parametrize(
    "about",
    [
        SMALL_USERS.clear(),
        SMALL_USERS.with_columns(job=polars.lit(None, polars.String)).select("user", "job"),
        SMALL_USERS.with_columns(likes=polars.lit([], polars.List(polars.String))).drop("job"),
        SMALL_USERS.with_columns(age=polars.lit(None, polars.Int64)).select("user", "age"),
    ],
    ids=["empty", "null text", "empty lists", "null numbers"],
)
def test_columns_without_values_are_no_features(about):
    _, _, ids = data.to_tensors(SMALL_TRAIN, SMALL_TEST)
    matrix, *_ = data.features(SMALL_TRAIN, ids, ("id", "side"), users=about)
    assert dense(matrix, 7) == identity(7)


@pytest.mark.parametrize("kinds", ["side", ("id", "tiem")])
def test_unknown_features_are_named(kinds):
    _, _, ids = data.to_tensors(SMALL_TRAIN, SMALL_TEST)
    with pytest.raises(ValueError, match="features must be some of"):
        data.features(SMALL_TRAIN, ids, kinds)


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 1.0])
def test_a_share_that_leaves_a_part_empty(ratings, fraction):
    with pytest.raises(ValueError, match=f"a share of {fraction:g} of 100000 ratings"):
        data.hold_out(ratings, fraction, seed=0)


def test_what_training_tells_of():
    part, _, ids = data.to_tensors(SMALL_TRAIN, SMALL_TEST)
    seen = data.find_seen(part, ids)
    assert [mask.tolist() for mask in seen] == [[True, True, False, True], [True, True, False]]
    seen, _ = data.find_seen(part, ids, users=SMALL_USERS)
    assert seen.tolist() == [True, True, False, True], "of user 40 nothing is told either"
    told = SMALL_USERS.with_columns(job=polars.lit("cook"))
    assert data.find_seen(part, ids, users=told)[0].all()


def test_time_context_is_the_formula():
    """Against the double loop over one user's ratings, ties and a gap of a year among them."""
    times = [50, 50, 53, 400, 40_000_000, 40_000_001, 52]
    rows = [(1, item, 1 + item % 5) for item in range(7)]
    rows += [(2, item, 1 + (item * 3) % 5) for item in range(0, 7, 2)]
    table = frame(rows).with_columns(timestamp=polars.Series([*times, 50, 60, 70, 80]))
    test = table[[2, 9]]
    train = table.filter(~polars.int_range(polars.len()).is_in([2, 9]))
    context, test_context = data.time_context(train, test)
    mean = train["rating"].mean()
    excess = {}
    for item, part in train.group_by("item"):
        excess[item[0]] = ((part["rating"] - mean).sum()) / (len(part) + 5)
    for part, got in ((train, context), (test, test_context)):
        for (user, item, _, time_), row in zip(part.iter_rows(), got.tolist(), strict=True):
            others = [
                (r - mean - excess[i], t)
                for u, i, r, t in train.iter_rows()
                if u == user and i != item
            ]
            usual = sum(e for e, _ in others) / (len(others) + 1)
            for tau, value in zip(data.TIME_SCALES, row, strict=True):
                weights = [math.exp(-abs(t - time_) / tau) for _, t in others]
                pairs = zip(weights, others, strict=True)
                total = sum(weight * (e - usual) for weight, (e, _) in pairs)
                assert value == pytest.approx(total / (10 + sum(weights)), abs=1e-6)


def test_features_never_read_a_test_rating(ratings, ml_100k):
    train, test = data.split(ratings, "ua")
    turned = test.drop("rating")
    for ours, theirs in zip(
        data.time_context(train, test), data.time_context(train, turned), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_path_is_no_pattern(tmp_path):
    for name, rating in (("d*", 3), ("dx", 5)):
        (tmp_path / name).mkdir()
        data.write_ratings(frame([(1, 2, rating)]), tmp_path / name / "u.data")
    assert data.read_ratings(tmp_path / "d*" / "u.data")["rating"].to_list() == [3]


# --- ids


@given(rows=st.lists(st.tuples(*[st.integers(0, 3)] * 3)), is_text=st.booleans())
def test_repeats_against_the_loop(rows, is_text):
    table = frame([(user, item, place) for place, (user, item, _) in enumerate(rows)])
    table = table.with_columns(
        timestamp=polars.Series([row[2] for row in rows], dtype=polars.Int64)
    )
    if is_text:
        table = table.with_columns(polars.col("user", "item").cast(polars.String))
    for ratings in (table, table.drop("timestamp"), table.sort("user", "item")):
        latest = {}
        for row in ratings.rows():
            known = latest.get(row[:2])
            if known is None or row[3:] >= known[3:]:
                latest[row[:2]] = row
        expected = [row for row in ratings.rows() if latest[row[:2]] == row]
        assert data.drop_repeats(ratings).rows() == expected


@pytest.mark.parametrize(
    ("ids", "pair"),
    [
        (["Ann", "Bob", "ann "], "'Ann' and 'ann '"),
        (["a  b", "c", "a\t b"], "'a\\\\t b' and 'a  b'"),
        (["straße", "STRASSE", "x"], "'STRASSE' and 'straße'"),
        (["É", "é\xa0"], "'É' and 'é\\\\xa0'"),
        (["ab", "a b", "7", "07"], None),
    ],
)
def test_ids_that_look_alike_are_named(ids, pair):
    table = polars.DataFrame({"user": ids, "item": [1] * len(ids)})
    for name in ("user", "item"):
        ratings = table if name == "user" else table.rename({"user": "item", "item": "user"})
        if pair is None:
            data.check_ids(ratings)
        else:
            message = f"^the {name}s {pair} differ only in case or spaces$"
            with pytest.raises(ValueError, match=message):
                data.check_ids(ratings)


def test_ids_of_one_type():
    numbers, words = frame([(1, 2, 3)]), frame([(1, 2, 3)]).with_columns(user=polars.lit("a"))
    users = polars.DataFrame({"user": [1]})
    assert data.same_ids(numbers, None, users) == (numbers, None, users)
    same = data.same_ids(numbers, words, None, users)
    assert [table["user"].to_list() for table in same if table is not None] == [["1"], ["a"], ["1"]]
    assert same[0]["item"].dtype == polars.Int64
    train, test = same[0], words
    assert data.to_tensors(train, test)[2].users.to_list() == ["1", "a"]


def test_shared_pairs_may_be_allowed():
    part, test_part, _ = data.to_tensors(SMALL_TRAIN, SMALL_TRAIN, allow_overlap=True)
    assert part.users.tolist() == test_part.users.tolist() == [2, 0, 2, 1]


def test_text_ids_give_the_features_of_numbers():
    """Of one order, so that the rows are the same; and the latest of each user is the same test."""
    table = frame([(user, item, 1 + user % 5) for user in range(10, 30) for item in range(40, 50)])
    table = table.with_columns(timestamp=polars.Series(range(200)) * 7919 % 1000)
    users = polars.DataFrame({"user": range(10, 30), "job": ["cook", "pilot"] * 10})
    results = []
    for dtype in (polars.Int64, polars.String):
        ratings = table.with_columns(polars.col("user", "item").cast(dtype))
        about = users.with_columns(polars.col("user").cast(dtype))
        train, test = data.split(ratings, "last3")
        part, test_part, ids = data.to_tensors(train, test)
        *matrices, _ = data.features(train, ids, users=about)
        seen = data.find_seen(part, ids, users=about)
        context = data.time_context(train, test)
        results.append([*part, *test_part, *seen, *context, *itertools.chain(*matrices)])
        folds = [len(test) for _, test in data.fold(ratings, 3, seed=0)]
        assert folds == [67, 67, 66]
    for number, text in zip(*results, strict=True):
        assert torch.equal(number, text)


# --- writing


def test_a_file_is_replaced_whole(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    data.write_file(path, b"old")
    link.symlink_to(path)
    data.write_file(link, b"new")
    assert path.read_bytes() == b"new"
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    data.write_file(path, b"old")
    with pytest.raises(TypeError):
        data.write_file(path, "no bytes")
    with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left"):
        data.write_file(Path("/dev/full"), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("is_file", [False, True])
def test_stdout_is_written_to_not_replaced(tmp_path, is_file):
    code = "import data, pathlib; print('before', flush=True);"
    code += "data.write_file(pathlib.Path('/dev/stdout'), b'through')"
    with open(tmp_path / "out", "w+b") as out:
        stdout = out if is_file else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True)
        out.seek(0)
        assert (out.read() if is_file else done.stdout) == b"before\nthrough"


def test_what_cannot_be_written_is_named(tmp_path):
    data.check_writable(tmp_path / "new")
    data.check_writable(tmp_path / ("n" * 255))
    assert os.listdir(tmp_path) == []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.close()
    for path in (
        tmp_path,
        tmp_path / "missing" / "file",
        tmp_path / "socket",
        tmp_path / ("n" * 300),
    ):
        with pytest.raises(OSError, match=f"^{path} cannot be written: "):
            data.check_writable(path)


TABLE = polars.DataFrame({"user": ["a,b", 'c"'], "score": [1.5, 2.0]})


@pytest.mark.parametrize("name", ["new.csv", "new.TSV", "new.parquet"])
def test_frames_are_written_as_one(tmp_path, name):
    path, link = tmp_path / name, tmp_path / f"link{Path(name).suffix}"
    link.symlink_to(path)
    data.write_frames(link, iter([TABLE] * 5))
    if name == "new.parquet":
        assert polars.read_parquet(path).equals(polars.concat([TABLE] * 5))
    else:
        separator = "," if name == "new.csv" else "\t"
        assert path.read_text() == polars.concat([TABLE] * 5).write_csv(separator=separator)
    assert sorted(os.listdir(tmp_path)) == sorted([name, link.name])


@pytest.mark.parametrize("name", ["old.csv", "old.parquet"])
@pytest.mark.parametrize("n_frames", [0, 1, 9])
@pytest.mark.parametrize("error", [KeyError("mine"), OSError("mine"), KeyboardInterrupt()])
def test_what_the_frames_raise_leaves_the_old_file(tmp_path, name, n_frames, error):
    def frames():
        assert threading.current_thread() is threading.main_thread()
        yield from [TABLE] * n_frames
        raise error

    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(type(error)) as caught:
        data.write_frames(tmp_path / name, frames())
    assert caught.value is error
    assert (tmp_path / name).read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def test_frames_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"new\.xlsx must end in \.csv, \.tsv or \.parquet"):
        data.write_frames(tmp_path / "new.xlsx", [TABLE])
    with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left"):
        data.write_frames(Path("/dev/full"), [TABLE] * 5)
    (tmp_path / "full.parquet").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"full\.parquet cannot be written: Parquet needs a file"):
        data.write_frames(tmp_path / "full.parquet", [TABLE])
    with pytest.raises(OSError, match=r"new\.csv cannot be written: No such file"):
        data.write_frames(tmp_path / "missing" / "new.csv", [TABLE])


def test_frames_go_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=data.write_frames, args=(tmp_path / "pipe", [TABLE] * 2))
    writer.start()
    assert (tmp_path / "pipe").read_text() == polars.concat([TABLE] * 2).write_csv()
    writer.join()


# --- the download, from a server of this machine


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def good_zip(ml_100k):
    """GroupLens's layout from the real data: its u.item has dates, URLs and flags besides."""
    lines = []
    for item, title, _year, genres in data.read_items(ml_100k).iter_rows():
        flags = ["01"[genre in genres] for genre in data.ML_100K_GENRES]
        lines.append("|".join([str(item), title + " ", "01-Jan-1995", "", "http://x", *flags]))
    return zipped(
        {
            "ml-100k/u.data": (ml_100k / "u.data").read_bytes(),
            "ml-100k/u.user": (ml_100k / "u.user").read_bytes(),
            "ml-100k/u.item": ("\n".join(lines) + "\n").encode("latin-1"),
        }
    )


@pytest.fixture
def serve():
    """Serve one answer: `serve(content, length=..., status=..., pause=...)` returns its URL."""
    servers, over = [], threading.Event()

    def serve(content=b"", length=None, status=200, pause=0.0, drip=False, head=b""):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.n_requests += 1
                over.wait(pause)
                for byte in head:
                    if over.wait(0.02):
                        return
                    self.wfile.write(bytes([byte]))
                self.send_response(status)
                self.send_header("Content-Length", str(length or len(content)))
                self.end_headers()
                try:
                    for start in range(0, len(content), 1 if drip else 1 << 20):
                        self.wfile.write(content[start : start + (1 if drip else 1 << 20)])
                        if drip and over.wait(0.02):
                            break
                except OSError:
                    pass  # the client has given up

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = False  # server_close waits for their sockets to be closed
        server.n_requests = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/ml-100k.zip"

    serve.servers = servers
    yield serve
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def get(tmp_path, url, content=b"", **options):
    lines = []
    folder = data.get_ml_100k(
        tmp_path, notice=lines.append, url=url, zip_md5=md5(content), **options
    )
    (line,) = lines
    return folder, line


def test_a_good_zip_is_kept_and_never_fetched_again(tmp_path, serve, good_zip, ml_100k):
    url = serve(good_zip)
    folder, line = get(tmp_path, url, good_zip)
    assert line == f"ml-100k: from {url}, kept in {folder}"
    for name in data.ML_100K_FILES:
        assert (folder / name).read_bytes() == (ml_100k / name).read_bytes()
    assert get(tmp_path, url, good_zip) == (folder, f"ml-100k: from the cache {folder}")
    assert serve.servers[0].n_requests == 1


@pytest.mark.parametrize("name", ["u.data", "u.user", "items.tsv"])
def test_a_changed_byte_in_the_cache_is_fetched_again(tmp_path, serve, good_zip, name):
    folder, _ = get(tmp_path, serve(good_zip), good_zip)
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(good.replace(b"1", b"2", 1))
    _, line = get(tmp_path, serve(good_zip), good_zip)
    assert line.startswith(f"ml-100k: {name} in {folder} failed the checksum; from http")
    assert (folder / name).read_bytes() == good


ESCAPES = {"../../escaped": b"x", "/tmp/ml-100k-escaped": b"x", "ml-100k/../../escaped": b"x"}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda zip_: {"content": zip_[:1000], "length": len(zip_)}, "broke off after 1,000 of"),
        (lambda zip_: {"content": zip_[:-9] + b"different"}, "the zip failed its checksum"),
        (lambda zip_: {"content": b"", "status": 404}, "HTTP 404 Not Found"),
        (lambda zip_: {"content": zip_, "pause": 9.0}, "no answer in 0.3 s"),
        (lambda zip_: {"content": zip_, "drip": True}, "not all in 3.6 s"),
        (lambda zip_: {"content": zip_, "head": b"HTTP/1.1 200 OK" + b" " * 999}, "not all in 3.6"),
    ],
    ids=["truncated", "wrong checksum", "404", "hangs", "drips", "drips its head"],
)
def test_a_bad_answer_is_one_line_and_keeps_nothing(tmp_path, serve, good_zip, answer, message):
    start = time.monotonic()
    with pytest.raises(OSError, match=r"can't be had: http://127\.0\.0\.1:") as caught:
        get(tmp_path, serve(**answer(good_zip)), good_zip, timeout=0.3)
    assert message in str(caught.value)
    assert "recbole==1.2.1 through pip: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "ml-100k") == []
    assert time.monotonic() - start < 60


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip at all", "no good zip (File is not a zip file)"),
        (zipped({"ml-100k/u.data": b"1\t2\t3\t4\n"}), "There is no item named 'ml-100k/u.user'"),
        (zipped(ESCAPES), "There is no item named 'ml-100k/u.data'"),
    ],
)
def test_a_bad_zip_with_the_right_checksum(tmp_path, serve, content, message):
    with pytest.raises(OSError, match="can't be had") as caught:
        get(tmp_path / "data", serve(content), content)
    assert message in str(caught.value)
    assert list(tmp_path.rglob("*")) == [tmp_path / "data", tmp_path / "data" / "ml-100k"]


def test_a_zip_that_escapes_its_folder_writes_only_the_data(tmp_path, serve, good_zip):
    buffer = io.BytesIO(good_zip)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, content in ESCAPES.items():
            archive.writestr(name, content)
    content = buffer.getvalue()
    folder, _ = get(tmp_path / "a" / "b", serve(content), content)
    assert sorted(os.listdir(folder)) == sorted(data.ML_100K_FILES)
    assert not list(tmp_path.rglob("*escaped*"))
    assert not os.path.exists("/tmp/ml-100k-escaped")


@pytest.mark.usefixtures("offline")
def test_ratings_that_are_not_the_published_ones_are_refused(tmp_path, serve, good_zip, ml_100k):
    with zipfile.ZipFile(io.BytesIO(good_zip)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["ml-100k/u.data"] = members["ml-100k/u.data"].replace(b"\t5\t", b"\t1\t", 1)
    content = zipped(members)
    with pytest.raises(OSError, match=r"zip: u.data failed its checksum; recbole==1.2.1 through"):
        get(tmp_path, serve(content), content)
    assert os.listdir(tmp_path / "ml-100k") == []


def test_the_package_gives_the_same_files(tmp_path, ml_100k, serve):
    """Through the real pip and whatever index it is set up for."""
    try:
        url = serve(status=404)
        folder, line = get(tmp_path, url)
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no package index: {error}")
    assert line == (
        f"ml-100k: {url}: HTTP 404 Not Found; from recbole==1.2.1 through pip, kept in {folder}"
    )
    for name in data.ML_100K_FILES:
        assert (folder / name).read_bytes() == (ml_100k / name).read_bytes()


def layout(name):
    """A zip of `name` as GroupLens makes it, of two ratings and a film."""
    folder = {"ml-10m": "ml-10M100K"}.get(name, name)
    if name in ("ml-1m", "ml-10m"):
        members = {
            "ratings.dat": b"1::2::3::4\n1::5::0.5::6\n",
            "movies.dat": b"2::A (1990)::War\n",
        }
    else:
        text = b"userId,movieId,rating,timestamp\n1,2,3.0,4\n1,5,0.5,6\n"
        members = {"ratings.csv": text, "movies.csv": b"movieId,title,genres\n2,A (1990),War\n"}
    return zipped({f"{folder}/{file}": content for file, content in members.items()})


def get_other(tmp_path, url, name="ml-1m", **options):
    lines, server = [], url.rpartition("/")[0]
    return data.get_dataset(name, tmp_path, notice=lines.append, server=server, **options), lines


@pytest.mark.parametrize("name", data.DATASETS)
def test_another_movielens_is_kept_as_its_zip(tmp_path, serve, monkeypatch, name):
    content, path = layout(name), tmp_path / "new" / f"{name}.zip"
    checksum = data.DATASETS[name][1] and md5(content)
    monkeypatch.setitem(data.DATASETS, name, (9_000, checksum))
    url = serve(content)
    source = url.replace("ml-100k", name)
    got, lines = get_other(path.parent, url, name)
    assert lines == [f"{name}: downloading {source}", f"{name}: from {source}, kept in {path}"]
    assert got == path
    assert data.read_ratings(path).rows() == [(1, 2, 3, 4), (1, 5, 0.5, 6)]
    assert data.read_items(path).rows() == [(2, "A (1990)", 1990, ["War"])]
    assert get_other(path.parent, url, name) == (path, [f"{name}: from the cache {path}"])
    if checksum:
        path.write_bytes(content[:-1] + b"x")
        get_other(path.parent, url, name)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]
    assert serve.servers[0].n_requests == (2 if checksum else 1)


ML_1M = layout("ml-1m")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"content": ML_1M[:99], "length": len(ML_1M)}, "broke off after 99 of"),
        ({"content": ML_1M[:-9] + b"different"}, "the zip failed its checksum"),
        ({"content": b"", "status": 404}, "HTTP 404 Not Found"),
        ({"content": ML_1M, "pause": 9.0}, "no answer in 0.1 s"),
        ({"content": ML_1M, "drip": True}, "not all in 1.2 s"),
        ({"content": ML_1M * 30}, "more than 3,000 bytes"),
    ],
    ids=["truncated", "wrong checksum", "404", "hangs", "drips", "too large"],
)
def test_a_bad_answer_keeps_nothing_of_another(tmp_path, serve, monkeypatch, answer, message):
    monkeypatch.setitem(data.DATASETS, "ml-1m", (3_000, md5(ML_1M)))
    with pytest.raises(OSError, match=r"^ml-1m can't be had: http://127") as caught:
        get_other(tmp_path, serve(**answer), timeout=0.1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_page_is_no_data_set(tmp_path, serve):
    with pytest.raises(OSError, match=r"^ml-latest-small can't be had: .*small\.zip: no zip$"):
        get_other(tmp_path, serve(b"<html>"), "ml-latest-small")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="no data set 'netflix': it is ml-100k, ml-latest-small,"):
        data.get_dataset("netflix")


def test_the_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COLLAB_DATA_DIR", raising=False)
    assert data.default_data_dir() == tmp_path / "collab"
    monkeypatch.setenv("COLLAB_DATA_DIR", str(tmp_path / "mine"))
    assert data.default_data_dir() == tmp_path / "mine"


def test_a_path_may_be_text(tmp_path, ratings):
    few = ratings.head(50)
    data.write_ratings(few, f"{tmp_path}/r.tsv")
    assert data.read_ratings(f"{tmp_path}/r.tsv").equals(few)
    data.check_writable(f"{tmp_path}/p.csv")
    data.write_frames(f"{tmp_path}/p.csv", [few.select("user", "item")])
    (pairs,) = data.read_pairs(f"{tmp_path}/p.csv")
    assert pairs["item"].cast(int).to_list() == few["item"].to_list()
    data.write_file(f"{tmp_path}/i.csv", b"item,rating,title\n1,4,Film\n")
    assert data.read_rated(f"{tmp_path}/i.csv").rows() == [(1, 4.0)]
    assert data.read_items(f"{tmp_path}/i.csv")["title"].to_list() == ["Film"]
    data.write_file(f"{tmp_path}/u.csv", b"user,age\n1,40\n")
    assert data.read_users(f"{tmp_path}/u.csv")["age"].to_list() == [40]
    folder = str(data.get_ml_100k().parent)
    assert data.get_ml_100k(folder) == data.get_dataset("ml-100k", folder) == data.get_ml_100k()
