"""Matrix factorisation with biases, from ids alone or from features: prediction, loss, gradient.

>>> import torch
>>> from model import bounded, init_params, join, loss_and_grad, predict
>>> params = init_params(3, 5, n_factors=2, generator=torch.Generator().manual_seed(0))
>>> users, items, ratings = torch.tensor([0, 2]), torch.tensor([4, 1]), torch.tensor([5.0, 3.0])
>>> head = bounded(0, 5.5)
>>> loss, (grad,) = loss_and_grad([join(params)], users, items, ratings, n_users=3, head=head)
>>> predict(params, torch.tensor([[0], [1]]), torch.arange(5), head=head).shape
torch.Size([2, 5])
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Parameters


class Params(NamedTuple):
    """The tables of the model, or anything of their shapes, such as their gradients.

    With features a row belongs to a feature, not to a user or an item: see `embed`.
    """

    user_factors: Tensor  # (n_users, K)
    item_factors: Tensor  # (n_items, K)
    user_bias: Tensor  # (n_users,), or (n_users, Q) for a head of Q > 1 outputs
    item_bias: Tensor  # (n_items,), or (n_items, Q)


def init_params(
    n_users: int,
    n_items: int,
    *,
    n_factors: int,
    generator: torch.Generator,
    n_outputs: int = 1,
    std: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Params:
    """All four tables from a normal distribution cut at two deviations, times `std`, as in fastai.

    `n_outputs` is the head's: biases are (n,) for one output and (n, n_outputs) for more.
    Cut means `fmod(2)`: a draw beyond two deviations is wrapped towards zero, not drawn again.
    (`torch.nn.init.trunc_normal_(std=0.01)` would cut nothing: its bounds are absolute.)
    """
    if min(n_users, n_items, n_factors) < 1:
        raise ValueError(f"cannot make {n_users} x {n_items} rows of {n_factors} factors")
    outputs = () if n_outputs == 1 else (n_outputs,)
    shapes = (n_users, n_factors), (n_items, n_factors), (n_users, *outputs), (n_items, *outputs)
    draws = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return Params(*(draw.fmod_(2).mul_(std) for draw in draws))


def join(params: Params) -> Tensor:
    """One table of all four, (n_users + n_items, K + Q): the users' rows, then the items'.

    It is what is trained: one gather, one sum of gradients and one step of Adam for all four. A row
    is its factors, then its biases. `split_table` undoes it.
    """
    sides = (params.user_factors, params.user_bias), (params.item_factors, params.item_bias)
    return torch.cat([torch.cat([p, b.reshape(len(b), -1)], 1) for p, b in sides])


def split_table(table: Tensor, n_users: int, *, n_outputs: int = 1) -> Params:
    """The four tables as views of what `join` has made of them."""
    bias = -1 if n_outputs == 1 else slice(-n_outputs, None)
    users, items = table[:n_users], table[n_users:]
    return Params(users[:, :-n_outputs], items[:, :-n_outputs], users[:, bias], items[:, bias])


# Heads


class Head(NamedTuple):
    """From the sums z of dot product and biases to ratings, and to a loss of them."""

    n_outputs: int  # Q: z is (...,) for Q = 1, (..., Q) otherwise
    slope: float  # d rating / dz at z = 0, in all outputs together
    predict: Callable[[Tensor], Tensor]  # z to ratings (...,)
    loss_and_grad: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # z, ratings to loss, d/dz
    curvature: Callable[[Tensor], Tensor]  # z to the expected second derivative of a loss, d2/dz2


def bounded(low: float, high: float, *, mean: float | None = None, unit: float = 1.0) -> Head:
    """A sigmoid into `y_range = (low, high)` and the mean squared error, as in fastai.

        prediction = low + (high - low) s,  s = sigmoid(z + z0)
        loss = mean over the batch of ((prediction - rating) / unit)^2
        d loss / dz = 2 (prediction - rating) (high - low) s (1 - s) / unit^2 / B

    At z = 0 the prediction is `mean`, the middle of `y_range` unless given: that makes z0. With a
    `unit` that goes with the ratings, such as their deviation, training is the same at any scale.
    ValueError unless low < mean < high.
    """
    mean = (low + high) / 2 if mean is None else mean
    span = high - low
    share = (mean - low) / span if span > 0 else math.nan
    if not 0 < share < 1:  # also where the ends are too far out for it to be told
        raise ValueError(f"the mean {mean:g} is not between {low:g} and {high:g}")
    z0 = math.log(share / (1 - share))

    def squash(z: Tensor) -> Tensor:
        return torch.sigmoid(z + z0 if z0 else z)

    def predict(z: Tensor) -> Tensor:
        return squash(z) * span + low

    def loss_and_grad(z: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
        s, total = squash(z), len(ratings) * unit**2
        error = (low - ratings).add_(s, alpha=span)
        dz = torch.ops.aten.sigmoid_backward(error, s)  # error s (1 - s)
        return error.dot(error) / total, dz.mul_(2 * span / total)

    def curvature(z: Tensor) -> Tensor:
        s = squash(z)
        return 2 * (span / unit * s * (1 - s)).square()

    return Head(1, span * share * (1 - share), predict, loss_and_grad, curvature)


def ordinal(levels: Sequence[float], shares: Sequence[float]) -> Head:
    """Q logistic regressions, [rating > level q] for each level but the last, with one dot product.

        prediction = level_0 + sum_q (level_q+1 - level_q) sigmoid(z_q + logit(share_q))
        loss       = mean over the batch of sum_q binary cross-entropy([rating > level_q])
        d loss / dz_q = (sigmoid - [rating > level_q]) / B

    `levels` are the Q + 1 values a rating takes, ascending; `shares` the Q shares of training
    ratings above each, at which the predictions start. Only the biases tell the outputs apart, so
    that a user may be generous with fives and sparing with threes.
    Source: Cao, Mirjalili & Raschka 2020, "Rank consistent ordinal regression for neural networks",
    equations 1 to 4, with biases of users and items in place of the global ones; unlike theirs,
    these do not force the Q probabilities into order.
    """
    fit = len(levels) == len(shares) + 1 > 2 and list(levels) == sorted(set(levels))
    if not fit or not all(0 < share < 1 for share in shares):
        raise ValueError(f"levels {list(levels)} and shares {list(shares)} do not fit")
    share = torch.tensor(shares, dtype=torch.float64)
    base, lower = share.logit(), torch.tensor(levels[:-1], dtype=torch.float64)
    gaps = torch.tensor(levels, dtype=torch.float64).diff()

    def predict(z: Tensor) -> Tensor:
        return torch.sigmoid(z + base.to(z)) @ gaps.to(z) + levels[0]

    def loss_and_grad(z: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
        z = z + base.to(z)
        above = (ratings.unsqueeze(1) > lower.to(z)).to(z)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, above, reduction="sum")
        return loss / len(ratings), (torch.sigmoid(z) - above) / len(ratings)

    def curvature(z: Tensor) -> Tensor:
        s = torch.sigmoid(z + base.to(z))
        return s * (1 - s)

    slope = (gaps * share * (1 - share)).sum().item()
    return Head(len(shares), slope, predict, loss_and_grad, curvature)


# Averages


class Averages(NamedTuple):
    """The mean rating, and how far each user's and each item's ratings lie from it."""

    mean: float
    users: Tensor  # (n_users,), of the ratings' dtype
    items: Tensor  # (n_items,)


def find_averages(
    users: Tensor, items: Tensor, ratings: Tensor, *, n_users: int, n_items: int, shrink: float = 5
) -> Averages:
    """The averages of `ratings` (N,) of rows `users` and `items`, int64 (N,).

    With r the rating, m the mean of all and each sum over the ratings of an item or a user, n their
    number,

        offset_item = sum (r - m) / (n + shrink)
        offset_user = sum (r - m - offset_item) / (n + shrink)

    and m + offset_user + offset_item predicts a rating. With `shrink` above 0 the offset of a row
    without ratings is 0.
    Source: Koren 2008, "Factorization meets the neighborhood", section 2.1, whose offsets these
    are, found one after the other as in Bell & Koren 2007.
    """
    mean = ratings.mean(dtype=torch.float64).item()
    rest, offsets = ratings - mean, []
    for rows, n_rows in ((items, n_items), (users, n_users)):
        counts = torch.bincount(rows, minlength=n_rows)
        offsets.append(rest.new_zeros(n_rows).index_add_(0, rows, rest) / (counts + shrink))
        rest -= offsets[-1][rows]
    return Averages(mean, offsets[1], offsets[0])


def find_center(params: Params, averages: Averages, *, head: Head) -> Params:
    """Zeros of the shapes of `params`, but for first biases that predict the averages.

    Params that decay towards it, rather than towards zero, are near the averages where ratings are
    few. To first order: a bias is the offset over the slope of the head's prediction, the same for
    all of the head's outputs. Rows beyond those of the averages are of other features than the id.
    """
    center = Params(*map(torch.zeros_like, params))
    for bias, offsets in ((center.user_bias, averages.users), (center.item_bias, averages.items)):
        bias[: len(offsets)] = (offsets / head.slope).view(-1, *[1] * (bias.dim() - 1))
    return center


# Prediction, loss and gradient


def predict(
    params: Params, users: Tensor, items: Tensor, context: Tensor | None = None, *, head: Head
) -> Tensor:
    """Predicted ratings of pairs of rows: `users` and `items` int64, their shapes broadcast.

        head.predict(user_factors . item_factors + user_bias + item_bias)

    (B,) with (B,) gives B pairs; (B, 1) with (n_items,) gives a (B, n_items) matrix, every item
    for each user, by one matrix product. `context` (B, J) has features of each rating, such as its
    time, which add to the user's row; their rows are the last J of the user tables.
    Source: Koren, Bell & Volinsky 2009, "Matrix factorization techniques for recommender systems",
    equation 4; the sigmoid is fastai's.
    """
    p, _, user_bias, _ = take_users(params, users, context)
    q, item_bias = params.item_factors[items], params.item_bias[items]
    is_matrix = users.dim() == 2 and users.shape[1] == 1 and items.dim() == 1
    dot = p[:, 0] @ q.T if is_matrix else (p * q).sum(-1)
    return head.predict((dot if head.n_outputs == 1 else dot.unsqueeze(-1)) + user_bias + item_bias)


def take_users(params: Params, users: Tensor, context: Tensor | None = None) -> Params:
    """`params` with of the users' rows those of `users`, each at the moment of its `context`."""
    p, user_bias = params.user_factors[users], params.user_bias[users]
    if context is not None:
        if users.dim() != 1:
            raise ValueError(f"with context, users must be (B,), not {tuple(users.shape)}")
        p = p + context @ params.user_factors[-context.shape[1] :]
        user_bias = user_bias + context @ params.user_bias[-context.shape[1] :]
    return params._replace(user_factors=p, user_bias=user_bias)


