"""Ratings, from a download to a polars frame, a split of it, and tensors in memory.

>>> from data import get_dataset, read_items, read_ratings, split, to_tensors
>>> path = get_dataset("ml-100k")  # verified and cached; downloaded when it is not there yet
>>> train, test = split(read_ratings(path), "ua")
>>> part, test_part, ids = to_tensors(train, test)
>>> len(part.ratings), len(test_part.ratings), len(ids.users), len(ids.items)
(90570, 9430, 943, 1682)
>>> read_items(path)["title"][0]
'Toy Story (1995)'
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import compress
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

Name = str | os.PathLike  # of a file or a folder
Columns = Mapping[str, str]  # which name in a header is that of which column
Range = tuple[float, float]
Frame = pl.DataFrame
POLARS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)  # of a zip


def _brief(error: object) -> str:
    """The first line of a message, printable, of at most 100 characters."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return "".join(letter if letter.isprintable() else "?" for letter in line[:100])


# Files written whole.

UNFINISHED: set[Path] = set()  # hidden files, for who ends the process at once to remove


@contextmanager
def replacing(path: Name) -> Iterator[Path]:
    """Yield a hidden, empty file beside `path` to write to, which is renamed to `path` at the end.

    An exception removes it, and comes as it is. A file that is replaced keeps its mode, a symbolic
    link is followed. OSError names `path` if it cannot be written, as on a full disk, or no file.
    """
    mode = None
    try:
        target = Path(os.path.realpath(path))
        with suppress(FileNotFoundError):
            mode = os.stat(target).st_mode
        if mode is not None and not stat.S_ISREG(mode):
            raise OSError(None, "it is no regular file")
        beside = target.parent / f".{secrets.token_hex(6)}.part"
        UNFINISHED.add(beside)
        beside.touch(0o666 if mode is None else 0o600, exist_ok=False)
        try:
            yield beside
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            if mode is not None:
                beside.chmod(stat.S_IMODE(mode))
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
            UNFINISHED.discard(beside)
    except (OSError, *POLARS) as error:
        why = getattr(error, "strerror", None) or _brief(error)
        raise OSError(f"{path} cannot be written: {why}") from None


def check_writable(path: Name) -> None:
    """Raise the OSError that `replacing` would raise."""
    with suppress(KeyError), replacing(path):
        raise KeyError  # so that nothing is renamed


def write_file(path: Name, content: bytes) -> None:
    """Write `content` to `path` by `replacing`."""
    with replacing(path) as beside:
        beside.write_bytes(content)


