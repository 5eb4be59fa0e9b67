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

import hashlib
import http.client
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import polars
import torch
from torch import Tensor

ML_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
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
LARGEST_DOWNLOAD = 64 << 20  # bytes; the zip has 5 MB, the largest member read 2 MB


def default_data_dir() -> Path:
    """`$COLLAB_DATA_DIR`, or `collab` in the user's cache folder."""
    if folder := os.environ.get("COLLAB_DATA_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collab"


def _is_replaceable(path: Path) -> bool:
    """Whether `path` may be renamed over: not a pipe or device, nor what /dev/stdout stands for."""
    return not path.exists() or (path.is_file() and path.parts[:2] != ("/", "dev"))


def check_writable(path: Path) -> None:
    """Raise OSError, naming `path`, if `write_file` could not write it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if _is_replaceable(path):
            tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def write_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: `path` has the old bytes or the new, never less.

    A symbolic link is followed; a pipe or a device is written to directly.
    """
    if not _is_replaceable(path):
        with open(path, "ab") as file:
            file.write(content)
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def get_ml_100k(
    data_dir: Path | None = None,
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
    folder = (data_dir or default_data_dir()) / "ml-100k"
    broken = [name for name in ML_100K_FILES if not _verifies(folder, name)]
    if not broken:
        notice(f"ml-100k: from the cache {folder}")
        return folder
    changed = [name for name in broken if (folder / name).exists()]
    why = f"{', '.join(changed)} in {folder} failed the checksum; " if changed else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: {error.strerror}") from None
    try:
        files, source = _from_zip(_download(url, zip_md5, timeout)), url
    except (OSError, ValueError) as error:
        why += f"{urllib.parse.urlsplit(url).hostname}: {error}; "
        source = f"{wheel} through pip"
        try:
            files = _from_wheel(_pip_download(wheel, 12 * timeout))
        except (OSError, ValueError) as error:
            raise OSError(f"ml-100k can't be had: {why}{source}: {error}") from None
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != ML_100K_FILES[name]:
            raise OSError(f"ml-100k: {name} from {source} failed its checksum; nothing was kept")
    for name, content in files.items():
        write_file(folder / name, content)
    notice(f"ml-100k: {why}from {source}, kept in {folder}")
    return folder


def _verifies(folder: Path, name: str) -> bool:
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content).hexdigest() == ML_100K_FILES[name]


def _download(url: str, md5: str, timeout: float) -> bytes:
    deadline = time.monotonic() + 12 * timeout
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            expected = response.headers.get("Content-Length")
            while chunk := response.read1(1 << 20):
                content += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(content) > LARGEST_DOWNLOAD:
                    raise OSError(f"more than {LARGEST_DOWNLOAD:,} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    except TimeoutError:
        raise OSError(f"no answer in {timeout:g} s, or not all in {12 * timeout:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise OSError(f"no answer in {timeout:g} s") from None
        raise OSError(f"can't be reached ({error.reason})") from None
    except http.client.HTTPException as error:
        raise OSError(f"broke off ({error!r})") from None
    if expected is not None and len(content) != int(expected):
        raise OSError(f"broke off after {len(content):,} of {int(expected):,} bytes")
    if hashlib.md5(content).hexdigest() != md5:
        raise OSError("the zip failed its checksum")
    return bytes(content)


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
            for name in names:
                if file.getinfo(name).file_size > LARGEST_DOWNLOAD:
                    raise OSError(f"{name} has more than {LARGEST_DOWNLOAD:,} bytes")
            return [file.read(name) for name in names]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise OSError(f"no good zip ({error})") from None
    except KeyError as error:
        raise OSError(f"no good zip ({error.args[0]})") from None


def _from_zip(archive: bytes) -> dict[str, bytes]:
    """GroupLens's zip: u.item is Latin-1, `item|title (year)|date||URL|19 genre flags`."""
    names = ["ml-100k/u.data", "ml-100k/u.user", "ml-100k/u.item"]
    ratings, users, items = _members(archive, names)
    rows = []
    for line in items.decode("latin-1").splitlines():
        item, title, _date, _video, _url, *flags = line.split("|")
        genres = [genre for genre, flag in zip(ML_100K_GENRES, flags, strict=True) if flag == "1"]
        rows.append((item, title, genres))
    return {"u.data": ratings, "u.user": users, "items.tsv": _items_tsv(rows)}


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


def read_ratings(path: Path) -> polars.DataFrame:
    """`user item rating timestamp`, tab-separated without a header, in file order.

    Columns user, item, timestamp int64 (raw ids, Unix seconds) and rating float32. ValueError
    naming the file for anything else.
    """
    schema = {
        "user": polars.Int64,
        "item": polars.Int64,
        "rating": polars.Float32,
        "timestamp": polars.Int64,
    }
    try:
        ratings = polars.read_csv(path, separator="\t", has_header=False, schema=schema)
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    if not len(ratings):
        raise ValueError(f"{path}: no ratings")
    if sum(ratings.null_count().row(0)):
        missing = ratings.select(polars.any_horizontal(polars.all().is_null())).to_series()
        raise ValueError(f"{path}, line {missing.arg_max() + 1}: a value is missing")
    return ratings


def write_ratings(ratings: polars.DataFrame, path: Path) -> None:
    """The inverse of `read_ratings`; whole ratings are written as GroupLens does, `3` for 3.0."""
    if (ratings["rating"] == ratings["rating"].round()).all():
        ratings = ratings.with_columns(polars.col("rating").cast(polars.Int64))
    write_file(path, ratings.write_csv(separator="\t", include_header=False).encode())


def read_users(folder: Path) -> polars.DataFrame:
    """Demographics: user and age int64, gender, occupation and zip_code strings."""
    schema = {
        "user": polars.Int64,
        "age": polars.Int64,
        "gender": polars.String,
        "occupation": polars.String,
        "zip_code": polars.String,
    }
    return polars.read_csv(folder / "u.user", separator="|", has_header=False, schema=schema)


def read_items(folder: Path) -> polars.DataFrame:
    """Films: item int64, title string, year int64 (null if unknown), genres list of strings."""
    schema = {
        "item": polars.Int64,
        "title": polars.String,
        "year": polars.Int64,
        "genres": polars.String,
    }
    items = polars.read_csv(folder / "items.tsv", separator="\t", quote_char=None, schema=schema)
    return items.with_columns(polars.col("genres").str.split("|"))


def split(
    ratings: polars.DataFrame, name: str, *, seed: int = 0
) -> tuple[polars.DataFrame, polars.DataFrame]:
    """Cut `ratings` into a train and a test part, each sorted by user, then item.

    ua and ub: each user's first ten ratings in file order are the test part, or the next ten.
    u1 to u5: the k-th fifth of the lines is. random: a tenth, drawn by `seed`. The first seven are
    GroupLens's published splits of ml-100k (rules of its mku.sh and allbut.pl).
    """
    row = polars.int_range(polars.len())
    if name == "ua":
        is_test = row.over("user") < 10
    elif name == "ub":
        is_test = row.over("user").is_between(10, 19)
    elif name in ("u1", "u2", "u3", "u4", "u5"):
        is_test = row * 5 // polars.len() == int(name[1]) - 1
    elif name == "random":
        n_test = len(ratings) // 10
        drawn = numpy.random.default_rng(seed).permutation(len(ratings)) < n_test
        is_test = polars.lit(polars.Series(drawn))
    else:
        raise ValueError(f"no split '{name}': it is ua, ub, u1 to u5, or random")
    marked = ratings.with_columns(is_test.alias("is_test"))
    marked = marked.sort("user", "item", maintain_order=True)
    train, test = (marked.filter(polars.col("is_test") == part) for part in (False, True))
    return train.drop("is_test"), test.drop("is_test")


class Part(NamedTuple):
    """Ratings as tensors."""

    users: Tensor  # (N,) int64, rows of the user tables
    items: Tensor  # (N,) int64, rows of the item tables
    ratings: Tensor  # (N,) float32


class Ids(NamedTuple):
    """Raw ids by row, sorted: `ids.users[row]` is the user of that row of the tables."""

    users: polars.Series
    items: polars.Series


def to_tensors(train: polars.DataFrame, test: polars.DataFrame) -> tuple[Part, Part, Ids]:
    """Both frames as tensors, with the raw ids of the two together indexed from 0.

    ValueError when a part is empty, or when a (user, item) pair is in both parts: a model would be
    tested on what it was trained on (a copy of ua.base in circulation holds the whole of ua.test).
    """
    for name, part in (("training", train), ("test", test)):
        if not len(part):
            raise ValueError(f"the {name} part has no ratings")
    shared = test.join(train, on=["user", "item"], how="semi")
    if len(shared):
        user, item = shared.select("user", "item").row(0)
        raise ValueError(
            f"{len(shared)} of the test part's (user, item) pairs are in the training part too, "
            f"the first is ({user}, {item})"
        )
    ids = Ids(*(polars.concat([train[c], test[c]]).unique().sort() for c in ("user", "item")))

    def tensors(part: polars.DataFrame) -> Part:
        users = ids.users.search_sorted(part["user"]).cast(polars.Int64)
        items = ids.items.search_sorted(part["item"]).cast(polars.Int64)
        columns = users, items, part["rating"].cast(polars.Float32)
        return Part(*(torch.from_numpy(column.to_numpy(writable=True)) for column in columns))

    return tensors(train), tensors(test), ids
