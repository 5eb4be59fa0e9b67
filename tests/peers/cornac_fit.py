"""Cornac: matrix factorisation with biases by compiled SGD, 40 factors, regularisation 0.1."""

from importlib.metadata import version

import peer
from cornac.data import Dataset
from cornac.models import MF


def main():
    folder = peer.folder()
    train, test = (peer.read_ratings(folder / f"{part}.tsv") for part in ("train", "test"))
    dataset = Dataset.from_uir([row[:3] for row in train], seed=peer.SEED)
    model = MF(k=40, max_iter=100, learning_rate=0.01, lambda_reg=0.1, seed=peer.SEED)
    _, times = peer.measure(lambda: model.fit(dataset))
    predictions = [
        model.rate(dataset.uid_map.get(row.user, -1), dataset.iid_map.get(row.item, -1))
        for row in test
    ]
    system = f"Cornac {version('cornac')} MF, 40 factors, 100 epochs, reg 0.1"
    peer.write(folder, [peer.result(system, predictions, times)])


if __name__ == "__main__":
    main()
