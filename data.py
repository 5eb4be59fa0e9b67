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
import lzma
import os
import re
import secrets
import stat
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy
import polars
import torch
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
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    for stream in (1, 2):
        try:
            if os.path.samestat(status, os.fstat(stream)):
                return False
        except OSError:
            continue  # a closed stream
    return stat.S_ISREG(status.st_mode)


def _beside(path: Path) -> Path:
    return path.parent / f".{secrets.token_hex(6)}.part"


def check_writable(path: Path) -> None:
    """Raise OSError, naming `path`, if `write_file` could not write it."""
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


def write_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: `path` has the old bytes or the new, never less.

    A symbolic link is followed; a pipe or a device is written to directly. OSError names `path`.
    """
    try:
        if not _is_replaceable(path):
            with open(path, "ab") as file:
                file.write(content)
            return
        target = Path(os.path.realpath(path))
        beside = _beside(target)
        with open(beside, "xb") as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(beside, target)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def get_dataset(
    name: str,
    data_dir: Path | None = None,
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
    path, url = (data_dir or default_data_dir()) / f"{name}.zip", f"{server}/{name}.zip"
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
    sources = (
        (url, lambda: _from_zip(_download(url, zip_md5, timeout, LARGEST_DOWNLOAD))),
        (f"{wheel} through pip", lambda: _from_wheel(_pip_download(wheel, 12 * timeout))),
    )
    for source, fetch in sources:
        try:
            files = fetch()
            for name, content in files.items():
                if not _is_published(name, content):
                    raise OSError(f"{name} failed its checksum")
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


def _verifies(folder: Path, name: str) -> bool:
    try:
        return _is_published(name, (folder / name).read_bytes())
    except FileNotFoundError:
        return False


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
    except urllib.error.URLError as error:
        if not isinstance(error.reason, TimeoutError):
            return OSError(f"can't be reached ({error.reason})")
        return OSError(f"no answer in {timeout:g} s")
    except TimeoutError:
        return OSError(f"no answer in {timeout:g} s")
    except (OSError, http.client.HTTPException) as error:
        return OSError(f"broke off ({error!r})")
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
            for name in names:
                if file.getinfo(name).file_size > LARGEST_DOWNLOAD:
                    raise OSError(f"{name} has more than {LARGEST_DOWNLOAD:,} bytes")
            return [file.read(name) for name in names]
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise OSError(f"no good zip ({error})") from None
    except KeyError as error:
        raise OSError(f"no good zip ({error.args[0]})") from None


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
ITEMS_FILES = ("items.tsv", "movies.csv", "movies.dat", "u.item")
USERS_FILES = ("u.user", "users.dat")
LARGEST_MEMBER = 4 << 30  # bytes of a file in a zip; ml-32m's ratings have 0.9e9
LONGEST_LINE = 1 << 16  # bytes
BLOCK = 4 << 20  # bytes parsed at a time
SLICE = 1 << 18  # ratings handled at a time, so that no column is copied whole
RATING_SCHEMA = {
    "user": polars.Int64,
    "item": polars.Int64,
    "rating": polars.Float32,
    "timestamp": polars.Int64,
}


def read_ratings(path: Path) -> polars.DataFrame:
    """Ratings from a file, or from the folder or zip of a MovieLens, in file order.

    A file has lines of user, item, rating and, if it likes, timestamp, between tabs, commas or
    `::`, without quotes. A first line without numbers names the columns: user..., item... or
    movie..., rating..., time..., in any order, others among them. In a folder or a zip the file is
    the first of `RATINGS_FILES`. Columns user, item (raw ids) and timestamp (Unix seconds; no such
    column if the file has none) int64, rating float32, without nulls. ValueError, in one line that
    names the file and the line, for anything else; OSError when `path` can't be read.
    """
    name = _find(path, RATINGS_FILES)
    if name is None and (path.is_dir() or _is_zip(path)):
        raise ValueError(f"{path}: no {', '.join(RATINGS_FILES)} in it")
    with _open(path, name) as (label, file):
        first = file.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf")
        if not first.strip():
            raise ValueError(f"{label}: no ratings" + (" in line 1" if first else ""))
        form, is_header = _detect(label, first)
        frames, n_above = [], int(is_header)
        if (ratings := _read_whole(file, form, n_above)) is not None:
            return ratings
        block = b"" if is_header else first
        while block := block + _read_lines(label, file):
            frames.append(_parse(label, block, form, n_above))
            n_above += len(frames[-1])
            block = b""
    if not frames:
        raise ValueError(f"{label}: no ratings")
    return polars.concat(frames, rechunk=False)


def _find(path: Path, names: Sequence[str]) -> str | None:
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
    """An error that names `path`, for what a broken zip or a device raises without it."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: no good zip ({error})") from None
    except OSError as error:
        if error.filename:
            raise
        raise OSError(f"{path}: {error.strerror or error}") from None


