"""Cornac: matrix factorisation with biases by compiled SGD, 40 factors, regularisation 0.1."""

from functools import partial
from importlib.metadata import version

import peer
from cornac.data import Dataset
from cornac.models import MF


def systems(folder):
    train, test = peer.read_parts(folder)
    dataset = Dataset.from_uir([row[:3] for row in train], seed=peer.SEED)
    model = MF(k=40, max_iter=100, learning_rate=0.01, lambda_reg=0.1, seed=peer.SEED)

    def predict(model):
        users, items = dataset.uid_map, dataset.iid_map
        return [model.rate(users.get(row.user, -1), items.get(row.item, -1)) for row in test]

    system = f"Cornac {version('cornac')} MF, 40 factors, 100 epochs, reg 0.1"
    yield system, partial(model.fit, dataset), predict
