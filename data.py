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

import csv
import hashlib
import io
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
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, NoReturn

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


# Reading.

# The columns of ratings, and how their names begin, in any case, where a header is read.
NAMES = {
    "user": "user|customer",
    "item": "item|movie|product",
    "rating": "rating|score",
    "timestamp": "timestamp|time|date",
}
NUMBER = r"(?i)\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*"
TIMES = ("%F", "%F %R", "%F %R%#z", "%F %T%.f", "%F %T%.f%#z")  # with a blank for ISO 8601's T
BEGINS = r"\W*(%s)(?![ _-]?\d)"  # user, but not user 1
TEXT = (pl.String, pl.Categorical, pl.Enum)
ANY = (float(np.finfo("f4").min), float(np.finfo("f4").max))


class _Kind(NamedTuple):
    noun: str  # what a file has none of when it is empty
    needed: tuple[str, ...]  # columns
    other: str | None  # column read if it is there
    fields: tuple[str, ...]  # of a line without a header, the last ones at will; () for a table


RATINGS = _Kind("ratings", ("user", "item", "rating"), "timestamp", tuple(NAMES))
RATED = _Kind("ratings", ("item", "rating"), "timestamp", tuple(NAMES)[1:])
PAIRS = _Kind("pairs", ("user", "item"), "timestamp", tuple(NAMES))
USERS = _Kind("users", ("user",), None, ())
ITEMS = _Kind("items", ("item",), "title", ())


class _Form(NamedTuple):
    separator: str
    fields: list[str | None]  # what each field of a line is; None for one that is not read
    n_headers: int = 0
    quote: str | None = None  # which a field may be in (RFC 4180)


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
    "movies.csv": _Form(",", ["item", "title", "genres"], 1, '"'),
    "movies.dat": _Form("::", ["item", "title", "genres"]),
    "u.item": _Form("|", ["item", "title", None, None, None, *ML_100K_GENRES]),
    "ml-100k.item": _Form("\t", ["item", "title", "year", "genres"], 1),
}


class _Source(NamedTuple):
    label: str  # what messages call a file
    name: str  # without folders
    content: Path | bytes
    start: bytes  # the first four
    form: _Form | None = None  # None for Parquet
    frame: pl.LazyFrame | None = None  # the columns read: of a text strings, never null


def read_ratings(
    path: Name, *, columns: Columns | None = None, rating_range: Range | None = None
) -> Frame:
    """Ratings from a file, or from the folder or archive of a MovieLens, in file order.

    A file is Parquet, or UTF-8 text, as it is or by gzip or zstd: lines of user, item, rating and,
    if it likes, timestamp, between tabs, commas, `;`, `|` or `::`. Except between `::`, a field may
    be in double quotes, a quote in it doubled (RFC 4180). A first line without numbers is a header.
    `columns` tells which name in it (or in Parquet) is that of user, item, rating or timestamp;
    others are known by how they begin, `NAMES`, best alone or ending in id.

    Columns user and item are Int64 where every id is an integer as one is printed, else String,
    exactly as in the file; rating is float32, finite, in `rating_range` if there is one; timestamp
    Int64, Unix seconds, if the file has it, from numbers, floored, or ISO 8601 dates and times, in
    UTC unless they name a zone. No nulls. ValueError names the file and the line or row of anything
    else; OSError when `path` can't be read.
    """
    bounds = tuple(map(float, map(np.float32, rating_range or ANY)))  # rounded as a rating is
    return _read(_scan(path, RATINGS, columns), RATINGS, bounds)


def read_rated(path: Name, *, columns: Columns | None = None) -> Frame:
    """The ratings of one user, as `read_ratings` of a file without the column user."""
    return _read(_scan(path, RATED, columns), RATED)