# Archives: a MovieLens is one file, verified, and read where it lies.

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
# The most bytes that NAME.zip may have, and its published MD5; GroupLens renews ml-latest-small.
DATASETS = {
    "ml-100k": (8 << 20, "0e33842e24a9c977be4e0107933c0723"),
    "ml-latest-small": (4 << 20, None),
    "ml-1m": (8 << 20, "c4d9eecfca2ab87c1945afe126590906"),
    "ml-10m": (80 << 20, "ce571fd55effeba0271552578f2648bd"),
    "ml-20m": (240 << 20, "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-25m": (300 << 20, "6b51fb2759a8657d3bfcbfc42b592ada"),
    "ml-32m": (300 << 20, "d472be332d4daa821edc399621853b57"),
}
# RecBole's wheel, a zip too, has ml-100k in it, and can be had from any package index.
ML_100K_WHEEL = "recbole==1.2.1"
WHEEL_FILE = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
LARGEST_MEMBER = 4 << 30  # bytes of a file in a zip; ml-32m's ratings have 0.9e9


def default_data_dir() -> Path:
    """`$COLLAB_DATA_DIR`, or `collab` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("COLLAB_DATA_DIR") or Path(cache, "collab"))


def get_dataset(
    name: str,
    data_dir: Name | None = None,
    *,
    notice: Callable[[str], None] = lambda line: None,
    server: str = GROUPLENS,
    wheel: str = ML_100K_WHEEL,
    timeout: float = 10.0,
) -> Path:
    """The archive of a MovieLens, one of `DATASETS`, for `read_ratings` and the other readers.

    `server/NAME.zip`, kept in `data_dir`, which is `default_data_dir()` unless given; where that of
    ml-100k can't be had, the package `wheel`, through `pip download`. Verified each time, and had
    anew if that fails. `timeout`, in seconds, is how long a server may stay silent; a download may
    take twelve times as long for each 64 MiB it may have. `notice` gets a line before a download
    and on where the data came from. ValueError for another name; OSError if no source has the data.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set '{name}': it is {', '.join(DATASETS)}")
    folder, url = Path(data_dir or default_data_dir()), f"{server}/{name}.zip"
    largest, md5 = DATASETS[name]
    sources = [(folder / f"{name}.zip", md5, url, lambda: _download(url, timeout, largest))]
    if name == "ml-100k":
        package = f"{wheel} through pip", lambda: _pip_download(wheel, 12 * timeout)
        sources.append((folder / WHEEL_FILE, WHEEL_SHA256, *package))
    for path, digest, *_ in sources:
        with suppress(FileNotFoundError), open(path, "rb") as file:
            if _is_intact(file, digest):
                notice(f"{name}: from the cache {path}")
                return path
    why = ""
    folder.mkdir(parents=True, exist_ok=True)
    for path, digest, source, fetch in sources:
        check_writable(path)  # said now, not after the download
        notice(f"{name}: downloading {source}")
        try:
            content = fetch()
            if not _is_intact(io.BytesIO(content), digest):
                raise OSError("it failed its checksum")
        except OSError as error:
            why += f"{source}: {error}; "
            continue
        write_file(path, content)
        notice(f"{name}: {why}from {source}, kept in {path}")
        return path
    raise OSError(f"{name} can't be had: {why.removesuffix('; ')}")


def _is_intact(file: IO[bytes], digest: str | None) -> bool:
    """Whether a file has this MD5 or SHA-256 or, without one, is a zip that can be read."""
    if digest is not None:
        method = "md5" if len(digest) == 32 else "sha256"
        return hashlib.file_digest(file, method).hexdigest() == digest
    with suppress(*BROKEN), zipfile.ZipFile(file) as archive:
        return archive.testzip() is None
    return False


def _download(url: str, timeout: float, largest: int) -> bytes:
    """The bytes at `url`, in time and not too many, or OSError in one line."""
    limit = 12 * timeout * max(1, largest / (64 << 20))
    content, deadline = io.BytesIO(), time.monotonic() + limit
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            expected = response.headers.get("Content-Length")
            while chunk := response.read1(1 << 20):
                content.write(chunk)
                if content.tell() > largest:
                    raise OSError(f"more than {largest:,} bytes")
                if time.monotonic() > deadline:
                    raise OSError(f"not all in {limit:g} s")
        if expected not in (None, str(content.tell())):
            raise OSError(f"broke off after {content.tell()} of {expected} bytes")
    except Exception as error:  # whatever a strange answer, proxy or redirect makes urllib raise
        raise OSError(_brief(error)) from None
    return content.getvalue()


def _pip_download(requirement: str, timeout: float) -> bytes:
    """A wheel's bytes, from whatever index the user's pip has; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--no-input", "--quiet", "--retries", "1", "--dest", folder, requirement]
        options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        try:
            done = subprocess.run(command, timeout=timeout, **options)
        except subprocess.TimeoutExpired:
            raise OSError(f"not done in {timeout:g} s") from None
        for path in Path(folder).glob("*.whl"):
            return path.read_bytes()
        errors = re.findall("^ERROR: (.+)", done.stderr, re.MULTILINE) or [done.stderr]
        raise OSError(_brief(errors[-1]))


# Ratings: a file or a frame -> its columns as they are, lazily -> those that are needed, typed.

USER = "user|reviewer|member|customer|person|account"
ITEM = (
    "item|movie|film|book|isbn|asin|product|business|place|artist|song|track|album|game|recipe|"
    "joke|anime|app|course|article"
)
KEY = "(id|key|no|num|number|idx|index|code)s?"
WHEN = "(unix|utc|iso|review|rat(ing|ed)|creat(ed|ion)|updated?|added|submi(t|tted|ssion)|event)*"
# How columns are called in a header, best first, once `_plain` has made names so.
NAMES = {
    "user": (f"({USER})s?{KEY}|uid", f"({USER})s?", f"({USER})s?name"),
    "item": (f"({ITEM})s?{KEY}|iid", f"({ITEM})s?", f"parent({ITEM})", f"({ITEM})s?(name|title)"),
    "rating": ("(rating|score|star|label|value)s?|overall", ".*rating.*"),
    "timestamp": (
        f"unix(review)?time|{WHEN}timestamp(s|ms|us|ns)?",
        f"{WHEN}(datetime|time|date)(s|ms|us|ns|utc)?|{WHEN}(at|on)",
    ),
    "title": (f"title|name|({ITEM})(title|name)",),
}
OPTIONS = {name: f"--{name}-column" for name in NAMES} | {"timestamp": "--time-column"}
NUMBER = r"(?i)\s*[-+]?(\d+([.,]\d*)?|[.,]\d+)(e[-+]?\d+)?\s*"
MISSING = ("", "nan", "NaN", "NULL", "None", r"\N")
NOT_THERE = (*MISSING, "<NA>", "NaT")  # of objects of Python
# ISO 8601, with a blank for its T; then the day first. With - for / and .
TIMES = ("%F", "%F %R", "%F %R%#z", "%F %T%.f", "%F %T%.f%#z")
TIMES += ("%d-%m-%Y", "%d-%m-%Y %R", "%d-%m-%Y %T%.f")
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
LATEST = 2.6e11  # seconds, in the year 10,208; as milliseconds in 1978
TEXT = (pl.String, pl.Categorical, pl.Enum)
ANY = (float(np.finfo("f4").min), float(np.finfo("f4").max))
# What is no table, by how its text begins (a byte that is no UTF-8 as "\ufffd"), and the cure.
FOREIGN = {
    r"\d+:\n": "in blocks, as Netflix's: put the number before the colon on each line below",
    r"(?i)(%.*\n|\s)*@relation": "ARFF: save what is below @data as CSV, with a header",
    "\ufffd[\x02-\x05]": "a pickle: load it where you trust it, and save the table as CSV",
    "MATLAB 5|\ufffdHDF": "of MATLAB or HDF5: save the ratings as CSV, user,item,rating",
    "\ufffd\ufffd\x11": "a workbook: save the sheet as CSV",
    "\ufffdNUMPY|SQLite format|FEA1\0": "of NumPy, SQLite or an old Feather: save the table as CSV",
    r'\s*(\[\s*[\[{\n]|\{\s*\n|\{"[^"]*":\{"0")': "JSON, not a record a line",
    r"\s*\{\s*'": "of Python's dicts, not JSON: write each by json.dumps on a line",
    r"(?i)\s*<(!|\?|[a-z]+>)": "XML or HTML: save the table as CSV",
    r"[^\n]*\r[^\n]+\n\Z": r"with an old Mac's line ends: tr '\r' '\n' < OLD > NEW",
    "\ufffd\ufffd|[^\n]*\0": "no text, or UTF-16: save it as CSV, or --encoding utf-16",
}


class _Kind(NamedTuple):
    noun: str  # what a file has none of when it is empty
    needed: tuple[str, ...]  # columns
    others: tuple[str, ...]  # columns read if they are there
    fields: tuple[str, ...]  # of a line without a header, the last ones at will; () for a table


RATINGS = _Kind("ratings", ("user", "item", "rating"), ("timestamp",), tuple(NAMES)[:4])
RATED = _Kind("ratings", ("item", "rating"), ("timestamp", "user"), tuple(NAMES)[1:4])
PAIRS = _Kind("pairs", ("user", "item"), ("timestamp",), tuple(NAMES)[:4])
USERS = _Kind("users", ("user",), (), ())
ITEMS = _Kind("items", ("item",), ("title",), ())


class _Form(NamedTuple):
    separator: str  # " " for any blanks, "{" for JSON lines
    fields: list[str | None]  # what each is; None for one that is not read
    n_headers: int = 0  # lines above the records
    has_quotes: bool = False  # which a field may be in (RFC 4180)


GENRES = """
unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir
Horror Musical Mystery Romance Sci-Fi Thriller War Western"""
ML_100K_GENRES = GENRES.split()  # in the order of the flags of u.item
RATINGS_FILES = ("ratings.csv", "ratings.dat", "u.data", "ml-100k.inter")
USERS_FILES = {
    "u.user": _Form("|", ["user", "age", "gender", "occupation", "zip_code"]),
    "users.dat": _Form("::", ["user", "gender", "age", "occupation", "zip_code"]),
    "ml-100k.user": _Form("\t", ["user", "age", "gender", "occupation", "zip_code"], 1),
}
ITEMS_FILES = {
    "movies.csv": _Form(",", ["item", "title", "genres"], 1, True),
    "movies.dat": _Form("::", ["item", "title", "genres"]),
    "u.item": _Form("|", ["item", "title", None, None, None, *ML_100K_GENRES]),
    "ml-100k.item": _Form("\t", ["item", "title", "year", "genres"], 1),
}


class _How(NamedTuple):
    """How a table is read: keywords of all readers, see `read_ratings`."""

    columns: Columns = MappingProxyType({})
    encoding: str | None = None
    skip_bad: bool = False
    notice: Callable[[str], None] = lambda line: None


class _Source(NamedTuple):
    label: str  # what messages call it
    name: str  # of a file, without folders
    content: Path | bytes | None = None  # of a file
    start: bytes = b""  # the first four
    how: _How = _How()
    form: _Form | None = None  # of a text
    places: Mapping[str, int] = MappingProxyType({})  # of columns among the fields; a needed first
    frame: pl.LazyFrame | None = None  # of what is no text


ROW = "\n\0"  # a column of line numbers, from 0, called as no other is


def read_ratings(table: Name | object, *, rating_range: Range | None = None, **how) -> Frame:
    """Ratings from a file, from the folder or archive of a MovieLens, or from a frame, in order.

    A file is Parquet, Arrow (Feather), JSON lines, or text: lines of user, item, rating and, if it
    likes, timestamp, between tabs, commas, `;`, `|`, `::` or blanks. It may be packed by gzip,
    zstd, bz2, xz or, alone, zip. Except between `::` and blanks, a field may be in double quotes, a
    quote in it doubled (RFC 4180); between `;` numbers may have decimal commas; blank lines are
    left out. A first line without numbers is a header, its names known by `NAMES`. A frame is of
    polars or pandas, a dict of columns, or what exports Arrow (`__arrow_c_stream__`).

    `how`: `columns`, which field is user, item, rating or timestamp (of a table of items, title),
    by name or by number from 1; `encoding` of a text, if it is not UTF-8; `skip_bad`, to leave out
    lines that can't be read; `notice`, a function that gets a line on what was understood.

    Columns user and item are Int64 where every id is an integer as one is printed, or with `.0`,
    else String, exactly as in the file; rating is float32, finite, in `rating_range` if there is
    one; timestamp, if the file has it, Unix seconds, Int64 or, where one has a fraction, Float64,
    from numbers (in the unit that their size tells) or dates and times, ISO 8601 or the day first,
    in UTC unless they name a zone. Times that can't be read are left out, if `columns` does not
    name them. No nulls. ValueError names the file and the line or row of anything else; OSError
    when a file can't be read.
    """
    bounds = tuple(map(float, map(np.float32, rating_range or ANY)))  # rounded as a rating is
    return _read(_scan(table, RATINGS, how), RATINGS, bounds)


def read_rated(table: Name | object, **how) -> Frame:
    """The ratings of one user, as `read_ratings` of a table in which the column user may lack."""
    rated = _read(source := _scan(table, RATED, how), RATED)
    if "user" in rated.columns and (n_users := rated["user"].n_unique()) > 1:
        raise ValueError(f"{source.label}: ratings of {n_users} users: give those of one")
    return rated.drop("user", strict=False)


def scan_pairs(table: Name | object, **how) -> tuple[pl.LazyFrame, Callable[[int], str]]:
    """Pairs of a user and an item, to be streamed in file order, and where in the file each is.

    As `read_ratings`, but a rating may be missing and is not read. The frame: row Int64, its line;
    user and item String, exactly as in the file; timestamp Int64, if the file has it and all can be
    read. The function says of a row 'FILE, line 17', or 'FILE, row 16' of a frame. All is read once
    here, in bounded memory, for errors as of `read_ratings`: the frame raises none later.
    """
    source = _scan(table, PAIRS, how)
    query = _select(source, is_exact=True)
    casts = _list_casts(source, PAIRS)
    casts |= {name: casts[name][-1:] for name in PAIRS.needed}  # `find_rows` minds 7.0
    chosen, n_nulls = _choose(source, casts, query)
    if n_nulls.get("timestamp") and "timestamp" not in source.how.columns:
        del chosen["timestamp"]
        source.how.notice(f"{source.label}: without the times, which can't all be read")
    texts = {name: chosen.pop(name).cast(pl.String) for name in PAIRS.needed}
    pairs = query.select(pl.col(ROW).cast(pl.Int64).alias("row"), **texts, **chosen)
    if any(map(n_nulls.get, (*texts, *chosen))):
        is_wrong = pl.any_horizontal(pl.all().is_null())
        wrong = _collect(source, pairs.filter(is_wrong))
        name = next(name for name in (*texts, *chosen) if wrong[name][0] is None)
        _refuse(source, len(wrong), _explain(source, wrong["row"][0], name))
        pairs = pairs.filter(~is_wrong)
    most = _collect(source, pairs.select(pl.len(), *(pl.col(n).abs().max() for n in chosen))).row(0)
    if not most[0]:
        raise ValueError(f"{source.label}: no pairs")
    if chosen:
        pairs = pairs.with_columns(_to_seconds(most[1])[1].floor().cast(pl.Int64))
    return pairs, partial(_locate, source)


# Opening a file or a frame.


def _scan(table: Name | object, kind: _Kind, how: Mapping) -> _Source:
    source = _open(table, RATINGS_FILES, kind, how)
    if source is None:
        has = f"no {', '.join(RATINGS_FILES)} in it"
        raise ValueError(f"{table}: {has}: give the path of the table itself")
    return _find_columns(source, kind)


def _open(table: Name | object, names: Sequence[str], kind: _Kind, how: Mapping) -> _Source | None:
    """A frame, or a file, or of a folder or a zip the one with the first of `names`, else None.

    Of a zip with one file that. A pipe (that a signal may interrupt), a member of a zip (whose name
    never becomes a path) and what polars can't read itself are read into memory.
    """
    how = {name: value for name, value in how.items() if value is not None}
    if not isinstance(table, str | os.PathLike):
        label = f"the frame of {kind.noun}"
        try:
            return _Source(label, "", how=_How(**how), frame=to_lazy(table))
        except Exception as error:  # of whatever library it is
            raise ValueError(f"{label} cannot be read: {_brief(error)}") from None
    path = Path(table)
    label, name, content = str(path), path.name, None
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), None)
        return path and _open(path, names, kind, how)
    if path.suffix == ".zip" or (path.is_file() and zipfile.is_zipfile(path)):
        with _naming(path), zipfile.ZipFile(path) as archive:
            inside = _list_members(archive)
            members = {PurePosixPath(each).name: each for each in inside}
            alone = members if len(inside) == 1 else ()
            name = next((name for name in (*names, *alone) if name in members), None)
            if "workbook.xml" in members:
                raise ValueError(f"{path}: it is a workbook: save the sheet as CSV")
            if name is None:
                return None
            label, member = f"{path}, {_brief(members[name])}", archive.getinfo(members[name])
            if member.file_size > LARGEST_MEMBER:
                raise ValueError(f"{label}: more than {LARGEST_MEMBER:,} bytes")
            with archive.open(member) as file:
                content = b"".join(iter(lambda: file.read(1 << 20), b""))
    # polars opens files itself, unless their names are no UTF-8.
    elif not path.is_file() or os.fsencode(path).decode(errors="ignore") != str(path):
        signal.siginterrupt(signal.SIGINT, True)  # polars has Ctrl-C go on with what waits
        with _naming(path):
            content = path.read_bytes()
    source = _Source(label, name, path.absolute() if content is None else content, how=_How(**how))
    with _naming(label):
        return _unpack(source)


def has_tables(table: Name | object) -> bool:
    """Whether it is a folder or a zip of several files, as of a MovieLens."""
    with suppress(TypeError, zipfile.BadZipFile):
        is_file = Path(table).is_file()  # no pipe, which is read once
        return Path(table).is_dir() or (is_file and len(_list_members(zipfile.ZipFile(table))) > 1)
    return False


def _list_members(archive: zipfile.ZipFile) -> list[str]:
    """The files in a zip, without those that macOS adds."""
    return [name for name in archive.namelist() if not re.search(r"/$|^__MACOSX/", name)]


def _unpack(source: _Source) -> _Source:
    """The source with its start and, if polars can't read it as it is, in memory, as UTF-8."""
    content, encoding = source.content, source.how.encoding
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        start = file.read(4)
        encoding = None if start in (b"PAR1", b"ARRO") else encoding
        if encoding and start == b"\x28\xb5\x2f\xfd":
            raise ValueError(f"{source.label}: zstd and --encoding do not go together: unpack it")
        methods = {b"BZh": bz2.open, b"\xfd7z": lzma.open, b"\x1f\x8b\x08": encoding and gzip.open}
        file.seek(0)
        if method := methods.get(start[:3]):
            content = method(file).read()
        elif encoding:
            content = file.read()
    if encoding:
        try:
            content = content.decode(encoding).encode()
        except (LookupError, UnicodeError) as error:
            cure = "try --encoding latin-1, cp1252 or utf-16"
            raise ValueError(f"{source.label}: {_brief(error)}: {cure}") from None
    return source._replace(content=content, start=content[:4] if encoding or method else start)


@contextmanager
def _naming(label: object) -> Iterator[None]:
    """An error that names a file, for what a broken one or a broken device raises without it."""
    try:
        yield
    except (OSError, *BROKEN, *POLARS) as error:
        if getattr(error, "filename", None):
            raise
        why = f"cannot be read ({_brief(error)})"
        if "utf-8" in str(error):
            why = "it is not UTF-8: --encoding latin-1, cp1252 ..."
        is_device = getattr(error, "errno", None) is not None  # unlike a broken gzip or zstd
        raise (OSError if is_device else ValueError)(f"{label}: {why}") from None


def to_lazy(table: object) -> pl.LazyFrame:
    """A frame of any library, or a dict of columns, as one of polars."""
    if isinstance(table, pl.DataFrame | pl.LazyFrame):
        return table.lazy()
    if hasattr(table, "items"):  # column by column: polars takes whole ones of pandas with pyarrow
        columns = [to_series(column).alias(str(name)) for name, column in table.items()]
    elif hasattr(table, "__arrow_c_stream__"):
        columns = pl.DataFrame(table)
    else:
        raise ValueError(f"{_brief(type(table))} is neither a path nor a frame or a dict")
    return pl.LazyFrame(columns)


def to_series(column: object) -> pl.Series:
    """A column of pandas, numpy, torch or Python; what is of no type of numpy as text or lists."""
    if isinstance(column, pl.Series):
        return column
    values = np.asarray(column)
    if values.dtype.kind in "mM":
        values = values.astype(f"{values.dtype.kind}8[us]")
    if values.dtype.kind not in "OU":
        return pl.Series(values)
    values = [None if v is None or str(v) in NOT_THERE else v for v in values]
    if any(isinstance(value, bytes | dict | set) for value in values):
        raise ValueError("bytes, dicts and sets are no ids")
    is_list = any(isinstance(value, list | tuple | np.ndarray) for value in values)
    return pl.Series([v if v is None else list(v) if is_list else str(v) for v in values])


# Finding the form of a text, and the columns.


def _find_columns(source: _Source, kind: _Kind) -> _Source:
    """The source with its form, and the places among its fields of the columns to be read."""
    scan = {b"PAR1": pl.scan_parquet, b"ARRO": pl.scan_ipc}.get(source.start)
    if source.frame is None and scan is None:
        head = _collect(source, _scan_lines(source, encoding="utf8-lossy").head(100))
        form, places = _detect(source, kind, head["line"])
        fields, source = form.fields, source._replace(form=form)
    else:
        fields, source, places = _find_typed(source, kind, scan)
    said = {name: _brief(fields[places[name]]) for name in NAMES if name in places}
    if source.name not in RATINGS_FILES and any(name != field for name, field in said.items()):
        listed = ", ".join(f"{name} is {field}" for name, field in said.items())
        source.how.notice(f"{source.label}: {listed}")
    return source._replace(places=places)


def _find_typed(source: _Source, kind: _Kind, scan: Callable | None) -> tuple:
    """The fields, the source with its frame, and the places, of what is no text."""
    with _naming(source.label):
        frame = scan(source.content, glob=False, hive_partitioning=False) if scan else source.frame
        schema = frame.collect_schema()
    fields = list(schema)
    try:
        places = _find_places(fields, kind, source.how.columns)
    except ValueError as error:
        raise ValueError(f"{source.label}: {error}") from None
    for name in [name for name in (*kind.needed, *kind.others) if name in places]:
        dtype = schema.dtypes()[places[name]]
        is_time = name == "timestamp" and dtype in (pl.Date, pl.Datetime)
        if not (is_time or dtype.is_numeric() or dtype in (*TEXT, pl.Null)):
            why = f"{fields[places[name]]!r} for {name} is of type {dtype}, not numbers or text"
            if name != "timestamp" or name in source.how.columns:
                raise ValueError(f"{source.label}: {why}: {OPTIONS[name]} tells another")
            source.how.notice(f"times are left out: {source.label}: {why}")
            del places[name]
    return fields, source._replace(frame=frame), places


def _detect(source: _Source, kind: _Kind, head: pl.Series) -> tuple[_Form, dict[str, int]]:
    """The form of a text and the places of its columns, by its first lines."""
    n_blank = (head.str.strip_chars() != "").arg_max() or 0
    lines = [f"{line}\n" for line in head[n_blank:]]
    for what in (what for begin, what in FOREIGN.items() if re.match(begin, "".join(lines))):
        raise ValueError(f"{source.label}: it is {what}")
    if not "".join(lines).strip():
        raise ValueError(f"{source.label}: no {kind.noun}")
    found, errors = [], [(0, "no tab, comma, ';', '|', '::' or blank between the columns")]
    is_json, columns = lines[0].lstrip()[:2] in ('{"', "{ "), source.how.columns
    for separator in "{" if is_json else ("\t", "::", ";", ",", "|", " "):
        fields = _split(lines, separator)
        if len(fields) < 2 and kind.fields and not is_json:
            continue
        is_header = is_json or _is_header(fields, kind, columns)
        names, words, n = fields, None, len(fields)
        if not is_header:
            names = [f"column {place + 1}" for place in range(n)]
            words = kind.fields[:n] if n <= len(kind.fields) else [""] * n
        try:
            places = _find_places(names, kind, columns, words)
        except ValueError as error:
            errors.append((n, str(error)))
            continue
        rating = "0" if is_header or "rating" not in places else fields[places["rating"]]
        is_good = re.fullmatch(NUMBER, rating) is not None
        score = is_good, n > 1, separator != " ", len(places), n
        n_headers = 0 if is_json else n_blank + is_header
        form = _Form(separator, names, n_headers, separator in "\t,;|")
        found.append((score, form, places))
    if not found:
        raise ValueError(f"{source.label}, line {n_blank + 1}: {max(errors)[1]}")
    return max(found, key=lambda each: each[0])[1:]


def _split(lines: list[str], separator: str) -> list[str]:
    """The fields of the first record, or the names in all records of JSON."""
    fields = lines[0].strip("\n").split(None if separator == " " else separator)
    if separator == "{":
        fields = {}
        for line in lines:
            with suppress(ValueError, TypeError, RecursionError):
                fields |= json.loads(line)
    elif separator in "\t,;|":
        with suppress(csv.Error):  # a record may go on in the next lines
            fields = next(csv.reader(lines, delimiter=separator, strict=True))
    return list(fields)


def _is_header(fields: list[str], kind: _Kind, columns: Columns) -> bool:
    """Whether a first record has names: those given, or words alone, which of pairs may be ids."""
    given = {str(each) for each in columns.values()}
    known = "|".join(f"({pattern})" for patterns in NAMES.values() for pattern in patterns)
    n_known = sum(re.fullmatch(known, _plain(field)) is not None for field in fields)
    is_named = any(each in fields and (n_known > 1 or not each.isdecimal()) for each in given)
    keys = f"{NAMES['user'][0]}|{NAMES['item'][0]}"  # which no id is like, as a word might be
    is_named |= any(re.fullmatch(keys, _plain(field)) for field in fields)
    is_words = not any(re.fullmatch(NUMBER, field) for field in fields)
    may_be = "rating" in kind.needed or n_known > 0 or not all(map(str.isdecimal, given))
    if not kind.fields:
        return n_known > 0 or not any(map(str.isdecimal, given))
    return is_named or (is_words and may_be)


def _plain(field: str) -> str:
    """A name in small letters and digits alone; RecBole tells the type after a colon."""
    return re.sub(r"[\W_]+", "", field.split(":")[0].rsplit("/", 1)[-1].lower())


def _find_places(
    fields: Sequence[str], kind: _Kind, columns: Columns, words: Sequence[str] | None = None
) -> dict[str, int]:
    """The place of each column among the fields: as given, by its name, or the only one left.

    Without a header `words` are the names that the fields have by their order. Of a table of one's
    own all other columns are read, too. ValueError if a needed one is not found.
    """
    names = dict.fromkeys((*kind.fields, *kind.needed, *kind.others))
    has = _brief(", ".join(fields))
    places = {name: _find_given(fields, kind, name, columns) for name in names if name in columns}
    places = {name: place for name, place in places.items() if place is not None}
    if len(set(places.values())) < len(places):
        raise ValueError(f"one column is told for two, {' and '.join(places)}")
    _find_names(fields if words is None else words, kind, names, places)
    if missing := [name for name in kind.needed if name not in places]:
        cure = " and ".join(OPTIONS[name] for name in missing)
        cure += ", or unpivot the table if each item has a column" * (len(missing) > 1)
        cure += ", in its first line" * (not kind.fields)
        raise ValueError(f"no column for {', '.join(missing)} among {has}: tell it by {cure}")
    places = {n: p for n, p in places.items() if n in (*kind.needed, *kind.others)}
    taken = set(places.values())
    for place, field in enumerate(() if kind.fields else fields):
        if field and place not in taken:  # pandas' index has no name
            is_free = field not in (*places, "user", "item")  # which are ids, wherever they are
            places[field if is_free else f"{field}_{place}"] = place
    return places


def _find_given(fields: Sequence[str], kind: _Kind, name: str, columns: Columns) -> int | None:
    """The place of a column that is told by its name, in any case, or by its number from 1."""
    given, lower = str(columns[name]).strip(), [field.strip().lower() for field in fields]
    for same, text in (([field.strip() for field in fields], given), (lower, given.lower())):
        if same.count(text) > 1:
            raise ValueError(f"several columns are called {given!r}: tell it by its number")
        if text in same:
            return same.index(text)
    if given.isdecimal() and 1 <= int(given) <= len(fields):
        return int(given) - 1
    if not kind.fields and name != "title":  # a table may call its ids otherwise than the ratings
        return None
    ways = f"{OPTIONS[name]} takes a name or a number from 1"
    raise ValueError(f"no column {given!r} among {_brief(', '.join(fields))}: {ways}")


def _find_names(words: Sequence[str], kind: _Kind, names: list[str], places: dict) -> None:
    """Add to `places` what the names tell, by `NAMES`, and the one left if one is missing."""
    plain, free = [*map(_plain, words)], set(range(len(words))) - set(places.values())
    for name in sorted((name for name in names if name not in places), key="rating".__eq__):
        for pattern in (*NAMES[name], *["id"] * (not kind.fields and name in kind.needed)):
            found = [place for place in sorted(free) if re.fullmatch(pattern, plain[place])]
            if len(found) > 1 and name in kind.needed:
                has = _brief(", ".join(words[place] for place in found))
                raise ValueError(f"several columns for {name}, {has}: tell it by {OPTIONS[name]}")
            if found:
                places[name] = found[0]
                free.remove(found[0])
                break
    left = [place for place in free if plain[place]]
    missing = [name for name in kind.needed if name not in places]
    if kind.fields and len(missing) == len(left) == 1:
        places[missing[0]] = left[0]


# Reading the columns.


def _scan_lines(source: _Source, *, end: str = "\n", **options) -> pl.LazyFrame:
    """Its lines, without the \\r that may stand before the `end` of each."""
    options |= {"separator": end, "eol_char": end, "quote_char": None}
    options |= {"has_header": False, "glob": False}
    options |= {"raise_if_empty": False, "empty_string_is_null": False}
    return pl.scan_csv(source.content, schema={"line": pl.String}, **options)


def _select(source: _Source, *, is_exact: bool = False) -> pl.LazyFrame:
    """The columns to be read: of a text strings, the first one null where a line is no record.

    Exact, quotes are minded, blank lines are left out, and column `ROW` has the line, from 0.
    """
    form, rows, line = source.form, [ROW] * is_exact, pl.col("line")
    if form is None:
        columns = (pl.nth(place + 1).alias(name) for name, place in source.places.items())
        return source.frame.with_row_index(ROW).select(*rows, *columns)
    lines, n = _scan_lines(source, skip_rows=form.n_headers), len(form.fields)
    lines = lines.with_row_index(ROW, form.n_headers) if is_exact else lines
    has_quote = line.str.contains('"', literal=True)
    if is_exact and form.has_quotes and _collect(source, lines.select(has_quote.any())).item():
        return _read_quoted(source)
    if is_exact:
        lines = lines.filter(line.str.strip_chars() != "")
    if form.separator == "{":
        keys = (json.dumps(field, ensure_ascii=False) for field in form.fields)
        fields = [line.str.json_path_match(f"$[{key}]") for key in keys]
        columns = (fields[place].alias(name) for name, place in source.places.items())
        return lines.select(*rows, *columns)
    if form.separator == " ":
        line = line.str.strip_chars().str.replace_all(r"\s+", " ")
    names = [str(place) for place in range(n + 1)]  # one more, which only too many fields reach
    fields = line.str.split_exact(form.separator, n).struct.rename_fields(names).struct.unnest()
    is_record = pl.col(names[n - 1]).is_not_null() & pl.col(names[n]).is_null()
    if form.has_quotes:
        is_record &= ~has_quote
    first, *columns = (pl.col(names[place]).alias(name) for name, place in source.places.items())
    return lines.select(*rows, "line", fields).select(
        *rows, pl.when(is_record).then(first), *columns
    )


def _read_quoted(source: _Source) -> pl.LazyFrame:
    """What `_select` makes of a text with quotes, by Python's csv, slowly.

    Below a line that is no record it begins anew.
    """
    # By a character that no text has, for fields may have line ends with \r.
    lines = "\0".join(_collect(source, _scan_lines(source, end="\0"))["line"]).split("\n")
    form, places = source.form, [*source.places.values()]
    csv.field_size_limit(1 << 30)  # reviews can be long
    start, n_headers, reader, rows = 0, form.n_headers, None, []
    while start < len(lines):
        if reader is None:
            base, texts = start, (f"{lines[place]}\n" for place in range(start, len(lines)))
            reader = csv.reader(texts, delimiter=form.separator, strict=True)
        try:
            fields = next(reader)
            stop = base + reader.line_num
            n_quotes = sum(line.count('"') for line in lines[start:stop])
            if n_quotes % 2 and '"' in "".join(fields):
                raise csv.Error  # a quote in a field without quotes
        except csv.Error:
            fields, stop, reader = ["not blank"], start + 1, None
        if start >= n_headers and (len(fields) > 1 or "".join(fields).strip()):
            is_record = len(fields) == len(form.fields)
            rows.append((start, *(fields[place] if is_record else None for place in places)))
        start = stop
    schema = {ROW: pl.Int64} | dict.fromkeys(source.places, pl.String)
    return pl.LazyFrame(rows, schema, orient="row")


def _collect(source: _Source, query: pl.LazyFrame) -> Frame:
    with _naming(source.label):
        return query.collect(engine="streaming")


def _read(source: _Source, kind: _Kind, bounds: Range = ANY) -> Frame:
    """Ids, ratings and timestamps, typed; then the others."""
    casts = _list_casts(source, kind, bounds)
    others = pl.exclude([*casts, ROW])
    for is_exact in (False, True):  # by a sample, which is mostly enough; then by all
        query = _select(source, is_exact=is_exact)
        chosen, _ = _choose(source, casts, query if is_exact else query.head(1000))
        rows = [ROW] * is_exact
        frame = _collect(source, query.select(*rows, *chosen.values(), others))
        if not any(frame[name].null_count() for name in casts):
            break
    else:
        frame = _leave_out(source, frame, list(casts), bounds)
    if not len(frame):
        raise ValueError(f"{source.label}: no {kind.noun}")
    if "timestamp" in casts and "timestamp" in frame.columns:
        times = frame["timestamp"]
        unit, seconds = _to_seconds(max(times.max(), -times.min()))
        times = frame.select(seconds)["timestamp"]
        is_whole = times.dtype == pl.Float64 and (times == times.floor()).all()
        frame = frame.with_columns(times.cast(pl.Int64) if is_whole else times)
        if source.name not in RATINGS_FILES:
            first, last = np.array([times.min(), times.max()]).astype("M8[s]").astype("M8[D]")
            source.how.notice(f"{source.label}: times from {first} to {last}{unit}")
    return frame.drop(ROW, strict=False)


def _leave_out(source: _Source, frame: Frame, names: list[str], bounds: Range) -> Frame:
    """Without times that can't be read, unless they are named, and, if `skip_bad`, wrong rows."""
    others = [name for name in names if name != "timestamp"]
    untimed = frame.drop_nulls(others)
    untimed = untimed.filter(pl.col("timestamp").is_null()) if others != names else untimed.clear()
    if len(untimed) and "timestamp" not in source.how.columns:
        why = _explain(source, untimed[ROW][0], "timestamp")
        source.how.notice(f"times are left out: {why}")
        frame, names = frame.drop("timestamp"), others
    wrong = frame.filter(pl.any_horizontal(pl.col(names).is_null()))
    if len(wrong):
        row = wrong.row(0, named=True)
        why = _explain(source, row[ROW], next(n for n in names if row[n] is None), bounds)
        _refuse(source, len(wrong), why)
    return frame.drop_nulls(names)


def _refuse(source: _Source, n_wrong: int, why: str) -> None:
    """ValueError says why a row can't be read; with `skip_bad` a notice does."""
    if not source.how.skip_bad:
        raise ValueError(f"{why}; --skip-bad leaves out what can't be read")
    source.how.notice(f"left out: {n_wrong:,}, the first is {why}")


def _locate(source: _Source, row: int) -> str:
    """Where a row, from 0, of what `_select` finds is in its file."""
    return f"{source.label}, {'row' if source.form is None else 'line'} {row + 1}"


def _explain(source: _Source, row: int, name: str, bounds: Range = ANY) -> str:
    """Where a row of a null is, and what is wrong with this column of it."""
    query = _select(source, is_exact=True).filter(pl.col(ROW) == row)
    values = _collect(source, query).row(0, named=True)
    where, value = _locate(source, row), values[name]
    separator, names, *_ = source.form or ("", ())
    if separator == "{" and not any(values[name] for name in source.places):
        return f"{where}: no JSON object with {', '.join(source.places)}"
    if separator not in ("", "{") and values[next(iter(source.places))] is None:
        line = _collect(source, _scan_lines(source).slice(row, 1)).item()
        n_fields = len(_split([line], separator))
        if '\\"' in line:
            return f"{where}: a quote with a backslash: double the quote instead"
        n_fields = f"{n_fields}, not {len(names)}" * (n_fields != len(names))
        return f"{where}: fields: {n_fields or 'a quote that is not doubled, in quotes'}"
    if value is None or str(value).strip() in MISSING:
        return f"{where}: a value is missing ({name})"
    needed = "a finite number" + (bounds != ANY) * " in {:g} to {:g}".format(*bounds)
    needed = {"rating": needed, "timestamp": "a time"}.get(name, "an integer")
    return f"{where}: {name} {_brief(repr(value))} is not {needed}"


def _choose(source: _Source, casts: dict, query: pl.LazyFrame) -> tuple[dict, dict]:
    """Of each column the first cast that leaves the fewest nulls, and how many those are."""
    counts = [cast.null_count() for name in casts for cast in casts[name]]
    counts = (count.alias(str(number)) for number, count in enumerate(counts))
    counts, chosen, n_nulls = [*_collect(source, query.select(counts)).row(0)], {}, {}
    for name, each in casts.items():
        own, counts = counts[: len(each)], counts[len(each) :]
        n_nulls[name] = min(own)
        chosen[name] = each[own.index(n_nulls[name])]
    return chosen, n_nulls


def _list_casts(source: _Source, kind: _Kind, bounds: Range = ANY) -> dict[str, list[pl.Expr]]:
    """How each column may be read, the fastest first: null for what is wrong or missing."""
    is_comma = source.form is not None and source.form.separator == ";"
    schema = _select(source).collect_schema()
    names = (*kind.needed, *(kind.others if kind.fields else ()))
    names = [name for name in names if name in schema]
    return {
        name: [c.alias(name) for c in _cast(name, schema[name], bounds, is_comma)] for name in names
    }


def _cast(name: str, dtype: pl.DataType, bounds: Range, is_comma: bool) -> list[pl.Expr]:
    is_text = dtype in (*TEXT, pl.Null)
    text = pl.col(name).cast(pl.String)
    column, bare = text if is_text else pl.col(name), text.str.strip_chars()
    if name in ("user", "item") and not is_text and not dtype.is_integer():
        return [pl.when(column.floor() == column).then(column.cast(pl.Int64, strict=False))]
    if name in ("user", "item"):
        number = text.cast(pl.Int64, strict=False)  # which takes 007 and +1, too
        digits = bare.str.replace(r"\.0*$", "")
        whole = digits.cast(pl.Int64, strict=False)
        return [
            pl.when((text >= "1") | (text == "0")).then(number),
            pl.when(whole.cast(pl.String) == digits).then(whole),
            pl.when(~bare.is_in(MISSING)).then(text),
        ]
    if name == "rating":
        point = bare.str.replace(",", ".", literal=True) if is_comma else bare
        numbers = [c.cast(pl.Float32, strict=False) for c in (column, point)]
        numbers = numbers if is_text else numbers[:1]
        return [pl.when(number.is_between(*bounds)).then(number) for number in numbers]
    if dtype in (pl.Date, pl.Datetime):
        return [_divide(column.dt.epoch("us"), 10**6)]
    if not is_text:
        number = column.cast(pl.Int64 if dtype.is_integer() else pl.Float64, strict=False)
        return [pl.when(number.abs() < 2.0**63).then(number)]
    number = bare.cast(pl.Float64, strict=False)
    iso = bare.str.replace(r"^(\d+)[/.](\d+)[/.](\d+)", "$1-$2-$3")
    iso = iso.str.extract(r"^((?:\d{4}-|\d\d?-\d\d?-\d{4}).*)")
    iso = iso.str.replace("[Tt]", " ").str.replace("[Zz]$", "+00:00")
    times = (iso.str.to_datetime(form, strict=False, time_unit="us") for form in TIMES)
    time = _divide(pl.coalesce(time.dt.epoch("us") for time in times), 10**6)
    return [column.cast(pl.Int64, strict=False), pl.when(number.abs() < 2.0**63).then(number), time]


def _to_seconds(most: float) -> tuple[str, pl.Expr]:
    """The unit of times of which the latest is `most`, in words, and how they become seconds."""
    unit = next((unit for unit, size in UNITS.items() if most < LATEST * size), "nanoseconds")
    time = pl.col("timestamp")
    return ("", time) if unit == "seconds" else (f", from {unit}", _divide(time, UNITS[unit]))


def _divide(time: pl.Expr, size: int) -> pl.Expr:
    """The quotient, whole where it is: polars may multiply by 1 / size."""
    return time // size + (time % size) / size


# Tables of users and items.


def read_users(table: Name | object, **how) -> Frame | None:
    """What is known of users, by `USERS_FILES` or a table of one's own; as `read_items`.

    MovieLens: user and age Int64, gender, occupation, zip_code String. (In users.dat an occupation
    is a number, and an age the lowest of its group.)
    """
    age = pl.col("age").cast(pl.Int64, strict=False)
    columns = "user", age, "gender", "occupation", "zip_code"
    return _read_table(table, USERS, USERS_FILES, how, lambda users: users.select(columns))


def read_items(table: Name | object, **how) -> Frame | None:
    """What is known of items, by `ITEMS_FILES` or a table of one's own.

    MovieLens, from a folder or a zip (None if it has none) or a file so called: item Int64, title
    String, year Int64 (null if unknown), the last in parentheses in the title, genres list of
    String. Any other file or frame, or a file whose column of ids `how` names, is a table of one's
    own with a header: `_to_side` tells what becomes of its columns. ValueError as in
    `read_ratings`, and for an id that is there twice.
    """
    return _read_table(table, ITEMS, ITEMS_FILES, how, _to_films)


def _to_films(films: Frame) -> Frame:
    title, genres = pl.col("title").str.strip_chars(), pl.col("genres")
    if "year" in films:  # of RecBole, where the film without a title is misspelt, and is its year
        full = pl.format("{} ({})", title, "year")
        title = pl.when(title != pl.col("year")).then(full).otherwise(pl.lit("unknown"))
        genres = genres.str.replace_all(" ", "|")
    elif "genres" not in films:  # a column for each, of zeros and ones
        flags = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in ML_100K_GENRES]
        genres = pl.concat_str(flags, separator="|", ignore_nulls=True)
    genres = genres.str.replace("(no genres listed)", "", literal=True).str.extract_all(r"[^|]+")
    year = title.str.extract(r".*\((\d{4})\)").cast(pl.Int64)
    return films.select("item", title=title, year=year, genres=genres)


