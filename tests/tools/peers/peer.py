"""Run a peer in its own environment, `python peer.py NAME FOLDER ...`: needs nothing but Python.

NAME_fit.py beside this file has `systems(folder, ...)`, which yields `(name, fit, predict)` of each
system: `predict(fit())` is a prediction for each row of test.tsv, and `fit` is timed.
"""

import importlib
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


def read_parts(folder):
    """The ratings of train.tsv and of test.tsv, in their order."""
    for name in ("train.tsv", "test.tsv"):
        rows = (line.split("\t") for line in (folder / name).read_text().splitlines())
        yield [Rating(user, item, float(rating), int(time)) for user, item, rating, time in rows]


def read_features(path):
    """`{id: [feature, ...]}` of a file with lines `id feature|feature|...`."""
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {name: features.split("|") for name, features in rows}


def main():
    name, folder, *arguments = sys.argv[1:]
    folder, results = Path(folder), []
    systems = importlib.import_module(f"{name}_fit").systems
    for system, fit, predict in systems(folder, *arguments):
        start = time.perf_counter()
        model = fit()
        seconds = time.perf_counter() - start
        predictions = [float(prediction) for prediction in predict(model)]
        results.append({"system": system, "predictions": predictions, "seconds": seconds})
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
