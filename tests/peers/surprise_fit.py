"""Surprise: SVD, SVD++ and KNNBaseline with their defaults, and the first and last tuned."""

from importlib.metadata import version

import peer
from surprise import SVD, Dataset, KNNBaseline, Reader, SVDpp

SYSTEMS = {
    "SVD": lambda: SVD(random_state=peer.SEED),
    "SVD++": lambda: SVDpp(random_state=peer.SEED),
    "KNNBaseline": lambda: KNNBaseline(verbose=False),
    "KNNBaseline between items, pearson_baseline": lambda: KNNBaseline(
        sim_options={"name": "pearson_baseline", "user_based": False}, verbose=False
    ),
    "SVD, 40 factors, 100 epochs, lr 0.01, reg 0.1": lambda: SVD(
        n_factors=40, n_epochs=100, lr_all=0.01, reg_all=0.1, random_state=peer.SEED
    ),
}


def main():
    folder = peer.folder()
    test = peer.read_ratings(folder / "test.tsv")
    reader = Reader(line_format="user item rating timestamp", sep="\t")
    train = Dataset.load_from_file(folder / "train.tsv", reader).build_full_trainset()
    results = []
    for name, make in SYSTEMS.items():
        model, times = peer.measure(lambda make=make: make().fit(train))
        predictions = [model.predict(row.user, row.item).est for row in test]
        system = f"Surprise {version('scikit-surprise')} {name}"
        results.append(peer.result(system, predictions, times))
    peer.write(folder, results)


if __name__ == "__main__":
    main()