@contextmanager
def _open(path: Path, name: str | None) -> Iterator[tuple[str, IO[bytes]]]:
    """What `_find` found, `path` itself for None: what to call it in a message, and the file.

    A zip's member is read as a stream: no name in an archive ever becomes a path.
    """
    if name is None or path.is_dir():
        path = path / (name or "")
        with _naming(path), open(path, "rb") as file:
            yield str(path), file
        return
    with _naming(path), zipfile.ZipFile(path) as archive:
        label = f"{path}, {name if name.isprintable() else ascii(name)}"
        if archive.getinfo(name).file_size > LARGEST_MEMBER:
            raise ValueError(f"{label}: more than {LARGEST_MEMBER:,} bytes")
        with archive.open(name) as file:
            yield label, file


def _read_lines(label: str, file: IO[bytes]) -> bytes:
    """The next block of whole lines."""
    block, rest = file.read(BLOCK), file.readline(LONGEST_LINE)
    if len(rest) == LONGEST_LINE:
        raise ValueError(f"{label}: a line of {LONGEST_LINE:,} bytes or more")
    return block + rest


class _Form(NamedTuple):
    """How the lines of a file of ratings are made."""

    separator: str
    columns: list[str | None]  # what each field is; None for one that is not read


def _detect(label: str, first: bytes) -> tuple[_Form, bool]:
    """The form of a file by its first line, and whether that is a header."""
    where = f"{label}, line 1"
    try:
        line = first.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f"{where}: it is not UTF-8") from None
    separator = next((s for s in ("\t", "::", ",") if s in line), None)
    if separator is None:
        raise ValueError(f"{where}: no tab, comma or '::' between user, item and rating")
    fields = line.split(separator)
    if any(map(_is_number, fields)):
        if len(fields) not in (3, 4):
            raise ValueError(f"{where}: {len(fields)} fields, not user, item, rating[, timestamp]")
        return _Form(separator, list(RATING_SCHEMA)[: len(fields)]), False
    columns = []
    for field in fields:
        known = re.match(r"\W*(user|item|movie|rating|time)", field.lower())
        name = {"movie": "item", "time": "timestamp"}.get(known[1], known[1]) if known else None
        columns.append(None if name in columns else name)
    if missing := [name for name in ("user", "item", "rating") if name not in columns]:
        raise ValueError(f"{where}: the header has no column {', '.join(missing)}")
    return _Form(separator, columns), True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_whole(file: IO[bytes], form: _Form, n_above: int) -> polars.DataFrame | None:
    """The ratings of a file on disk, by all cores; None where it takes blocks to tell."""
    is_on_disk = isinstance(file, io.BufferedReader) and Path(file.name).is_file()
    if not is_on_disk or form.separator == "::" or None in form.columns:
        return None
    # Opened again, for polars moves the position; by path, it would take a * as a pattern.
    with open(file.name, "rb") as whole, suppress(ValueError):
        return _read_csv(whole, form, skip_rows=n_above)


def _read_csv(source: bytes | IO[bytes], form: _Form, **options) -> polars.DataFrame:
    """ValueError says what is wrong, not where; also a field too few or too many, if it is read."""
    names = [name or f"_{place}" for place, name in enumerate(form.columns)]
    schema = {name: RATING_SCHEMA.get(name, polars.String) for name in names}
    options |= {"separator": form.separator, "has_header": False, "quote_char": None}
    try:
        ratings = polars.read_csv(source, schema=schema, **options)
    except polars.exceptions.PolarsError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    ratings = ratings.select(name for name in RATING_SCHEMA if name in schema)
    n_nulls = sum(ratings.null_count().row(0))
    if n_nulls or not len(ratings) or not ratings["rating"].is_finite().all():
        raise ValueError("a value is missing or not finite")
    return ratings


