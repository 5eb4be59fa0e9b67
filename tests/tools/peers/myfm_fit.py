"""myFM: factorisation machines by Gibbs sampling, rank 10, 300 draws, with more and more features.

A rating's features are, in blocks: the user and the items that the user rated in training, each
1 / sqrt(their number); the item and the users who rated it, likewise; then the day of the rating,
as one of the user's days and as one of all days; then demographics, genres and years. A feature
that the training part does not have is none. No test rating is read.
"""

import math
from collections import defaultdict
from functools import partial
from importlib.metadata import version

import numpy
import peer
from myfm import MyFMOrderedProbit, MyFMRegressor, RelationBlock
from scipy.sparse import csr_matrix, hstack

DAY = 86400  # seconds
TIMES = {
    "user day": lambda row: (row.user, row.timestamp // DAY),
    "day": lambda row: row.timestamp // DAY,
}
FULL = ("id", "implicit", "user day", "day", "side")
SYSTEMS = {  # what the features are made of; whether the ratings are taken as ordered levels
    "ids": (FULL[:1], False),
    "ids + implicit": (FULL[:2], False),
    "ids + implicit + user's day": (FULL[:3], False),
    "ids + implicit + user's day + day + side, ordered probit": (FULL, True),
}
N_DRAWS = 300


def encode(rows, vocabulary):
    """A sparse matrix: row r has 1 / sqrt(n) at each of its n values that the vocabulary has."""
    index = {value: column for column, value in enumerate(sorted(vocabulary))}
    starts, columns, values = [0], [], []
    for row in rows:
        known = [index[value] for value in row if value in index]
        columns += known
        values += [1 / math.sqrt(len(known)) for _ in known]
        starts.append(len(columns))
    return csr_matrix((values, columns, starts), shape=(len(rows), len(index)))


def side_matrices(names, pairs, told, kinds):
    """The blocks of features of the users or items `names`, from pairs of one and its partner."""
    partners = defaultdict(list)
    for name, partner in pairs:
        partners[name].append(partner)
    side = {feature for name in partners for feature in told[name]}
    blocks = {  # the values of each name, and those that the training part has
        "id": ([[name] for name in names], set(partners)),
        "implicit": ([partners.get(name, []) for name in names], {other for _, other in pairs}),
        "side": ([told.get(name, []) for name in names], side),
    }
    return [encode(*block) for kind, block in blocks.items() if kind in kinds]


def assemble(train, test, sides, kinds):
    """myFM's arguments: `(X, X_rel)` of the training and of the test part, and the group sizes."""
    parts = (train, test)
    times = [find for kind, find in TIMES.items() if kind in kinds]
    main = [
        [encode([[find(row)] for row in rows], set(map(find, train))) for find in times]
        for rows in parts
    ]
    sizes = [block.shape[1] for block in main[0]]
    relations = [[], []]
    for key, other, told in sides:
        names = sorted({getattr(row, key) for row in train + test})
        pairs = [(getattr(row, key), getattr(row, other)) for row in train]
        place = {name: number for number, name in enumerate(names)}
        blocks = side_matrices(names, pairs, told, kinds)
        sizes += [block.shape[1] for block in blocks]
        matrix = hstack(blocks).tocsr()
        for rows, relation in zip(parts, relations, strict=True):
            places = [place[getattr(row, key)] for row in rows]
            relation.append(RelationBlock(places, matrix))
    matrices = [hstack(blocks).tocsr() if blocks else None for blocks in main]
    return *zip(matrices, relations, strict=True), sizes


def systems(folder):
    train, test = peer.read_parts(folder)
    ratings = numpy.array([row.rating for row in train])
    levels, classes = numpy.unique(ratings, return_inverse=True)
    sides = (
        ("user", "item", peer.read_features(folder / "users.tsv")),
        ("item", "user", peer.read_features(folder / "items.tsv")),
    )
    for name, (kinds, is_ordered) in SYSTEMS.items():
        part, test_part, sizes = assemble(train, test, sides, kinds)
        model = (MyFMOrderedProbit if is_ordered else MyFMRegressor)(rank=10, random_seed=peer.SEED)
        options = {"X_rel": part[1], "group_shapes": sizes, "n_iter": N_DRAWS}
        fit = partial(model.fit, part[0], classes if is_ordered else ratings, **options)

        def predict(model, is_ordered=is_ordered, test_part=test_part):
            if is_ordered:
                return model.predict_proba(*test_part) @ levels
            return model.predict(*test_part)

        yield f"myFM {version('myfm')} {name}", fit, predict
