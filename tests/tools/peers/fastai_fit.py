"""fastai 2: the settings of the notebook, with fastai's own loader and with a plain one.

fastai's loader of tables draws the rows of an epoch with replacement, which leaves out a third of
them; the plain one goes through all.
"""

from functools import partial
from importlib.metadata import version

import pandas
import peer
from fastai.collab import TabularCollab, collab_learner
from fastai.data.all import TransformBlock
from fastai.tabular.all import Categorify, TabDataLoader, set_seed

LOADERS = {"": None, ", plain loader": TabDataLoader}  # None: its own, TabWeightedDL


def fit(learner):
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(10, 1e-2)
    return learner


def systems(folder):
    names = ["user", "item", "rating", "timestamp"]
    train, test = (
        pandas.read_csv(folder / f"{part}.tsv", sep="\t", names=names) for part in ("train", "test")
    )

    def predict(learner):
        with learner.no_bar(), learner.no_logging():
            return learner.get_preds(dl=learner.dls.test_dl(test.copy()))[0].flatten()

    # As of `CollabDataLoaders.from_df`, with no part of the training part held out.
    parts = list(range(len(train))), []
    options = {"y_names": ["rating"], "y_block": TransformBlock(), "splits": parts}
    for name, loader in LOADERS.items():
        set_seed(peer.SEED)
        table = TabularCollab(train.copy(), [Categorify], ["user", "item"], **options)
        loaders = table.dataloaders(bs=64, dl_type=loader)
        learner = collab_learner(loaders, n_factors=40, y_range=(0, 5.5), wd=0.1)
        yield f"fastai {version('fastai')}{name}", partial(fit, learner), predict