def _read_table(
    table: Name | object, kind: _Kind, forms: Mapping[str, _Form], how: Mapping, finish: Callable
) -> Frame | None:
    """A table of users or items, one's own, or MovieLens's, of which `finish` makes its columns."""
    source, (key,) = _open(table, forms, kind, how), kind.needed
    if source is None:
        return None
    is_own = source.name not in forms or (key in source.how.columns and source.label == str(table))
    if is_own:
        source = _find_columns(source, kind)
    else:
        content, form = source.content, forms[source.name]
        content = content if isinstance(content, bytes) else content.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:  # as the films of ml-100k and ml-1m
            content = content.decode("latin-1").encode()
        places = {name: place for place, name in enumerate(form.fields) if name}
        source = source._replace(content=content, form=form, places=places)
    frame = _read(source, kind)
    if (is_twice := frame[key].is_duplicated()).any():
        twice = frame[key].filter(is_twice)[0]
        where = f"{source.label}: the {key} {twice!r} is there twice"
        raise ValueError(f"{where}: leave one line of it")
    if not is_own:
        return finish(frame)
    others = frame.drop(key).columns
    return Frame({key: frame[key]} | {n: _to_side(source, n, frame[n]) for n in others})


def _to_side(source: _Source, name: str, column: pl.Series) -> pl.Series:
    """A column of a table of one's own: numbers, texts or lists of texts.

    By the type in Parquet. Of text what is all numbers becomes numbers, what has a `|` between in
    some value lists, except a title; what is empty, or not a number, null.
    """
    column, dtype = column.alias("value"), column.dtype  # for polars takes a * as a pattern
    if dtype.is_numeric():
        return column if dtype.is_integer() else column.cast(pl.Float64).fill_nan(None)
    if dtype in (pl.Date, pl.Datetime):
        return column.dt.epoch("s")
    if dtype == pl.List and dtype.inner in TEXT:
        return column.cast(pl.List(pl.String))
    if dtype not in (*TEXT, pl.Boolean, pl.Null):
        raise ValueError(f"{source.label}: the column {name!r} is of type {dtype}")
    text = column.cast(pl.String)
    text = text.set(text.is_in([""] if name == "title" else MISSING), None)
    if name == "title":
        return text
    if source.form is not None and source.form.separator == "{" and text.str.starts_with("[").all():
        with suppress(*POLARS):  # a text may begin so, too
            return text.str.json_decode(pl.List(pl.String))
    if source.form is not None:
        for number in (pl.Int64, pl.Float64):
            numbers = text.str.strip_chars().cast(number, strict=False)
            if numbers.null_count() == text.null_count():
                return numbers.fill_nan(None) if number == pl.Float64 else numbers
    return text.str.extract_all(r"[^|]+") if text.str.contains(r"[^|]\|[^|]").any() else text


