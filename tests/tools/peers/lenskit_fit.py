"""LensKit: biased ALS and item-item nearest neighbours with their defaults.

Where a scorer has no score its pipeline falls back on biases, as LensKit's documentation has it.
Nearest neighbours do much of their work when they predict, which is not in the time of the fit.
"""

from functools import partial
from importlib.metadata import version

import pandas
import peer
from lenskit.als import BiasedMFScorer
from lenskit.batch import predict
from lenskit.data import from_interactions_df
from lenskit.knn import ItemKNNScorer
from lenskit.pipeline import predict_pipeline
from lenskit.training import TrainingOptions

SYSTEMS = {"biased ALS": BiasedMFScorer, "ItemKNN": ItemKNNScorer}


def fit(scorer, dataset):
    pipeline = predict_pipeline(scorer)
    pipeline.train(dataset, TrainingOptions(rng=peer.SEED))
    return pipeline


def systems(folder):
    options = {"sep": "\t", "names": ["user_id", "item_id", "rating"], "usecols": [0, 1, 2]}
    train, test = (pandas.read_csv(folder / f"{part}.tsv", **options) for part in ("train", "test"))
    dataset = from_interactions_df(train)

    def score(pipeline):
        scores = predict(pipeline, test, n_jobs=1).to_df()
        # The predictions come grouped by user.
        return test.merge(scores, on=["user_id", "item_id"], how="left")["score"]

    for name, scorer in SYSTEMS.items():
        yield f"LensKit {version('lenskit')} {name}", partial(fit, scorer(), dataset), score
