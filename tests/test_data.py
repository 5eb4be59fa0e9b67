import bz2
import datetime
import gzip
import hashlib
import http.server
import io
import itertools
import lzma
import math
import os
import pickle
import re
import threading
import zipfile
from contextlib import suppress
from functools import partial

import numpy
import polars
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from data import read_items, read_rated, read_ratings, read_users

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


def as_text(table, **options):
    return table.write_csv(**options).encode()


as_tabs = partial(as_text, separator="\t", include_header=False)


def frame(rows):
    schema = {"user": polars.Int64, "item": polars.Int64, "rating": polars.Float32}
    table = polars.DataFrame(rows, schema=schema, orient="row")
    return table.with_columns(timestamp=polars.lit(0, polars.Int64))


def ordered(*tables):
    return polars.concat(tables).sort("user", "item")


@pytest.mark.parametrize("name", SPLIT_MD5)
def test_splits_are_grouplenss_byte_for_byte(ratings, name):
    parts = data.split(ratings.cast({"rating": polars.Int64}), name)
    assert tuple(hashlib.md5(as_tabs(part)).hexdigest() for part in parts) == SPLIT_MD5[name]


def test_random_shares_are_seeded(ratings):
    for seed, fraction, n_test in ((0, 0.1, 10_000), (1, 0.25, 25_000)):
        train, test = data.hold_out(ratings, fraction, seed=seed)
        assert ordered(train, test).equals(ordered(ratings))
        drawn = numpy.random.default_rng(seed).permutation(100_000) < n_test
        assert ordered(ratings.filter(drawn)).equals(test), "figures rest on it"
        assert data.split(ratings, "random", seed=seed)[1].equals(test) == (fraction == 0.1)


def test_every_rating_is_tested_in_one_fold():
    table = frame([(user, item, 1 + user % 5) for user in range(20) for item in range(5)][:-1])
    parts = list(data.fold(table, 7, seed=0))
    assert sorted(len(test) for _, test in parts) == [14, 14, 14, 14, 14, 14, 15]
    assert ordered(*(test for _, test in parts)).equals(table)
    assert all(ordered(*part).equals(table) for part in parts)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1), st.integers(1, 12))
def test_the_last_n_are_the_last_by_time(rows, n_last):
    """Against a sort of each user's ratings: times tie, and the first of a user is never tested."""
    table = frame([(user, item, 3) for item, (user, _) in enumerate(rows)])
    table = table.with_columns(timestamp=polars.Series([time_ for _, time_ in rows]))
    if len({user for user, _ in rows}) == len(rows):
        with pytest.raises(ValueError, match="leaves no test part"):
            data.split(table, f"last{n_last}")
        return
    train, test = data.split(table, f"last{n_last}")
    expected = []
    for user in range(1, 5):
        places = [place for place, row in enumerate(rows) if row[0] == user]
        places.sort(key=lambda place: rows[place][1])  # stable: of one time, by the file's order
        expected += sorted((user, place) for place in places[1:][-n_last:])
    assert test.select("user", "item").rows() == expected
    assert train.equals(ordered(train))
    assert ordered(train, test).equals(ordered(table))


def test_the_split_by_date_is_the_last_tenth():
    table = frame([(1 + n % 3, n, 3) for n in range(29)])
    table = table.with_columns(timestamp=polars.Series([(n * 7) % 29 for n in range(29)]))
    train, test = data.split(table, "by-date")
    assert sorted(test["timestamp"]) == [26, 27, 28]
    assert ordered(train, test).equals(ordered(table))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 9))
