from functools import partial

import pytest
import torch

import model

HEAD = model.bounded(0.5, 5.5)
ORDINAL = model.ordinal([1, 2, 3.5, 4, 5], [0.9, 0.8, 0.5, 0.2])


@pytest.fixture
def params():
    """Large enough for the sigmoid to bend: std 1, float64, three factors."""
    generator = torch.Generator().manual_seed(0)
    return model.init_params(6, 9, n_factors=3, generator=generator, std=1.0, dtype=torch.float64)


@pytest.fixture
def batch():
    """Users and items that occur several times in one batch."""
    users = torch.tensor([0, 5, 0, 2, 0, 5, 1])
    items = torch.tensor([8, 8, 8, 3, 1, 0, 3])
    ratings = torch.tensor([5, 1, 3.5, 4, 2, 5, 1], dtype=torch.float64)
    return users, items, ratings


def test_init_is_a_cut_normal():
    params = model.init_params(
        400, 500, n_factors=50, generator=torch.Generator().manual_seed(0), std=0.01
    )
    assert [tuple(p.shape) for p in params] == [(400, 50), (500, 50), (400,), (500,)]
    assert all(p.dtype == torch.float32 and p.abs().max() < 0.02 for p in params)
    # Wrapping at two deviations leaves a variance of 0.777 of the normal's.
    assert params.item_factors.std().item() == pytest.approx(0.00881, rel=0.02)
    assert abs(params.item_factors.mean().item()) < 2e-4


def test_init_depends_on_the_generator_alone():
    first, again, other = (
        model.init_params(3, 4, n_factors=2, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.user_factors, other.user_factors)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_init_names_the_bad_count(counts):
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        model.init_params(*counts[:2], n_factors=counts[2], generator=torch.Generator())


def test_prediction_is_the_formula(params):
    user, item = 2, 7
    p, q = params.user_factors[user].tolist(), params.item_factors[item].tolist()
    z = sum(a * b for a, b in zip(p, q, strict=True))
    z += params.user_bias[user].item() + params.item_bias[item].item()
    expected = 0.5 + 5 / (1 + 2.718281828459045**-z)
    got = model.predict(params, torch.tensor([user]), torch.tensor([item]), head=HEAD)
    assert got.tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("n_users", [1, 2, 6])
def test_prediction_broadcasts(params, n_users):
    every = torch.arange(9)
    got = model.predict(params, torch.arange(n_users).unsqueeze(1), every, head=HEAD)
    assert got.shape == (n_users, 9)
    for user in range(n_users):
        pairs = model.predict(params, torch.full((9,), user), every, head=HEAD)
        torch.testing.assert_close(got[user], pairs, rtol=0, atol=1e-12)
    # A column of items against a row of users goes through the other branch.
    users = torch.arange(n_users)
    other = model.predict(params, users, every.unsqueeze(1), head=HEAD)
    torch.testing.assert_close(other.T, got, rtol=0, atol=1e-12)


def sparse(matrix):
    """The triple of a dense matrix."""
    rows, columns = matrix.nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(matrix) + 1))
    return starts, columns, matrix[rows, columns]


def bounded_loss(z, ratings):
    return torch.nn.functional.mse_loss(HEAD.predict(z), ratings)


def ordinal_loss(z, ratings):
    """The negative log-likelihood of Q independent coins, written out."""
    total = 0.0
    for q, (level, share) in enumerate(zip([1, 2, 3.5, 4], [0.9, 0.8, 0.5, 0.2], strict=True)):
        p = 1 / (1 + torch.exp(-(z[:, q] + torch.logit(torch.tensor(share, dtype=torch.float64)))))
        total = total - torch.where(ratings > level, p, 1 - p).log().mean()
    return total


def make_params(n_users, n_items, head):
    generator = torch.Generator().manual_seed(1)
    options = {"n_factors": 3, "n_outputs": head.n_outputs, "std": 1.0, "dtype": torch.float64}
    return model.init_params(n_users, n_items, generator=generator, **options)


def sums(params, users, items, context=None, kept=1.0):
    """Dot product and biases of pairs, written without any of the model's functions."""
    p, b = params.user_factors[users], params.user_bias[users]
    if context is not None:
        p = p + context @ params.user_factors[-2:]
        b = b + context @ params.user_bias[-2:]
    dot = (p * params.item_factors[items] * kept).sum(1)
    bias = b + params.item_bias[items]
    return bias + (dot if bias.dim() == 1 else dot.unsqueeze(1))


