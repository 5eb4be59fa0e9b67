"""Cornac's whole job from files: read, build the data set, fit, 40 factors and 20 epochs.

Called with a folder of train.csv and test.csv (user, item, rating, a header line) and the moment
the process was started; writes results.json: system, mse, seconds from that moment to the end of
the fit. Errors are of predictions clipped to the training ratings' range.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy
from cornac.data import Dataset, Reader
from cornac.models import MF


def main():
    folder, started = Path(sys.argv[1]), float(sys.argv[2])
    rows = Reader().read(folder / "train.csv", fmt="UIR", sep=",", skip_lines=1)
    dataset = Dataset.from_uir(rows, seed=0)
    model = MF(k=40, max_iter=20, learning_rate=0.01, lambda_reg=0.1, seed=0).fit(dataset)
    seconds = time.time() - started
    test = numpy.loadtxt(folder / "test.csv", delimiter=",", skiprows=1)
    users, items = (
        numpy.array([index.get(str(int(name)), -1) for name in column])
        for index, column in ((dataset.uid_map, test[:, 0]), (dataset.iid_map, test[:, 1]))
    )
    bias = numpy.where(users >= 0, model.u_biases[users], 0)
    bias = bias + numpy.where(items >= 0, model.i_biases[items], 0)
    dot = (model.u_factors[users] * model.i_factors[items]).sum(1)
    prediction = model.global_mean + bias + numpy.where((users >= 0) & (items >= 0), dot, 0)
    error = prediction.clip(dataset.min_rating, dataset.max_rating) - test[:, 2]
    system = f"Cornac {version('cornac')} MF, 40 factors, 20 epochs"
    result = {"system": system, "mse": float((error**2).mean()), "seconds": seconds}
    (folder / "results.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
