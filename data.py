"""Ratings, from a download to a polars frame, a split of it, and tensors in memory.

>>> from data import get_ml_100k, read_items, read_ratings, split, to_tensors
>>> folder = get_ml_100k()  # verified and cached; downloaded when it is not there yet
>>> train, test = split(read_ratings(folder / "u.data"), "ua")
>>> part, test_part, ids = to_tensors(train, test)
>>> len(part.ratings), len(test_part.ratings), len(ids.users), len(ids.items)
(90570, 9430, 943, 1682)
>>> read_items(folder)["title"][0]
'Toy Story (1995)'
"""

import csv
import gzip
import hashlib
import http.client
import io
import lzma
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy
import polars
import torch
from polars import selectors
from torch import Tensor

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
ML_100K_URL = f"{GROUPLENS}/ml-100k.zip"
ML_100K_ZIP_MD5 = "0e33842e24a9c977be4e0107933c0723"
# The recbole wheel carries the same ratings and can be had from any package index.
ML_100K_WHEEL = "recbole==1.2.1"
# What is kept, and the SHA-256 of each. u.data and u.user are GroupLens's files byte for byte;
# items.tsv is written here, since the two sources tell titles, years and genres differently.
ML_100K_FILES = {
    "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
    "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
    "items.tsv": "8724836f32f36760850f579a7abadafd06286cfbdea9a13c644a652a9d02c0ed",
}
# fmt: off
ML_100K_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
]
# fmt: on
# What reading a broken or an encrypted archive raises.
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
POLARS = (polars.exceptions.PolarsError, polars.exceptions.PanicException)
LARGEST_DOWNLOAD = 64 << 20  # bytes; the zip has 5 MB, the largest member read 2 MB
# The other MovieLens: the most bytes that the zip may have, and its published MD5.
# ml-latest-small has none, for GroupLens renews it.
DATASETS = {
    "ml-latest-small": (4 << 20, None),
    "ml-1m": (8 << 20, "c4d9eecfca2ab87c1945afe126590906"),
    "ml-10m": (80 << 20, "ce571fd55effeba0271552578f2648bd"),
    "ml-20m": (240 << 20, "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-25m": (300 << 20, "6b51fb2759a8657d3bfcbfc42b592ada"),
    "ml-32m": (300 << 20, "d472be332d4daa821edc399621853b57"),
}


Name = str | os.PathLike  # of a file or a folder


def default_data_dir() -> Path:
    """`$COLLAB_DATA_DIR`, or `collab` in the user's cache folder."""
    if folder := os.environ.get("COLLAB_DATA_DIR"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collab"
    except RuntimeError:
        raise OSError("no home folder for the cache: set COLLAB_DATA_DIR") from None


def _is_replaceable(path: Path) -> bool:
    """Whether a file may be renamed over `path`: no pipe or device, nor where our output goes."""
    if not path.exists():
        return True
    with suppress(OSError):  # a closed stream
        if any(os.path.samefile(path, stream) for stream in (1, 2)):
            return False
    return path.is_file()


def _beside(path: Path) -> Path:
    return path.parent / f".{secrets.token_hex(6)}.part"


def check_writable(path: Name) -> None:
    """Raise OSError, naming `path`, if `write_file` could not write it."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if path.is_socket():
            raise OSError(None, "it is a socket")
        if _is_replaceable(path):
            beside = _beside(Path(os.path.realpath(path)))
            beside.touch(exist_ok=False)
            beside.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def write_file(path: Name, content: bytes) -> None:
    """Write `content` beside `path`, then rename: `path` has the old bytes or the new, never less.

    A symbolic link is followed; a pipe or a device is written to directly. OSError names `path`.
    """
    path = Path(path)
    with _replacing(path) as file, _naming_output(path):
        file.write(content)


def write_frames(path: Name, frames: Iterable[polars.DataFrame]) -> None:
    """Write frames of one schema, of which there is at least one, as one table, one at a time.

    `path` ends in .csv, .tsv (both with a header; what polars quotes is quoted) or .parquet, or
    ValueError; a pipe or a device gets CSV, whatever its name. As by `write_file`, it has the old
    bytes or the whole table; an exception that `frames` raises leaves the old, and comes as it is.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".parquet"):
        if _is_replaceable(path):
            raise ValueError(f"{path} must end in .csv, .tsv or .parquet")
        ending = ".csv"
    with _replacing(path) as file:
        if ending == ".parquet":
            _write_parquet(path, file, frames)
            return
        separator = "\t" if ending == ".tsv" else ","
        for number, frame in enumerate(frames):
            text = frame.write_csv(separator=separator, include_header=number == 0)
            with _naming_output(path):
                file.write(text.encode())


def _write_parquet(path: Path, file: IO[bytes], frames: Iterable[polars.DataFrame]) -> None:
    """Each frame to a file of its own, then all to one: polars cannot add to a Parquet file.

    (A Python generator as its source is no way: it waits for ever where making the frames takes
    polars, too.)
    """
    target = Path(file.name)
    with _naming_output(path):
        if not target.is_file():
            raise OSError(None, "Parquet needs a file")
        folder = tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=target.parent)
    with folder:
        parts = []
        for frame in frames:
            parts.append(Path(folder.name) / str(len(parts)))
            with _naming_output(path):
                frame.write_parquet(parts[-1])
        with _naming_output(path):
            polars.scan_parquet(parts, glob=False).sink_parquet(target)


@contextmanager
def _naming_output(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    except POLARS as error:  # a full disk, say
        raise OSError(f"{path} cannot be written: {_first_line(error)}") from None


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write beside `path` that is renamed at the end; `path` if it can't be replaced."""
    is_replaced = _is_replaceable(path)
    target = Path(os.path.realpath(path)) if is_replaced else path
    beside = _beside(target) if is_replaced else path
    with _naming_output(path):
        file = open(beside, "xb" if is_replaced else "ab")  # noqa: SIM115
    try:
        yield file
        with _naming_output(path):
            file.flush()
            if is_replaced:
                os.fsync(file.fileno())
                os.replace(beside, target)
    finally:
        with suppress(OSError):  # closing writes what is left, and may fail again
            file.close()
        if is_replaced:
            beside.unlink(missing_ok=True)


def get_dataset(
    name: str,
    data_dir: Name | None = None,
    *,
    notice: Callable[[str], None] = lambda line: None,
    server: str = GROUPLENS,
    timeout: float = 10.0,
) -> Path:
    """Return what `read_ratings` reads of a MovieLens: ml-100k's folder, the zip of the others.

    `name` is ml-100k, for which see `get_ml_100k`, or one of `DATASETS`: `server/NAME.zip` is kept
    as `data_dir/NAME.zip` and verified by its MD5, if it has one, each time. `timeout`, in seconds,
    is how long the server may stay silent; a download may take twelve times as long for each 64 MiB
    it may have. `notice` gets one line before a download, and one on where the data came from.
    ValueError for another name; OSError, in one line, when the data can't be had.
    """
    if name == "ml-100k":
        url = f"{server}/ml-100k.zip"
        return get_ml_100k(data_dir, notice=notice, url=url, timeout=timeout)
    if name not in DATASETS:
        raise ValueError(f"no data set '{name}': it is ml-100k, {', '.join(DATASETS)}")
    largest, md5 = DATASETS[name]
    path, url = Path(data_dir or default_data_dir()) / f"{name}.zip", f"{server}/{name}.zip"
    if path.exists():
        with open(path, "rb") as file:
            if md5 in (None, hashlib.file_digest(file, "md5").hexdigest()):
                notice(f"{name}: from the cache {path}")
                return path
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)  # said now, not after the download
    notice(f"{name}: downloading {url}")
    try:
        content = _download(url, md5, timeout, largest)
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise OSError("no zip")
    except OSError as error:
        raise OSError(f"{name} can't be had: {url}: {error}") from None
    write_file(path, content)
    notice(f"{name}: from {url}, kept in {path}")
    return path