def scan_pairs(
    path: Name, *, columns: Columns | None = None
) -> tuple[pl.LazyFrame, Callable[[int], str]]:
    """Pairs of a user and an item, to be streamed in file order, and where in the file each is.

    As `read_ratings`, but a rating may be missing and is not read. The frame: row Int64, from 0;
    user and item String, exactly as in the file; timestamp Int64, if the file has it. The function
    says of a row 'FILE, line 17', or 'FILE, row 16' of Parquet. All is read once here, in bounded
    memory, for errors as of `read_ratings`: the frame raises none later.
    """
    source = _scan(path, PAIRS, columns)
    schema = source.frame.collect_schema()
    names = [name for name in NAMES if name in schema]
    for place in (0, -1):  # ISO 8601 is slow to read
        times = [_casts(name, schema[name], ANY)[place] for name in names[2:]]
        texts = [_casts(name, schema[name], ANY)[-1] for name in names[:2]]
        pairs = source.frame.select(*texts, *times).with_row_index("row")
        pairs = pairs.with_columns(pl.col("row").cast(pl.Int64))
        first = pl.all().filter(pl.any_horizontal(pl.all().is_null())).first()
        n_pairs, wrong, *values = _collect(source, pairs.select(pl.len(), first)).row(0)
        if wrong is None:
            break
    if not n_pairs:
        raise ValueError(f"{source.label}: no pairs")
    if wrong is not None:
        _refuse(source, wrong, names[values.index(None)], ANY)
    return pairs, lambda row: _find_record(source, row)[0]


def _open(path: Path, names: Sequence[str]) -> _Source | None:
    """A file, or of a folder or a zip the one with the first of `names`, None if it has none.

    A pipe (that a signal may interrupt) and a member of a zip (whose name never becomes a path) are
    read into memory.
    """
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), None)
        if path is None:
            return None
    elif path.suffix == ".zip" or (path.is_file() and zipfile.is_zipfile(path)):
        with _naming(path), zipfile.ZipFile(path) as archive:
            members = {PurePosixPath(member).name: member for member in archive.namelist()}
            name = next((name for name in names if name in members), None)
            if name is None:
                return None
            label, member = f"{path}, {_brief(members[name])}", archive.getinfo(members[name])
            if member.file_size > LARGEST_MEMBER:
                raise ValueError(f"{label}: more than {LARGEST_MEMBER:,} bytes")
            with archive.open(member) as file:
                content = b"".join(iter(lambda: file.read(1 << 20), b""))
            return _Source(label, name, content, content[:4])
    # polars opens files itself, unless their names are no UTF-8.
    is_regular = path.is_file() and os.fsencode(path).decode(errors="ignore") == str(path)
    if not is_regular:
        signal.siginterrupt(signal.SIGINT, True)  # polars has Ctrl-C go on with what waits
    with _naming(path), open(path, "rb") as file:
        content = file.read(4 if is_regular else -1)
    return _Source(str(path), path.name, path.absolute() if is_regular else content, content[:4])


@contextmanager
def _naming(label: object) -> Iterator[None]:
    """An error that names a file, for what a broken one or a broken device raises without it."""
    try:
        yield
    except (OSError, *BROKEN, *POLARS) as error:
        if getattr(error, "filename", None):
            raise
        why = "it is not UTF-8" if "utf-8" in str(error) else f"cannot be read ({_brief(error)})"
        is_device = getattr(error, "errno", None) is not None  # unlike a broken gzip or zstd
        raise (OSError if is_device else ValueError)(f"{label}: {why}") from None


def _scan(path: Name, kind: _Kind, columns: Columns | None) -> _Source:
    source = _open(Path(path), RATINGS_FILES)
    if source is None:
        raise ValueError(f"{path}: no {', '.join(RATINGS_FILES)} in it")
    return _find_columns(source, kind, columns or {})


def _find_columns(source: _Source, kind: _Kind, columns: Columns) -> _Source:
    """The columns of a kind in a file, by names or places; of Parquet with a type that is read."""
    if source.start != b"PAR1":
        return _scan_text(source, _detect(source, kind, columns))
    with _naming(source.label):
        scan = pl.scan_parquet(source.content, glob=False, hive_partitioning=False)
        schema = scan.collect_schema()
    try:
        names = _name_columns(list(schema), kind, columns)
    except ValueError as error:
        raise ValueError(f"{source.label}: {error}") from None
    for name, (column, dtype) in zip(names, schema.items(), strict=True):
        is_good = dtype.is_integer() or (name in ("user", "item", "title") and dtype in TEXT)
        is_good |= name in ("rating", "timestamp") and dtype.is_float()
        is_good |= name == "timestamp" and dtype in (pl.Date, pl.Datetime)
        if name in (*kind.needed, kind.other) and name is not None and not is_good:
            raise ValueError(f"{source.label}: the column {column!r} for {name} is of type {dtype}")
    chosen = [pl.nth(place).alias(name) for place, name in enumerate(names) if name]
    return source._replace(frame=scan.select(chosen))


