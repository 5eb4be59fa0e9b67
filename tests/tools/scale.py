"""Make a synthetic set of ratings with the shape of MovieLens 25M: `make(path, 25_000_095)`.

162,541 users and 59,047 items, or the same share of both as of the ratings, each with a rating at
least; long-tailed counts of both; half stars from 0.5 to 5 of a low-rank table plus noise; a CSV
file with MovieLens's header, sorted by user, then item, as GroupLens's are.
"""

import math

import numpy
import polars

N_USERS, N_ITEMS, N_RATINGS = 162_541, 59_047, 25_000_095
RANK, NOISE = 8, 0.75  # of the table, in stars
BLOCK = 1 << 20  # ratings written at a time


def make(path, n_ratings, *, seed=0):
    """Write `n_ratings` lines to `path`."""
    rng = numpy.random.default_rng(seed)
    n_users, n_items = (math.ceil(n * n_ratings / N_RATINGS) for n in (N_USERS, N_ITEMS))
    n_items = max(n_items, 1_000)  # of which a user rates 154 on average
    keys = draw_pairs(rng, n_users, n_items, n_ratings)
    item_ids = numpy.sort(rng.choice(numpy.arange(1, 4 * n_items), n_items, replace=False))
    user_factors, item_factors = (
        rng.normal(0, std, (n, RANK)) for std, n in ((0.35, n_users), (0.6, n_items))
    )
    user_bias, item_bias = rng.normal(0, 0.4, n_users), rng.normal(-0.3, 0.5, n_items)
    joined = rng.integers(800_000_000, 1_570_000_000, n_users)  # Unix seconds
    with open(path, "wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        for start in range(0, n_ratings, BLOCK):
            users, items = numpy.divmod(keys[start : start + BLOCK], n_items)
            dot = (user_factors[users] * item_factors[items]).sum(1)
            stars = 3.6 + user_bias[users] + item_bias[items] + dot
            stars += rng.normal(0, NOISE, len(users))
            columns = {
                "user": users + 1,
                "item": item_ids[items],
                "rating": (numpy.round(2 * stars) / 2).clip(0.5, 5),
                "timestamp": joined[users] + rng.integers(0, 200_000, len(users)),
            }
            polars.DataFrame(columns).write_csv(file, include_header=False)


def draw_pairs(rng, n_users, n_items, n_ratings):
    """Distinct pairs `user * n_items + item`, sorted: log-normal counts of users, items by rank."""
    counts = rng.lognormal(4.25, 1.15, n_users).clip(20, 0.4 * n_items)
    counts = (counts * 1.1 * n_ratings / counts.sum()).astype(int) + 1
    cumulative = numpy.cumsum((numpy.arange(n_items) + 30.0) ** -1.55)
    ranked = rng.permutation(n_items)

    def draw(size):
        return ranked[numpy.searchsorted(cumulative, rng.random(size) * cumulative[-1])]

    every_item = rng.integers(0, n_users, n_items) * n_items + numpy.arange(n_items)
    every_user = numpy.arange(n_users) * n_items + draw(n_users)
    kept = numpy.union1d(every_item, every_user)
    drawn = []
    for start in range(0, n_users, 4_000):  # users; as one array, the sort would take gigabytes
        users = numpy.repeat(numpy.arange(n_users)[start : start + 4_000], counts[start:][:4_000])
        keys = numpy.unique(users * n_items + draw(len(users)))
        while (missing := len(users) - len(keys)) > len(users) // 20:  # twice the same pair
            more = rng.choice(users, missing) * n_items + draw(missing)
            keys = numpy.union1d(keys, more)
        drawn.append(keys)
    others = numpy.setdiff1d(numpy.concatenate(drawn), kept, assume_unique=True)
    others = rng.choice(others, n_ratings - len(kept), replace=False, shuffle=False)
    return numpy.sort(numpy.concatenate([kept, others]))