# Ids.


def same_ids(*frames: Frame | None) -> tuple[Frame | None, ...]:
    """The frames with their ids of one type: users and items Int64 if all are, else String.

    Ratings, pairs, and tables of users or items go together; None stays None.
    """
    for name in ("user", "item"):
        has = [frame is not None and name in frame for frame in frames]
        if len({frame[name].dtype for frame in compress(frames, has)}) > 1:
            text = {name: pl.String}
            frames = [f.cast(text) if h else f for f, h in zip(frames, has, strict=True)]
    return tuple(frames)


def find_rows(ids: pl.Series, values: pl.Series) -> pl.Series:
    """The rows of `values` in `ids`, sorted and unique: Int64, null for what is not there.

    Where one is of numbers and the other of text, both are compared as text, a number with .0 as
    the integer.
    """
    if values.dtype.is_numeric():
        values = values.set(values != values.floor(), None).cast(pl.Int64, strict=False)
    if ids.dtype != values.dtype:
        if values.dtype == pl.String:
            values = values.str.strip_chars().str.replace(r"\.0*$", "")
        ids, values = ids.cast(pl.String), values.cast(pl.String)
    known = Frame({"id": ids, "row": np.arange(len(ids))})
    return Frame({"id": values}).join(known, "id", "left", maintain_order="left")["row"]


