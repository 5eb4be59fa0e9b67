"""Matrix factorisation with biases, from ids alone or from features: prediction, loss, gradient.

>>> import torch
>>> from model import bounded, init_params, loss_and_grad, predict
>>> params = init_params(3, 5, n_factors=2, generator=torch.Generator().manual_seed(0))
>>> users, items, ratings = torch.tensor([0, 2]), torch.tensor([4, 1]), torch.tensor([5.0, 3.0])
>>> loss, grads = loss_and_grad(params, users, items, ratings, head=bounded(0, 5.5))
>>> predict(params, torch.tensor([[0], [1]]), torch.arange(5), head=bounded(0, 5.5)).shape
torch.Size([2, 5])
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
    for name, count in (("n_users", n_users), ("n_items", n_items), ("n_factors", n_factors)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    outputs = () if n_outputs == 1 else (n_outputs,)
    shapes = (n_users, n_factors), (n_items, n_factors), (n_users, *outputs), (n_items, *outputs)
    draws = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return Params(*(draw.fmod_(2).mul_(std) for draw in draws))


class Head(NamedTuple):
    """From the sums z of dot product and biases to ratings, and to a loss of them."""

    n_outputs: int  # Q: z is (...,) for Q = 1, (..., Q) otherwise
    predict: Callable[[Tensor], Tensor]  # z to ratings (...,)
    loss_and_grad: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # z, ratings to loss, d/dz
    # The same for batches in turn, of ratings (n, B): a function from the next one's z to d loss /
    # dz, and one that gives the losses (n,) after the last. What all share is worked out once.
    in_turn: Callable[[Tensor], tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]]
    # z, ratings (B,) to the negative log-likelihood, summed, and its first and expected second
    # derivative in each z, for `fold_in`
    newton: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def bounded(low: float, high: float) -> Head:
    """A sigmoid into `y_range = (low, high)` and the mean squared error, as in fastai.

    prediction = low + (high - low) sigmoid(z)
    d loss / dz = 2 (prediction - rating) (high - low) s (1 - s) / B,  s = sigmoid(z)
    """
    span = high - low

    def predict(z: Tensor) -> Tensor:
        return torch.sigmoid(z) * span + low

    def loss_and_grad(z: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(z)
        error = s * span + (low - ratings)
        return error.dot(error) / len(ratings), error * (s - s * s) * (2 * span / len(ratings))

    def in_turn(ratings: Tensor) -> tuple[Callable, Callable]:
        n_ratings = ratings.shape[1]
        # An error, (high - low) s + low - rating, times 2 (high - low) / B: all but the s of it is
        # known before. Times s (1 - s) it is d loss / dz.
        scale = 2 * span**2 / n_ratings
        errors = (low - ratings) * (scale / span)
        rows = iter(errors.unbind())

        def grad(z: Tensor) -> Tensor:
            s = torch.sigmoid(z)
            return torch.ops.aten.sigmoid_backward(next(rows).add_(s, alpha=scale), s)

        return grad, lambda: errors.square().sum(1) * (span**2 / scale**2 / n_ratings)

    def newton(z: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = torch.sigmoid(z)
        error, slope = s * span + (low - ratings), span * s * (1 - s)
        return error.dot(error) / 2, error * slope, slope.square()

    return Head(1, predict, loss_and_grad, in_turn, newton)


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
    if len(levels) < 3 or len(shares) != len(levels) - 1 or list(levels) != sorted(set(levels)):
        raise ValueError(f"levels {list(levels)} and shares {list(shares)} do not fit")
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares must be in (0, 1), not {list(shares)}")
    base = torch.tensor(shares, dtype=torch.float64).logit()
    lower = torch.tensor(levels[:-1], dtype=torch.float64)
    gaps = torch.tensor(levels, dtype=torch.float64).diff()

    def predict(z: Tensor) -> Tensor:
        return torch.sigmoid(z + base.to(z)) @ gaps.to(z) + levels[0]

    def loss_and_grad(z: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
        z = z + base.to(z)
        above = (ratings.unsqueeze(1) > lower.to(z)).to(z)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, above, reduction="sum")
        return loss / len(ratings), (torch.sigmoid(z) - above) / len(ratings)

    def in_turn(ratings: Tensor) -> tuple[Callable, Callable]:
        rows, losses = iter(ratings.unbind()), []

        def grad(z: Tensor) -> Tensor:
            loss, dz = loss_and_grad(z, next(rows))
            losses.append(loss)
            return dz

        return grad, lambda: torch.stack(losses)

    def newton(z: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, dz = loss_and_grad(z, ratings)
        s = torch.sigmoid(z + base.to(z))
        return loss * len(ratings), dz * len(ratings), s * (1 - s)

    return Head(len(shares), predict, loss_and_grad, in_turn, newton)


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
    if context is not None and users.dim() != 1:
        raise ValueError(f"with context, users must be (B,), not {tuple(users.shape)}")
    user_bias, item_bias = _rows(params.user_bias, users), _rows(params.item_bias, items)
    if users.dim() == 2 and users.shape[1] == 1 and items.dim() == 1:
        dot = params.user_factors[users[:, 0]] @ params.item_factors[items].T
    else:
        p = _rows(params.user_factors, users)
        if context is not None:
            p = p + context @ params.user_factors[-context.shape[1] :]
            user_bias = user_bias + context @ params.user_bias[-context.shape[1] :]
        dot = (p * _rows(params.item_factors, items)).sum(-1)
    if head.n_outputs > 1:
        dot = dot.unsqueeze(-1)
    return head.predict(dot + user_bias + item_bias)


def predict_all(members: Sequence[Params], users: Tensor, *, head: Head) -> Tensor:
    """Predicted ratings of every item for `users` (B,): (B, n_items), the mean over the members."""
    items = torch.arange(len(members[0].item_factors))
    total = predict(members[0], users.unsqueeze(1), items, head=head)
    for params in members[1:]:
        total += predict(params, users.unsqueeze(1), items, head=head)
    return total.div_(len(members)) if len(members) > 1 else total


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]` in a fifth of its time."""
    return table.index_select(0, rows.reshape(-1)).view(*rows.shape, *table.shape[1:])


