"""LensKit: biased ALS and item-item nearest neighbours with their defaults.

Where a scorer has no score its pipeline falls back on biases, as LensKit's documentation has it.
Nearest neighbours do much of their work when they predict, which is not in the time of the fit.
"""

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


def read_frame(path):
    columns = ["user_id", "item_id", "rating", "timestamp"]
    return pandas.read_csv(path, sep="\t", names=columns).drop(columns="timestamp")


def fit(scorer, dataset):
    pipeline = predict_pipeline(scorer)
    pipeline.train(dataset, TrainingOptions(rng=peer.SEED))
    return pipeline


def main():
    folder = peer.folder()
    dataset = from_interactions_df(read_frame(folder / "train.tsv"))
    test = read_frame(folder / "test.tsv")
    results = []
    for name, scorer in SYSTEMS.items():
        pipeline, times = peer.measure(lambda scorer=scorer: fit(scorer(), dataset))
        scores = predict(pipeline, test, n_jobs=1).to_df()
        # The predictions come grouped by user.
        predictions = test.merge(scores, on=["user_id", "item_id"], how="left")["score"]
        system = f"LensKit {version('lenskit')} {name}"
        results.append(peer.result(system, predictions, times))
    peer.write(folder, results)


if __name__ == "__main__":
    main()