def floor_times(ratings: Frame) -> Frame:
    """The frame with its timestamps, if it has any, in whole seconds: Int64, as in a model.

    ValueError for any but Unix seconds.
    """
    if "timestamp" not in ratings.columns:
        return ratings
    times = ratings["timestamp"]
    if not times.dtype.is_numeric() or (times.max() or 0) > LATEST:
        raise ValueError("timestamps must be Unix seconds: of dates, series.dt.epoch('s') has them")
    return ratings.with_columns(times.floor().cast(pl.Int64))


def drop_repeats(ratings: Frame) -> Frame:
    """One rating for each (user, item), the others in their order.

    The latest by timestamp, if there are timestamps; of one time, or without them, the later row.
    """
    if _is_sorted(ratings, strictly=True):
        return ratings
    kept = ratings.select(pl.exclude("rating")).with_row_index()
    if "timestamp" in ratings:
        kept = kept.sort("timestamp", maintain_order=True)
    kept = kept.unique(["user", "item"], keep="last", maintain_order=True)["index"]
    return ratings if len(kept) == len(ratings) else ratings[kept.sort()]


# Splits.

PUBLISHED_SPLITS = ("ua", "ub", "u1", "u2", "u3", "u4", "u5")
SPLITS = (*PUBLISHED_SPLITS, "random", "by-date", "none")
SLICE = 1 << 18  # ratings handled at a time, so that no column is copied whole