def _scan_csv(content: Path | bytes, names: Sequence[str], **options) -> pl.LazyFrame:
    """Columns of strings, an empty one for what is missing; by default one of whole lines."""
    options = {"separator": "\n", "quote_char": None, "has_header": False, "glob": False} | options
    schema = dict.fromkeys(names, pl.String)
    return pl.scan_csv(
        content, schema=schema, raise_if_empty=False, empty_string_is_null=False, **options
    )


def _scan_text(source: _Source, form: _Form) -> _Source:
    """A text with its columns. ValueError names a line of too few or too many fields.

    polars adds empty fields to too few, and refuses too many if all are read. So separators are
    counted, but for ratings of no other columns: there an empty field is refused anyhow.
    """
    names = [str(place) for place in range(len(form.fields))]
    lines = _scan_csv(source.content, ["line"], skip_rows=form.n_headers)
    line, options = pl.col("line"), {"separator": form.separator, "quote_char": form.quote}
    if form.separator == "::":
        fields = line.str.splitn("::", len(names)).struct.rename_fields(names)
        scan = lines.select(fields.struct.unnest())
    else:
        scan = _scan_csv(source.content, names, skip_rows=form.n_headers, **options)
    chosen = [pl.nth(place).alias(name) for place, name in enumerate(form.fields) if name]
    source = source._replace(form=form, frame=scan.select(chosen))
    if form.separator == "::" or not set(form.fields) <= set(NAMES):
        is_odd = line.str.count_matches(form.separator, literal=True) != len(names) - 1
        if _collect(source, lines.select(is_odd.any())).item():
            _find_record(source)
    return source


def _collect(source: _Source, query: pl.LazyFrame) -> Frame:
    try:
        with _naming(source.label):
            return query.collect(engine="streaming")
    except ValueError:
        if source.form is not None:
            _find_record(source)  # which can name the line
        raise


def _find_record(source: _Source, row: int | None = None) -> tuple[str, dict]:
    """Where a row, from 0, is in its file, and what the columns have there.

    ValueError names the line of the first record of a text that is none, before it or at all.
    """
    form = source.form
    if form is None:
        values = _collect(source, source.frame.slice(row, 1)).row(0, named=True)
        return f"{source.label}, row {row + 1}", values
    with _naming(source.label):
        lines = _scan_csv(source.content, ["line"], encoding="utf8-lossy").collect()["line"]
    separator = form.separator if form.quote else "\0"
    texts = (f"{line.replace(form.separator, separator)}\n" for line in lines)
    quoting = csv.QUOTE_MINIMAL if form.quote else csv.QUOTE_NONE
    reader = csv.reader(texts, delimiter=separator, quoting=quoting, strict=True)
    start, fields = 1, []
    try:
        for number, fields in enumerate(reader, -form.n_headers):
            if form.quote and '"' in "".join(fields):
                record = lines[start - 1 : reader.line_num]
                if record.str.count_matches('"').sum() % 2:
                    raise csv.Error("a quote in a field")
            if len(fields) != len(form.fields):
                raise csv.Error(f"fields: {len(fields)}, not {len(form.fields)}")
            if number == row:
                break
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{source.label}, line {start}: {error}") from None
    return f"{source.label}, line {start}", dict(zip(form.fields, fields, strict=False))


def _read(source: _Source, kind: _Kind, bounds: Range = ANY) -> Frame:
    """Ids, ratings and timestamps, each by the first cast without a null; then the others."""
    schema = source.frame.collect_schema()
    names = [name for name in (kind.fields or kind.needed) if name in schema]
    casts = {name: _casts(name, schema[name], bounds) for name in names}
    others = pl.exclude(names)
    for part in (source.frame.head(1000), source.frame):  # few are mostly enough to choose by
        looser = names
        while looser:
            frame = _collect(source, part.select(*(each[0] for each in casts.values()), others))
            wrong = [name for name in names if frame[name].null_count()]
            looser = [name for name in wrong if len(casts[name]) > 1]
            casts |= {name: casts[name][1:] for name in looser}
    if not len(frame):
        raise ValueError(f"{source.label}: no {kind.noun}")
    if wrong:
        rows = [frame[name].is_null().arg_max() for name in wrong]
        _refuse(source, min(rows), wrong[rows.index(min(rows))], bounds)
    return frame


