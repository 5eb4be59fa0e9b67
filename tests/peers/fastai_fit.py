"""fastai 2: the settings of the notebook, with fastai's own loader and with a plain one.

fastai's loader of tables draws the rows of an epoch with replacement, which leaves out a third of
them; the plain one goes through all.
"""

from importlib.metadata import version

import pandas
import peer
from fastai.collab import TabularCollab, collab_learner
from fastai.data.all import TransformBlock
from fastai.tabular.all import Categorify, TabDataLoader, set_seed

LOADERS = {"": None, ", plain loader": TabDataLoader}  # None: its own, TabWeightedDL


def read_frame(path):
    return pandas.read_csv(path, sep="\t", names=["user", "item", "rating", "timestamp"])


def make_loaders(train, loader):
    """As `CollabDataLoaders.from_df` does, with no part of the training part held out."""
    table = TabularCollab(
        train,
        [Categorify],
        ["user", "item"],
        y_names=["rating"],
        y_block=TransformBlock(),
        splits=(list(range(len(train))), []),
    )
    return table.dataloaders(bs=64, dl_type=loader)


def main():
    folder = peer.folder()
    train, test = (read_frame(folder / f"{part}.tsv") for part in ("train", "test"))
    results = []
    for name, loader in LOADERS.items():
        set_seed(peer.SEED)
        loaders = make_loaders(train.copy(), loader)
        learner = collab_learner(loaders, n_factors=40, y_range=(0, 5.5), wd=0.1)
        with learner.no_bar(), learner.no_logging():
            _, times = peer.measure(lambda learner=learner: learner.fit_one_cycle(10, 1e-2))
            predictions, _ = learner.get_preds(dl=loaders.test_dl(test.copy()))
        system = f"fastai {version('fastai')}{name}"
        results.append(peer.result(system, predictions.flatten(), times))
    peer.write(folder, results)


if __name__ == "__main__":
    main()
