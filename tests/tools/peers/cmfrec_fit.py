"""cmfrec: collective matrix factorisation by alternating least squares.

With 40 factors and its other defaults, and with what was rated at all as features of users and of
items; or, called with numbers of factors and iterations, with these alone.
"""

import os
from functools import partial
from importlib.metadata import version

import numpy
import pandas
import peer
from cmfrec import CMF
from scipy.sparse import coo_matrix

SYSTEMS = {", 40 factors": {"k": 40}}
SYSTEMS[", 40 factors, implicit features"] = {"k": 40, "add_implicit_features": True}


def systems(folder, *sizes):
    options = {"sep": "\t", "names": ["user", "item", "rating"], "usecols": [0, 1, 2]}
    options |= {"dtype": {"user": str, "item": str}, "keep_default_na": False}
    train, test = (pandas.read_csv(folder / f"{part}.tsv", **options) for part in ("train", "test"))
    shape, columns = [], []
    for name in ("user", "item"):
        rows, ids = pandas.factorize(pandas.concat([train[name], test[name]]), sort=True)
        shape.append(len(ids))
        columns.append(numpy.split(rows.astype("int32"), [len(train)]))
    (users, test_users), (items, test_items) = columns
    matrix = coo_matrix((train["rating"].to_numpy("float32"), (users, items)), shape=shape)

    def predict(model):
        predictions = model.predict(test_users, test_items)
        return numpy.where(numpy.isnan(predictions), model.glob_mean_, predictions)

    chosen = SYSTEMS
    if sizes:
        k, niter = map(int, sizes)
        chosen = {f", {k} factors, {niter} iterations": {"k": k, "niter": niter}}
    common = {"nthreads": int(os.environ["OMP_NUM_THREADS"]), "random_state": peer.SEED}
    for name, options in chosen.items():
        model = CMF(method="als", verbose=False, **common, **options)
        yield f"cmfrec {version('cmfrec')} CMF{name}", partial(model.fit, matrix), predict