def _parse(label: str, block: bytes, form: _Form, n_above: int) -> polars.DataFrame:
    """The ratings of whole lines, of which `n_above` are above in the file."""
    content, separator = block, form.separator
    if separator == "::":  # polars' separator is one byte
        content, separator = block.replace(b"::", b"\x1f"), "\x1f"
    try:
        ratings = _read_csv(content, form._replace(separator=separator))
        n_separators = numpy.count_nonzero(numpy.frombuffer(content, "u1") == ord(separator))
        if n_separators == len(ratings) * (len(form.columns) - 1):
            return ratings
        why = "too few fields or too many"
    except ValueError as error:
        why = str(error)
    # Only now is a block looked at line by line.
    lines = block.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, n_above + 1):
        if wrong := _find_wrong(line, form):
            raise ValueError(f"{label}, line {number}: {wrong}")
    raise ValueError(f"{label}, lines {n_above + 1} to {n_above + len(lines)}: {why}")


def _find_wrong(line: bytes, form: _Form) -> str | None:
    try:
        fields = line.decode().removesuffix("\r").split(form.separator)
    except UnicodeDecodeError:
        return "it is not UTF-8"
    if len(fields) != len(form.columns):
        return f"fields: {len(fields)}, not {len(form.columns)}"
    for name, text in zip(form.columns, fields, strict=True):
        if name is None:
            continue
        if not text:
            return f"a value is missing ({name})"
        try:
            value = float(text) if name == "rating" else int(text)
            if "_" in text or not text.isascii():  # which Python takes, and polars does not
                raise ValueError
        except ValueError:
            return f"could not parse {name} {text[:40]!r}"
        if name == "rating" and not abs(value) < 3.4028235e38:
            return f"{name} {text[:40]!r} is not finite"
        if name != "rating" and not -(2**63) <= value < 2**63:
            return f"{name} {text[:40]!r} is too large"
    return None


def write_ratings(ratings: polars.DataFrame, path: Path) -> None:
    """Tab-separated without a header; whole ratings are written as GroupLens does, `3` for 3.0."""
    if (ratings["rating"] == ratings["rating"].round()).all():
        ratings = ratings.with_columns(polars.col("rating").cast(polars.Int64))
    write_file(path, ratings.write_csv(separator="\t", include_header=False).encode())


def _read_beside(path: Path, names: Sequence[str]) -> tuple[str, str, bytes] | None:
    """Label, name and content of the first of `names` in a folder or a zip, None without it."""
    name = _find(path, names)
    if name is None:
        return None
    with _open(path, name) as (label, file):
        return label, PurePosixPath(name).name, file.read()


def _read_table(label: str, content: bytes, schema: dict, **options) -> polars.DataFrame:
    try:
        return polars.read_csv(content, schema=schema, **options)
    except polars.exceptions.NoDataError:
        return polars.DataFrame(schema=schema)
    except polars.exceptions.PolarsError as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{label}: not a table of {', '.join(schema)}: {why}") from None


def read_users(path: Path) -> polars.DataFrame | None:
    """Demographics: user and age int64, gender, occupation and zip_code strings.

    From the first of `USERS_FILES` in a folder or a zip, None if it has none. In users.dat an
    occupation is a number, and an age the lowest of its group. ValueError names a broken file.
    """
    found = _read_beside(path, USERS_FILES)
    if found is None:
        return None
    label, name, content = found
    columns = ["user", "age", "gender", "occupation", "zip_code"]
    order = columns
    if name == "users.dat":
        order = ["user", "gender", "age", "occupation", "zip_code"]
        content = content.replace(b"::", b"|")
    schema = {c: polars.Int64 if c in ("user", "age") else polars.String for c in order}
    users = _read_table(label, content, schema, separator="|", has_header=False, quote_char=None)
    return users.select(columns)