def get_ml_100k(
    data_dir: Name | None = None,
    *,
    notice: Callable[[str], None] = lambda line: None,
    url: str = ML_100K_URL,
    zip_md5: str = ML_100K_ZIP_MD5,
    wheel: str = ML_100K_WHEEL,
    timeout: float = 10.0,
) -> Path:
    """Return the folder of MovieLens 100K: `u.data`, `u.user`, `items.tsv`, verified by SHA-256.

    Tried in this order: `data_dir/ml-100k` (`data_dir` is `default_data_dir()` unless given), the
    zip at `url`, the package `wheel` through `pip download`. `timeout`, in seconds, is how long a
    server may stay silent; a whole download may take twelve times as long. `notice` gets one line
    on where the data came from. Files that fail their checksum are fetched again and replaced one
    by one, each by a rename. OSError, in one line, when no source has the data.
    """
    folder = Path(data_dir or default_data_dir()) / "ml-100k"
    kept = {n: (folder / n).read_bytes() for n in ML_100K_FILES if (folder / n).exists()}
    broken = [name for name, content in kept.items() if not _is_published(name, content)]
    if len(kept) == len(ML_100K_FILES) and not broken:
        notice(f"ml-100k: from the cache {folder}")
        return folder
    why = f"{', '.join(broken)} in {folder} failed the checksum; " if broken else ""
    folder.mkdir(parents=True, exist_ok=True)
    sources = (
        (url, lambda: _from_zip(_download(url, zip_md5, timeout, LARGEST_DOWNLOAD))),
        (f"{wheel} through pip", lambda: _from_wheel(_pip_download(wheel, 12 * timeout))),
    )
    for source, fetch in sources:
        try:
            files = fetch()
            if wrong := [name for name in files if not _is_published(name, files[name])]:
                raise OSError(f"{wrong[0]} failed its checksum")
        except (OSError, ValueError) as error:
            why += f"{source}: {error}; "
            continue
        for name, content in files.items():
            write_file(folder / name, content)
        notice(f"ml-100k: {why}from {source}, kept in {folder}")
        return folder
    raise OSError(f"ml-100k can't be had: {why.removesuffix('; ')}")