def _casts(name: str, dtype: pl.DataType, bounds: Range) -> list[pl.Expr]:
    """How a column may be read, strict ones first: null for what is wrong or missing."""
    column = pl.col(name)
    if name in ("user", "item"):
        text = column.cast(pl.String)
        number = text.cast(pl.Int64, strict=False)  # which takes 007 and +1, too
        is_plain = (text >= "1") | (text == "0")
        casts = [
            pl.when(is_plain).then(number),
            pl.when(number.cast(pl.String) == text).then(number),
        ]
        casts.append(pl.when(text != "").then(text))
    elif name == "rating":
        texts = (column, column.str.strip_chars()) if dtype == pl.String else (column,)
        numbers = [text.cast(pl.Float32, strict=False) for text in texts]
        casts = [pl.when(number.is_between(*bounds)).then(number) for number in numbers]
    elif dtype in (pl.Date, pl.Datetime):
        casts = [column.dt.epoch("s")]
    elif dtype != pl.String:
        casts = [column.floor().cast(pl.Int64, strict=False)]
    else:
        bare = column.str.strip_chars()
        number = bare.cast(pl.Float64, strict=False).floor().cast(pl.Int64, strict=False)
        iso = bare.str.replace("[Tt]", " ").str.replace("[Zz]$", "+00:00")
        times = (iso.str.to_datetime(form, strict=False, time_unit="us") for form in TIMES)
        wholes = [text.cast(pl.Int64, strict=False) for text in (column, bare)]
        casts = [wholes[0], pl.coalesce(wholes[1], number, *(time.dt.epoch("s") for time in times))]
    return [cast.alias(name) for cast in casts]


def _refuse(source: _Source, row: int, name: str, bounds: Range) -> NoReturn:
    """ValueError says where a value is wrong, and what it is."""
    where, record = _find_record(source, row)
    if record[name] in (None, ""):
        raise ValueError(f"{where}: a value is missing ({name})")
    needed = "a finite number" + (bounds != ANY) * " in {:g} to {:g}".format(*bounds)
    needed = {"rating": needed, "timestamp": "a time"}.get(name, "an integer")
    raise ValueError(f"{where}: {name} {_brief(repr(record[name]))} is not {needed}")


def _detect(source: _Source, kind: _Kind, columns: Columns) -> _Form:
    """The form of a text by its first record: a line, or more, up to 100, if it has quotes."""
    if source.start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{source.label}, line 1: it is not UTF-8 but UTF-16")
    with _naming(source.label):
        head = _scan_csv(source.content, ["line"], encoding="utf8-lossy").head(100).collect()
    lines = [f"{line}\n" for line in head["line"]]
    if not lines or not lines[0].strip():
        raise ValueError(f"{source.label}: no {kind.noun}" + " in line 1" * len(lines[:1]))
    scores, forms, why = [], [], (0, "no tab, comma, ';', '|' or '::' between the columns")
    for separator in ("\t", "::", ",", ";", "|"):
        fields, quote = lines[0].rstrip("\n").split(separator), None
        if separator != "::":
            quote = '"'
            with suppress(csv.Error):
                fields = next(csv.reader(lines, delimiter=separator, strict=True))
        if len(fields) > 1:
            try:
                names, n_headers = _name_fields(fields, kind, columns)
                rating = dict(zip(kind.fields, fields, strict=False)).get("rating", "0")
                is_good = n_headers == 1 or re.fullmatch(NUMBER, rating) is not None
                scores.append((is_good, len(names) - names.count(None), len(names)))
                forms.append(_Form(separator, names, n_headers, quote))
            except ValueError as error:
                why = max(why, (len(fields), str(error)))
    if not forms:
        raise ValueError(f"{source.label}, line 1: {why[1]}")
    return forms[scores.index(max(scores))]


