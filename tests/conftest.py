"""What several test files share: the command line as a user runs it, real data, trained models."""

import io
import os
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

import polars
import pytest
import torch
from hypothesis import settings

import collab
import data

settings.register_profile("any-machine", deadline=None, max_examples=50)
settings.load_profile("any-machine")
torch.set_num_threads(1)  # as the command line; two only get in each other's way here
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that a test starts
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"user": "kunde", "item": "ware", "rating": "sterne", "timestamp": "wann"}  # of r.csv
FLAGS = ("--user-column", "kunde", "--item-column", "ware", "--rating-column", "sterne")
FLAGS += ("--time-column", "wann")


@pytest.fixture(scope="session")
def ml_100k():
    """The archive of the real data, had as a user has it; CI must have it."""
    try:
        return data.get_dataset("ml-100k", notice=print)
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ratings(ml_100k):
    return data.read_ratings(ml_100k)


def call(folder, *arguments):
    """Run `python collab.py ...` in this process, in a folder, to an exit status."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    out, errors = io.StringIO(), io.StringIO()
    argv = patch.object(sys, "argv", ["collab.py", *map(str, arguments)])
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(errors), argv:
            status = collab.main() or 0
    except SystemExit as ended:
        status = ended.code
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        torch.set_num_threads(1)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


@pytest.fixture
def main(tmp_path):
    """`call` in an empty folder."""
    return partial(call, tmp_path)


@pytest.fixture(scope="session")
def small(tmp_path_factory, ratings):
    """A small part of ml-100k: r.csv (of other ids and names), i.csv, u.csv, and r.parquet."""
    folder = tmp_path_factory.mktemp("small")
    some = ratings.filter(polars.col("user") <= 90, polars.col("item") <= 120)
    some.write_parquet(folder / "r.parquet")
    kunde = polars.format("ü-{} {}", polars.col("user") % 2, "user")
    ware = polars.format('{}-x,"{}"', "item", polars.col("item") % 3)
    wann = polars.from_epoch("timestamp").dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    table = some.select(kunde=kunde, ware=ware, sterne="rating", wann=wann)
    table.write_csv(folder / "r.csv")
    for name, path in (("ware", "i.csv"), ("kunde", "u.csv")):
        about = table.select(polars.col(name).unique(maintain_order=True)).with_row_index("place")
        title = polars.format("Filmé {}, A “{}”", name, polars.col("place") % 7)
        kind = polars.format("kind {}", polars.col("place") % 5)
        about.select(name, title=title, kind=kind).write_csv(folder / path)
    return folder


@pytest.fixture
def offline(monkeypatch):
    """Environment in which neither GroupLens nor a package index can be reached."""
    variables = {"https_proxy": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    for name, value in (variables | {"PIP_CONFIG_FILE": os.devnull}).items():
        monkeypatch.setenv(name, value)