def read_items(path: Path) -> polars.DataFrame | None:
    """Films: item int64, title string, year int64 (null if unknown), genres list of strings.

    From the first of `ITEMS_FILES` in a folder or a zip, None if it has none. The year is the last
    one in parentheses in the title. ValueError names a broken file.
    """
    found = _read_beside(path, ITEMS_FILES)
    if found is None:
        return None
    label, name, content = found
    options = {"separator": "\t", "quote_char": None, "has_header": False}
    options["skip_rows"] = int(name != "movies.dat")  # its header
    if name == "movies.csv":
        options |= {"separator": ",", "quote_char": '"'}
    elif name == "movies.dat":
        content = _to_utf8(content).replace(b"::", b"\t")
    elif name == "u.item":
        try:
            content = _items_tsv(_from_u_item(content))
        except ValueError as error:
            raise ValueError(f"{label}: not item|title|date|video|URL|flags: {error}") from None
    columns = ["item", "title", "genres"]
    if name in ("items.tsv", "u.item"):
        columns.insert(2, "year")
    schema = dict.fromkeys(columns, polars.String) | {"item": polars.Int64}
    title = polars.col("title").str.strip_chars()
    genres = polars.col("genres").fill_null("").str.replace("(no genres listed)", "", literal=True)
    return _read_table(label, content, schema, **options).select(
        "item",
        title,
        title.str.extract(r".*\((\d{4})\)").cast(polars.Int64).alias("year"),
        genres.str.extract_all(r"[^|]+"),
    )


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


def _is_sorted(ratings: polars.DataFrame) -> bool:
    """Whether by user, then item. Slice by slice, since a comparison of chunks copies them."""
    for start in range(0, len(ratings), SLICE):
        user, item = (ratings[c].slice(start, SLICE + 1).to_numpy() for c in ("user", "item"))
        is_same = user[1:] == user[:-1]
        if not ((user[1:] > user[:-1]) | (is_same & (item[1:] >= item[:-1]))).all():
            return False
    return True


def hold_out(
    ratings: polars.DataFrame, fraction: float, *, seed: int
) -> tuple[polars.DataFrame, polars.DataFrame]:
    """Cut off a random `fraction` of the ratings: the rest, then it, sorted by user, then item."""
    n_test = int(len(ratings) * fraction)
    if not 0 < n_test < len(ratings):
        raise ValueError(f"a share of {fraction:g} of {len(ratings)} ratings leaves a part empty")
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


def to_tensors(train: polars.DataFrame, test: polars.DataFrame) -> tuple[Part, Part, Ids]:
    """Both frames as tensors, with the raw ids of the two together indexed from 0.

    ValueError when a part is empty, or when a (user, item) pair is in both parts: a model would be
    tested on what it was trained on (a copy of ua.base in circulation holds the whole of ua.test).
    """
    for name, part in (("training", train), ("test", test)):
        if not len(part):
            raise ValueError(f"the {name} part has no ratings")
    with ThreadPoolExecutor(2) as pool:
        (user_ids, *users), (item_ids, *items) = pool.map(
            lambda name: _index(train[name], test[name]), ("user", "item")
        )
    ratings = [
        part["rating"].cast(polars.Float32).to_numpy(writable=True) for part in (train, test)
    ]
    part, test_part = (
        Part(*map(torch.from_numpy, columns)) for columns in zip(users, items, ratings, strict=True)
    )
    if _is_any_shared(part, test_part, len(item_ids)):
        pairs, test_pairs = (frame.select("user", "item") for frame in (train, test))
        shared = test_pairs.join(pairs, ["user", "item"], "semi", maintain_order="left")
        user, item = shared.row(0)
        raise ValueError(
            f"{len(shared)} of the test part's (user, item) pairs are in the training part "
            f"too, the first is ({user}, {item})"
        )
    return part, test_part, Ids(user_ids, item_ids)