def _is_published(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == ML_100K_FILES[name]


def _download(url: str, md5: str | None, timeout: float, largest: int) -> bytes:
    """The bytes at `url`. In a thread: no time-out of a socket bounds a server that drips."""
    limit = 12 * timeout * max(1, largest / LARGEST_DOWNLOAD)
    answer: list[bytes | OSError] = []
    thread = threading.Thread(
        target=lambda: answer.append(_try_download(url, timeout, largest)), daemon=True
    )
    thread.start()
    thread.join(limit)
    content = answer[0] if answer else OSError(f"not all in {limit:g} s")
    if isinstance(content, OSError):
        raise content
    if md5 not in (None, hashlib.md5(content).hexdigest()):
        raise OSError("the zip failed its checksum")
    return content


def _try_download(url: str, timeout: float, largest: int) -> bytes | OSError:
    content = io.BytesIO()  # whose getvalue() copies nothing
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            expected = response.headers.get("Content-Length")
            while chunk := response.read1(1 << 20):
                content.write(chunk)
                if content.tell() > largest:
                    return OSError(f"more than {largest:,} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        return OSError(f"HTTP {error.code} {error.reason}")
    except (OSError, http.client.HTTPException) as error:
        is_url_error = isinstance(error, urllib.error.URLError)
        if isinstance(error.reason if is_url_error else error, TimeoutError):
            return OSError(f"no answer in {timeout:g} s")
        why = f"can't be reached ({error.reason})" if is_url_error else f"broke off ({error!r})"
        return OSError(why)
    if expected is not None and content.tell() != int(expected):
        return OSError(f"broke off after {content.tell():,} of {int(expected):,} bytes")
    return content.getvalue()


def _pip_download(requirement: str, timeout: float) -> bytes:
    """Return a wheel's bytes, from whatever index the user's pip has; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--no-input", "--quiet", "--retries", "1", "--dest", folder, requirement]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"not done in {timeout:g} s") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            errors = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in errors if line.startswith("ERROR")] or errors
            raise OSError(errors[-1].removeprefix("ERROR: ") if errors else "it gave no wheel")
        return wheels[0].read_bytes()


def _members(archive: bytes, names: list[str]) -> list[bytes]:
    """The named members, read into memory: no name in an archive ever becomes a path."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            return [file.read(name) for name in names]
    except (*BROKEN, KeyError) as error:
        raise OSError(f"no good zip ({error})") from None


def _from_zip(archive: bytes) -> dict[str, bytes]:
    """GroupLens's zip: u.item is Latin-1, `item|title (year)|date||URL|19 genre flags`."""
    names = ["ml-100k/u.data", "ml-100k/u.user", "ml-100k/u.item"]
    ratings, users, items = _members(archive, names)
    return {"u.data": ratings, "u.user": users, "items.tsv": _items_tsv(_from_u_item(items))}


def _from_u_item(content: bytes) -> list[tuple[str, str, list[str]]]:
    rows = []
    for line in content.decode("latin-1").splitlines():
        item, title, _date, _video, _url, *flags = line.split("|")
        genres = [genre for genre, flag in zip(ML_100K_GENRES, flags, strict=True) if flag == "1"]
        rows.append((item, title, genres))
    return rows


def _from_wheel(archive: bytes) -> dict[str, bytes]:
    """RecBole's copy: tab-separated with a header line, title and year in two columns."""
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    names = [f"{folder}.{ending}" for ending in ("inter", "user", "item")]
    ratings, users, items = (member.partition(b"\n")[2] for member in _members(archive, names))
    rows = []
    for line in items.decode().splitlines():
        item, title, year, genres = line.split("\t")
        # Item 267 has no year, and its title, 'unknown', is misspelt here.
        title = "unknown" if title == year == "unkonwn" else f"{title} ({year})"
        rows.append((item, title, genres.split(" ")))
    users = users.replace(b"\t", b"|")
    return {"u.data": ratings, "u.user": users, "items.tsv": _items_tsv(rows)}


def _items_tsv(rows: list[tuple[str, str, list[str]]]) -> bytes:
    lines = ["item\ttitle\tyear\tgenres"]
    for item, title, genres in rows:
        title = title.strip()
        years = re.findall(r"\((\d{4})\)", title)
        lines.append(f"{item}\t{title}\t{years[-1] if years else ''}\t{'|'.join(genres)}")
    return ("\n".join(lines) + "\n").encode()


RATINGS_FILES = ("ratings.csv", "ratings.dat", "u.data")
LARGEST_MEMBER = 4 << 30  # bytes of a file in a zip or a gzip; ml-32m's ratings have 0.9e9
LONGEST_LINE = 1 << 16  # bytes
BLOCK = 4 << 20  # bytes parsed at a time
SLICE = 1 << 18  # ratings handled at a time, so that no column is copied whole
SEPARATORS = ("\t", "::", ",", ";", "|")
# The columns of ratings, and how their names begin, in any case, where a header is read.
NAMES = {
    "user": "user|customer",
    "item": "item|movie|product",
    "rating": "rating|score",
    "timestamp": "timestamp|time|date",
}
NUMBERS = dict.fromkeys(NAMES, polars.Int64) | {"rating": polars.Float32}
ISO_8601 = (
    r"^(?<day>\d{4}-\d\d-\d\d)(?:[Tt ](?<minute>\d\d:\d\d)(?<second>:\d\d)?(?:[.,]\d+)?"
    r"(?<zone>[Zz]|[+-]\d\d(?::?\d\d)?)?)?$"
)
TEXT = (polars.String, polars.Categorical, polars.Enum)
Range = tuple[float, float]
ANY = (-math.inf, math.inf)


class _Kind(NamedTuple):
    """What a file is read for."""

    noun: str  # what it has none of when it is empty
    needed: tuple[str, ...]  # columns
    others: tuple[str, ...]  # columns read if they are there
    fields: tuple[str, ...]  # of a line without a header, the last ones at will; () for a table
    told: Mapping[str, str] = {}  # which names in a header are of which columns


RATINGS = _Kind("ratings", ("user", "item", "rating"), ("timestamp",), tuple(NAMES))
RATED = _Kind("ratings", ("item", "rating"), ("timestamp",), tuple(NAMES)[1:])
PAIRS = _Kind("pairs", ("user", "item"), ("timestamp",), tuple(NAMES))
USERS = _Kind("users", ("user",), (), ())
ITEMS = _Kind("items", ("item",), ("title",), ())


class _Form(NamedTuple):
    """How the lines of a text are made."""

    separator: str
    columns: list[str | None]  # what each field is; None for one that is not read
    is_header: bool  # whether the first record is one


USERS_FILES = {
    "u.user": _Form("|", ["user", "age", "gender", "occupation", "zip_code"], False),
    "users.dat": _Form("::", ["user", "gender", "age", "occupation", "zip_code"], False),
}
ITEMS_FILES = {
    "items.tsv": _Form("\t", ["item", "title", "year", "genres"], True),
    "movies.csv": _Form(",", ["item", "title", "genres"], True),
    "movies.dat": _Form("::", ["item", "title", "genres"], False),
    "u.item": _Form("\t", ["item", "title", "year", "genres"], True),  # once it is an items.tsv
}


def read_ratings(
    path: Name,
    *,
    columns: Mapping[str, str] | None = None,
    rating_range: Range | None = None,
) -> polars.DataFrame:
    """Ratings from a file, or from the folder or zip of a MovieLens, in file order.

    A file is Parquet, or UTF-8 text, as it is or in a gzip: lines of user, item, rating and, if it
    likes, timestamp, between tabs, commas, `;`, `|` or `::`. Except between `::`, a field may be in
    double quotes, a quote in it doubled (RFC 4180). A first line without numbers is a header.
    `columns` tells which name in it (or in Parquet) is that of user, item, rating or timestamp;
    others are known by how they begin, `NAMES`, and the word alone or one that ends in id is taken
    before the rest. In a folder or a zip the file is the first of `RATINGS_FILES`.

    Columns user and item are Int64 where every id is an integer as one is printed, else String,
    exactly as in the file; rating is float32, finite, in `rating_range` if there is one; timestamp
    Int64, Unix seconds (no such column if the file has none), from numbers, floored, or ISO 8601
    dates and times, in UTC unless they name a zone. No nulls. ValueError, in one line that names
    the file and the line or row, for anything else; OSError when `path` can't be read.
    """
    path = Path(path)
    name = _find(path, RATINGS_FILES)
    if name is None and (path.is_dir() or _is_zip(path)):
        raise ValueError(f"{path}: no {', '.join(RATINGS_FILES)} in it")
    return _read_records(path, name, RATINGS._replace(told=columns or {}), rating_range or ANY)


def read_rated(path: Name, *, columns: Mapping[str, str] | None = None) -> polars.DataFrame:
    """The ratings of one user, as `read_ratings` of a file without the column user."""
    return _read_records(Path(path), None, RATED._replace(told=columns or {}), ANY)


def _read_records(path: Path, name: str | None, kind: _Kind, bounds: Range) -> polars.DataFrame:
    low, high = map(float, map(numpy.float32, bounds))  # rounded as a rating is
    raws = _read_raw(path, name, kind, bounds=(low, high))
    frames = [
        raw if numbers is None else _convert(where, raw, numbers, (low, high))
        for where, raw, numbers in raws
    ]
    return polars.concat(same_ids(*frames), rechunk=False)


def read_pairs(
    path: Name, *, columns: Mapping[str, str] | None = None, block: int = 1 << 18
) -> Iterator[polars.DataFrame]:
    """Pairs of a user and an item, in file order, in frames of at most `block` rows.

    From a file in any of `read_ratings`'s formats, with no more of it in memory than a frame is
    parsed from. A rating may be there and is not read. A line without a header has the fields
    user, item[, rating[, timestamp]], and a header names a user or an item, or `columns` does.
    Columns user and item String, exactly as in the file; timestamp Int64, if the file has it; line
    Int64, from 1: that in which the pair begins, or the row of Parquet. Errors as `read_ratings`.
    """
    kind = PAIRS._replace(told=columns or {})
    for where, raw, numbers in _read_raw(Path(path), None, kind, size=block):
        pairs = _convert(where, raw, numbers, is_text=True)
        pairs = pairs.with_columns(polars.Series("line", numbers, polars.Int64))
        yield from pairs.iter_slices(block)


def _find(path: Path, names: Iterable[str]) -> str | None:
    """Which file of a folder, or member of a zip, has the first of `names` that is there."""
    if path.is_dir():
        found = {name: name for name in names if (path / name).is_file()}
    elif _is_zip(path):
        with _naming(path), zipfile.ZipFile(path) as archive:
            found = {PurePosixPath(name).name: name for name in archive.namelist()}
    else:
        return None
    return next((found[name] for name in names if name in found), None)


def _is_zip(path: Path) -> bool:
    return path.suffix == ".zip" or (path.is_file() and zipfile.is_zipfile(path))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error that names `path`, for what a broken zip, gzip or device raises without it."""
    try:
        yield
    except (*BROKEN, gzip.BadGzipFile) as error:
        kind = "zip" if _is_zip(path) else "gzip"
        raise ValueError(f"{path}: no good {kind} ({error})") from None
    except OSError as error:
        if error.filename:
            raise
        raise OSError(f"{path}: {error.strerror or error}") from None


@contextmanager
def _open(path: Path, name: str | None) -> Iterator[tuple[str, IO[bytes]]]:
    """What `_find` found, `path` itself for None: what to call it in a message, and the file.

    A zip's member and a gzip's content are streams: no name in an archive ever becomes a path.
    """
    if name is None or path.is_dir():
        path = path / (name or "")
        with _naming(path), open(path, "rb") as file:
            is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
            yield str(path), gzip.GzipFile(fileobj=file) if is_gzip else file
        return
    with _naming(path), zipfile.ZipFile(path) as archive, archive.open(name) as file:
        yield f"{path}, {name if name.isprintable() else ascii(name)}", file


def _read(label: str, file: IO[bytes], size: int) -> bytes:
    """At most `size` bytes, of a zip's member or a gzip no more than `LARGEST_MEMBER` in all."""
    content = file.read(size)
    if not isinstance(file, io.BufferedReader) and file.tell() > LARGEST_MEMBER:
        raise ValueError(f"{label}: more than {LARGEST_MEMBER:,} bytes")
    return content


def _read_all(label: str, file: IO[bytes]) -> bytes:
    return b"".join(iter(lambda: _read(label, file, BLOCK), b""))


def _is_on_disk(file: IO[bytes]) -> bool:
    return isinstance(file, io.BufferedReader) and Path(file.name).is_file()


def _read_raw(
    path: Path,
    name: str | None,
    kind: _Kind,
    *,
    size: int | None = None,
    bounds: Range | None = None,
) -> Iterator[tuple[str, polars.DataFrame, Sequence[int] | None]]:
    """The columns of a file as they are in it, block by block, with the number of each row.

    What is numbered, rows of Parquet or lines of text, comes first. A block of Parquet has `size`
    rows, or all. From text come strings, or, as long as all are integers and ratings in `bounds`,
    what `_convert` makes of them, without numbers.
    """
    if strange := [name for name in kind.told if name not in NAMES]:
        raise ValueError(f"columns: no column {strange[0]!r}: it is {', '.join(NAMES)}")
    is_empty = True
    with _open(path, name) as (label, file):
        is_parquet = file.peek(4)[:4] == b"PAR1"
        if is_parquet:
            blocks = _read_parquet(label, file, kind, size)
        else:
            blocks = _read_text(label, file, kind, bounds)
        for raw, numbers in blocks:
            is_empty = False
            yield f"{label}, {'row' if is_parquet else 'line'}", raw, numbers
    if is_empty:
        raise ValueError(f"{label}: no {kind.noun}")


def _read_parquet(
    label: str, file: IO[bytes], kind: _Kind, size: int | None
) -> Iterator[tuple[polars.DataFrame, range]]:
    try:
        scan = _scan_parquet(label, file, kind)
        n_rows = scan.select(polars.len()).collect().item()
        for start in range(0, n_rows, size or n_rows or 1):
            raw = scan.slice(start, size).collect()
            yield raw, range(start + 1, start + 1 + len(raw))
    except POLARS as error:
        raise ValueError(f"{label}: no good Parquet ({_first_line(error)})") from None


def _scan_parquet(label: str, file: IO[bytes], kind: _Kind) -> polars.LazyFrame:
    """The columns read of a Parquet file, of types that `_convert` takes."""
    source = Path(file.name) if _is_on_disk(file) else io.BytesIO(_read_all(label, file))
    scan = polars.scan_parquet(source, glob=False, hive_partitioning=False)
    schema = scan.collect_schema()
    names = _name_columns(label, list(schema), kind)
    for name, (column, dtype) in zip(names, schema.items(), strict=True):
        is_good = dtype.is_integer() or (name in ("user", "item", "title") and dtype in TEXT)
        is_good |= name in ("rating", "timestamp") and dtype.is_float()
        is_good |= name == "timestamp" and dtype in (polars.Date, polars.Datetime)
        if name in kind.needed + kind.others and not is_good:
            raise ValueError(f"{label}: the column {column!r} for {name} is of type {dtype}")
    return scan.select(_choose(names))


def _choose(names: Sequence[str | None]) -> list[polars.Expr]:
    """The columns that have a name, by it."""
    return [polars.nth(place).alias(name) for place, name in enumerate(names) if name is not None]


def _read_text(
    label: str, file: IO[bytes], kind: _Kind, bounds: Range | None
) -> Iterator[tuple[polars.DataFrame, Sequence[int] | None]]:
    form, block = _detect(label, file, kind)
    if bounds and (ratings := _read_whole(file, form, block, bounds)) is not None:
        yield ratings, None
        return
    n_above = block.count(b"\n") if form.is_header else 0
    block = b"" if form.is_header else block
    while block := block + _read_lines(label, file, BLOCK, is_quoted=form.separator != "::"):
        content, one_byte = _one_byte(block, form)
        ratings = _read_numbers(io.BytesIO(content), one_byte, bounds) if bounds else None
        if ratings is not None and _is_shaped(content, one_byte, len(ratings)):
            yield ratings, None
            n_above += len(ratings)
        else:
            bounds = None  # the rest will hardly be numbers
            yield _read_strings(label, content, one_byte, n_above)
            n_above += block.count(b"\n")
        block = b""


def _detect(label: str, file: IO[bytes], kind: _Kind) -> tuple[_Form, bytes]:
    """The form of a text by its first record, and that record: a line, or more if it has quotes."""
    first = _read_lines(label, file, 0).removeprefix(b"\xef\xbb\xbf")
    if not first.strip():
        raise ValueError(f"{label}: no {kind.noun}" + (" in line 1" if first else ""))
    where = f"{label}, line 1"
    try:
        text = first.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        is_utf_16 = first.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ValueError(f"{where}: it is not UTF-8{' but UTF-16' * is_utf_16}") from None
    records = {s: _split_record(text, s) for s in SEPARATORS if s in text}
    if not records:
        *before, last = kind.needed if kind.fields else (*kind.needed, "the others")
        between = f"between {', '.join(before)} and {last}"
        raise ValueError(f"{where}: no tab, comma, ';', '|' or '::' {between}")
    separator = max(records, key=lambda s: _count_known(records[s], kind))
    fields = records[separator]
    is_header = _is_header(fields, kind)
    name = _name_columns if is_header else _name_fields
    return _Form(separator, name(where, fields, kind), is_header), first


def _split_record(text: str, separator: str) -> list[str]:
    if separator == "::":
        return text.partition("\n")[0].split(separator)
    try:
        return next(csv.reader([text], delimiter=separator))
    except csv.Error:  # a carriage return
        return text.split(separator)


def _count_known(fields: list[str], kind: _Kind) -> int:
    """How much of what is read a first line has, if these are its fields."""
    if _is_header(fields, kind):
        return len(_find_places(fields, kind))
    rating = dict(zip(kind.fields, fields, strict=False)).get("rating", "0")
    return len(fields) if _fits(fields, kind) and _is_number(rating) else 0


def _fits(fields: list[str], kind: _Kind) -> bool:
    return len(kind.needed) <= len(fields) <= len(kind.fields)


def _is_header(fields: list[str], kind: _Kind) -> bool:
    if not kind.fields or (kind.told and set(kind.told.values()) <= set(fields)):
        return True
    if any(map(_is_number, fields)):
        return False
    # Pairs may be words alone, as a header is.
    return "rating" in kind.needed or bool(kind.told or _find_places(fields, kind))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _find_places(fields: list[str], kind: _Kind) -> dict[str, int]:
    """Which field of a header names which column; those that are told choose first."""
    known = NAMES if kind.fields else kind.needed + kind.others
    places = {}
    for name in sorted(known, key=lambda name: name not in kind.told):
        found = (
            place
            for pattern in _patterns(name, kind)
            for place, field in enumerate(fields)
            if place not in places.values() and re.fullmatch(f"(?is:{pattern})", field.strip())
        )
        if (place := next(found, None)) is not None:
            places[name] = place
    return places


def _patterns(name: str, kind: _Kind) -> list[str]:
    """Regular expressions of what names a column in a header, the best first."""
    if name in kind.told:
        told = re.escape(kind.told[name].strip())
        return [f"(?-i:{told})", told]
    if name == "title":
        return ["title", "name"]
    begins = rf"\W*({NAMES[name]})(?![ _-]?\d)"
    is_id = name in ("user", "item")
    # RecBole tells the type after a colon.
    best = rf"{begins}{'([^:]*id)?' if is_id else ''}(:.*)?"
    return [best, f"{begins}.*"] + ["id"] * (not kind.fields)


def _name_columns(where: str, fields: list[str], kind: _Kind) -> list[str | None]:
    """What each field of a header is. A table's other columns keep their names."""
    places = _find_places(fields, kind)
    has = ", ".join(field if field.isprintable() else ascii(field) for field in fields)
    has = has if len(has) < 500 else has[:500] + "..."
    missing = [f"{told!r} for {name}" for name, told in kind.told.items() if name not in places]
    missing = missing[:1] or [name for name in kind.needed if name not in places]
    if missing:
        raise ValueError(f"{where}: the header has no column {', '.join(missing)}, but {has}")
    names = {place: name for name, place in places.items() if name in kind.needed + kind.others}
    if not kind.fields:
        for place, field in enumerate(fields):
            while field in names.values() and place not in names:
                field += "_"
            if field:  # as pandas' index has no name
                names.setdefault(place, field)
    return [names.get(place) for place in range(len(fields))]


def _name_fields(where: str, fields: list[str], kind: _Kind) -> list[str | None]:
    """What each field of a line without a header is."""
    if kind.told:
        raise ValueError(f"{where}: no header, so no column {next(iter(kind.told.values()))!r}")
    if not _fits(fields, kind):
        form = f"{', '.join(kind.needed)}[, {', '.join(kind.fields[len(kind.needed) :])}]"
        raise ValueError(f"{where}: {len(fields)} fields, not {form}")
    read = kind.needed + kind.others
    return [name if name in read else None for name in kind.fields[: len(fields)]]


def _read_lines(label: str, file: IO[bytes], size: int, *, is_quoted: bool = True) -> bytes:
    """`size` bytes, and on to the end of a line, where the quotes are even if that is soon."""
    block = _read(label, file, size)
    is_open, rest = is_quoted and _is_open(block), b""
    while True:
        line = file.readline(LONGEST_LINE)
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{label}: a line of {LONGEST_LINE:,} bytes or more")
        rest += line
        is_open ^= is_quoted and _is_open(line)
        if not is_open or not line or len(rest) > LONGEST_LINE:
            return block + rest


def _is_open(text: bytes) -> bool:
    return b'"' in text and text.count(b'"') % 2 == 1


def _one_byte(block: bytes, form: _Form) -> tuple[bytes, _Form]:
    """With a separator of one byte, as polars needs it, that is not in the block."""
    if form.separator != "::":
        return block, form
    free = next((code for code in b"\x1e\x1d\x1c\x01\x02" if code not in block), 0x1F)
    return block.replace(b"::", bytes([free])), form._replace(separator=chr(free))


def _read_csv(
    source: bytes | IO[bytes],
    form: _Form,
    dtypes: dict,
    quote: str | None = None,
    is_header: bool = False,
) -> polars.DataFrame:
    names = {name or f"\0{place}": name for place, name in enumerate(form.columns)}
    return polars.read_csv(
        source,
        schema={unique: dtypes.get(name, polars.String) for unique, name in names.items()},
        separator=form.separator,
        quote_char=quote,
        has_header=False,
        skip_rows=int(is_header),
        raise_if_empty=False,
    )


def _read_whole(
    file: IO[bytes], form: _Form, first: bytes, bounds: Range
) -> polars.DataFrame | None:
    """The ratings of a file on disk, by all cores; None where it takes blocks to tell."""
    is_simple = form.separator != "::" and None not in form.columns and first.count(b"\n") < 2
    if not is_simple or not _is_on_disk(file):
        return None
    # Opened again, for polars moves the position; by path, it would take a * as a pattern.
    with open(file.name, "rb") as whole:
        return _read_numbers(whole, form, bounds, form.is_header)


def _read_numbers(
    source: IO[bytes], form: _Form, bounds: Range, is_header: bool = False
) -> polars.DataFrame | None:
    """Ratings by integers; None for any others, or where something is wrong or missing."""
    try:
        numbers = _read_csv(source, form, NUMBERS, is_header=is_header)
        numbers = numbers.select(_choose(form.columns))
        if not len(numbers) or sum(numbers.null_count().row(0)):  # as of a field too few
            return None
        ratings = _convert("", numbers, range(len(numbers)), bounds)
    except (polars.exceptions.PolarsError, ValueError):
        return None
    source.seek(0)
    if is_header:  # which may have blanks
        source.readline()
    return ratings if _is_canonical(source, form.separator) else None


def _is_canonical(file: IO[bytes], separator: str) -> bool:
    """Whether no number has a zero, plus or blank about it that polars would take away."""
    blanks = {b"+", b" ", b"\t", b"\v", b"\f"} - {separator.encode()}
    rare = (b"-0", b"\r" + separator.encode())  # two bytes are sought slowly
    tail = b"\n"
    while chunk := file.read(1 << 17):  # bytes, that stay in the processor's cache
        chunk = tail + chunk.removeprefix(b"\xef\xbb\xbf")
        if any(mark in chunk for mark in blanks):
            return False
        if any(mark[:1] in chunk and mark in chunk for mark in rare):
            return False
        codes = numpy.frombuffer(chunk, "u1")
        is_zero = (codes[:-2] == ord(separator)) | (codes[:-2] == ord("\n"))
        is_zero &= codes[1:-1] == ord("0")
        is_zero &= codes[2:] - ord("0") < 10  # unsigned: no byte is below 0
        if is_zero.any():
            return False
        tail = chunk[-2:]
    return True


def _is_shaped(block: bytes, form: _Form, n_records: int) -> bool:
    return block.count(form.separator.encode()) == n_records * (len(form.columns) - 1)


def _read_strings(
    label: str, block: bytes, form: _Form, n_above: int
) -> tuple[polars.DataFrame, Sequence[int]]:
    """The fields of whole records as they are, and the line in which each record begins.

    ValueError names the line of what is no UTF-8 or no record.
    """
    try:
        block.decode()
    except UnicodeDecodeError as error:
        line = n_above + 1 + block.count(b"\n", 0, error.start)
        raise ValueError(f"{label}, line {line}: it is not UTF-8") from None
    n_lines = block.count(b"\n") + (not block.endswith(b"\n"))
    lines, end = range(n_above + 1, n_above + 1 + n_lines), form.separator.encode()
    quote = '"' if form.separator in SEPARATORS and b'"' in block else None
    if quote:
        _check_records(label, block, form, n_above, quote)
        lines = n_above + 1 + _find_starts(block)
    else:  # polars takes a carriage return from the end of every field
        block = block.replace(b"\r" + end, b"\r\r" + end)
    with suppress(polars.exceptions.PolarsError):
        raw = _read_csv(block, form, {}, quote).select(_choose(form.columns))
        if len(raw) == len(lines) and (quote or _is_shaped(block, form, len(raw))):
            return raw, lines
    _check_records(label, block, form, n_above, quote)
    raise ValueError(f"{label}, lines {n_above + 1} to {n_above + n_lines}: no table")


def _find_starts(block: bytes) -> numpy.ndarray:
    """In which lines, from 0, a record begins: not within quotes."""
    codes = numpy.frombuffer(b"\n" + block.removesuffix(b"\n"), "u1")
    is_inside = numpy.logical_xor.accumulate(codes == ord('"'))
    return numpy.flatnonzero(~is_inside[codes == ord("\n")])


def _check_records(label: str, block: bytes, form: _Form, n_above: int, quote: str | None) -> None:
    """ValueError names the line of the first record that is none."""
    separator = re.escape(form.separator.encode())
    field = rb"[^%b\n%b]*+" % (separator, b'"' * bool(quote))
    if quote:
        field = rb'(?:"[^"]*+(?:""[^"]*+)*+"|%b)' % field
    block = block.removesuffix(b"\n") + b"\n"
    others = rb"(?:%b%b)" % (separator, field)
    end = re.match(rb"(?:%b%b{%d}\r?\n)*+" % (field, others, len(form.columns) - 1), block).end()
    if end == len(block):
        return
    why = "a quote that neither begins nor ends a field, nor is doubled in one"
    if record := re.match(rb"%b%b*+\r?\n" % (field, others), block[end:]):
        unquoted = re.sub(rb'"[^"]*"', b"", record[0]) if quote else record[0]
        n_fields = unquoted.count(form.separator.encode()) + 1
        why = f"fields: {n_fields}, not {len(form.columns)}"
    line = n_above + 1 + block.count(b"\n", 0, end)
    raise ValueError(f"{label}, line {line}: {why}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _convert(
    where: str,
    raw: polars.DataFrame,
    numbers: Sequence[int],
    bounds: Range = ANY,
    *,
    is_text: bool = False,
) -> polars.DataFrame:
    """Ids (String if `is_text`), ratings and timestamps from strings or what Parquet has.

    ValueError names the first of the rows, by `numbers`, in which one is missing or wrong.
    """
    columns, wrong = {}, []
    for name in (name for name in NAMES if name in raw.columns):
        column = raw[name]
        if name in ("user", "item"):
            is_text_id = column.dtype in TEXT
            is_good = column.cast(polars.String) != "" if is_text_id else column.is_not_null()
            column = column.cast(polars.String) if is_text else _to_ids(column)
        else:
            if column.dtype == polars.String:
                column = column.str.strip_chars()
            if name == "timestamp":
                column = _to_seconds(column)
                is_good = column.is_not_null()
            else:
                column = column.cast(polars.Float32, strict=False)
                is_good = column.is_finite() & column.is_between(*bounds)
        columns[name] = column
        if not is_good.all(ignore_nulls=False):
            wrong.append((is_good.fill_null(False).arg_min(), name))
    if wrong:
        row, name = min(wrong, key=lambda found: found[0])
        why = _say_wrong(name, raw[name][row], columns[name][row], bounds)
        raise ValueError(f"{where} {numbers[row]}: {why}")
    return polars.DataFrame(columns)


def _say_wrong(name: str, value: object, known: float | None, bounds: Range) -> str:
    shown = repr(value[:40] if isinstance(value, str) else value)
    if value in (None, ""):
        return f"a value is missing ({name})"
    if known is None:
        return f"could not parse {name} {shown}"
    if not math.isfinite(known):
        return f"{name} {shown} is not finite"
    return f"{name} {shown} is not in {bounds[0]:g} to {bounds[1]:g}"


def _to_ids(column: polars.Series) -> polars.Series:
    """Int64 if that loses nothing of what is in the file, else String."""
    if not column.dtype.is_integer():
        column = column.cast(polars.String)
    whole = column.cast(polars.Int64, strict=False)
    is_same = whole.cast(column.dtype, strict=False).eq_missing(column).all()
    return whole if is_same else column.cast(polars.String)


def _to_seconds(column: polars.Series) -> polars.Series:
    """Unix seconds, Int64, floored; null for what is no time."""
    if column.dtype in (polars.Date, polars.Datetime):
        return column.dt.epoch("s")
    if column.dtype.is_float():
        return column.floor().cast(polars.Int64, strict=False)
    seconds = column.cast(polars.Int64, strict=False)
    if column.dtype == polars.String and seconds.null_count():
        seconds = seconds.fill_null(_to_seconds(column.cast(polars.Float64, strict=False)))
        if seconds.null_count():
            seconds = seconds.fill_null(_from_iso(column))
    return seconds


def _from_iso(column: polars.Series) -> polars.Series:
    parts = column.str.extract_groups(ISO_8601).struct.unnest()
    absent = {"minute": "00:00", "second": ":00", "zone": "Z"}
    optional = (polars.col(name).fill_null(text) for name, text in absent.items())
    text = parts.select(polars.format("{}T{}{}{}", "day", *optional)).to_series()
    return text.str.to_datetime("%FT%T%#z", time_unit="us", strict=False).dt.epoch("s")


def same_ids(*frames: polars.DataFrame | None) -> tuple[polars.DataFrame | None, ...]:
    """The frames with their ids of one type: users and items Int64 if all are, else String.

    Ratings, pairs, and tables of users or items go together; None stays None.
    """
    for name in ("user", "item"):
        if len({frame[name].dtype for frame in frames if frame is not None and name in frame}) > 1:
            to_text = selectors.by_name(name, require_all=False).cast(polars.String)
            frames = [frame if frame is None else frame.with_columns(to_text) for frame in frames]
    return tuple(frames)


def check_ids(ratings: polars.DataFrame) -> None:
    """ValueError names two ids of users or items that differ only in case or in blanks.

    That is, with the same `" ".join(id.split()).casefold()`.
    """
    for name in ("user", "item"):
        if ratings[name].dtype == polars.String:
            known = {}
            for text in ratings[name].unique().sort():
                other = known.setdefault(" ".join(text.split()).casefold(), text)
                if other != text:
                    raise ValueError(
                        f"the {name}s {other!r} and {text!r} differ only in case or spaces"
                    )


def drop_repeats(ratings: polars.DataFrame) -> polars.DataFrame:
    """One rating for each (user, item), the others in their order.

    The latest by timestamp, if there are timestamps; of one time, or without them, the later row.
    """
    if _is_sorted(ratings, strictly=True):
        return ratings
    kept = ratings.select(polars.exclude("rating")).with_row_index()
    if "timestamp" in ratings:
        kept = kept.sort("timestamp", maintain_order=True)
    kept = kept.unique(["user", "item"], keep="last", maintain_order=True)["index"]
    return ratings if len(kept) == len(ratings) else ratings[kept.sort()]


def write_ratings(ratings: polars.DataFrame, path: Name) -> None:
    """Tab-separated without a header; whole ratings are written as GroupLens does, `3` for 3.0."""
    if (ratings["rating"] == ratings["rating"].round()).all():
        ratings = ratings.with_columns(polars.col("rating").cast(polars.Int64))
    write_file(path, ratings.write_csv(separator="\t", include_header=False).encode())


def read_users(path: Name, *, column: str | None = None) -> polars.DataFrame | None:
    """What is known of users: of MovieLens's, or of any from a table of one's own.

    From the first of `USERS_FILES` in a folder or a zip, None if it has none, or a file so called:
    user and age int64, gender, occupation and zip_code strings. In users.dat an occupation is a
    number, and an age the lowest of its group. Any other file, or one whose column of ids is named
    by `column`, is a table of one's own, as for `read_items`. ValueError names a broken file.
    """
    path = Path(path)
    if _is_own(path, USERS_FILES, column):
        return _read_own(path, USERS, column)
    users = _read_movielens(path, USERS_FILES)
    return None if users is None else users.select(USERS_FILES["u.user"].columns)


def read_items(path: Name, *, column: str | None = None) -> polars.DataFrame | None:
    """What is known of items: of MovieLens's films, or of any from a table of one's own.

    From the first of `ITEMS_FILES` in a folder or a zip, None if it has none, or a file so called:
    item int64, title string, year int64 (null if unknown), the last one in parentheses in the
    title, genres list of strings. ValueError names a broken file.

    Any other file, or one whose column of ids is named by `column`, is a table of one's own, with a
    header or Parquet: `_read_own` tells what becomes of its columns.
    """
    path = Path(path)
    if _is_own(path, ITEMS_FILES, column):
        return _read_own(path, ITEMS, column)
    films = _read_movielens(path, ITEMS_FILES)
    if films is None:
        return None
    title = polars.col("title").str.strip_chars()
    genres = polars.col("genres").fill_null("").str.replace("(no genres listed)", "", literal=True)
    return films.select(
        "item",
        title,
        title.str.extract(r".*\((\d{4})\)").cast(polars.Int64).alias("year"),
        genres.str.extract_all(r"[^|]+"),
    )


def _is_own(path: Path, names: Iterable[str], column: str | None) -> bool:
    """Whether a path is of a table that is not one of MovieLens."""
    if path.is_dir() or _is_zip(path):
        return False
    return column is not None or path.name not in names


def _read_movielens(path: Path, forms: Mapping[str, _Form]) -> polars.DataFrame | None:
    """The first of `forms` in a folder or a zip, None if there is none, or a file so called."""
    name = _find(path, forms)
    if name is None and path.name not in forms:
        return None
    with _open(path, name) as (label, file):
        content = _read_all(label, file)
    name = PurePosixPath(name or path).name
    dtypes = dict.fromkeys(("user", "item", "age"), polars.Int64)
    try:
        if name == "u.item":
            content = _items_tsv(_from_u_item(content))
        elif name == "movies.dat":
            content = _to_utf8(content)
        content, form = _one_byte(content, forms[name])
        quote = '"' if form.separator == "," else None
        table = _read_csv(content, form, dtypes, quote, form.is_header)
    except polars.exceptions.PolarsError as error:
        columns = ", ".join(forms[name].columns)
        raise ValueError(f"{label}: not a table of {columns}: {_first_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{label}: not item|title|date|video|URL|flags: {error}") from None
    _check_unique(label, table[table.columns[0]])
    return table


def _check_unique(label: str, ids: polars.Series) -> None:
    if ids.null_count():
        raise ValueError(f"{label}: a value is missing ({ids.name})")
    if (is_twice := ids.is_duplicated()).any():
        raise ValueError(f"{label}: the {ids.name} {ids.filter(is_twice)[0]!r} is there twice")


def _read_own(path: Path, kind: _Kind, column: str | None) -> polars.DataFrame:
    """A table with a header, of any format of ratings: the ids, a title if items have one, others.

    The ids are those of `column`, or of the column known by its name as that of ratings is, or
    called id; a title that of title or name. Of the others numbers stay numbers, text in which some
    value has a `|` between becomes lists, and what is empty is null. Names stay as they are, but
    for one that is taken, which gets an underscore, and none, which is not read. ValueError in one
    line for an id that is missing or there twice, and as in `read_ratings`.
    """
    key = kind.needed[0]
    kind = kind if column is None else kind._replace(told={key: column})
    frames = []
    for where, raw, numbers in _read_raw(path, None, kind):
        _convert(where, raw.select(key), numbers)  # for what is missing
        frames.append(raw)
    raw = polars.concat(frames)
    ids = _to_ids(raw[key])
    _check_unique(str(path), ids)
    is_typed = where == f"{path}, row"
    told = {name: _to_side(path, raw[name], is_typed) for name in raw.columns if name != key}
    if "title" in set(kind.others) & set(told):
        told["title"] = raw["title"].cast(polars.String)
    return polars.DataFrame({key: ids, **told})


def _to_side(path: Path, column: polars.Series, is_typed: bool) -> polars.Series:
    """Numbers, texts or lists of texts, by the type in Parquet, or by what the strings say."""
    dtype = column.dtype
    if dtype.is_float():
        return column.fill_nan(None)
    if dtype.is_integer():
        return column
    if dtype.is_decimal():
        return column.cast(polars.Float64)
    if dtype in (polars.Date, polars.Datetime):
        return column.dt.epoch("s")
    if dtype == polars.List and dtype.inner in TEXT:
        return column.cast(polars.List(polars.String))
    if dtype not in (*TEXT, polars.Boolean, polars.Null):
        raise ValueError(f"{path}: the column {column.name!r} is of type {dtype}")
    text = column.cast(polars.String)
    text = text.set(text == "", None)
    numbers = text.str.strip_chars().cast(polars.Float64, strict=False)
    if not is_typed and numbers.null_count() == text.null_count():
        whole = text.str.strip_chars().cast(polars.Int64, strict=False)
        return whole if whole.null_count() == text.null_count() else numbers.fill_nan(None)
    if text.str.contains(r"[^|]\|[^|]").any():
        return text.str.extract_all(r"[^|]+")
    return text


def _to_utf8(content: bytes) -> bytes:
    """ml-10m's films are UTF-8 as they are, ml-1m's Latin-1."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1").encode()
    return content


PUBLISHED_SPLITS = ("ua", "ub", "u1", "u2", "u3", "u4", "u5")


def split(
    ratings: polars.DataFrame, name: str, *, seed: int = 0
) -> tuple[polars.DataFrame, polars.DataFrame]:
    """Cut `ratings` into a train and a test part, each sorted by user, then item.

    ua and ub: each user's first ten ratings in file order are the test part, or the next ten.
    u1 to u5: the k-th fifth of the lines is. These are GroupLens's published splits of ml-100k
    (rules of its mku.sh and allbut.pl), and of 100,000 ratings only. random: a tenth, drawn by
    `seed`. last1, last10 and any other lastN: each user's last N by time (of one time, the later in
    the file); of a user with N ratings or fewer, all but the first. ValueError for any other.
    """
    row = polars.int_range(polars.len())
    if name in PUBLISHED_SPLITS and len(ratings) != 100_000:
        raise ValueError(
            f"the split {name} is of ml-100k's 100,000 ratings, and here are {len(ratings):,}: "
            "random, last10 and folds go with any"
        )
    if name == "ua":
        is_test = row.over("user") < 10
    elif name == "ub":
        is_test = row.over("user").is_between(10, 19)
    elif name in PUBLISHED_SPLITS:
        is_test = row * 5 // polars.len() == int(name[1]) - 1
    elif name == "random":
        return hold_out(ratings, 0.1, seed=seed)
    elif last := re.fullmatch(r"last([1-9]\d{0,8})", name):
        if "timestamp" not in ratings.columns:
            raise ValueError(f"the split {name} needs timestamps, and the ratings have none")
        n_later = polars.len() - polars.col("timestamp").rank("ordinal")
        is_first = n_later == polars.len() - 1
        is_test = ((n_later < int(last[1])) & ~is_first).over("user")
    else:
        names = ", ".join(PUBLISHED_SPLITS)
        raise ValueError(f"no split '{name}': it is {names}, random or lastN, as last10")
    return _part(ratings, is_test)


def _part(
    ratings: polars.DataFrame, is_test: polars.Expr | polars.Series
) -> tuple[polars.DataFrame, polars.DataFrame]:
    is_test = ratings.select(is_test=is_test)["is_test"]
    if not _is_sorted(ratings):  # as most of MovieLens is: 25 million need no sort
        marked = ratings.with_columns(is_test=is_test).sort("user", "item", maintain_order=True)
        ratings, is_test = marked.drop("is_test"), marked["is_test"]
    return ratings.filter(~is_test), ratings.filter(is_test)


def _is_sorted(ratings: polars.DataFrame, *, strictly: bool = False) -> bool:
    """Whether by user, then item. Slice by slice, since a comparison of chunks copies them."""
    for start in range(0, len(ratings), SLICE):
        user, item = (ratings[name].slice(start, SLICE + 1) for name in ("user", "item"))
        (user, next_user), (item, next_item) = ((ids[:-1], ids[1:]) for ids in (user, item))
        is_after = next_item > item if strictly else next_item >= item
        if not ((next_user > user) | ((next_user == user) & is_after)).all():
            return False
    return True


def hold_out(
    ratings: polars.DataFrame, fraction: float, *, seed: int
) -> tuple[polars.DataFrame, polars.DataFrame]:
    """Cut off a random `fraction` of the ratings: the rest, then it, sorted by user, then item."""
    n_test = int(len(ratings) * fraction)
    if not 0 < n_test < len(ratings):
        few = f"a share of {fraction:g} of {len(ratings)} ratings leaves a part empty"
        raise ValueError(f"{few}: more are needed, or a test part of its own")
    drawn = numpy.zeros(len(ratings), dtype=bool)
    drawn[:n_test] = True
    numpy.random.default_rng(seed).shuffle(drawn)  # permutation(n) < n_test, in an eighth of memory
    return _part(ratings, polars.Series(drawn))


def fold(
    ratings: polars.DataFrame, n_folds: int, *, seed: int
) -> Iterator[tuple[polars.DataFrame, polars.DataFrame]]:
    """Cut the ratings at random into `n_folds`, and yield train and test with each as the test."""
    if not 2 <= n_folds <= len(ratings):
        raise ValueError(f"cannot cut {len(ratings)} ratings into {n_folds} folds")
    number = numpy.random.default_rng(seed).permutation(len(ratings)) % n_folds
    for test in range(n_folds):
        yield _part(ratings, polars.Series(number == test))


class Part(NamedTuple):
    """Ratings as tensors."""

    users: Tensor  # (N,) int64, rows of the user tables
    items: Tensor  # (N,) int64, rows of the item tables
    ratings: Tensor  # (N,) float32


class Ids(NamedTuple):
    """Raw ids by row, sorted: `ids.users[row]` is the user of that row of the tables."""

    users: polars.Series
    items: polars.Series


def to_tensors(
    train: polars.DataFrame, test: polars.DataFrame, *, allow_overlap: bool = False
) -> tuple[Part, Part, Ids]:
    """Both frames, with ids of one type (`same_ids`), as tensors; their raw ids indexed from 0.

    ValueError when a part is empty, or, unless `allow_overlap`, when a (user, item) pair is in both
    parts: a model would be tested on what it was trained on (a copy of ua.base in circulation holds
    the whole of ua.test).
    """
    for name, part in (("training", train), ("test", test)):
        if not len(part):
            raise ValueError(f"the {name} part has no ratings")
    with ThreadPoolExecutor(2) as pool:
        (user_ids, *users), (item_ids, *items) = pool.map(
            lambda name: _index(train[name], test[name]), ("user", "item")
        )
    ratings = (part["rating"].cast(polars.Float32).to_torch() for part in (train, test))
    part, test_part = map(Part, users, items, ratings)
    if not allow_overlap and _is_any_shared(part, test_part, len(item_ids)):
        pairs, test_pairs = (frame.select("user", "item") for frame in (train, test))
        shared = test_pairs.join(pairs, ["user", "item"], "semi", maintain_order="left")
        user, item = shared.row(0)
        raise ValueError(
            f"{len(shared)} of the test part's (user, item) pairs are in the training part "
            f"too, the first is ({user!r}, {item!r})"
        )
    return part, test_part, Ids(user_ids, item_ids)


def _index(*columns: polars.Series) -> tuple[polars.Series, Tensor, Tensor]:
    """The ids in the columns, sorted, and for each column their rows, int64.

    By a table from id to row where integers lie near each other: a look-up for a binary search.
    """
    is_text = columns[0].dtype == polars.String
    low = 0 if is_text else min(column.min() for column in columns)
    n_places = math.inf if is_text else max(column.max() for column in columns) - low + 1
    if n_places > 2 * sum(map(len, columns)) + 2**20:
        ids = polars.concat([column.unique() for column in columns]).unique().sort()
        find = (lambda c: c.cast(polars.Enum(ids)).to_physical()) if is_text else ids.search_sorted
        return ids, *(find(column).cast(polars.Int64).to_torch() for column in columns)
    # In place, slice by slice: no column is copied twice.
    found = [column.to_numpy(writable=True) for column in columns]
    is_used = numpy.zeros(n_places, dtype=bool)
    for rows in found:
        rows -= low
        is_used[rows] = True
    table = numpy.cumsum(is_used) - 1
    for rows in found:
        for start in range(0, len(rows), SLICE):
            rows[start : start + SLICE] = table[rows[start : start + SLICE]]
    return polars.Series(numpy.flatnonzero(is_used) + low), *map(torch.from_numpy, found)


def _is_any_shared(part: Part, test_part: Part, n_items: int) -> bool:
    """Whether a (user, item) pair is in both. Quick where they are sorted, as by `split`."""
    test_keys = numpy.sort((test_part.users * n_items + test_part.items).numpy())
    users, items = part.users.numpy(), part.items.numpy()
    for start in range(0, len(users), SLICE):
        keys = users[start : start + SLICE] * n_items + items[start : start + SLICE]
        keys.sort(kind="stable")  # one pass over what is sorted
        low, high = numpy.searchsorted(test_keys, [keys[0], keys[-1] + 1])
        few, many = sorted((keys, test_keys[low:high]), key=len)
        places = numpy.searchsorted(many, few).clip(max=len(many) - 1)
        if (many[places] == few).any():
            return True
    return False


def find_seen(
    part: Part,
    ids: Ids,
    users: polars.DataFrame | None = None,
    items: polars.DataFrame | None = None,
) -> tuple[Tensor, Tensor]:
    """Whether training tells something of each user and each item: bool (n_users,), (n_items,).

    It does by a rating in `part`, or by a feature (`describe`) in the frames `users` and `items`.
    """

    def find(name, raw, rows, about):
        seen = torch.zeros(len(raw), dtype=torch.bool)
        if about is not None:
            told = describe(about, name)[name].unique().implode()
            seen |= raw.is_in(told).to_torch()
        return seen.index_fill_(0, rows, True)

    return find("user", ids.users, part.users, users), find("item", ids.items, part.items, items)


class Sparse(NamedTuple):
    """A sparse matrix by rows: row r has `columns` and `values` from `starts[r]` to the next."""

    starts: Tensor  # (n_rows + 1,) int64
    columns: Tensor  # (number of values,) int64
    values: Tensor  # float32


FEATURES = ("id", "implicit", "side", "time")
TIME_SCALES = (10.0, 100.0, 1_000.0, 100_000.0)  # seconds


def features(
    train: polars.DataFrame,
    ids: Ids,
    kinds: Sequence[str] = FEATURES,
    *,
    users: polars.DataFrame | None = None,
    items: polars.DataFrame | None = None,
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
    index = {
        "user": polars.DataFrame({"user": ids.users}).with_row_index("user_row"),
        "item": polars.DataFrame({"item": ids.items}).with_row_index("item_row"),
    }
    pairs = train.select("user", "item").join(index["user"], "user").join(index["item"], "item")
    entries, n_features, n_above = [], [0], 0
    for name, about, other in (("user", users, "item"), ("item", items, "user")):
        row, n_rows = f"{name}_row", len(index[name])
        every, blocks = polars.int_range(n_rows, eager=True), []  # and how many features there are
        if "id" in kinds:
            blocks.append((every, every, 1.0, n_rows))
        if "implicit" in kinds:
            value = (1 / polars.len().over(row).sqrt()).alias("value")
            blocks.append((*pairs.select(row, f"{other}_row", value), len(index[other])))
        if "side" in kinds and about is not None:
            told = describe(about, name).join(index[name], name)
            n_told = told["feature"].max() + 1 if len(told) else 0
            blocks.append((told[row], told["feature"], told["value"], n_told))
        if "time" in kinds and name == "user":
            scales = polars.int_range(len(TIME_SCALES), eager=True)
            blocks.append((scales + n_rows, scales, 1.0, len(scales)))
            n_rows += len(scales)
        *offsets, n_so_far = accumulate((n for *_, n in blocks), initial=n_features[-1])
        if n_so_far == n_features[-1]:
            raise ValueError(f"the features {','.join(kinds)} say nothing of the {name}s")
        for block, offset in zip(blocks, offsets, strict=True):
            entries.append(_entries(block, n_above, offset))
        n_features.append(n_so_far)
        n_above += n_rows
    entries = polars.concat(entries)
    return (
        _sparse(entries, "row", "feature", n_above),
        _sparse(entries, "feature", "row", n_features[2]),
        (n_features[1], n_features[2] - n_features[1]),
    )


def _entries(block: tuple, first_row: int, first_feature: int) -> polars.DataFrame:
    rows, columns, values, _ = block
    frame = polars.DataFrame({"row": rows, "feature": columns}).with_columns(value=values)
    return frame.select(
        polars.col("row").cast(polars.Int64) + first_row,
        polars.col("feature").cast(polars.Int64) + first_feature,
        polars.col("value").cast(polars.Float32),
    )


def _sparse(entries: polars.DataFrame, row: str, column: str, n_rows: int) -> Sparse:
    entries = entries.sort(row, column)
    starts = torch.searchsorted(entries[row].to_torch(), torch.arange(n_rows + 1))
    return Sparse(starts, entries[column].to_torch(), entries["value"].to_torch())


def describe(about: polars.DataFrame, key: str) -> polars.DataFrame:
    """Side information as features: columns `key`, feature (from 0), value, a line per feature set.

    A column of text gives one feature a value; a list of them one a member, each 1 / sqrt(their
    number); a number one for each of ten bins of equal count, or one a value if it has few. A text
    column in which most values occur once is a label (a title, a postal code) and is left out, and
    so is what is missing.
    """
    schema = {key: about[key].dtype, "feature": polars.Int64, "value": polars.Float64}
    blocks, n_features = [polars.DataFrame(schema=schema)], 0
    for column in about.drop(key).columns:
        values = polars.DataFrame({key: about[key], "value": about[column]})
        values = values.with_columns(share=1.0).drop_nulls()
        if values["value"].dtype == polars.List:
            share = (1 / polars.col("value").list.len().sqrt()).alias("share")
            values = values.with_columns(share).explode("value").drop_nulls()
        elif values["value"].dtype.is_numeric():
            if values["value"].n_unique() > 10:
                tenth = (polars.col("value").rank("average") - 1) * 10 // polars.len()
                values = values.with_columns(tenth.alias("value"))
        elif 2 * values["value"].is_unique().sum() > len(values):
            continue
        if not len(values):
            continue
        feature = polars.col("value").rank("dense").cast(polars.Int64) - 1 + n_features
        blocks.append(values.select(key, feature.alias("feature"), value="share"))
        n_features = int(blocks[-1]["feature"].max()) + 1
    return polars.concat(blocks)


def time_context(train: polars.DataFrame, test: polars.DataFrame) -> tuple[Tensor, Tensor]:
    """How far a user's ratings near in time lie from what is usual: (N, J) and (M, J), float32.

    One feature for each of `TIME_SCALES`, tau. With e the user's training ratings less the mean of
    the rated item, less the user's mean of those, and the rating itself left out,

        sum_k exp(-|t - t_k| / tau) e_k / (10 + sum_k exp(-|t - t_k| / tau))

    A page of films is rated in one mood: on MovieLens ratings of one minute are alike. Item means
    are shrunk by five ratings, the user's by one; these, the 10 and the scales were found on
    validation parts of ml-100k. Of `test` only user, item and timestamp are read. All times count,
    those after a rating as well as those before it.
    """
    columns = ["user", "item", "timestamp"]
    excess = polars.col("rating").cast(polars.Float64)
    rows = polars.concat(
        [
            train.select(*columns, excess=excess - excess.mean(), count=1.0),
            test.select(*columns, excess=0.0, count=0.0),
        ]
    ).with_columns(place=polars.int_range(polars.len()))
    rated = polars.col("count")
    of_item = polars.col("excess").sum().over("item") / (polars.col("count").sum().over("item") + 5)
    rows = rows.with_columns(excess=polars.col("excess") - rated * of_item)
    others = polars.col("excess").sum().over("user") - polars.col("excess")
    n_others = polars.col("count").sum().over("user") - polars.col("count")
    rows = rows.with_columns(usual=others / (n_others + 1)).sort("user", "timestamp", "place")

    seconds = rows["timestamp"].cast(polars.Float64).to_torch()
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