@torch.inference_mode()  # a fifth less of a small batch's time; nothing here is differentiated
def loss_and_grad(
    params: Sequence[Tensor],
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    context: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    n_users: int,
    head: Head,
) -> tuple[Tensor, list[Tensor]]:
    """The head's loss of a batch, and its gradient, derived by hand.

    `params` is one table, as `join` makes it, with `n_users` rows of users; so is the gradient.
    `users` and `items` int64 (B,), `ratings` (B,), `context` (B, J) or None, for which the last J
    of the users' rows are. With dz the head's d loss / dz, a row's biases get the sum of dz over
    its pairs, its factors the sum of dz times the other side's factors. `kept` (B, K) scales the
    products of each pair's dot product: see `with_dropout`.

    Any other shape is a ValueError and never broadcast: (B,) against (B, 1) would average over
    B x B pairs, which trains the biases alone and looks like a result.
    """
    if not users.shape == items.shape == ratings.shape or users.dim() != 1 or not len(users):
        shapes = ", ".join(str(tuple(t.shape)) for t in (users, items, ratings))
        raise ValueError(f"users, items and ratings must be (B,), not {shapes}")
    (table,) = params
    n_factors = table.shape[1] - head.n_outputs
    items = items + n_users
    rows, there = torch.cat([users, items]), torch.cat([items, users])
    pairs = table.index_select(0, rows).view(2, len(users), -1)  # users' rows, items' (2, B, C)
    if context is not None:
        moments = slice(n_users - context.shape[1], n_users)
        pairs[0].addmm_(context, table[moments])
    (p, q), (user_bias, item_bias) = pairs.tensor_split([n_factors], 2)  # (B, K), (B, Q)
    if kept is not None:
        p *= kept
    z = (p * q).sum(1, keepdim=True) + user_bias + item_bias
    loss, dz = head.loss_and_grad(z if head.n_outputs > 1 else z.view(-1), ratings)
    dz = dz.view(z.shape)
    if kept is not None:
        q *= kept
    # A side's gradient is a multiple of the other side's rows: made where these are, summed there.
    grads = pairs.mul_(dz if head.n_outputs == 1 else dz.sum(1, keepdim=True))
    grads[:, :, n_factors:] = dz
    grad = torch.zeros_like(table).index_add_(0, there, grads.view(len(rows), -1))
    if context is not None:
        grad[moments].addmm_(context.T, grads[1])
    return loss, [grad]