HEADS = pytest.mark.parametrize(
    ("head", "loss"), [(HEAD, bounded_loss), (ORDINAL, ordinal_loss)], ids=["bounded", "ordinal"]
)


@HEADS
@pytest.mark.parametrize("has_context", [False, True])
@pytest.mark.parametrize("has_features", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_is_autograds(batch, head, loss, has_context, has_features, dropout):
    users, items, ratings = batch
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(len(users), 2, generator=generator).double() if has_context else None
    kept = 1.0
    if dropout:
        draw = torch.rand((7, 3), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        kept = (draw >= dropout).double() / (1 - dropout)
    ours, dense = model.loss_and_grad, None
    params = make_params(8, 9, head)
    if has_features:
        dense = [torch.randn(shape, generator=generator) for shape in ((8, 4), (9, 5))]
        dense = [(matrix * (matrix > 0)).double() for matrix in dense]
        matrices = [sparse(m) for m in dense] + [sparse(m.T) for m in dense]
        ours = partial(model.embedded_loss_and_grad, features=model.Features(*matrices))
        params = make_params(4, 5, head)

    def expected(leaves):
        if dense is not None:
            x, y = dense
            p, q, b, c = leaves
            leaves = model.Params(x @ p, y @ q, x @ b, y @ c)
        return loss(sums(leaves, users, items, context, kept), ratings)

    leaves = model.Params(*(param.clone().requires_grad_() for param in params))
    wanted = expected(leaves)
    wanted.backward()
    got, grads = ours(
        params,
        *(users, items, ratings, context),
        head=head,
        dropout=dropout,
        generator=torch.Generator().manual_seed(3),
    )
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    for name, grad, leaf in zip(params._fields, grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-11, atol=1e-13, msg=name)


def test_gradient_changes_nothing(params, batch):
    before = [param.clone() for param in params]
    model.loss_and_grad(params, *batch, head=HEAD)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_shapes_are_never_broadcast(params, batch):
    users, items, ratings = batch
    with pytest.raises(ValueError, match=r"must be \(B,\), not \(7,\), \(7,\), \(7, 1\)"):
        model.loss_and_grad(params, users, items, ratings.unsqueeze(1), head=HEAD)
    with pytest.raises(ValueError, match=r"must be \(B,\), not \(7, 1\), \(7,\), \(7,\)"):
        model.loss_and_grad(params, users.unsqueeze(1), items, ratings, head=HEAD)
    with pytest.raises(ValueError, match=r"must be \(B,\), not \(0,\), \(0,\), \(0,\)"):
        model.loss_and_grad(params, users[:0], items[:0], ratings[:0], head=HEAD)


def test_identity_features_are_ids(params, batch):
    """Bit for bit: the model of ids alone is the case 'identity matrix'."""
    matrices = [sparse(torch.eye(n, dtype=torch.float64)) for n in (6, 9, 6, 9)]
    features = model.Features(*matrices)
    for ours, theirs in zip(model.embed(params, features), params, strict=True):
        assert torch.equal(ours, theirs)
    loss, grads = model.loss_and_grad(params, *batch, head=HEAD)
    same_loss, same = model.embedded_loss_and_grad(params, *batch, features=features, head=HEAD)
    assert loss == same_loss
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))


def test_the_matrix_of_predictions_is_that_of_pairs_for_ordinal_too():
    params = make_params(6, 9, ORDINAL)
    every = torch.arange(9)
    got = model.predict(params, torch.arange(6).unsqueeze(1), every, head=ORDINAL)
    for user in range(6):
        pairs = model.predict(params, torch.full((9,), user), every, head=ORDINAL)
        torch.testing.assert_close(got[user], pairs, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"with context, users must be \(B,\), not \(6, 1\)"):
        model.predict(params, torch.arange(6).unsqueeze(1), every, torch.zeros(6, 2), head=ORDINAL)


def test_the_ordinal_prediction_is_the_expected_level():
    head = model.ordinal([1, 2, 4], [0.75, 0.25])
    assert head.predict(torch.zeros(3, 2)).tolist() == pytest.approx([1 + 0.75 + 2 * 0.25] * 3)
    sure = head.predict(torch.tensor([[50.0, 50.0], [50.0, -50.0], [-50.0, -50.0]]))
    assert sure.tolist() == pytest.approx([4, 2, 1])