def split(ratings: Frame, name: str, *, seed: int = 0) -> tuple[Frame, Frame]:
    """Cut `ratings` into a train and a test part, each sorted by user, then item.

    ua and ub: each user's first ten ratings in file order are the test part, or the next ten.
    u1 to u5: the k-th fifth of the lines is. These are GroupLens's published splits of ml-100k
    (rules of its mku.sh and allbut.pl), and of 100,000 ratings only. random: a tenth, drawn by
    `seed`. last1, last10 and any other lastN: each user's last N by time (of one time, the later in
    the file); of a user with N ratings or fewer, all but the first. by-date: the last tenth of all
    by time, as of `fold_by_date`. none: no test part. ValueError for any other, and for one that
    leaves the test part empty.
    """
    row = pl.int_range(pl.len())
    if name in PUBLISHED_SPLITS and len(ratings) != 100_000:
        raise ValueError(
            f"the split {name} is of ml-100k's 100,000 ratings, and here are {len(ratings):,}: "
            "random, last10 and folds go with any"
        )
    if name in ("ua", "ub"):
        first = 0 if name == "ua" else 10
        is_test = row.over("user").is_between(first, first + 9)
    elif name in PUBLISHED_SPLITS:
        is_test = row * 5 // pl.len() == int(name[1]) - 1
    elif name == "random":
        return hold_out(ratings, 0.1, seed=seed)
    elif name == "by-date":
        return next(fold_by_date(ratings, 9, first=9))
    elif last := re.fullmatch(r"last([1-9]\d{0,8})", name):
        _need_times(ratings, name)
        n_later = pl.len() - pl.col("timestamp").rank("ordinal")
        is_first = n_later == pl.len() - 1
        is_test = ((n_later < int(last[1])) & ~is_first).over("user")
    elif name == "none":
        is_test = row < 0
    else:
        raise ValueError(f"no split '{name}': it is {', '.join(SPLITS)} or lastN, as last10")
    train, test = _part(ratings, is_test)
    if not len(test) and name != "none":
        raise ValueError(f"the split {name} leaves no test part: each user has one rating")
    return train, test