def loss_and_grad(
    params: Params,
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    context: Tensor | None = None,
    *,
    head: Head,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    rand: Callable[..., Tensor] = torch.rand,
) -> tuple[Tensor, Params]:
    """The head's loss of a batch, and its gradient in every table, derived by hand.

    `users` and `items` int64 (B,), `ratings` (B,), `context` (B, J) or None. With dz the head's
    d loss / dz, a bias gets the sum of dz over the pairs it takes part in, and a row of factors the
    sum of dz times the other side's row. `dropout` is the share of the K products of each pair left
    out of its dot product, drawn from `generator` by `rand`, called as `torch.rand`; the rest is
    scaled up.

    Any other shape is a ValueError and never broadcast: (B,) against (B, 1) would average over
    B x B pairs, which trains the biases alone and looks like a result.
    """
    if not users.shape == items.shape == ratings.shape or users.dim() != 1 or not len(users):
        shapes = ", ".join(str(tuple(t.shape)) for t in (users, items, ratings))
        raise ValueError(f"users, items and ratings must be (B,), not {shapes}")
    p, q = _rows(params.user_factors, users), _rows(params.item_factors, items)  # (B, K)
    user_bias = _rows(params.user_bias, users)  # (B,) or (B, Q)
    if context is not None:
        n_context = context.shape[1]
        p = p + context @ params.user_factors[-n_context:]
        user_bias = user_bias + context @ params.user_bias[-n_context:]
    if dropout:
        # Half the time of bernoulli_.
        draw = rand(q.shape, generator=generator, dtype=q.dtype)
        kept = draw.ge_(dropout).div_(1 - dropout)
        q = q * kept
    dot = (p * q).sum(1, keepdim=head.n_outputs > 1)
    loss, dz = head.loss_and_grad(dot + user_bias + _rows(params.item_bias, items), ratings)
    column = _sum_outputs(dz)
    dp, dq = q * column, p * column
    if dropout:
        dq *= kept
    grads = Params(
        torch.zeros_like(params.user_factors).index_add_(0, users, dp),
        torch.zeros_like(params.item_factors).index_add_(0, items, dq),
        torch.zeros_like(params.user_bias).index_add_(0, users, dz),
        torch.zeros_like(params.item_bias).index_add_(0, items, dz),
    )
    if context is not None:
        grads.user_factors[-n_context:] += context.T @ dp
        grads.user_bias[-n_context:] += context.T @ dz
    return loss, grads


