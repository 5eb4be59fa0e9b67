"""cmfrec: collective matrix factorisation by alternating least squares, 40 factors.

With its other defaults, and with what was rated at all as features of users and of items.
"""

from importlib.metadata import version

import numpy
import peer
from cmfrec import CMF
from scipy.sparse import coo_matrix

SYSTEMS = {"": {}, ", implicit features": {"add_implicit_features": True}}
K = 40


def main():
    folder = peer.folder()
    train, test = (peer.read_ratings(folder / f"{part}.tsv") for part in ("train", "test"))
    shape, columns = [], []
    for names in ([row.user for row in train + test], [row.item for row in train + test]):
        ids, rows = numpy.unique(names, return_inverse=True)
        shape.append(len(ids))
        columns.append(numpy.split(rows.astype("int32"), [len(train)]))
    (users, test_users), (items, test_items) = columns
    ratings = numpy.array([row.rating for row in train], dtype="float32")
    matrix = coo_matrix((ratings, (users, items)), shape=shape)
    results = []
    for name, options in SYSTEMS.items():
        model = CMF(k=K, method="als", nthreads=1, verbose=False, random_state=peer.SEED, **options)
        _, times = peer.measure(lambda model=model: model.fit(matrix))
        predictions = model.predict(test_users, test_items)
        predictions = numpy.where(numpy.isnan(predictions), model.glob_mean_, predictions)
        system = f"cmfrec {version('cmfrec')} CMF, {K} factors{name}"
        results.append(peer.result(system, predictions, times))
    peer.write(folder, results)


if __name__ == "__main__":
    main()