def _part(ratings: Frame, is_test: pl.Expr | pl.Series) -> tuple[Frame, Frame]:
    is_test = ratings.select(is_test=is_test)["is_test"]
    if not _is_sorted(ratings):  # as most of MovieLens is: 25 million need no sort
        marked = ratings.with_columns(is_test=is_test).sort("user", "item", maintain_order=True)
        ratings, is_test = marked.drop("is_test"), marked["is_test"]
    return ratings.filter(~is_test), ratings.filter(is_test)


def _is_sorted(ratings: Frame, *, strictly: bool = False) -> bool:
    """Whether by user, then item. Slice by slice, since a comparison of chunks copies them."""
    for start in range(0, len(ratings), SLICE):
        user, item = (ratings[name].slice(start, SLICE + 1) for name in ("user", "item"))
        (user, next_user), (item, next_item) = ((ids[:-1], ids[1:]) for ids in (user, item))
        is_after = next_item > item if strictly else next_item >= item
        if not ((next_user > user) | ((next_user == user) & is_after)).all():
            return False
    return True


def hold_out(ratings: Frame, fraction: float, *, seed: int) -> tuple[Frame, Frame]:
    """Cut off a random `fraction` of the ratings: the rest, then it, sorted by user, then item."""
    n_test = int(len(ratings) * fraction)
    if not 0 < n_test < len(ratings):
        few = f"a share of {fraction:g} of {len(ratings)} ratings leaves a part empty"
        raise ValueError(f"{few}: more are needed, or a test part of its own")
    drawn = np.zeros(len(ratings), dtype=bool)
    drawn[:n_test] = True
    np.random.default_rng(seed).shuffle(drawn)  # permutation(n) < n_test, in an eighth of memory
    return _part(ratings, pl.Series(drawn))


def fold(ratings: Frame, n_folds: int, *, seed: int) -> Iterator[tuple[Frame, Frame]]:
    """Cut the ratings at random into `n_folds`, and yield train and test with each as the test."""
    if not 2 <= n_folds <= len(ratings):
        raise ValueError(f"cannot cut {len(ratings)} ratings into {n_folds} folds")
    number = np.random.default_rng(seed).permutation(len(ratings)) % n_folds
    for test in range(n_folds):
        yield _part(ratings, pl.Series(number == test))