def _sum_outputs(dz: Tensor) -> Tensor:
    """d loss / d dot product, (B, 1), of d loss / dz, (B,) or (B, Q)."""
    return dz.unsqueeze(1) if dz.dim() == 1 else dz.sum(1, keepdim=True)


def join(params: Params) -> Tensor:
    """One table of all four, (n_users + n_items, K + Q + 0 to 3): the users' rows, then the items'.

    A row is its factors, its biases, and zeros up to a multiple of four columns, in which rows are
    moved about two to four times as fast. `split_table` undoes it.
    """
    sides = (params.user_factors, params.user_bias), (params.item_factors, params.item_bias)
    rows = torch.cat([torch.cat([p, b.reshape(len(b), -1)], 1) for p, b in sides])
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))


def split_table(table: Tensor, n_users: int, *, n_factors: int, n_outputs: int = 1) -> Params:
    """The four tables as views of what `join` has made of them."""
    factors, bias = _columns(n_factors, n_outputs)
    users, items = table[:n_users], table[n_users:]
    return Params(users[:, factors], items[:, factors], users[:, bias], items[:, bias])


def _columns(n_factors: int, n_outputs: int) -> tuple:
    """Where `join` puts factors and biases."""
    bias = n_factors if n_outputs == 1 else slice(n_factors, n_factors + n_outputs)
    return slice(n_factors), bias