@pytest.mark.parametrize(
    ("levels", "shares"),
    [([1, 2], [0.5]), ([1, 2, 3], [0.5]), ([1, 3, 2], [0.5, 0.2]), ([1, 2, 3], [1.0, 0.2])],
)
def test_levels_and_shares_that_do_not_fit(levels, shares):
    with pytest.raises(ValueError, match="shares"):
        model.ordinal(levels, shares)


def test_unseen_rows_are_the_mean_of_the_seen(params):
    seen_users = torch.tensor([True, True, False, True, True, True])
    filled = model.fill_unseen(params, seen_users, torch.ones(9, dtype=torch.bool))
    assert torch.equal(filled.user_factors[2], params.user_factors[seen_users].mean(0))
    assert torch.equal(filled.user_bias[2], params.user_bias[seen_users].mean(0))
    assert torch.equal(filled.user_factors[seen_users], params.user_factors[seen_users])
    assert torch.equal(filled.item_factors, params.item_factors)
    assert not torch.equal(params.user_factors[2], filled.user_factors[2]), "pure"


def test_context_adds_to_the_users_row(params):
    """The last rows of the user tables belong to the context's features."""
    users, items = torch.tensor([0, 1]), torch.tensor([3, 4])
    context = torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    without = model.predict(params, users, items, head=HEAD)
    got = model.predict(params, users, items, context, head=HEAD)
    changed = params.user_factors.clone()
    changed[0] += 2 * params.user_factors[5]
    bias = params.user_bias.clone()
    bias[0] += 2 * params.user_bias[5]
    moved = params._replace(user_factors=changed, user_bias=bias)
    assert got[1] == without[1]
    assert torch.equal(got, model.predict(moved, users, items, head=HEAD))


@HEADS
def test_the_gradient_of_gathered_rows_is_autograds(batch, head, loss):
    users, items, ratings = batch
    params = make_params(6, 9, head)
    table = model.join(params)
    assert table.shape == (15, 4 if head.n_outputs == 1 else 8)
    again = model.split_table(table, 6, n_factors=3, n_outputs=head.n_outputs)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    leaf = table.clone().requires_grad_()
    split = model.split_table(leaf, 6, n_factors=3, n_outputs=head.n_outputs)
    wanted = loss(sums(split, users, items), ratings)
    wanted.backward()
    rows = torch.stack([users, items + 6])
    pairs = table[rows]
    grads = torch.zeros_like(pairs)
    compute_, losses = model.pair_loss_and_grad_(
        pairs, grads, torch.stack([ratings, ratings]), n_factors=3, head=head
    )
    for _ in range(2):
        compute_()
        summed = torch.zeros_like(table)
        summed.index_add_(0, rows.flip(0).view(-1), grads.view(14, -1))
        torch.testing.assert_close(summed, leaf.grad, rtol=1e-11, atol=1e-13)
    assert losses().tolist() == pytest.approx([wanted.item()] * 2, rel=1e-12)


@HEADS
def test_the_parts_of_a_batch_have_its_dropout(batch, head, loss):
    """Weighted by their shares, they add up: each takes its rows of one draw for the whole."""
    params = make_params(6, 9, head)
    whole, grads = model.loss_and_grad(
        params, *batch, head=head, dropout=0.4, generator=torch.Generator().manual_seed(3)
    )
    total, sums = 0.0, [torch.zeros_like(param) for param in params]
    for places in (torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5, 6])):

        def rand(shape, places=places, **options):
            assert shape == (len(places), 3)
            return torch.rand(7, 3, **options)[places]

        part, part_grads = model.loss_and_grad(
            params,
            *(column[places] for column in batch),
            head=head,
            dropout=0.4,
            generator=torch.Generator().manual_seed(3),
            rand=rand,
        )
        total += part * len(places) / 7
        for summed, grad in zip(sums, part_grads, strict=True):
            summed += grad * len(places) / 7
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    for summed, grad in zip(sums, grads, strict=True):
        torch.testing.assert_close(summed, grad, rtol=0, atol=1e-12)


def rated(head, n=12, seed=0):
    """Items of three factors, ratings of them, and a prior, float64."""
    generator = torch.Generator().manual_seed(seed)
    outputs = () if head.n_outputs == 1 else (head.n_outputs,)
    q = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(n, *outputs, generator=generator, dtype=torch.float64)
    ratings = torch.randint(1, 6, (n,), generator=generator).double()
    rows = torch.randn(7, 3 + head.n_outputs, generator=generator, dtype=torch.float64)
    return q, bias, ratings, model.find_prior(rows[:, :3], rows[:, 3:].squeeze(1), width=4.0)