def _name_fields(fields: list[str], kind: _Kind, columns: Columns) -> tuple[list, int]:
    """What each field of a first record is, and whether it is a header: 1, or 0."""
    is_given = bool(columns) and set(columns.values()) <= set(fields)
    is_words = not any(re.fullmatch(NUMBER, field) for field in fields)
    # Pairs may be words alone, as a header is.
    is_known = any(re.fullmatch(f"(?is:{BEGINS}.*)" % "|".join(NAMES.values()), f) for f in fields)
    is_header = "rating" in kind.needed or columns or is_known
    if not kind.fields or is_given or (is_words and is_header):
        return _name_columns(fields, kind, columns), 1
    if columns:
        raise ValueError(f"no header, so no column {next(iter(columns.values()))!r}")
    if not len(kind.needed) <= len(fields) <= len(kind.fields):
        raise ValueError(f"{len(fields)} fields, not {', '.join(kind.fields)}")
    return _name_columns(kind.fields[: len(fields)], kind, columns), 0


def _name_columns(fields: Sequence[str], kind: _Kind, columns: Columns) -> list[str | None]:
    """What each field of a header is, by the best pattern. A table's other columns keep theirs."""
    names = {}
    known = filter(None, NAMES if kind.fields else (*kind.needed, kind.other))
    for name in sorted(known, key=lambda name: name not in columns):  # those given choose first
        begins = BEGINS % NAMES.get(name)
        # RecBole tells the type after a colon.
        best = f"{begins}{'([^:]*id)?' if name in ('user', 'item') else ''}(:.*)?"
        patterns = [best, f"{begins}.*", *["id"] * (not kind.fields)]
        if name in columns:
            given = re.escape(columns[name].strip())
            patterns = [f"(?-i:{given})", given]
        elif name == "title":
            patterns = ["title", "name"]
        found = (
            place
            for pattern in patterns
            for place, field in enumerate(fields)
            if place not in names and re.fullmatch(f"(?is:{pattern})", field.strip())
        )
        names |= dict.fromkeys([*found][:1], name)
    taken = set(names.values())
    missing = [f"{given!r} for {name}" for name, given in columns.items() if name not in taken]
    if missing := missing[:1] or [name for name in kind.needed if name not in taken]:
        has = _brief(", ".join(fields))
        raise ValueError(f"the header has no column {', '.join(missing)}, but {has}")
    for place, field in enumerate(() if kind.fields else fields):
        if field and place not in names:  # pandas' index has no name
            names[place] = field if field not in taken else f"{field}_{place}"
            taken.add(names[place])
    unread = set(NAMES) - {*kind.needed, kind.other} if kind.fields else set()
    return [None if (name := names.get(n)) in unread else name for n in range(len(fields))]


def read_users(path: Name, *, column: str | None = None) -> Frame | None:
    """What is known of users, by `USERS_FILES` or a table of one's own; as `read_items`.

    MovieLens: user and age Int64, gender, occupation, zip_code String. (In users.dat an occupation
    is a number, and an age the lowest of its group.)
    """
    users, is_own = _read_table(Path(path), USERS, USERS_FILES, column)
    if is_own or users is None:
        return users
    age = pl.col("age").cast(pl.Int64, strict=False)
    return users.select("user", age, "gender", "occupation", "zip_code")