def _index(*columns: polars.Series) -> tuple[polars.Series, numpy.ndarray, numpy.ndarray]:
    """The ids in the columns, sorted, and for each column their rows, int64.

    By a table from id to row where the ids lie near each other: a look-up for a binary search.
    """
    low = min(column.min() for column in columns)
    n_places = max(column.max() for column in columns) - low + 1
    if n_places > 2 * sum(map(len, columns)) + 2**20:
        ids = polars.concat(columns).unique().sort()
        rows = (ids.search_sorted(column).cast(polars.Int64) for column in columns)
        return ids, *(row.to_numpy(writable=True) for row in rows)
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
    return polars.Series(numpy.flatnonzero(is_used) + low), *found


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
    masks = []
    for name, raw, rows, about in (
        ("user", ids.users, part.users, users),
        ("item", ids.items, part.items, items),
    ):
        seen = torch.zeros(len(raw), dtype=torch.bool)
        if about is not None:
            told = describe(about, name)[name].unique().implode()
            seen |= torch.from_numpy(raw.is_in(told).to_numpy(writable=True))
        masks.append(seen.index_fill_(0, rows, True))
    return tuple(masks)


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
) -> tuple[Sparse, Sparse, Sparse, Sparse]:
    """Matrices (rows, features) of the users and of the items, then their transposes.

    `kinds` chooses among: id, the row's own; implicit, the items that the user rated in `train`, or
    the users who rated the item, each 1 / sqrt(their number) (Koren 2008, SVD++); side, what
    `users` and `items` tell, by `describe`; time, room for `time_context`, whose features vary by
    rating: the user matrix ends in identity rows and columns for them. No test rating is read.
    """
    if isinstance(kinds, str) or not set(kinds) <= set(FEATURES):
        raise ValueError(f"features must be some of {FEATURES}, not {kinds!r}")
    index = {
        "user": polars.DataFrame({"user": ids.users}).with_row_index("user_row"),
        "item": polars.DataFrame({"item": ids.items}).with_row_index("item_row"),
    }
    pairs = train.select("user", "item").join(index["user"], "user").join(index["item"], "item")
    matrices, transposes = [], []
    for name, about, other in (("user", users, "item"), ("item", items, "user")):
        row, n_rows = f"{name}_row", len(index[name])
        blocks, n_features = [], 0
        if "id" in kinds:
            every = polars.int_range(n_rows, eager=True)
            blocks.append(_entries(every, every, 1.0))
            n_features = n_rows
        if "implicit" in kinds:
            value = (1 / polars.len().over(row).sqrt()).alias("value")
            rated = pairs.select(polars.col(row), f"{other}_row", value)
            blocks.append(_entries(*rated, offset=n_features))
            n_features += len(index[other])
        if "side" in kinds and about is not None:
            told = describe(about, name).join(index[name], name)
            blocks.append(_entries(told[row], told["feature"], told["value"], offset=n_features))
            n_features += (told["feature"].max() if len(told) else -1) + 1
        if "time" in kinds and name == "user":
            every = polars.int_range(len(TIME_SCALES), eager=True)
            blocks.append(_entries(every + n_rows, every, 1.0, offset=n_features))
            n_rows, n_features = n_rows + len(every), n_features + len(every)
        if not n_features:
            raise ValueError(f"the features {','.join(kinds)} say nothing of the {name}s")
        entries = polars.concat(blocks)
        matrices.append(_sparse(entries, "row", "feature", n_rows))
        transposes.append(_sparse(entries, "feature", "row", n_features))
    return (*matrices, *transposes)


def _entries(rows, columns, values, *, offset=0) -> polars.DataFrame:
    frame = polars.DataFrame({"row": rows, "feature": columns}).with_columns(value=values)
    return frame.select(
        polars.col("row").cast(polars.Int64),
        polars.col("feature").cast(polars.Int64) + offset,
        polars.col("value").cast(polars.Float32),
    )


def _sparse(entries: polars.DataFrame, row: str, column: str, n_rows: int) -> Sparse:
    entries = entries.sort(row, column)
    starts = numpy.searchsorted(entries[row].to_numpy(), numpy.arange(n_rows + 1))
    columns, values = (entries[name].to_numpy(writable=True) for name in (column, "value"))
    return Sparse(*(torch.from_numpy(part) for part in (starts, columns, values)))


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
        values = about.select(key, value=column, share=1.0).drop_nulls()
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

    seconds = torch.from_numpy(rows["timestamp"].cast(polars.Float64).to_numpy(writable=True))
    is_first = torch.from_numpy(
        rows["user"].ne_missing(rows["user"].shift()).to_numpy(writable=True)
    )
    sums = torch.from_numpy(rows.select("excess", "count").to_numpy(writable=True))
    usual = torch.from_numpy(rows["usual"].to_numpy(writable=True))
    context = torch.empty(len(rows), len(TIME_SCALES))
    place = torch.from_numpy(rows["place"].to_numpy(writable=True))
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