@pytest.mark.parametrize(("head", "noise"), [(HEAD, 0.6), (HEAD, 3.0), (ORDINAL, 1.0)])
@pytest.mark.parametrize("seed", range(5))
def test_a_folded_in_user_is_where_the_posterior_is_flat(head, noise, seed):
    """By autograd, of the objective that the docstring states, from the losses in training."""
    q, bias, ratings, prior = rated(head, seed=seed)
    p, b = model.fold_in(q, bias, ratings, prior=prior, head=head, noise=noise)
    x = torch.cat([p, b.reshape(-1)]).requires_grad_()
    z = (q @ x[:3]).reshape(len(q), *[1] * (bias.dim() - 1))
    z = z + (x[3:] if bias.dim() > 1 else x[3]) + bias
    n_halves = 2 if head is HEAD else 1  # a Gaussian's is half the squared error
    nll = head.loss_and_grad(z, ratings)[0] * len(ratings) / n_halves
    posterior = nll / noise + ((x - prior.mean).square() / prior.variance).sum() / 2
    (slope,) = torch.autograd.grad(posterior, x)
    assert slope.abs().max() < 1e-4
    elsewhere = model.fold_in(q, bias, ratings.flip(0), prior=prior, head=head, noise=noise)[0]
    assert not torch.allclose(p, elsewhere)


def test_a_fold_in_recovers_the_user_who_gave_the_ratings(params):
    user = 3
    items = torch.arange(9)
    ratings = model.predict(params, torch.full((9,), user), items, head=HEAD)
    wide = model.Prior(torch.zeros(4, dtype=torch.float64), torch.full((4,), 1e8).double())
    p, b = model.fold_in(params.item_factors, params.item_bias, ratings, prior=wide, head=HEAD)
    assert torch.allclose(p, params.user_factors[user], atol=1e-5)
    assert b.item() == pytest.approx(params.user_bias[user].item(), abs=1e-5)


@pytest.mark.parametrize("head", [HEAD, ORDINAL])
def test_a_user_without_ratings_is_the_average_one(head):
    q, bias, ratings, prior = rated(head)
    p, b = model.fold_in(q[:0], bias[:0], ratings[:0], prior=prior, head=head)
    assert torch.equal(torch.cat([p, b.reshape(-1)]), prior.mean)


def test_the_prior_by_hand():
    factors, bias = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([1.0, -1.0])
    prior = model.find_prior(factors, bias, width=3.0)
    assert prior.mean.tolist() == [2, 0, 0]
    assert prior.variance.tolist() == pytest.approx([1.5, 1.5, 3.0])


def test_similar_is_the_mean_cosine():
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    second = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, 0.0]])
    assert model.find_similar([first], 0).tolist() == [1, 1, 0, 0]
    expected = [1, 0.5, 0.5, 0.5**0.5 / 2]
    assert model.find_similar([first, second], 0).tolist() == pytest.approx(expected)


def test_components_are_those_of_the_singular_value_decomposition():
    members = [torch.randn(50, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    rows = torch.cat(members, 1).double()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    places, expected = model.find_components(members), u[:, :2] * s[:2]
    assert torch.allclose(places.abs(), expected.abs())
    assert places.shape == (50, 2)
    assert (places.max(0).values > -places.min(0).values).all()


def test_all_items_are_predicted_by_the_mean_of_the_members(params):
    others = model.Params(*(table.flip(0) for table in params))
    users, items = torch.tensor([4, 0]), torch.arange(9)
    pairs = torch.cartesian_prod(users, items).unbind(1)
    expected = (
        model.predict(params, *pairs, head=HEAD) + model.predict(others, *pairs, head=HEAD)
    ) / 2
    found = model.predict_all([params, others], users, head=HEAD)
    assert torch.allclose(found, expected.view(2, 9))
    assert torch.allclose(
        model.predict_all([params], users, head=HEAD).view(-1),
        model.predict(params, *pairs, head=HEAD),
    )


def test_the_average_row_stands_behind_the_others(params):
    seen_users, seen_items = torch.tensor([True, False, True]), torch.ones(9, dtype=torch.bool)
    longer = model.append_average(params, seen_users, seen_items)  # three rows more than users
    assert [len(table) for table in longer] == [7, 10, 7, 10]
    assert torch.equal(longer.user_factors[3], params.user_factors[[0, 2]].mean(0))
    assert torch.equal(longer.user_factors[4:], params.user_factors[3:])
    assert longer.item_bias[9] == params.item_bias.mean()