def with_dropout(
    loss_and_grad: Callable, *, dropout: float, n_factors: int, generator: torch.Generator
) -> Callable:
    """`loss_and_grad` with a share `dropout` of the products of each pair's dot product left out.

    Those left are scaled up by 1 / (1 - dropout). They are drawn from `generator` anew for each
    batch, the whole of it, so wrap what `train.share` has made, not the other way round.
    """

    def dropped(params: Sequence[Tensor], *batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        shape, dtype = (len(batch[0]), n_factors), params[0].dtype
        # Half the time of bernoulli_.
        kept = torch.rand(shape, generator=generator, dtype=dtype).ge_(dropout).div_(1 - dropout)
        return loss_and_grad(params, *batch, kept=kept)

    return dropped


# Unknown and new users and items


def add_average(params: Params, seen_users: Tensor, seen_items: Tensor) -> Params:
    """Rows for what training told nothing of: the mean of the seen rows of their table.

    That is each row not seen, by `seen_users` bool (n_users,) and `seen_items` bool (n_items,), and
    one more for unknown ids, at index n_users behind the users and n_items behind the items. Rows
    beyond the users', of features of a moment, stay last.
    """
    tables = []
    for table, seen in zip(params, (seen_users, seen_items) * 2, strict=True):
        own, rest = table.split([len(seen), len(table) - len(seen)])
        tables.append(torch.cat([own, own[seen].mean(0, keepdim=True), rest]))
        tables[-1][: len(seen)][~seen] = tables[-1][len(seen)]
    return Params(*tables)


class Prior(NamedTuple):
    """What is believed of a user's row, factors then biases, before any rating: a normal law."""

    mean: Tensor  # (K + Q,) float64
    variance: Tensor  # (K + Q,)


def find_prior(
    rows: Params, users: Tensor, *, width: float, implicit: tuple[Tensor, Tensor] | None = None
) -> Prior:
    """The `Prior` that trained users, rows `users` int64 (n,) of the tables `rows`, show.

    Their mean; as variance `width` times theirs, one for all factors and one for each bias. A width
    above 1 is for that trained rows are shrunk themselves. Where a part of a user's row is made of
    the items that the user rated, `implicit` has that part of each row, (n_users, K + Q), and of
    the new user's, (K + Q,): the variance is of the rest.
    """
    bias = rows.user_bias[users]
    own = torch.cat([rows.user_factors[users], bias.view(len(bias), -1)], 1)
    own = own if implicit is None else own - implicit[0][users]
    mean, variance = own.double().mean(0), own.double().var(0, correction=0)
    n_factors = rows.user_factors.shape[1]
    variance[:n_factors] = variance[:n_factors].mean()
    return Prior(mean if implicit is None else mean + implicit[1], variance * width + 1e-12)


def fold_in(
    item_factors: Tensor,
    item_bias: Tensor,
    ratings: Tensor,
    *,
    prior: Prior,
    head: Head,
    noise: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A user's factors (K,) and bias, () or (Q,), from ratings (N,), nothing else changing.

    `item_factors` (N, K) and `item_bias` (N,) or (N, Q) are the rows of the items rated. The row
    x = (p, b) is the one of the greatest posterior density,

        argmin_x  N loss(z(x), ratings) / noise + sum_k (x_k - mean_k)^2 / (2 variance_k)

    with z(x)_i = p . q_i + b + item_bias_i. `noise` is 1 for `ordinal`, and for `bounded` twice the
    mean squared error of predictions, such as the loss in training. It is found by at most 50 steps
    of Newton's method with the expected curvature, K + Q equations each, a step halved while the
    sum rises; where `bounded` has several minima it is one of them. No rating: the prior's mean.
    Source: the user's half of alternating least squares, Zhou et al. 2008, "Large-scale parallel
    collaborative filtering for the Netflix prize", section 3, with a prior from the other users.
    """
    item_bias, ratings, precision = item_bias.double(), ratings.double(), 1 / prior.variance
    # A line for each z: d z / d x.
    each = torch.eye(head.n_outputs, dtype=torch.float64).repeat(len(ratings), 1)
    design = torch.cat([item_factors.double().repeat_interleave(head.n_outputs, 0), each], 1)

    def posterior(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = (design @ x).view(item_bias.shape) + item_bias
        loss, dz = head.loss_and_grad(z, ratings)
        away, scale = x - prior.mean, len(ratings) / noise
        slope = design.T @ dz.reshape(-1) * scale + precision * away
        return loss * scale + (precision * away.square()).sum() / 2, slope, z

    x = prior.mean.clone()
    for _ in range(50 if len(ratings) else 0):
        before, slope, z = posterior(x)
        ridge = design.T @ (design * head.curvature(z).reshape(-1, 1) / noise)
        step = torch.linalg.solve(ridge + torch.diag(precision), slope)
        while step.abs().max() > 1e-9 and posterior(x - step)[0] > before:
            step = step / 2
        x = x - step
        if step.abs().max() < 1e-6:
            break
    factors, bias = x.to(item_factors).tensor_split([item_factors.shape[1]])
    return factors, bias.view(item_bias.shape[1:])


def add_user(
    rows: Params,
    items: Tensor,
    ratings: Tensor,
    *,
    prior: Prior,
    head: Head,
    noise: float = 1.0,
    context: Tensor | None = None,
) -> Params:
    """`rows` with one user in place of theirs: who gave `ratings` (N,) to `items` (N,), int64.

    By `fold_in`. `context` (N, J) has features of each rating, as in `predict`, whose rows stay the
    last J.
    """
    factors, bias = rows.item_factors[items], rows.item_bias[items]
    n_rest = 0 if context is None else context.shape[1]
    rest = [table[len(table) - n_rest :] for table in (rows.user_factors, rows.user_bias)]
    if context is not None:  # it adds to the user's row; here it is a part of what the item is
        dot = ((context @ rest[0]) * factors).sum(1)
        bias = bias + context @ rest[1] + (dot.unsqueeze(1) if head.n_outputs > 1 else dot)
    found = fold_in(factors, bias, ratings, prior=prior, head=head, noise=noise)
    factors, bias = (torch.cat([x.unsqueeze(0), r]) for x, r in zip(found, rest, strict=True))
    return rows._replace(user_factors=factors, user_bias=bias)


# Lists: what people pick, which is not what they rate highly.


def find_tastes(
    users: Tensor, items: Tensor, *, n_users: int, n_items: int, n_factors: int = 20
) -> Tensor:
    """Factors of the items by who rated what, (n_items, at most n_factors), by PureSVD.

    With X (n_users, n_items) one where a user has rated an item and zero elsewhere, whatever the
    rating, they are its first right singular vectors V, so that x V V' is the part of a user's x
    that others' picks explain. `users`, in order, and `items` are rows (N,). By five steps
    of subspace iteration, V <- orth(X' X V), with eight vectors more than are kept: the last ones
    are exact to a few percent. At MovieLens 25M's shape 11 s on two threads, in 0.3 GiB.
    Source: Cremonesi, Koren & Turrin 2010, "Performance of recommender algorithms on top-N
    recommendation tasks"; Halko, Martinsson & Tropp 2011, "Finding structure with randomness".
    """
    counts = torch.bincount(users, minlength=n_users)
    starts, blocks = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(items.dtype), []
    for part in starts.unfold(0, 2, 1).split(1 << 15):  # X' of all at once takes 1 GB at 25 million
        begins = torch.cat([part[:, 0], part[-1:, 1]])
        own, shape = items[begins[0] : begins[-1]], (len(part), n_items)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CSR is called beta
            block = begins - begins[0], own, torch.ones(len(own)), shape
            blocks.append(torch.sparse_csr_tensor(*block, check_invariants=False))
    generator = torch.Generator().manual_seed(0)
    n_vectors = min(n_factors + 8, n_users, n_items)
    vectors = torch.randn(n_items, n_vectors, generator=generator)
    for _ in range(5):
        basis = torch.linalg.qr(vectors)[0]
        vectors = sum(block.t() @ (block @ basis) for block in blocks)
    basis = torch.linalg.qr(vectors)[0]
    picks = torch.cat([block @ basis for block in blocks])
    _, sizes, rotation = torch.linalg.svd(picks, full_matrices=False)
    rotation = rotation.T * (sizes > 1e-4 * sizes[0])  # others tell of nothing
    return (basis @ rotation)[:, :n_factors].contiguous()


def score_tastes(tastes: Tensor, rated: Sequence[Tensor], counts: Tensor) -> Tensor:
    """x V V' (B, n_items) of each user's `rated`, rows of items, by `find_tastes`.

    Who has rated nothing gets those that most have rated: x is then `counts` (n_items,), the
    ratings of each item, over their sum.
    """
    prior = counts / counts.sum() @ tastes
    sums = prior.repeat(len(rated), 1)
    for own, items in zip(sums, rated, strict=True):
        if len(items):
            torch.sum(tastes[items], 0, out=own)
    return sums @ tastes.T


# Similar items, components, likings


def find_similar(factors: Sequence[Tensor], row: int) -> Tensor:
    """Cosine of the factors of every row with those of one, (n,); the mean over the members.

    `factors` has one (n, K) for each model of an ensemble, since their factors have nothing to do
    with each other. Factors of length zero are like nothing: 0.
    """
    units = (torch.nn.functional.normalize(each, dim=1) for each in factors)
    return torch.stack([unit @ unit[row] for unit in units]).mean(0)


def find_components(item_factors: Sequence[Tensor], n: int = 2) -> tuple[Tensor, Tensor]:
    """The first `n` principal components of items, (n_items, n), and their shares of variance (n,).

    Of all members' factors side by side, the largest variance first. The sign, which is arbitrary,
    is such that the item furthest out is positive.
    """
    rows = torch.cat([factors.double() for factors in item_factors], 1)
    rows = rows - rows.mean(0)
    variances, axes = torch.linalg.eigh(rows.T @ rows)  # (K, K): cheap for millions of items
    places = rows @ axes.flip(1)[:, :n]
    furthest = places.abs().argmax(0, keepdim=True)
    shares = variances.flip(0)[:n] / variances.sum()
    return places * places.gather(0, furthest).sign(), shares


def find_likings(members: Sequence[Params], user: int, *, head: Head) -> Tensor:
    """How items are liked, whoever rates, (n_items,): the mean over the members of

        head.predict(user_bias + item_bias)

    the rating that an item's bias predicts without factors, `user` being the average one's row.
    """
    ratings = [head.predict(params.user_bias[user] + params.item_bias) for params in members]
    return torch.stack(ratings).mean(0)


# Features


class Features(NamedTuple):
    """What the rows of users and items are made of: a sparse matrix and its transpose.

    A matrix is (starts, columns, values) as in `torch.nn.functional.embedding_bag`: row r has
    `columns` (int64) and `values` from `starts[r]` to `starts[r + 1]`, (n_rows + 1,) of them.
    Rows and columns are in the order of `join`: users', then items'.
    """

    matrix: tuple[Tensor, Tensor, Tensor]  # (n_users + n_items, F + G)
    transposed: tuple[Tensor, Tensor, Tensor]  # (F + G, n_users + n_items)


def embed(table: Tensor, matrix: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`matrix` times `table`: rows of users and items, each the sum of its features' rows.

    From a table of F + G features (F + G, C) it makes one of users and items, (n_users + n_items,
    C). With the identity as matrix the two are the same: a model of ids alone.
    Source: Rendle 2010, "Factorization machines", without the products inside a side; SVD++ is the
    case of the user's id and rated items.
    """
    starts, columns, values = matrix
    # Twice as fast here as a product of torch's sparse CSR matrix.
    return torch.nn.functional.embedding_bag(
        columns, table, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def regress_unrated(
    rows: Tensor, matrix: tuple[Tensor, Tensor, Tensor], n_ratings: Tensor, *, ridge: float
) -> Tensor:
    """The `rows` (n, C) of users or of items, those without ratings by what their features tell.

    An unrated row's own features were not trained, and it has no implicit ones, so that the sum of
    the rest is no row like the others. With x_i the features that unrated rows have, and a one, and
    w_i the number of ratings (n,) over its mean, it is m + x_i B, where

        m = the mean of the rated rows, weighed by w
        B minimises sum_i w_i |r_i - m - x_i B|^2 + ridge |B|^2

    over the rated rows, by conjugate gradients (Hestenes & Stiefel 1952). `matrix` is `embed`'s, of
    these rows.
    """
    starts, columns, values = matrix
    is_rated, n = n_ratings > 0, len(rows)
    if is_rated.all():
        return rows
    lines = torch.arange(n).repeat_interleave(starts.diff())
    columns, values = columns[starts[0] : starts[-1]], values[starts[0] : starts[-1]]
    used, columns = columns.unique(return_inverse=True)
    is_used = torch.zeros(len(used) + 1, dtype=torch.bool)
    is_used[columns[~is_rated[lines]]] = True
    kept = is_used[columns]
    places = torch.stack([lines[kept], columns[kept]])
    ones = torch.stack([torch.arange(n), torch.full((n,), len(used))])
    features = torch.sparse_coo_tensor(
        torch.cat([places, ones], 1),
        torch.cat([values[kept], torch.ones(n)]),
        (n, len(used) + 1),
        check_invariants=True,
    )
    weights = (n_ratings / n_ratings[is_rated].double().mean()).float().unsqueeze(1)
    mean = (weights * rows).sum(0) / weights.sum()
    transposed = features.t()
    residual = transposed @ (weights * (rows - mean))
    slopes, step, norm = torch.zeros_like(residual), residual, residual.square().sum(0)
    for _ in range(100):
        product = transposed @ (weights * (features @ step)) + ridge * step
        rate = norm / (step * product).sum(0).clamp_min(1e-30)
        slopes, residual = slopes + rate * step, residual - rate * product
        norm, old = residual.square().sum(0), norm
        step = residual + norm / old.clamp_min(1e-30) * step
    return torch.where(is_rated.unsqueeze(1), rows, mean + features @ slopes)


def embedded_loss_and_grad(
    params: Sequence[Tensor], *batch: Tensor, features: Features, **options
) -> tuple[Tensor, list[Tensor]]:
    """`loss_and_grad` of the table that `embed` makes, with the gradient in the features' table.

    `batch` and `options` are those of `loss_and_grad`; `params` and the gradient have F + G rows.
    Rows are linear in their features' rows, so the gradient comes back through the transpose.
    """
    loss, grads = loss_and_grad([embed(params[0], features.matrix)], *batch, **options)
    return loss, [embed(grads[0], features.transposed)]