def test_by_date_all_that_is_tested_is_later_than_all_trained_on(times, n_folds):
    table = frame([(1 + n % 3, n, 3) for n in range(len(times))])
    table = table.with_columns(timestamp=polars.Series(times, dtype=polars.Int64))
    in_order, n_parts = sorted(times), n_folds + 1
    edges = [in_order[len(times) * n // n_parts] for n in range(n_parts)] + [10]
    if len(set(edges)) <= n_parts:
        with pytest.raises(ValueError, match=rf"different times are too few for {n_parts} parts"):
            next(data.fold_by_date(table, n_folds))
        return
    parts = list(data.fold_by_date(table, n_folds))
    for (train, test), start, end in zip(parts, edges[1:-1], edges[2:], strict=True):
        assert train.equals(ordered(table.filter(polars.col("timestamp") < start)))
        assert test.equals(
            ordered(table.filter(polars.col("timestamp").is_between(start, end - 1)))
        )


def into(write, **options):
    buffer = io.BytesIO()
    write(buffer, **options)
    return buffer.getvalue()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Exported:
    """A frame of some other library."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


WRITERS = {
    "csv": as_text,
    **{separator: partial(as_text, separator=separator) for separator in "\t;|"},
    "no header": partial(as_text, include_header=False),
    "quoted": partial(as_text, quote_style="always", line_terminator="\r\n"),
    "marked": partial(as_text, include_bom=True),
    "unread": lambda table: as_text(table.with_columns(text=polars.lit(""))),
    "parquet": lambda table: into(table.write_parquet),
    "gzip": lambda table: gzip.compress(as_text(table)),
    "zstd": lambda table: into(table.lazy().sink_csv, compression="zstd"),
    "zip": lambda table: zipped({"a/README": b"", "../../ratings.csv": as_text(table)}),
    "colons": lambda table: as_tabs(table).replace(b"\t", b"::"),
}
# What a file of text, or a number in it, is made of, more often than at random.
LETTERS = st.sampled_from(',;|\t"\n\n\n\r :aAé0') | st.characters(exclude_categories=["Cs", "Cc"])
NUMBERS = st.integers(-(2**63), 2**63) | st.integers(0, 200)
IDS = (st.text(letters, min_size=1, max_size=5) for letters in (LETTERS, "00112 +-._"))
TEXTS = [texts.filter(lambda text: text.strip() not in data.MISSING) for texts in IDS]
ANY_IDS = st.sampled_from([NUMBERS.map(str), *TEXTS])
PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1)
ID_NAMES = st.sampled_from([lambda n: n, lambda n: n * 10**9, "é{}".format])
ML_1M = zipped({"ml-1m/ratings.dat": b"1::2::3::4\n1::5::0.5::6\n", "a": b"b"})
ML_1M_MD5 = hashlib.md5(ML_1M).hexdigest()


def as_ids(texts):
    """The rule: Int64 where each is as Python prints it, or with .0 and blanks; else as it is."""
    bare = [re.sub(r"\.0*$", "", text.strip()) for text in texts]
    try:
        numbers = [int(text) for text in bare]
    except ValueError:
        return texts
    is_plain = [*map(str, numbers)] == bare and all(-(2**63) <= n < 2**63 for n in numbers)
    return polars.Series(texts.name, numbers) if is_plain else texts


def read_pairs(path):
    return data.scan_pairs(path)[0].collect(engine="streaming").drop("row")


@pytest.mark.parametrize("name", WRITERS)
@given(source=st.data())
def test_any_ratings_are_read_as_they_were_written(tmp_path_factory, name, source):
    ids = NUMBERS.map(str) if name == "colons" else source.draw(ANY_IDS)
    row = st.tuples(ids, ids, st.integers(-10, 10).map(lambda twice: twice / 2))
    rows = source.draw(st.lists(row, min_size=3, max_size=8))
    table = polars.DataFrame(rows, ["user", "item", "rating"], orient="row")
    if source.draw(st.booleans()):
        table = table.with_columns(timestamp=polars.int_range(polars.len()) - 1)
    path = tmp_path_factory.getbasetemp() / "any*body[1]"
    path.write_bytes(WRITERS[name](table))
    expected = table.with_columns(as_ids(table["user"]), as_ids(table["item"]))
    expected = expected.cast({"rating": polars.Float32})
    read = read_ratings(path)
    assert read.equals(expected)
    assert read.schema == expected.schema
    pairs, locate = data.scan_pairs(path)
    pairs = pairs.collect(engine="streaming")
    assert pairs.drop("row").equals(table.drop("rating"))
    if name == "csv":
        n_lines = [1 + (user + item).count("\n") for user, item, _ in rows]
        starts = itertools.accumulate(n_lines[:-1], initial=2)
        assert [*map(locate, pairs["row"])] == [f"{path}, line {start}" for start in starts]


def try_reading(read, path):
    """What is read and None, or None and the line that says why not."""
    try:
        return read(path), None
    except (OSError, ValueError) as error:
        line = str(error)
    assert line.startswith(str(path))
    assert len(line.splitlines()) == 1
    return None, line


@pytest.mark.parametrize("name", ["parquet", "gzip", "zstd", "zip", "quoted", "none"])
def test_a_broken_file_is_a_frame_or_one_line(tmp_path, name):
    """Cut off, with bytes changed, or both; seeded, for some would have polars end the process."""
    items, random = [*map(str, range(26)), "é"], numpy.random.default_rng(0)
    table = polars.DataFrame({"user": [1, 2, 3] * 9, "item": items, "rating": [1.5, 2, 3] * 9})
    for _ in range(60):
        letters = "".join(random.choice([*'12.,:;"\t\r\n-exan'], 60)).encode()
        changed = bytearray(letters if name == "none" else WRITERS[name](table))
        for place in random.integers(4, len(changed), random.integers(0, 4)):
            changed[place] = random.integers(256)
        end = random.choice([len(changed), random.integers(5, len(changed))])
        (tmp_path / "broken").write_bytes(changed[:end])
        for reader in (read_users, read_items, read_pairs):
            try_reading(reader, tmp_path / "broken")
        read, error = try_reading(read_ratings, tmp_path / "broken")
        assert error or (read["rating"].is_finite().all() and not sum(read.null_count().row(0)))


rated = partial(partial, read_ratings)
NO_TIMES = (2**64, "2021-02-29", "1970-01-01T05+05", "01/31/2003", "1e300", "noon")
TIMES = [
    ("978300760.9", 978300760.9), ("-0.5", -0.5), (" 1e3", 1000), ("1970-01-02", 86_400),
    ("1970-01-01T00:00:01", 1), ("1970-01-01 00:01", 60), ("1970-01-01T00:00:01.999Z", 1.999),
    ("1969-12-31T23:59:59.5", -0.5), ("1970-01-01T02:00+02:00", 0),
    ("1970-01-01 00:00-0130", 5_400), ("02/01/1970", 86_400), ("2.1.1970 00:01", 86_460),
    ("1600000000123", 1600000000.123), ("1600000000123456", 1600000000.123456),
    ("1600000000123456789", 1600000000.123456789), ("253402300799", 253402300799),
]  # fmt: skip
NOON = datetime.datetime(1970, 1, 1, 12)
ONE, TWO = frame([(1, 2, 3)]), frame([(1, 2, 3), (1, 4, 3)])
TIMED = ONE.with_columns(timestamp=1)


@pytest.mark.parametrize("n_before", [0, 2000])
@pytest.mark.parametrize(("line", "message"), [
    ("1,2", "fields: 2, not 4"), ("1,2,3,4,5", "fields: 5, not 4"), ('1,2,"3,4', "fields: "),
    ("1,,3,4", "a value is missing (item)"), ('"",2,3,4', "a value is missing (user)"),
    ("1,2,1_0,4", "rating '1_0' is not a finite number"), ("1::2::3::4", "fields: 1, not 4"),
    ('1,2",3,4', "fields: a quote"), ('1,"2\n3",4', "fields: 2, not 4"), ('1,"2"x,3,4', ""),
    ('1,"2\n3",bad,4', "rating 'bad' is not a finite number"),
    *((f"1,2,3,{text}", f"timestamp '{text}' is not a time") for text in NO_TIMES),
])  # fmt: skip
def test_a_wrong_line_is_named_by_its_number(tmp_path, n_before, line, message):
    good, path = "7,8,3.5,9\r\n7,9,4,9\n", tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,time\n" + good * (1 + n_before) + line + "\n" + good)
    for read in (partial(read_ratings, columns={"timestamp": "time"}), read_pairs):
        _, error = try_reading(read, path)
        if read is not read_pairs or message.startswith("fields"):
            assert error.startswith(f"{path}, line {4 + 2 * n_before}: {message}")


@pytest.mark.parametrize(("read", "content", "message"), [
    (read_ratings, "\ufeff", "no ratings"),
    (read_ratings, "1,2,3,4,5\n", "line 1: no column for user, item, rating among column 1, "),
    (read_ratings, "1::1::3::4\na:b::c::3::4\n1::2::3\n1::3::3::4\n", "line 3: fields: 3, not 4"),
    (read_ratings, "1::1::3::4\na:b::c::3::4\n1::2::x::4\n", "line 3: rating 'x' is not"),
    (read_ratings, zipped({"a/u.data": b"u,i,r\n"}), "a/u.data, line 1: no column for user"),
    (read_ratings, zipped({"a\nb/ratings.csv": b""}), "no ratings"),
    (read_ratings, zipped({"u.data": b"1,2,3\n" * 99}), "more than 500 bytes"),
    (rated(rating_range=(0.1, 5)), "1,2,0.1\n1,2,6", "line 2: rating '6' is not a finite number"),
    (read_pairs, "user,sku,x\na,b,c\n", "line 1: no column for item among user, sku, x: tell it"),
    (read_pairs, "1,2\n1,\n,3\n", "line 2: a value is missing (item)"),
    (read_users, "a,b\n1,2\n", "line 1: no column for user among a, b: tell it by --user-column"),
    (read_ratings, '"7\n8",1,2\n1,2,x\n', "line 3: rating 'x' is not a finite number"),
    (read_users, "user,b\na,2\n,3\n", "line 3: a value is missing (user)"),
    (read_users, "user,b\na,2,3\n", "line 2: fields: 3, not 2"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, read, content, message):
    monkeypatch.setattr(data, "LARGEST_MEMBER", 500)
    path = tmp_path / ("ratings" if isinstance(content, str) else "r.zip")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in try_reading(read, path)[1]


@pytest.mark.parametrize(("ask", "message"), [
    *((partial(data.split, ONE, name), f"no split '{name}': it is ua, ub, .* or lastN")
      for name in ("u6", "last", "last0", "last-1", "last1.5", "LAST1")),
    (lambda: data.split(ONE, "u1"), "u1 is of ml-100k's .* here are 1: random"),
    (lambda: data.hold_out(TWO, 1e-9, seed=0), "a share of 1e-09 of 2 ratings"),
    (lambda: next(data.fold(TWO, 3, seed=0)), "cannot cut 2 ratings into 3 folds"),
    (lambda: data.to_tensors(TWO.clear(), ONE), "the training part has no ratings"),
    (lambda: data.split(TIMED, "last3"), "the split last3 leaves no test part"),
    (lambda: data.to_tensors(ONE, TWO), "1 of the test part's .* in the training part too"),
    (lambda: data.features(TWO, None, "side"), "features must be some of .*, not 'side'"),
    (lambda: data.features(TWO, None, ["id", "tiem"]), "features must be some of .* 'tiem'"),
    (lambda: data.get_dataset("netflix"), "no data set 'netflix': it is ml-100k, ml-latest-small,"),
])  # fmt: skip
def test_what_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_a_pipe_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (read_ratings, read_pairs):
        threading.Thread(target=pipe.write_bytes, args=(b"1,2,3\n1,4,5\n",)).start()
        assert read(pipe)["item"].cast(int).to_list() == [2, 4]


@pytest.mark.parametrize(("read", "text", "first"), [
    (read_ratings, "title,Rating,Movie_ID,user\nHeat,1,7,3\n", (3, 7, 1)),
    (read_ratings, "user_id:token\titem_id:token\trating:float\n3\t7\t1\n", (3, 7, 1)),
    (read_ratings, "user_name,user_id,movieTitle,movieId,rating\na,b,c,d,1\n", ("b", "d", 1)),
    (read_ratings, "customer;product;score\na,1;b|;1\n", ("a,1", "b|", 1)),
    (read_ratings, 'a::b|"c:d::1\n', ("a", 'b|"c:d', 1)),
    (rated(columns={"user": "who", "item": "it"}), "who,it,score\na,b,1\n", ("a", "b", 1)),
    (rated(columns={"user": "user"}), "User,item,userId,rating\na,b,c,1\n", ("a", "b", 1)),
    (rated(columns={"user": "item", "item": "user"}), "user,item,rating\na,b,1\n", ("b", "a", 1)),
    (rated(columns={"user": "a\nuser"}), '"a\nuser","item, or so",rating\na,b,1\n', ("a", "b", 1)),
    (rated(columns={"user": "2024"}), "2024,item,rating\na,b,1\n", ("a", "b", 1)),
    (read_pairs, "user 1,titanic\nbob,heat\n", ("user 1", "titanic")),
    (read_pairs, "item,user\n7,007\n", ("007", "7")), (read_pairs, "1,2,,60\n", ("1", "2", 60)),
    (read_pairs, "rating;user;time;item\n;a;1970-01-02;b\n", ("a", "b", 86_400)),
    (read_rated, "item,rating,title\n1,4,Film\n", (1, 4)), (read_rated, "x,4,9\n", ("x", 4, 9)),
    *((read_ratings, f"1,2,3,{text}\n", (1, 2, 3, seconds)) for text, seconds in TIMES),
])  # fmt: skip
def test_what_is_read(tmp_path, read, text, first):
    (tmp_path / "any").write_text(text)
    assert read(f"{tmp_path}/any").row(0) == first


# What people have: name, content, what is read of it, and how it is told. The first line of a text
# is its header, unless there are numbers in it.
HEADERS = """
userId,movieId,rating,timestamp; user_id,item_id,rating,timestamp; User-ID,ISBN,Book-Rating,Date
user_id:token,item_id:token,rating:float,timestamp:float; reviewerID,asin,overall,unixReviewTime
review/userId,product/productId,review/score,review/time; user_id,parent_asin,rating,timestamp
customer_id,product_id,star_rating,review_date; user_id,business_id,stars,date
uid,iid,rating,timestamp
User ID,Book ID,Rating,created_at; userID,placeID,rating,rating_time; member,track,score,rated_at_
user_id,recipe_id,rating,date; user_id,anime_id,score,updated_at; customer,app_id,rating,date
account_id,song_id,value,timestamp; person,article_id,label,time; CUSTOMER NO,COURSE,STARS,DATETIME
user,joke,rating,time; user_name,game_name,rating,date; userID,artistID,weight,timestamp
user,album_id,my_rating,time_ms; userId,thing,ratings,rated_on; user id,item id,movieRating,time
"""
HEADERS = [each for each in re.split(r";\s*|\n", HEADERS) if each]
JSON = '{"user_id":"A1","asin":"007","rating":5.0,"text":"a\\n\\"b\\"","timestamp":1600000000123}\n'
THREE = polars.DataFrame({"user": [1], "item": [2], "rating": [3]})
HAVE = [
    ("1 2 3\n4 5 6.5\n", [(1, 2, 3), (4, 5, 6.5)], {}),
    ("  1   2\t3 9\n", [(1, 2, 3, 9)], {}),
    ("1;2;3,5\n", [(1, 2, 3.5)], {}), ('"1";"2";"3,5"\n', [(1, 2, 3.5)], {}),
    ("user;item;rating\na;b;,5\n", [("a", "b", 0.5)], {}),
    (",user,item,rating\n0,1,2,3\n1,4,5,6\n", [(1, 2, 3), (4, 5, 6)], {}),
    ("1,2,3\n\n4,5,6\n\n\n", [(1, 2, 3), (4, 5, 6)], {}),
    ("\n \nuser,item,rating\r\n1,2,3\r\n\r\n", [(1, 2, 3)], {}),
    ('user,item,rating,text\n1,2,3,"a\n\nb"\n\n4,5,6,\n', [(1, 2, 3), (4, 5, 6)], {}),
    ("\ufeffuser,item,rating\n1,2,3\n", [(1, 2, 3)], {}),
    ("1.0,7.,3\n2,8.00,3\n", [(1, 7, 3), (2, 8, 3)], {}),
    ("1, 2, 3\n4, 5, 6\n", [(1, 2, 3), (4, 5, 6)], {}),
    ("007,1.50,3\n7,x,3\n", [("007", "1.50", 3), ("7", "x", 3)], {}),
    ("-1,+2,3\n", [(-1, "+2", 3)], {}), ("a b,c  d,3\n", [("a b", "c  d", 3)], {}),
    ("A,b;c|d,3\n", [("A", "b;c|d", 3)], {}), ("1::a|b,c::3::9\n", [(1, "a|b,c", 3, 9)], {}),
    ("b,a,5,9\n", [("a", "b", 5, 9)], {"columns": {"item": "1", "user": 2}}),
    ("9,5,b,a\n", [("a", "b", 5)], {"columns": {"rating": 2, "item": 3, "user": 4}}),
    ("151,Fallout 4,play,87,0\n", [(151, "Fallout 4", 87)],
     {"columns": {"user": 1, "item": 2, "rating": 4}}),
    ("x,y,z\na,b,5\n", [("a", "b", 5)], {"columns": {"user": "X", "item": "y"}}),
    ("who,what,stars\na,b,5\n", [("a", "b", 5)], {"columns": {"user": 1, "item": 2}}),
    ("user,item,weight\na,b,5\n", [("a", "b", 5)], {}),
    ("user,thing,rating,time\na,b,5,9\n", [("a", "b", 5, 9)], {}),
    ("user,item,rating,time_spent,timezone\n1,2,3,x,y\n", [(1, 2, 3)], {}),
    ("user,item,rating,date\n1,2,3,01/31/2020\n", [(1, 2, 3)], {}),
    ("user,item,rating,date\n1,2,3,\n4,5,6,9\n", [(1, 2, 3), (4, 5, 6)], {}),
    ("user,item,rating,date\n1,2,3,\n4,5,6,9\n", [(1, 2, 3), (4, 5, 6)], {"skip_bad": True}),
    ("user,item,rating,date\n1,2,3,\n4,5,6,9\n", [(4, 5, 6, 9)],
     {"skip_bad": True, "columns": {"timestamp": "date"}}),
    ("user, item, rating\n1, 2, 3\n4, NULL, 5\n5, , 5\n", [(1, 2, 3)], {"skip_bad": True}),
    ("user,item,rating,date,timestamp\n1,2,3,noon,9\n", [(1, 2, 3, 9)], {}),
    (f'1,"{"x" * 200_000}",3\n', [(1, "x" * 200_000, 3)], {}),
    ('{"ué":1,"item":2,"rating":3}\n', [(1, 2, 3)], {"columns": {"user": "ué"}}),
    ("user,item,rating\nnan,7,5\n2,NULL,3\n3,8,None\n\\N,7,2\n2,7,4\n", [(2, 7, 4)],
     {"skip_bad": True}),
    ("user,item,rating\n1,2\n1,2,3,4\n1,2,x\n,2,3\n5,6,7\n", [(5, 6, 7)], {"skip_bad": True}),
    ('user,item,rating\n"1,2,3\n4,5",6\n7,"8",9\n', [(7, 8, 9)], {"skip_bad": True}),
    ('user,item,rating,text\n1,2,3,"a \\"b\\", c"\n4,5,6,"d"\n', [(4, 5, 6)], {"skip_bad": True}),
    ('user,item,rating\r\n1,"a\r\n",3\r\n2,"\r\nb",4\r\n', [(1, "a\r\n", 3), (2, "\r\nb", 4)], {}),
    ("1,2,0\n3,4,-1\n5,6,10\n", [(5, 6, 10)], {"skip_bad": True, "rating_range": (1, 10)}),
    ("3::4::5\n1::2\n", [(3, 4, 5)], {"skip_bad": True}),
    (JSON, [("A1", "007", 5, 1600000000.123)], {}),
    (JSON + '\n{"rating":4,"user_id":2,"asin":"x","timestamp":1600000001000,"more":[{"a":1}]}\n',
     [("A1", "007", 5, 1600000000.123), ("2", "x", 4, 1600000001.0)], {}),
    (JSON + "{bad}\n[1]\n" + '{"user_id":null,"asin":1,"rating":1,"timestamp":1}\n',
     [("A1", "007", 5, 1600000000.123)], {"skip_bad": True}),
    ('{"user/id":1,"it\'em":2,"rating":3}\n', [(1, 2, 3)], {"columns": {"user": "user/id"}}),
    ("é,2,3\n".encode("latin-1"), [("é", 2, 3)], {"encoding": "latin-1"}),
    ("€,2,3\n".encode("cp1252"), [("€", 2, 3)], {"encoding": "cp1252"}),
    ("user,item,rating\né,2,3\n".encode("utf-16"), [("é", 2, 3)], {"encoding": "utf-16"}),
    (gzip.compress("é 2 3\n".encode("latin-1"), mtime=0), [("é", 2, 3)], {"encoding": "latin-1"}),
    (bz2.compress(b"1\t2\t3\n"), [(1, 2, 3)], {}), (lzma.compress(b"1|2|3\n"), [(1, 2, 3)], {}),
    (gzip.compress(JSON.encode(), mtime=0), [("A1", "007", 5, 1600000000.123)], {}),
    (zipped({"a/any.txt": b"1 2 3\n", "__MACOSX/a/._any.txt": b""}), [(1, 2, 3)], {}),
    (zipped({"x.csv": "é;2;3\n".encode("latin-1")}), [("é", 2, 3)], {"encoding": "latin-1"}),
    (into(THREE.write_parquet), [(1, 2, 3)], {}), (into(THREE.write_ipc), [(1, 2, 3)], {}),
    (THREE, [(1, 2, 3)], {}), (THREE.lazy(), [(1, 2, 3)], {}), (Exported(THREE), [(1, 2, 3)], {}),
    ({"user": [1, 2], "item": numpy.array([3, 4]), "rating": torch.tensor([5, 6])},
     [(1, 3, 5), (2, 4, 6)], {}),
    ({"user": [1.0, math.nan], "item": ["a", None], "stars": [5, 6]}, [(1, "a", 5)],
     {"skip_bad": True}),
    ({"user": ["x", 7, None], "item": [1, 2, 3], "rating": [True, 2, 3]},
     [("x", 1, 1), ("7", 2, 2)], {"skip_bad": True}),
    ({"user": [1], "item": [2], "rating": [3], "time": [NOON]}, [(1, 2, 3, 43_200)], {}),
    ({"user": [1], "item": [2], "rating": [3], "time": numpy.array([500], "M8[ms]")},
     [(1, 2, 3, 0.5)], {}),
    *((f"{header}\n7,it,4,9\n", [(7, "it", 4, 9)], {}) for header in HEADERS),
]  # fmt: skip


def put(folder, content):
    """A file of a text or of bytes; what is a frame stays one."""
    if not isinstance(content, str | bytes):
        return content
    (folder / "any").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / "any"


@pytest.mark.parametrize(("content", "rows", "how"), HAVE)
def test_ratings_as_people_have_them(tmp_path, content, rows, how):
    table = put(tmp_path, content)
    names = ["user", "item", "rating", "timestamp"]
    expected = polars.DataFrame(rows, names[: len(rows[0])], orient="row")
    expected = expected.cast({"rating": polars.Float32})
    read = read_ratings(table, **how)
    assert read.equals(expected)
    assert read.schema == expected.schema


# What can't be read, and words of the line that says so: what it is, and what mends it.
BAD = [
    ("u,i,r,x\n1,2,3,4\n", "any, line 1: user, item, rating u, i, r --user-column --item-column"),
    ("user,thing,r,x\n1,2,3,4\n", "item, rating --item-column --rating-column unpivot"),
    ("user,a,b,c\n1,2,3,4\n", "item, rating a, b, c unpivot"), ("1,2,3,4,5\n", "unpivot"),
    ("user,item,food_rating,service_rating\n1,2,3,4\n", "several columns rating --rating-column"),
    ("user,user,item,rating\n1,2,3,4\n", "several columns user --user-column"),
    ("a,b\n1,2\n", "line 1 --user-column"), ("text\n", "line 1: no tab, comma, ';', '::' blank"),
    ("user,item,rating\n1,2,x\n", "line 2: rating 'x' finite number --skip-bad"),
    ("user,item,rating\n\n1,2,3\n1,,3\n", "line 4: missing (item) --skip-bad"),
    ("user,item,rating\nnan,2,3\n", "line 2: missing (user) --skip-bad"),
    ("user,item,rating\n1,2,NULL\n", "line 2: missing (rating) --skip-bad"),
    ("user,item,rating\n1,2,3\n1,2\n", "line 3: fields: 2, not 3 --skip-bad"),
    ("1 2 3\n\n1 2 3 4\n", "line 3: fields: 4, not 3 --skip-bad"),
    ("1::2::3\n1::2::3\n1::2\n", "line 3: fields: 2, not 3"),
    (JSON + "\n{bad\n", "line 3: no JSON object user --skip-bad"),
    (JSON + '{"user_id":1,"asin":2}\n', "line 2: missing (rating) --skip-bad"),
    ('user,item,rating,text\n1,2,3,"a \\"b\\", c"\n', "line 2: quote"),
    ("user,item,rating,text\n1,2,3,ok\n1,2,3,a \"b\n", "line 3: quote doubled"),
    ("user,item,rating\r1,2,3\r", "old Mac tr"), ("1:\n1488844,3,2005-09-06\n", "Netflix colon"),
    ("% a\n@RELATION r\n@data\n1,2,3\n", "ARFF @data CSV"),
    ("[{\"user\":1}]\n", "JSON record line"),
    ("{'user': 1, 'item': 2}\n", "Python json.dumps"), ("<!DOCTYPE html>\n", "HTML CSV"),
    (pickle.dumps([1]), "pickle CSV"), (b"MATLAB 5.0 MAT-file\0\0", "MATLAB CSV"),
    (b"\x89HDF\r\n\x1a\n", "HDF5 CSV"), (zipped({"xl/workbook.xml": b""}), "workbook CSV"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1", "workbook CSV"), (b"\x93NUMPY\x01\0", "NumPy CSV"),
    ("é,2,3\n".encode("latin-1"), "UTF-8 --encoding latin-1"),
    ("a,2,3\n".encode("utf-16"), "UTF-16 --encoding utf-16"),
    (zipped({"a.csv": b"1,2,3\n", "b.csv": b"1,2,3\n"}), "ratings.csv path"),
    ({"user": [1], "item": [2], "rating": ["x"]}, "the frame of ratings, row 1: rating 'x' finite"),
    ({"user": [1.5], "item": [2], "rating": [3]}, "row 1: user 1.5 integer"),
    ({"user": [[1]], "item": [2], "rating": [3]}, "'user' type --user-column"),
    ({"user": [b"1"], "item": [2], "rating": [3]}, "Binary --user-column"),
    ({"user": [1], "item": [2, 3]}, "frame"),
    ([], "frame dict"), (polars.DataFrame({"user": [], "item": [], "rating": []}), "no ratings"),
    ("user_id,1,2\n1,5,3\n", "line 1: item, rating among user_id, 1, 2 unpivot"),
    (zipped({"a/x.csv": b"1,2,3\n", "b/x.csv": b"1,2,3\n"}), "ratings.csv path"),
    ("1,2,3\0\n", "text CSV"), ('{"user":{"0":1},"item":{"0":2}}\n', "JSON record line"),
    ("user,item,rating\n" + "7," * 20_000 + "x\n", "line 2: fields: 20001, not 3"),
    ({"user": [1], "item": [2], "stars": [3], "score": [4]}, "several columns stars, score"),
    ({"a": [1], "b": [2]}, "user, item, rating --user-column"), (7, "int path frame dict"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD)
def test_what_people_have_is_refused_with_a_cure(tmp_path, content, words):
    table = put(tmp_path, content)
    with pytest.raises(ValueError, match=r"any|frame") as caught:
        read_ratings(table)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in re.findall(r"[\w:'(]\S*", words)), line


@pytest.mark.parametrize(("how", "words"), [
    ({"columns": {"user": "who"}}, "'who' user, item, rating --user-column"),
    ({"columns": {"item": 9}}, "'9' --item-column number"), ({"encoding": "nope"}, "nope latin-1"),
    ({"columns": {"timestamp": "date"}}, "line 2: timestamp 'noon' time"),
    ({"rating_range": (4, 5)}, "line 2: rating '3' 4 5 --skip-bad"),
    ({"encoding": "ascii"}, "ascii --encoding"),
])  # fmt: skip
def test_how_it_is_told_is_checked(tmp_path, how, words):
    (tmp_path / "any").write_text("user,item,rating,date\n1,2,3,noon\n\né,,,\n")
    with pytest.raises(ValueError, match="any") as caught:
        read_ratings(tmp_path / "any", **how)
    assert all(word in str(caught.value) for word in words.split())


def test_what_was_understood_is_said(tmp_path):
    said, path = [], tmp_path / "any"
    path.write_text(JSON + "\n" + '{"user_id":1,"asin":2,"rating":"x","timestamp":1}\n')
    assert len(read_ratings(path, skip_bad=True, notice=said.append)) == 1
    columns = "user is user_id, item is asin, rating is rating, timestamp is timestamp"
    bad = f"left out: 1, the first is {path}, line 3: rating 'x' is not a finite number"
    times = "times from 2020-09-13 to 2020-09-13, from milliseconds"
    assert said == [f"{path}: {columns}", bad, f"{path}: {times}"]
    said.clear()
    path.write_text("user,item,rating,date\n1,2,3,01/31/2020\n")
    read_ratings(path, notice=said.append)
    bad = f"times are left out: {path}, line 2: timestamp '01/31/2020' is not a time"
    assert said[1:] == [bad]


@pytest.mark.parametrize(("name", "column", "expected"), [
    ("user", ["7"], 7), ("user", polars.Series([2**63], dtype=polars.UInt64), str(2**63)),
    ("user", [7.0], 7), ("user", [1.5], "row 1: user 1.5 is not an integer"),
    ("user", [math.nan], "row 1: a value is missing (user)"), ("timestamp", [math.nan], None),
    ("user", polars.Series(["07"], dtype=polars.Categorical), "07"),
    ("user", polars.Series(["u"], dtype=polars.Enum(["u"])), "u"),
    ("timestamp", [-0.5], -0.5), ("timestamp", [NOON], 43_200), ("timestamp", [NOON.date()], 0),
    ("timestamp", polars.Series([NOON], dtype=polars.Datetime("ms", "Europe/Paris")), 43_200),
    ("user", [True], "any: 'user' for user is of type Boolean, not numbers or text"),
    ("rating", [0.1], numpy.float32(0.1)), ("user", [""], "row 1: a value is missing (user)"),
    ("rating", [9], "row 1: rating 9 is not a finite number in 0.1 to 5"),
])  # fmt: skip
def test_types_of_parquet(tmp_path, name, column, expected):
    columns = {"user": ["a"], "item": [7], "rating": [4], "timestamp": [0], "more": [{"a": [1]}]}
    polars.DataFrame({**columns, name: column}).write_parquet(tmp_path / "any")
    read, error = try_reading(rated(rating_range=(0.1, 5)), tmp_path / "any")
    if error is None:
        assert read.to_dict(as_series=False).get(name, [None]) == [expected]
    assert error is None or expected in error


FILMS = [
    (1, "Toy: Story (1995)", 1995, ["Adventure", "Animation"]),
    (2, "Cité des enfants perdus, La (1995)", 1995, ["Drama"]),
    (3, '"Great" 12 (1st) (2001) Cut (2003)', 2003, ["Sci-Fi"]),
    (4, "Babylon 5", None, []),
]


def test_tables_of_the_other_movielens(tmp_path):
    rows = [(i, title + " ", "|".join(g) or "(no genres listed)") for i, title, _, g in FILMS]
    table = polars.DataFrame(rows, ["movieId", "title", "genres"], orient="row")
    dat = as_tabs(table, quote_style="never").replace(b"\t", b"::")
    latin = dat.decode().encode("latin-1")
    for name, content in (("dat", dat), ("dat", latin), ("csv", as_text(table))):
        (tmp_path / f"movies.{name}").write_bytes(content)
        (tmp_path / "ml.zip").write_bytes(zipped({f"ml/movies.{name}": content}))
        for path in (tmp_path, tmp_path / f"movies.{name}", tmp_path / "ml.zip"):
            assert read_items(path).rows() == FILMS
    assert read_items(tmp_path).columns == ["item", "title", "year", "genres"]
    assert read_users(tmp_path) is None
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-12\n")
    expected = [(1, 1, "F", "10", "48067"), (2, 56, "M", "16", "70072-12")]
    assert read_users(tmp_path).rows() == expected


def test_both_sources_of_ml_100k_are_read_alike(ml_100k, tmp_path):
    """GroupLens's layout made of the package: its u.item has dates, URLs and flags besides."""
    ratings = as_tabs(read_ratings(ml_100k).cast({"rating": polars.Int64}))
    sha256 = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"
    assert hashlib.sha256(ratings).hexdigest() == sha256
    items, users = read_items(ml_100k), read_users(ml_100k)
    lines = []
    for item, title, _, genres in items.iter_rows():
        flags = ["01"[genre in genres] for genre in data.ML_100K_GENRES]
        lines.append("|".join([str(item), title + " ", "01-Jan-1995", "", "http://x", *flags]))
    members = {"ml/u.data": ratings, "ml/u.item": "\n".join(lines).encode("latin-1")}
    members["ml/u.user"] = as_text(users, separator="|", include_header=False)
    (tmp_path / "ml-100k.zip").write_bytes(zipped(members))
    for read in (read_ratings, read_items, read_users):
        assert read(tmp_path / "ml-100k.zip").equals(read(ml_100k))
    assert items.row(0) == (1, "Toy Story (1995)", 1995, ["Animation", "Children's", "Comedy"])
    assert items.row(266) == (267, "unknown", None, ["unknown"])
    assert users.row(0) == (1, 24, "M", "technician", "85711")
    assert (len(items), len(users)) == (1682, 943)


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "things"
    lines = ['0,"Pen, red",1.5,x,office|red,007,3,1,2', "1,Cup,,y,,a b,,3,4"]
    path.write_text("\n".join([",Name,price,item,tags,ID,*,price,^u.*$", *lines]))
    assert read_items(path).columns[3:] == ["tags", "ID", "*", "price_7", "^u.*$"]
    items = read_items(path, columns={"item": "ID", "title": "Name"})
    pen = ("007", "Pen, red", 1.5, "x", ["office", "red"], 3, 1, 2)
    assert items.rows() == [pen, ("a b", "Cup", None, "y", None, None, 3, 4)]
    items.write_parquet(path)
    assert read_items(path).equals(items)
    columns = {"user_id": [3, 4], "born": [NOON.date(), None], "zip": ["07", ""]}
    columns |= {"is_new": [True, False], "height": [1.8, math.nan], "likes": [["tea"], None]}
    polars.DataFrame(columns).write_parquet(path)
    expected = [(3, 0, "07", "true", 1.8, ["tea"]), (4, None, None, "false", None, None)]
    assert read_users(path).rows() == expected
    polars.DataFrame({**columns, "odd": [{"a": 1}] * 2}).write_parquet(path)
    assert "the column 'odd' is of type Struct" in try_reading(read_users, path)[1]


@given(rows=st.lists(st.tuples(*[st.integers(0, 3)] * 3)), id_type=st.sampled_from([int, str]))
def test_repeats_against_the_loop(rows, id_type):
    times = polars.Series([row[2] for row in rows], dtype=polars.Int64)
    table = frame([(user, item, place) for place, (user, item, _) in enumerate(rows)])
    table = table.with_columns(timestamp=times).cast({"user": id_type, "item": id_type})
    for ratings in (table, table.drop("timestamp"), table.sort("user", "item")):
        latest = {}
        for row in ratings.rows():
            if row[3:] >= latest.get(row[:2], row)[3:]:
                latest[row[:2]] = row
        expected = [row for row in ratings.rows() if latest[row[:2]] == row]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "SLICE", 2)
            assert data.drop_repeats(ratings).rows() == expected


def test_ids_of_two_types():
    words, users = ONE.with_columns(user=polars.lit("a")), polars.DataFrame({"user": [1]})
    assert data.same_ids(ONE, None, users) == (ONE, None, users)
    same = data.same_ids(ONE, words, None, users)
    assert [table.row(0)[:2] for table in same if table is not None] == [("1", 2), ("a", 2), ("1",)]
    texts, numbers = polars.Series(["10", "9", "a"]), polars.Series([9, 10])
    assert data.find_rows(texts, polars.Series([9, 8, 10, 9])).to_list() == [1, None, 0, 1]
    assert data.find_rows(numbers, texts).to_list() == [1, 0, None]


@given(pairs=st.tuples(PAIRS, PAIRS), size=st.sampled_from([2, 1 << 18]), name=ID_NAMES)
def test_tensors_against_the_loop(pairs, size, name):
    """In any order, with pairs twice, for ids near each other and far apart, slice by slice."""
    parts = [[(name(user), name(item), user / 2) for user, item in part] for part in pairs]
    frames = [polars.DataFrame(part, ["user", "item", "rating"], orient="row") for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SLICE", size)
        *tensors, ids = data.to_tensors(*frames, allow_overlap=True)
    users, items = (sorted({row[column] for part in parts for row in part}) for column in (0, 1))
    assert [each.to_list() for each in ids] == [users, items], "those of the test part too"
    for rows, part in zip(parts, tensors, strict=True):
        expected = [(users.index(user), items.index(item), rating) for user, item, rating in rows]
        assert [*zip(*map(torch.Tensor.tolist, part), strict=True)] == expected
        assert [column.dtype for column in part] == [torch.int64, torch.int64, torch.float32]


def dense(matrix, n_columns):
    whole = torch.zeros(len(matrix.starts) - 1, n_columns)
    rows = torch.arange(len(whole)).repeat_interleave(matrix.starts.diff())
    return whole.index_put((rows, matrix.columns), matrix.values, accumulate=True)


TRAIN = frame([(70, 5, 3), (9, 8, 1), (70, 8, 2), (30, 8, 4)])
PART, _, IDS = data.to_tensors(TRAIN, frame([(9, 400, 5), (40, 5, 2)]))
USERS = polars.DataFrame({"user": [9, 30, 40, 70], "name": ["Ann", "Bo", "Cy", "Di"]}).with_columns(
    job=polars.Series(["cook", "cook", None, "pilot"]),
    likes=polars.Series([["tea", "rum"], ["tea"], [], None]),
)
HALF, THIRD = 0.5**0.5, 3**-0.5
OF_USERS = {  # in the rows of the users 9, 30, 40, 70: the items 5, 8, 400; cook, pilot, rum, tea
    "id": torch.eye(4),
    "implicit": torch.tensor([[0, 1, 0], [0, 1, 0], [0, 0, 0], [HALF, HALF, 0]]),
    "side": torch.tensor([[1, 0, HALF, HALF], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]),
}
RATED_BY = torch.tensor([[0, 0, 0, 1], [THIRD, THIRD, 0, THIRD], [0, 0, 0, 0]])
OF_ITEMS = {"id": torch.eye(3), "implicit": RATED_BY}


@pytest.mark.parametrize("kinds", [("id",), ("implicit", "time"), ("id", "side"), data.FEATURES])
def test_features_by_hand(kinds):
    matrix, transposed, counts = data.features(TRAIN, IDS, kinds, users=USERS)
    users, items = (
        torch.cat([block for kind, block in blocks.items() if kind in kinds], dim=1)
        for blocks in (OF_USERS, OF_ITEMS)
    )
    if "time" in kinds:  # a row and a column for each
        users = torch.block_diag(users, torch.eye(4))
    expected = torch.block_diag(users, items)
    assert counts == (users.shape[1], items.shape[1])
    torch.testing.assert_close(dense(matrix, sum(counts)), expected)
    torch.testing.assert_close(dense(transposed, len(expected)), expected.T)


def test_numbers_are_described_by_tenths():
    ages = polars.DataFrame({"user": range(100), "age": range(100), "*": [1, 2] * 50})
    told = data.describe(ages, "user").sort("user", "feature")
    expected = [(user, n, 1) for user in range(100) for n in (user // 10, 10 + user % 2)]
    assert told.rows() == expected


def test_what_says_nothing_is_no_feature():
    nothing = {"likes": polars.lit([], polars.List(polars.String)), "age": polars.lit(None, int)}
    for about in (USERS.clear(), USERS.select("user", "name", **nothing)):
        matrix, *_ = data.features(TRAIN, IDS, ("id", "side"), users=about)
        assert dense(matrix, 7).equal(torch.eye(7))
        with pytest.raises(ValueError, match="the features side say nothing of the users"):
            data.features(TRAIN, IDS, ("side",), users=about)


def test_what_training_tells_of():
    told = USERS.with_columns(job=polars.lit("cook"))
    masks = [data.find_seen(PART, IDS, users=users) for users in (None, USERS, told)]
    some = [True, True, False, True]  # of user 40 nothing is told either
    assert [users.tolist() for users, _ in masks] == [some, some, [True] * 4]
    assert masks[0][1].tolist() == [True, True, False]


def test_time_context_is_the_formula():
    """Against the double loop over one user's ratings, ties and a gap of a year among them."""
    times = [50, 50, 53, 400, 40_000_000, 40_000_001, 52, 50, 60, 70, 80]
    table = frame([(1 + n // 7, n % 7, 1 + n * 3 % 5) for n in range(11)])
    table = table.with_columns(timestamp=polars.Series(times))
    train, test = table[[0, 1, 3, 4, 5, 6, 7, 8, 10]], table[[2, 9]]
    mean, excess = train["rating"].mean(), {}
    for (item,), part in train.group_by("item"):
        excess[item] = (part["rating"] - mean).sum() / (len(part) + 5)
    unit = data.UA_DEVIATION / train["rating"].std(ddof=0)
    rated = [(u, (r - mean - excess[i]) * unit, t) for u, i, r, t in train.iter_rows()]
    contexts = data.time_context(data.find_excess(train), test)
    for part, context in zip((train, test), contexts, strict=True):
        for (user, _, _, time_), row in zip(part.iter_rows(), context.tolist(), strict=True):
            before = [(e, t) for u, e, t in rated if u == user and t < time_]
            usual = sum(e for e, _ in before) / (len(before) + 1)
            for tau, value in zip(data.TIME_SCALES, row, strict=True):
                weights = [math.exp((t - time_) / tau) for _, t in before]
                weighted = zip(weights, before, strict=True)
                total = sum(weight * (e - usual) for weight, (e, _) in weighted)
                assert value == pytest.approx(total / (10 + sum(weights)), abs=1e-6)


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    data.write_file(str(path), b"old")
    link.symlink_to(path)
    path.chmod(0o640)
    with data.replacing(link) as beside:
        polars.LazyFrame({"user": ["a,b"]}).sink_csv(beside)
    for error, message in (
        (KeyboardInterrupt("mine"), "mine"),
        (polars.exceptions.ComputeError("disk\nfull"), f"^{path} cannot be written: disk$"),
        (OSError(28, "No space"), f"^{path} cannot be written: No space$"),
    ):
        with pytest.raises((KeyboardInterrupt, OSError), match=message), data.replacing(path):
            raise error
    assert path.read_text() == 'user\n"a,b"\n'
    assert path.stat().st_mode & 0o7777 == 0o640
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_what_cannot_be_written_is_named(tmp_path):
    data.check_writable(tmp_path / ("n" * 255))
    assert os.listdir(tmp_path) == []
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "missing/file", "pipe", "n" * 300, "/dev/full"):
        with pytest.raises(OSError, match=f"^{tmp_path / name} cannot be written: .+$"):
            data.check_writable(tmp_path / name)


@pytest.fixture
def serve():
    """Serve one answer to all, so many bytes after each pause. Returns the server's URL."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            serve.paths.append(self.path)
            content, size, pause = serve.served
            with suppress(OSError):  # the client has given up
                for start in range(0, len(content), size):
                    over.wait(pause)
                    self.wfile.write(content[start : start + size])

    def serve(content, size=1 << 20, pause=0.0):
        serve.served, serve.paths = (content, size, pause), []
        return f"http://127.0.0.1:{server.server_port}"

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False
        threading.Thread(target=server.serve_forever).start()
        yield serve
        over.set()
        server.shutdown()


def answer(content, *headers, length=None, status="200 OK"):
    head = [f"HTTP/1.1 {status}", f"Content-Length: {length or len(content)}", *headers, "", ""]
    return "\r\n".join(head).encode("latin-1") + content


def get(folder, server, name="ml-1m", **options):
    lines = []
    path = data.get_dataset(name, folder, notice=lines.append, server=server, **options)
    return path, lines


@pytest.mark.parametrize("name", data.DATASETS)
def test_a_movielens_is_kept_as_its_zip(tmp_path, serve, monkeypatch, name):
    folder, checksum = tmp_path / "new", data.DATASETS[name][1] and ML_1M_MD5
    monkeypatch.setitem(data.DATASETS, name, (9_000, checksum))
    server, path = serve(answer(ML_1M)), folder / f"{name}.zip"
    url = f"{server}/{name}.zip"
    first = [f"{name}: downloading {url}", f"{name}: from {url}, kept in {path}"]
    assert get(folder, server, name) == (path, first)
    assert read_ratings(path).rows() == [(1, 2, 3, 4), (1, 5, 0.5, 6)]
    assert get(str(folder), server, name) == (path, [f"{name}: from the cache {path}"])
    for broken in (ML_1M[:-30], ML_1M.replace(b"\x00\x00\x00", b"\x00\x01\x00")):
        path.write_bytes(broken)
        assert get(folder, server, name) == (path, first)
        assert path.read_bytes() == ML_1M
    assert os.listdir(folder) == [path.name]
    assert serve.paths == [f"/{name}.zip"] * 3


@pytest.mark.parametrize(("served", "options", "message"), [
    (answer(ML_1M[:99], length=len(ML_1M)), {}, "broke off after 99 of"),
    (answer(ML_1M, length="many"), {}, "broke off after .* of many bytes"),
    (answer(ML_1M[:-9] + b"different"), {}, "it failed its checksum"),
    (answer(b"", status="404 Not Found"), {}, "HTTP Error 404: Not Found"),
    (answer(b"", status="404 " + "long" * 999), {}, "HTTP Error 404: long"),
    (answer(b"", "Location: file:///etc/passwd", status="301 x"), {}, "HTTP Error 301"),
    (answer(b"", "Location: http://a:b/", status="301 x"), {}, ""),
    (b"nonsense\r\n\r\n", {}, "nonsense"), (answer(ML_1M), {"pause": 9}, "timed out"),
    (answer(ML_1M), {"size": 2, "pause": 0.02}, "not all in 1.2 s"),
    (answer(ML_1M * 30), {}, "more than 3,000 bytes"),
])  # fmt: skip
def test_a_bad_answer_keeps_nothing(tmp_path, serve, monkeypatch, served, options, message):
    monkeypatch.setitem(data.DATASETS, "ml-1m", (3_000, ML_1M_MD5))
    with pytest.raises(OSError, match=f"^ml-1m can't be had: http.*zip: .*{message}") as caught:
        get(tmp_path, serve(served, **options), timeout=0.1)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("offline")
def test_a_page_is_no_data_set(tmp_path, serve):
    server = serve(answer(b"<html>"))
    for name, end in (("ml-latest-small", "$"), ("ml-100k", "; recbole==1.2.1 through pip")):
        with pytest.raises(OSError, match=rf"{name}\.zip: it failed its checksum{end}"):
            get(tmp_path, server, name)


def test_the_package_is_kept_where_the_zip_cannot_be_had(tmp_path, ml_100k, serve):
    """Through the real pip and whatever index it is set up for."""
    server = serve(answer(b"", status="404 Not Found"))
    try:
        path, lines = get(tmp_path, server, "ml-100k")
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no package index: {error}")
    assert path == tmp_path / data.WHEEL_FILE
    assert lines[-1].startswith(f"ml-100k: {server}/ml-100k.zip: HTTP Error 404: Not Found; from ")
    assert read_ratings(path).equals(read_ratings(ml_100k))
    assert get(tmp_path, server, "ml-100k") == (path, [f"ml-100k: from the cache {path}"])


def test_the_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COLLAB_DATA_DIR", raising=False)
    assert data.default_data_dir() == tmp_path / "collab"
    monkeypatch.setenv("COLLAB_DATA_DIR", str(tmp_path / "mine"))
    assert data.default_data_dir() == tmp_path / "mine"
