"""Surprise: SVD, SVD++ and KNNBaseline with their defaults, and the first and last tuned."""

from functools import partial
from importlib.metadata import version

import peer
from surprise import SVD, Dataset, KNNBaseline, Reader, SVDpp

BETWEEN_ITEMS = {"name": "pearson_baseline", "user_based": False}
TUNED = {"n_factors": 40, "n_epochs": 100, "lr_all": 0.01, "reg_all": 0.1}
KNN = partial(KNNBaseline, verbose=False)
SYSTEMS = {
    "SVD": partial(SVD, random_state=peer.SEED),
    "SVD++": partial(SVDpp, random_state=peer.SEED),
    "KNNBaseline": KNN,
    "KNNBaseline between items, pearson_baseline": partial(KNN, sim_options=BETWEEN_ITEMS),
    "SVD, 40 factors, 100 epochs, lr 0.01, reg 0.1": partial(SVD, **TUNED, random_state=peer.SEED),
}


def systems(folder):
    _, test = peer.read_parts(folder)
    reader = Reader(line_format="user item rating timestamp", sep="\t")
    train = Dataset.load_from_file(folder / "train.tsv", reader).build_full_trainset()

    def predict(model):
        return [model.predict(row.user, row.item).est for row in test]

    for name, make in SYSTEMS.items():
        yield f"Surprise {version('scikit-surprise')} {name}", partial(make().fit, train), predict