def read_items(path: Name, *, column: str | None = None) -> Frame | None:
    """What is known of items, by `ITEMS_FILES` or a table of one's own.

    MovieLens, from a folder or a zip (None if it has none) or a file so called: item Int64, title
    String, year Int64 (null if unknown), the last in parentheses in the title, genres list of
    String. Any other file, or one whose column of ids is named by `column`, is a table of one's
    own, with a header or Parquet: `_to_side` tells what becomes of its columns. ValueError as in
    `read_ratings`, and for an id that is there twice.
    """
    films, is_own = _read_table(Path(path), ITEMS, ITEMS_FILES, column)
    if is_own or films is None:
        return films
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
    path: Path, kind: _Kind, forms: Mapping[str, _Form], column: str | None
) -> tuple[Frame | None, bool]:
    """A table of users or items, and whether it is one's own, not MovieLens's."""
    source, (key,) = _open(path, forms), kind.needed
    if source is None:
        return None, False
    is_own = source.name not in forms or (column is not None and source.label == str(path))
    if is_own:
        source = _find_columns(source, kind, {key: column} if column is not None else {})
    else:
        content = source.content
        content = content if isinstance(content, bytes) else content.read_bytes()
        with suppress(UnicodeDecodeError):
            content = content.decode()
        if isinstance(content, bytes):  # as the films of ml-100k and ml-1m
            content = content.decode("latin-1")
        source = _scan_text(source._replace(content=content.encode()), forms[source.name])
    table = _read(source, kind)
    if (is_twice := table[key].is_duplicated()).any():
        twice = table[key].filter(is_twice)[0]
        raise ValueError(f"{source.label}: the {key} {twice!r} is there twice")
    if is_own:
        others = table.drop(key).columns
        table = Frame({key: table[key]} | {n: _to_side(source, n, table[n]) for n in others})
    return table, is_own


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
    text = text.set(text == "", None)
    if name == "title":
        return text
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

    Where one is of numbers and the other of text, both are compared as text.
    """
    if ids.dtype != values.dtype:
        ids, values = ids.cast(pl.String), values.cast(pl.String)
    known = Frame({"id": ids, "row": np.arange(len(ids))})
    return Frame({"id": values}).join(known, "id", "left", maintain_order="left")["row"]


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
SPLITS = (*PUBLISHED_SPLITS, "random")
SLICE = 1 << 18  # ratings handled at a time, so that no column is copied whole


def split(ratings: Frame, name: str, *, seed: int = 0) -> tuple[Frame, Frame]:
    """Cut `ratings` into a train and a test part, each sorted by user, then item.

    ua and ub: each user's first ten ratings in file order are the test part, or the next ten.
    u1 to u5: the k-th fifth of the lines is. These are GroupLens's published splits of ml-100k
    (rules of its mku.sh and allbut.pl), and of 100,000 ratings only. random: a tenth, drawn by
    `seed`. last1, last10 and any other lastN: each user's last N by time (of one time, the later in
    the file); of a user with N ratings or fewer, all but the first. ValueError for any other.
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
    elif last := re.fullmatch(r"last([1-9]\d{0,8})", name):
        if "timestamp" not in ratings.columns:
            raise ValueError(f"the split {name} needs timestamps, and the ratings have none")
        n_later = pl.len() - pl.col("timestamp").rank("ordinal")
        is_first = n_later == pl.len() - 1
        is_test = ((n_later < int(last[1])) & ~is_first).over("user")
    else:
        raise ValueError(f"no split '{name}': it is {', '.join(SPLITS)} or lastN, as last10")
    return _part(ratings, is_test)


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


def to_tensors(train: Frame, test: Frame, *, allow_overlap: bool = False) -> tuple[Part, Part, Ids]:
    """Both frames, with ids of one type (`same_ids`), as tensors; their raw ids indexed from 0.

    ValueError when a part is empty, or, unless `allow_overlap`, when a (user, item) pair is in both
    parts: a model would be tested on what it was trained on (a copy of ua.base in circulation holds
    the whole of ua.test).
    """
    for name, part in (("training", train), ("test", test)):
        if not len(part):
            raise ValueError(f"the {name} part has no ratings")
    if not allow_overlap:
        pairs, test_pairs = (part.lazy().select("user", "item") for part in (train, test))
        shared = pairs.join(test_pairs, ["user", "item"], "semi").collect(engine="streaming")
        if len(shared):
            raise ValueError(
                f"{len(shared)} of the test part's (user, item) pairs are in the training part "
                f"too, one is {shared.row(0)}"
            )
    with ThreadPoolExecutor(2) as pool:
        (user_ids, *users), (item_ids, *items) = pool.map(
            lambda name: _index(train[name], test[name]), ("user", "item")
        )
    ratings = (part["rating"].cast(pl.Float32).to_torch() for part in (train, test))
    return *map(Part, users, items, ratings), Ids(user_ids, item_ids)