def fold_by_date(ratings: Frame, n_folds: int, *, first: int = 1) -> Iterator[tuple[Frame, Frame]]:
    """Cut the ratings by time into n_folds + 1 parts; yield all before each but the first, and it.

    That is, train, which grows, and test, from the fold `first`. Ratings of one time stay together.
    ValueError without timestamps, and where there are too few different ones.
    """
    _need_times(ratings, "by-date")
    times, n_parts = ratings["timestamp"].sort(), n_folds + 1
    starts = [times[len(times) * number // n_parts] for number in range(n_parts)]
    if len(set(starts)) < n_parts:
        n_times = times.n_unique()
        raise ValueError(f"{n_times:,} different times are too few for {n_parts} parts by date")
    when = pl.col("timestamp")
    for number in range(first, n_parts):
        is_last = number + 1 == n_parts
        before_end = ratings if is_last else ratings.filter(when < starts[number + 1])
        yield _part(before_end, when >= starts[number])


def _need_times(ratings: Frame, name: str) -> None:
    if "timestamp" not in ratings.columns:
        cure = "tell their column by --time-column"
        raise ValueError(f"the split {name} needs timestamps, and there are none: {cure}")


# Tensors.


class Part(NamedTuple):
    """Ratings as tensors."""

    users: Tensor  # (N,) int64, rows of the user tables
    items: Tensor  # (N,) int64, rows of the item tables
    ratings: Tensor  # (N,) float32


class Ids(NamedTuple):
    """Raw ids by row, sorted: `ids.users[row]` is the user of that row of the tables."""

    users: pl.Series
    items: pl.Series


def to_tensors(
    train: Frame,
    test: Frame,
    *,
    users: Frame | None = None,
    items: Frame | None = None,
    allow_overlap: bool = False,
) -> tuple[Part, Part, Ids]:
    """Both frames, with ids of one type (`same_ids`), as tensors; their raw ids indexed from 0.

    Ids of tables of `users` and `items` are among them. ValueError when the training part is empty,
    or, unless `allow_overlap`, when a (user, item) pair is in both parts: a model would be tested
    on what it was trained on (a copy of ua.base in circulation holds the whole of ua.test).
    """
    if not len(train):
        raise ValueError("the training part has no ratings")
    if not allow_overlap:
        pairs, test_pairs = (part.lazy().select("user", "item") for part in (train, test))
        shared = pairs.join(test_pairs, ["user", "item"], "semi").collect(engine="streaming")
        if len(shared):
            raise ValueError(
                f"{len(shared)} of the test part's (user, item) pairs are in the training part "
                f"too, one is {shared.row(0)}: leave them out, or --allow-overlap"
            )
    with ThreadPoolExecutor(2) as pool:
        (user_ids, *users), (item_ids, *items) = pool.map(
            lambda name, about: _index(*(part[name] for part in (train, test, about))),
            ("user", "item"),
            (train.clear() if about is None else about for about in (users, items)),
        )
    ratings = (part["rating"].cast(pl.Float32).to_torch() for part in (train, test))
    return *map(Part, users, items, ratings), Ids(user_ids, item_ids)


def _index(*columns: pl.Series) -> tuple[pl.Series, Tensor, Tensor]:
    """The ids in the columns, sorted, and for each column their rows, int64.

    By a table from id to row where integers lie near each other: a look-up for a binary search.
    """
    is_text = columns[0].dtype == pl.String
    ends = [end for c in columns if len(c) and not is_text for end in (c.min(), c.max())]
    low, n_places = (0, 0) if is_text else (min(ends), max(ends) - min(ends) + 1)
    if is_text or n_places > 2 * sum(map(len, columns)) + 2**20:
        ids = pl.concat([column.unique() for column in columns]).unique().sort()
        return ids, *(find_rows(ids, column).to_torch() for column in columns)
    # In place, slice by slice: no column is copied twice.
    found = [column.to_numpy(writable=True) for column in columns]
    is_used = np.zeros(n_places, dtype=bool)
    for rows in found:
        rows -= low
        is_used[rows] = True
    table = np.cumsum(is_used) - 1
    for rows in found:
        for start in range(0, len(rows), SLICE):
            rows[start : start + SLICE] = table[rows[start : start + SLICE]]
    return pl.Series(np.flatnonzero(is_used) + low), *map(torch.from_numpy, found)


def find_seen(
    part: Part, ids: Ids, users: Frame | None = None, items: Frame | None = None
) -> tuple[Tensor, Tensor]:
    """Whether training tells something of each user and each item: bool (n_users,), (n_items,).

    It does by a rating in `part`, or by a feature (`describe`) in the frames `users` and `items`.
    """
    masks = []
    for name, raw, rows, about in zip(("user", "item"), ids, part, (users, items), strict=False):
        seen = torch.zeros(len(raw), dtype=torch.bool).index_fill_(0, rows, True)
        if about is not None:
            seen |= raw.is_in(describe(about, name)[name].unique().implode()).to_torch()
        masks.append(seen)
    return tuple(masks)


# Features.

FEATURES = ("id", "implicit", "side", "time")
UA_DEVIATION = 1.126  # of the training ratings of ml-100k's split ua
TIME_SCALES = (10.0, 100.0, 1_000.0, 100_000.0)  # seconds


class Sparse(NamedTuple):
    """A sparse matrix by rows: row r has `columns` and `values` from `starts[r]` to the next."""

    starts: Tensor  # (n_rows + 1,) int64
    columns: Tensor  # (number of values,) int64
    values: Tensor  # float32


def features(
    train: Frame,
    ids: Ids,
    kinds: Sequence[str] = FEATURES,
    *,
    users: Frame | None = None,
    items: Frame | None = None,
) -> tuple[Sparse, Sparse, tuple[int, int]]:
    """A matrix (rows, features), its transpose, and how many features users and items have.

    Rows and features are the users', then the items'. `kinds` chooses among: id, the row's own;
    implicit, the items that the user rated in `train`, or the users who rated the item, each
    1 / sqrt(their number) (Koren 2008, SVD++); side, what `users` and `items` tell, by `describe`;
    time, room for `time_context`, whose features vary by moment: the users' part ends in identity
    rows and columns for them. No test rating is read.
    """
    if isinstance(kinds, str) or not set(kinds) <= set(FEATURES):
        raise ValueError(f"features must be some of {FEATURES}, not {kinds!r}")
    users_items = (("user", ids.users, users), ("item", ids.items, items))
    pairs = Frame({name: find_rows(raw, train[name]) for name, raw, _ in users_items})
    entries, n_rows, sizes = [], 0, []
    for name, raw, about in users_items:
        n_above = sum(sizes)
        n_features = n_above
        for block, n_block in _list_blocks(name, ids, about, pairs, kinds):
            row, feature = pl.col("row") + n_rows, pl.col("feature") + n_features
            value = pl.col("value").cast(pl.Float32)
            entries.append(block.select(row=row, feature=feature, value=value))
            n_features += n_block
        if n_features == n_above:
            raise ValueError(f"the features {','.join(kinds)} say nothing of the {name}s")
        n_rows += len(raw) + len(TIME_SCALES) * (name == "user" and "time" in kinds)
        sizes.append(n_features - n_above)
    entries = pl.concat(entries)
    transposed = _sparse(entries, "feature", "row", sum(sizes))
    return _sparse(entries, "row", "feature", n_rows), transposed, tuple(sizes)


def _list_blocks(
    name: str, ids: Ids, about: Frame | None, pairs: Frame, kinds: Sequence[str]
) -> Iterator[tuple[Frame, int]]:
    """For each kind the entries (row, feature, value) of users or items, and its features."""
    raw, others = ids if name == "user" else reversed(ids)
    rows = pl.int_range(len(raw), eager=True)
    scales = pl.int_range(len(TIME_SCALES), eager=True)
    value = pl.lit(1.0)
    if "id" in kinds:
        yield pl.select(row=rows, feature=rows, value=value), len(raw)
    if "implicit" in kinds:
        share = 1 / pl.len().over(name).sqrt()
        other = "item" if name == "user" else "user"
        yield pairs.select(row=name, feature=other, value=share), len(others)
    if "side" in kinds and about is not None:
        side = describe(about, name)
        rows = find_rows(raw, side[name])
        side = side.select(rows.alias("row"), "feature", "value").drop_nulls("row")
        yield side, (side["feature"].max() + 1) if len(side) else 0
    if "time" in kinds and name == "user":
        yield pl.select(row=scales + len(raw), feature=scales, value=value), len(scales)


def _sparse(entries: Frame, row: str, column: str, n_rows: int) -> Sparse:
    entries = entries.sort(row, column)
    starts = torch.searchsorted(entries[row].to_torch(), torch.arange(n_rows + 1))
    return Sparse(starts, entries[column].to_torch(), entries["value"].to_torch())


def describe(about: Frame, key: str) -> Frame:
    """Side information as features: columns `key`, feature (from 0), value, a line per feature set.

    A column of text gives one feature a value; a list of them one a member, each 1 / sqrt(their
    number); a number one for each of ten bins of equal count, or one a value if it has few. A text
    column in which most values occur once is a label (a title, a postal code) and is left out, and
    so is what is missing.
    """
    schema = {key: about[key].dtype, "feature": pl.Int64, "value": pl.Float64}
    blocks, n_features = [Frame(schema=schema)], 0
    for column in about.drop(key).columns:
        values = Frame({key: about[key], "value": about[column]})
        values = values.with_columns(share=1.0).drop_nulls()
        if values["value"].dtype == pl.List:
            share = (1 / pl.col("value").list.len().sqrt()).alias("share")
            values = values.with_columns(share).explode("value").drop_nulls()
        elif values["value"].dtype.is_numeric():
            if values["value"].n_unique() > 10:
                tenth = (pl.col("value").rank("average") - 1) * 10 // pl.len()
                values = values.with_columns(tenth.alias("value"))
        elif 2 * values["value"].is_unique().sum() > len(values):
            continue
        if not len(values):
            continue
        feature = pl.col("value").rank("dense").cast(pl.Int64) - 1 + n_features
        blocks.append(values.select(key, feature.alias("feature"), value="share"))
        n_features = int(blocks[-1]["feature"].max()) + 1
    return pl.concat(blocks)


def find_excess(ratings: Frame) -> Frame:
    """user, timestamp and excess: how far each rating lies above the mean of the item's.

    At the deviation of ml-100k's ratings whatever their scale. Item means are shrunk by five
    ratings towards the mean of all.
    """
    rating = pl.col("rating").cast(pl.Float64)
    excess = (rating - rating.mean()) * UA_DEVIATION / rating.std(ddof=0)
    of_item = pl.col("excess").sum().over("item") / (pl.len().over("item") + 5)
    ratings = ratings.with_columns(excess=excess)
    return ratings.select("user", "timestamp", pl.col("excess") - of_item)


def time_context(rated: Frame, asked: Frame) -> tuple[Tensor, Tensor]:
    """What the ratings that a user gave before tell of a moment: (N, J) and (M, J), float32.

    The moments are those of the ratings `rated`, of `find_excess`, and `asked` (user, timestamp).
    One feature for each of `TIME_SCALES`, tau. With sums over the user's ratings k from before the
    moment t, of excess e,

        usual = sum_k e_k / (1 + sum_k 1)
        sum_k exp((t_k - t) / tau) (e_k - usual) / (10 + sum_k exp((t_k - t) / tau))

    Films are rated in moods: on MovieLens ratings of one hour are alike. Of the user nothing of the
    same second or of later is read; item means are of the whole training part. The 10, the 1, the
    scales and the 5 of item means were found on validation parts of ml-100k.
    """
    rows = [rated.with_columns(count=1.0), asked.with_columns(excess=0.0, count=0.0)]
    keys = ["user", "timestamp"]
    rows = pl.concat([part.select(*keys, "excess", "count") for part in rows])
    rows = rows.with_row_index("place").sort(keys, maintain_order=True)
    is_first = rows["user"].ne_missing(rows["user"].shift()).to_torch()
    gaps = rows["timestamp"].diff().fill_null(0).cast(pl.Float64).to_torch()
    values = torch.stack([rows["excess"].to_torch(), rows["count"].to_torch()], 1)
    # The first row of each user's second.
    starts = torch.arange(len(rows)).where(is_first | (gaps > 0), 0).cummax(0).values

    def sum_before(keep: Tensor) -> tuple[Tensor, Tensor]:
        sums = _decayed_sums(values, keep.masked_fill(is_first, 0.0))
        return (sums - values)[starts].unbind(1)

    excess, count = sum_before(torch.ones_like(gaps))
    usual, place = excess / (count + 1), rows["place"].to_torch().long()
    context = torch.empty(len(rows), len(TIME_SCALES))
    for column, tau in enumerate(TIME_SCALES):
        excess, count = sum_before(torch.exp(-gaps / tau))
        context[place, column] = ((excess - usual * count) / (10 + count)).float()
    return context[: len(rated)], context[len(rated) :]


def _decayed_sums(values: Tensor, keep: Tensor) -> Tensor:
    """s_k = values_k + keep_k s_k-1 along the first dimension, in log2(n) passes of tensors."""
    shift = 1
    while shift < len(keep) and keep.any():
        values = torch.cat([values[:shift], values[shift:] + keep[shift:, None] * values[:-shift]])
        keep = torch.cat([torch.zeros_like(keep[:shift]), keep[shift:] * keep[:-shift]])
        shift *= 2
    return values