def pair_loss_and_grad_(
    pairs: Tensor, grads: Tensor, ratings: Tensor, *, n_factors: int, head: Head
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """`loss_and_grad` of gathered rows of `join`'s table, for the batches `ratings` (n, B) in turn.

    `pairs` (2, B, C) holds the users' rows of a batch, then the items'. Returns two functions. A
    call of the first goes on to the next batch and writes to `grads`, of the same shape, the
    gradient of the items' rows, then of the users': but for the biases one product, since each is a
    multiple of the other side's row. The second gives the losses (n,) after the last batch.
    """
    factors, bias = _columns(n_factors, head.n_outputs)
    p, q = pairs[:, :, factors]
    user_bias, item_bias = pairs[:, :, bias]
    bias_grads = grads[:, :, bias]
    row, column = p.unsqueeze(1), q.unsqueeze(2)
    product = pairs.new_empty(len(p), 1, 1)
    dot = product[:, 0] if head.n_outputs > 1 else product[:, 0, 0]  # (B, 1) or (B,)
    grad, losses = head.in_turn(ratings)

    def compute_() -> None:
        torch.bmm(row, column, out=product)  # the fastest of torch's ways to dot products of rows
        dz = grad(torch.add(user_bias, dot).add_(item_bias))
        torch.mul(pairs, _sum_outputs(dz), out=grads)
        bias_grads.copy_(dz)

    return compute_, losses


def fill_unseen(params: Params, seen_users: Tensor, seen_items: Tensor) -> Params:
    """Give each row of which training told nothing the mean of the other rows of its table.

    An unseen user then is an average user, an unseen item an average item, where the rows that
    training left near zero would be a prediction in the middle of `y_range`. `seen_users` bool
    (n_users,), `seen_items` bool (n_items,); rows beyond these are left alone.
    """

    def fill(table: Tensor, seen: Tensor) -> Tensor:
        if seen.all():
            return table
        filled = table.clone()
        filled[: len(seen)][~seen] = table[: len(seen)][seen].mean(0)
        return filled

    return Params(
        fill(params.user_factors, seen_users),
        fill(params.item_factors, seen_items),
        fill(params.user_bias, seen_users),
        fill(params.item_bias, seen_items),
    )


def append_average(params: Params, seen_users: Tensor, seen_items: Tensor) -> Params:
    """A row behind the users' and one behind the items': the mean of those seen, for unknown ids.

    As `fill_unseen` does for rows that are there; rows beyond the users' stay behind.
    """
    tables = []
    for table, seen in zip(params, (seen_users, seen_items) * 2, strict=True):
        own, rest = table.split([len(seen), len(table) - len(seen)])
        tables.append(torch.cat([own, own[seen].mean(0, keepdim=True), rest]))
    return Params(*tables)


class Prior(NamedTuple):
    """What is believed of a user's row, factors then biases, before any rating: a normal law."""

    mean: Tensor  # (K + Q,) float64
    variance: Tensor  # (K + Q,)


def find_prior(factors: Tensor, bias: Tensor, *, width: float) -> Prior:
    """The `Prior` that the rows of trained users show: `factors` (n, K), `bias` (n,) or (n, Q).

    Their mean; as variance `width` times theirs, one for all factors and one for each bias. A width
    above 1 is for that trained rows are shrunk themselves.
    """
    rows = torch.cat([factors, bias.reshape(len(bias), -1)], 1).double()
    variance = rows.var(0, correction=0)
    variance[: factors.shape[1]] = variance[: factors.shape[1]].mean()
    return Prior(rows.mean(0), variance * width + 1e-12)


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

        argmin_x  nll(ratings | z(x)) / noise + sum_k (x_k - mean_k)^2 / (2 variance_k)

    with z(x)_i = p . q_i + b + item_bias_i. `noise` is the variance of ratings around predictions
    for `bounded`, such as its loss in training, and 1 for `ordinal`. Were the predictions linear in
    x, as they nearly are, this would be a ridge problem: K + Q equations. These are solved exactly
    with the slope at the current x, until x stands still (Newton's method with the expected
    curvature, its step halved while the sum rises), for 50 steps at most. For `bounded`, of which
    the sum may have several minima, it is one of these. No rating: the prior's mean.
    Source: the user's half of alternating least squares, Zhou et al. 2008, "Large-scale parallel
    collaborative filtering for the Netflix prize", section 3, with a prior from the other users.
    """
    n_factors = item_factors.shape[1]
    q, item_bias, ratings = (t.double() for t in (item_factors, item_bias, ratings))
    precision = 1 / prior.variance
    if not len(ratings):
        return _split_row(prior.mean, n_factors, head, item_factors.dtype)

    def find_z(x: Tensor) -> Tensor:
        factors, bias = _split_row(x, n_factors, head, x.dtype)
        dot = q @ factors
        return (dot.unsqueeze(1) if head.n_outputs > 1 else dot) + bias + item_bias

    def penalty(x: Tensor) -> Tensor:
        return (precision * (x - prior.mean).square()).sum() / 2

    x = prior.mean.clone()
    for _ in range(50):
        nll, dz, curvature = head.newton(find_z(x), ratings)
        dz, curvature = (t.reshape(len(q), -1) / noise for t in (dz, curvature))
        slope = torch.cat([q.T @ dz.sum(1), dz.sum(0)]) + precision * (x - prior.mean)
        ridge = torch.diag(precision) + _sum_curvature(q, curvature)
        step, before = torch.linalg.solve(ridge, slope), nll / noise + penalty(x)
        while step.abs().max() > 1e-9:
            if head.newton(find_z(x - step), ratings)[0] / noise + penalty(x - step) <= before:
                break
            step = step / 2
        x = x - step
        if step.abs().max() < 1e-6:
            break
    return _split_row(x, n_factors, head, item_factors.dtype)


def _sum_curvature(q: Tensor, curvature: Tensor) -> Tensor:
    """sum_i sum_q c_iq j_iq j_iq^T, j_iq = (q_i, e_q): (K + Q, K + Q) of (N, K) and (N, Q)."""
    mixed = q.T @ curvature
    of_factors = (q * curvature.sum(1, keepdim=True)).T @ q
    return torch.cat(
        [torch.cat([of_factors, mixed], 1), torch.cat([mixed.T, curvature.sum(0).diag()], 1)]
    )


def _split_row(row: Tensor, n_factors: int, head: Head, dtype: torch.dtype) -> tuple:
    factors, bias = _columns(n_factors, head.n_outputs)
    return row[factors].to(dtype), row[bias].to(dtype)


def find_similar(item_factors: Sequence[Tensor], item: int) -> Tensor:
    """Cosine of every item's factors with those of `item`, (n_items,); the mean over the members.

    `item_factors` has one (n_items, K) for each model of an ensemble, since their factors have
    nothing to do with each other. Factors of length zero are like nothing: 0.
    """
    cosines = []
    for factors in item_factors:
        unit = torch.nn.functional.normalize(factors, dim=1)
        cosines.append(unit @ unit[item])
    return torch.stack(cosines).mean(0)


def find_components(item_factors: Sequence[Tensor], n: int = 2) -> Tensor:
    """The first `n` principal components of items, (n_items, n), all members' factors side by side.

    Of the largest variance first. The sign, which is arbitrary, is such that the item furthest out
    is positive.
    """
    rows = torch.cat([factors.double() for factors in item_factors], 1)
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)  # (K, K): cheap for millions of items
    places = rows @ axes.flip(1)[:, :n]
    furthest = places.abs().argmax(0, keepdim=True)
    return places * places.gather(0, furthest).sign()


class Features(NamedTuple):
    """What the rows of both sides are made of: sparse matrices, each a triple of tensors.

    The triple is (starts, columns, values) as in `torch.nn.functional.embedding_bag`: row r has
    `columns` (int64) and `values` from `starts[r]` to `starts[r + 1]`, (n_rows + 1,) of them.
    """

    users: tuple[Tensor, Tensor, Tensor]  # (n_users, F)
    items: tuple[Tensor, Tensor, Tensor]  # (n_items, G)
    users_transposed: tuple[Tensor, Tensor, Tensor]  # (F, n_users)
    items_transposed: tuple[Tensor, Tensor, Tensor]  # (G, n_items)


def embed(params: Params, features: Features) -> Params:
    """Tables of users and items from tables of features: a row is the sum of its features' rows.

    `params` has F and G rows, the result n_users and n_items, and is what `predict` takes. With
    identity matrices the two are the same: a model of ids alone. Source: Rendle 2010,
    "Factorization machines", without the products inside a side; SVD++ is the case of the user's id
    and rated items.
    """
    return _multiply(features.users, features.items, params)


def embedded_loss_and_grad(
    params: Params, *batch: Tensor, features: Features, **options
) -> tuple[Tensor, Params]:
    """`loss_and_grad` of `embed(params, features)`, with the gradient in the features' tables.

    `batch` and `options` are those of `loss_and_grad`, rows of users and items in `batch`; `params`
    and the gradient have F and G rows. A row is linear in its features' rows, so the gradient comes
    back through the transpose.
    """
    loss, grads = loss_and_grad(embed(params, features), *batch, **options)
    return loss, _multiply(features.users_transposed, features.items_transposed, grads)


def _multiply(users: tuple, items: tuple, params: Params) -> Params:
    """Both sides' matrices times their tables, factors and biases in one pass over the indices."""
    tables = []
    for (starts, columns, values), factors, bias in (
        (users, params.user_factors, params.user_bias),
        (items, params.item_factors, params.item_bias),
    ):
        n_factors = factors.shape[1]
        # Twice as fast here as a product of torch's sparse CSR matrix.
        product = torch.nn.functional.embedding_bag(
            columns,
            torch.cat([factors, bias.reshape(len(bias), -1)], 1),
            starts,
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )
        tables.append((product[:, :n_factors], product[:, n_factors:].reshape(-1, *bias.shape[1:])))
    (user_factors, user_bias), (item_factors, item_bias) = tables
    return Params(user_factors, item_factors, user_bias, item_bias)