def _index(*columns: pl.Series) -> tuple[pl.Series, Tensor, Tensor]:
    """The ids in the columns, sorted, and for each column their rows, int64.

    By a table from id to row where integers lie near each other: a look-up for a binary search.
    """
    is_text = columns[0].dtype == pl.String
    low = 0 if is_text else min(column.min() for column in columns)
    n_places = 0 if is_text else max(column.max() for column in columns) - low + 1
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
    time, room for `time_context`, whose features vary by rating: the users' part ends in identity
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


def time_context(train: Frame, test: Frame) -> tuple[Tensor, Tensor]:
    """How far a user's ratings near in time lie from what is usual: (N, J) and (M, J), float32.

    One feature for each of `TIME_SCALES`, tau. With e the user's training ratings less the mean of
    the rated item, less the user's mean of those, at the deviation of ml-100k's ratings whatever
    their scale, and the rating itself left out,

        sum_k exp(-|t - t_k| / tau) e_k / (10 + sum_k exp(-|t - t_k| / tau))

    A page of films is rated in one mood: on MovieLens ratings of one minute are alike. Item means
    are shrunk by five ratings, the user's by one; these, the 10 and the scales were found on
    validation parts of ml-100k. Of `test` only user, item and timestamp are read. All times count,
    those after a rating as well as those before it.
    """
    columns = ["user", "item", "timestamp"]
    rating = pl.col("rating").cast(pl.Float64)
    excess = (rating - rating.mean()) * UA_DEVIATION / rating.std(ddof=0)
    rows = pl.concat(
        [
            train.select(*columns, excess=excess, count=1.0),
            test.select(*columns, excess=0.0, count=0.0),
        ]
    ).with_columns(place=pl.int_range(pl.len()))
    rated = pl.col("count")
    of_item = pl.col("excess").sum().over("item") / (pl.col("count").sum().over("item") + 5)
    rows = rows.with_columns(excess=pl.col("excess") - rated * of_item)
    others = pl.col("excess").sum().over("user") - pl.col("excess")
    n_others = pl.col("count").sum().over("user") - pl.col("count")
    rows = rows.with_columns(usual=others / (n_others + 1)).sort("user", "timestamp", "place")

    seconds = rows["timestamp"].cast(pl.Float64).to_torch()
    is_first = rows["user"].ne_missing(rows["user"].shift()).to_torch()
    sums = torch.stack([rows["excess"].to_torch(), rows["count"].to_torch()], 1)
    usual, place = rows["usual"].to_torch(), rows["place"].to_torch()
    context = torch.empty(len(rows), len(TIME_SCALES))
    for column, tau in enumerate(TIME_SCALES):
        keep = torch.exp(-seconds.diff(prepend=seconds[:1]) / tau).masked_fill(is_first, 0.0)
        before = _decayed_sums(sums, keep)
        keep_back = torch.cat([keep.new_zeros(1), keep[1:].flip(0)])
        after = _decayed_sums(sums.flip(0), keep_back).flip(0)
        excess, count = (before + after - 2 * sums).unbind(1)
        context[place, column] = ((excess - usual * count) / (10 + count)).float()
    return context[: len(train)], context[len(train) :]


def _decayed_sums(values: Tensor, keep: Tensor) -> Tensor:
    """s_k = values_k + keep_k s_k-1 along the first dimension, in log2(n) passes of tensors."""
    shift = 1
    while shift < len(keep) and keep.any():
        values = torch.cat([values[:shift], values[shift:] + keep[shift:, None] * values[:-shift]])
        keep = torch.cat([torch.zeros_like(keep[:shift]), keep[shift:] * keep[:-shift]])
        shift *= 2
    return values


def pair_context(history: Frame, pairs: Frame) -> Tensor:
    """`time_context` of `pairs` by the ratings of `history`: (M, J) float32.

    A rating of the history is left out of its own context, as it is in training.
    """
    own, context = time_context(history, pairs)
    columns = ["user", "item", "timestamp"]
    rows = pairs.join(history.with_row_index("row"), columns, "left", maintain_order="left")["row"]
    known = torch.from_numpy(rows.is_not_null().to_numpy(writable=True))
    context[known] = own[rows.drop_nulls().cast(int).to_torch()]
    return context
