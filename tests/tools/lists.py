"""Measure lists of ten items: ours, the most rated items, EASE, implicit.

`python tests/tools/lists.py` prints a Markdown table: of the test part's ratings of four stars and
more, ndcg, recall, hit rate and mean reciprocal rank at ten, the items of the training part left
out. All systems see the training part alone, and their lists are measured alike, by `train.rank`.
EASE is Steck 2019, its closed form here in four lines, with the regularisation that its author has
for data of this size; implicit (`pip install implicit`) is left out where it is not installed.
"""

import click
import torch
from common import echo_heads, echo_row, notice

import collab
import train

K, FIGURES = 10, ("ndcg", "recall", "hit_rate", "mrr")


def rank(scores, rated, relevant):
    """The figures of `scores` (n_users, n_items), without the items that are `rated`."""
    items = scores.masked_fill(rated > 0, -torch.inf).topk(K).indices
    users = torch.arange(len(items)).repeat_interleave(K)
    ranks = torch.arange(1, K + 1).repeat(len(items))
    lists = collab.to_frame(("user", "rank", "item"), users, ranks, items.reshape(-1))
    return train.rank(lists, relevant, k=K)


def ease(rated, weight=300.0):
    """x B with B = I - P / diag P, P = (X'X + weight I)^-1."""
    inverse = torch.linalg.inv((rated.T @ rated + weight * torch.eye(rated.shape[1])).double())
    loadings = (-inverse / inverse.diagonal()).fill_diagonal_(0)
    return rated @ loadings.float()


def alternate(rated):
    """implicit's alternating least squares, 40 factors, else its defaults; None without it."""
    try:
        from implicit.als import AlternatingLeastSquares
        from scipy.sparse import csr_matrix
    except ImportError:
        return notice("implicit is not installed: pip install implicit")
    fitted = AlternatingLeastSquares(factors=40, random_state=0, num_threads=1)
    fitted.fit(csr_matrix(rated.numpy()), show_progress=False)
    return torch.from_numpy(fitted.user_factors @ fitted.item_factors.T)


@click.command()
@click.option("--splits", default="ua,last10")
@click.option("--recipes", default="default,best")
def main(splits, recipes):
    """Print the table."""
    echo_heads("split", "lists by", *FIGURES)
    for split in splits.split(","):
        rows = {}
        for recipe in recipes.split(","):
            trained = collab.train_model(collab.prepare(collab.read(), recipe, split=split))
            rows[recipe] = collab.rank(trained, k=K, min_rating=4)
            rows[f"{recipe}, --by rating"] = collab.rank(trained, k=K, min_rating=4, by="rating")
        users, items, ratings = (
            trained.tensors[f"test_{n}"] for n in ("users", "items", "ratings")
        )
        relevant = collab.to_frame(("user", "item"), users[ratings >= 4], items[ratings >= 4])
        rated = torch.zeros(*map(len, trained.ids))
        rated[trained.tensors["train_users"].long(), trained.tensors["train_items"].long()] = 1
        rows["the number of ratings"] = rows[recipe]["popular"]
        rows["EASE"] = rank(ease(rated), rated, relevant)
        if (scores := alternate(rated)) is not None:
            rows["implicit, ALS"] = rank(scores, rated, relevant)
        for name, figures in rows.items():
            echo_row(split, name, *(f"{figures[each]:.3f}" for each in FIGURES))


if __name__ == "__main__":
    main()
