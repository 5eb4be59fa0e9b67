"""What several test files share: the command line as a user runs it, and the real data."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="session")
def ml_100k():
    """The folder of the real data, had as a user has it; CI must have it."""
    try:
        return data.get_ml_100k(notice=print)
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ratings(ml_100k):
    return data.read_ratings(ml_100k / "u.data")


@pytest.fixture(scope="session")
def ua(ratings):
    """Train part, test part and ids of the ua split, as tensors."""
    return data.to_tensors(*data.split(ratings, "ua"))


@pytest.fixture
def run(tmp_path):
    """Run `python collab.py ...` as a subprocess in an empty folder."""

    def run(*arguments, **environment):
        command = [sys.executable, ROOT / "collab.py", *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            timeout=170,
        )

    return run


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Run `python collab.py ...` in this process, in an empty folder, to an exit status."""

    def main(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["collab.py", *map(str, arguments)])
        status = 0
        try:
            collab.main()
        except SystemExit as ended:
            status = ended.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return main


@pytest.fixture
def offline(monkeypatch):
    """Environment in which neither GroupLens nor a package index can be reached."""
    variables = {
        "https_proxy": "http://127.0.0.1:9",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
