"""What the scripts beside this file share: read a split, time a fit, write what came of it.

It needs nothing but Python, since each script runs in its own peer's virtual environment:

    folder = peer.folder()
    train, test = peer.read_ratings(folder / "train.tsv"), peer.read_ratings(folder / "test.tsv")
    model, times = peer.measure(lambda: fit(train))
    peer.write(folder, [peer.result("a name", predictions, times)])
"""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

SEED = 0


class Rating(NamedTuple):
    user: str
    item: str
    rating: float
    timestamp: int


class Times(NamedTuple):
    seconds: float  # on the wall
    cpu_seconds: float  # of this process, all its threads


def folder():
    """The folder that this script was called with."""
    return Path(sys.argv[1])


def read_ratings(path):
    """The lines `user item rating timestamp` of a file, in its order."""
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return [Rating(user, item, float(rating), int(time)) for user, item, rating, time in rows]


def read_features(path):
    """`{id: [feature, ...]}` of a file with lines `id feature|feature|...`."""
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {name: features.split("|") for name, features in rows}


def measure(fit):
    """Call `fit`: what it returns, and its `Times`."""
    start, cpu_start = time.perf_counter(), time.process_time()
    fitted = fit()
    return fitted, Times(time.perf_counter() - start, time.process_time() - cpu_start)


def result(system, predictions, times):
    """A system's line of the results; `predictions` are of the test part's rows in their order."""
    return {"system": system, "predictions": [float(p) for p in predictions], **times._asdict()}


def write(folder, results):
    """Write the results to where the caller of the script looks for them."""
    (folder / "results.json").write_text(json.dumps(results))
