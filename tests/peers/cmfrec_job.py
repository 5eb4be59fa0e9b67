"""cmfrec's whole job from files: read, number the ids, fit CMF, by alternating least squares.

Called with a folder of train.csv and test.csv (user, item, rating, a header line), the moment the
process was started, and numbers of factors and iterations; writes results.json: system, mse,
seconds from that moment to the end of the fit, fit_seconds from a sparse matrix on. Errors are of
predictions clipped to the training ratings' range. Threads are OMP_NUM_THREADS.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy
import pandas
from cmfrec import CMF
from scipy.sparse import coo_matrix


def main():
    folder, started = Path(sys.argv[1]), float(sys.argv[2])
    k, niter = map(int, sys.argv[3:])
    train, test = parts = [
        pandas.read_csv(folder / f"{part}.csv", keep_default_na=False) for part in ("train", "test")
    ]
    shape, columns = [], []
    for name in ("user", "item"):
        rows, ids = pandas.factorize(pandas.concat([part[name] for part in parts]), sort=True)
        shape.append(len(ids))
        columns.append(numpy.split(rows.astype("int32"), [len(train)]))
    ratings = train["rating"].to_numpy("float32")
    (users, test_users), (items, test_items) = columns
    matrix = coo_matrix((ratings, (users, items)), shape=shape)
    nthreads = int(os.environ["OMP_NUM_THREADS"])
    model = CMF(k=k, niter=niter, nthreads=nthreads, method="als", verbose=False, random_state=0)
    fit_started = time.time()
    model.fit(matrix)
    seconds, fit_seconds = (time.time() - start for start in (started, fit_started))
    prediction = model.predict(test_users, test_items)
    prediction = numpy.where(numpy.isnan(prediction), model.glob_mean_, prediction)
    error = prediction.clip(ratings.min(), ratings.max()) - test["rating"].to_numpy()
    system = f"cmfrec {version('cmfrec')} CMF, {k} factors, {niter} iterations"
    result = {"system": system, "mse": float((error**2).mean()), "seconds": seconds}
    result["fit_seconds"] = fit_seconds
    (folder / "results.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
