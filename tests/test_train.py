import math

import numpy
import pytest
import torch

import model
import schedule
import train

HEAD = model.bounded(0, 5.5)
ROWS = torch.arange(10)
RATINGS = torch.arange(10, dtype=torch.float32)


def recorder(seen):
    """A loss that notes its batches: the sum of the ratings over their number, no gradient."""

    def loss_and_grad(params, users, items, ratings):
        assert torch.equal(users, items)
        assert torch.equal(users.float(), ratings)
        seen.append(users.tolist())
        return ratings.mean(), [torch.zeros(())]

    return loss_and_grad


def fit_recorded(n_epochs=2, batch_size=4, drop_last=False, seed=0):
    seen = []
    epochs = train.fit(
        [torch.zeros(())],
        ROWS,
        ROWS,
        RATINGS,
        loss_and_grad=recorder(seen),
        optimizer=(lambda params: None, lambda params, grads, state, step: None),
        n_epochs=n_epochs,
        batch_size=batch_size,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
    )
    return list(epochs), seen


def test_an_epoch_is_every_rating_once():
    _, seen = fit_recorded()
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = (seen[i] + seen[i + 1] + seen[i + 2] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert second != sorted(second)


def test_the_last_batch_can_be_dropped():
    _, seen = fit_recorded(drop_last=True)
    assert [len(batch) for batch in seen] == [4, 4] * 2
    assert set(seen[0] + seen[1]) != set(seen[2] + seen[3]), "another two are left out"


def test_fewer_ratings_than_a_batch_are_one_batch():
    _, seen = fit_recorded(n_epochs=1, batch_size=64, drop_last=True)
    assert [len(batch) for batch in seen] == [10]


def test_the_loss_is_weighted_by_batch_size():
    epochs, _ = fit_recorded()
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    assert [epoch.train_loss for epoch in epochs] == [pytest.approx(4.5)] * 2


@pytest.mark.parametrize(
    ("n_ratings", "batch_size", "drop_last", "expected"),
    [(10, 5, False, 2), (11, 5, False, 3), (11, 5, True, 2), (4, 5, True, 1), (1, 1, True, 1)],
)
def test_count_batches(n_ratings, batch_size, drop_last, expected):
    assert train.count_batches(n_ratings, batch_size, drop_last=drop_last) == expected


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
def test_no_batches(counts):
    with pytest.raises(ValueError, match="batches of"):
        train.count_batches(*counts)


def fit_model(part, ids, seed=0, n_epochs=1, lr_max=0.01):
    """One short real training; returns the caller's params, those trained, and the loss."""
    generator = torch.Generator().manual_seed(seed)
    start = model.init_params(len(ids.users), len(ids.items), n_factors=5, generator=generator)
    epochs = train.fit(
        start,
        *part,
        loss_and_grad=lambda *batch: model.loss_and_grad(*batch, head=HEAD),
        optimizer=schedule.adamw(schedule.constant(lr=lr_max)),
        n_epochs=n_epochs,
        batch_size=1024,
        generator=generator,
    )
    *_, last = epochs
    return start, last.params, last.train_loss


def test_same_seed_same_bits(ua):
    part, _, ids = ua
    _, first, first_loss = fit_model(part, ids)
    _, again, again_loss = fit_model(part, ids)
    _, other, _ = fit_model(part, ids, seed=1)
    assert first_loss == again_loss
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.user_factors, other.user_factors)


def test_the_callers_params_and_the_global_random_state_stay(ua):
    part, _, ids = ua
    torch.manual_seed(99)
    before = torch.get_rng_state()
    start, trained, _ = fit_model(part, ids)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(trained, model.Params)
    assert start.user_factors.abs().max() < 0.02 < trained.user_factors.abs().max()
    torch.manual_seed(1)
    _, again, _ = fit_model(part, ids)
    assert torch.equal(trained.user_factors, again.user_factors)


def test_training_learns(ua):
    part, test_part, ids = ua
    start, trained, _ = fit_model(part, ids, n_epochs=2)
    errors = [
        train.evaluate(lambda *rows, p=p: model.predict(p, *rows, head=HEAD), *test_part).mse
        for p in (start, trained)
    ]
    assert errors[0] > 1.5
    assert errors[1] < 0.95


def test_a_loss_that_is_not_finite_is_an_error(ua):
    part, _, ids = ua
    with pytest.raises(ValueError, match="the loss is nan in epoch 1"):
        fit_model(part, ids, lr_max=1e38)


def test_columns_of_different_length():
    with pytest.raises(ValueError, match="the columns have 10, 10, 9 rows"):
        next(
            train.fit(
                [torch.zeros(())],
                ROWS,
                ROWS,
                RATINGS[:9],
                loss_and_grad=None,
                optimizer=(None, None),
                n_epochs=1,
                batch_size=4,
                generator=torch.Generator(),
            )
        )


PREDICTION = numpy.array([0.5, 2.0, 3.5, 6.0])
TARGET = numpy.array([1.0, 2.0, 5.0, 4.0])


def evaluate(prediction, **options):
    rows = torch.arange(len(TARGET))
    table = torch.tensor(prediction)
    return train.evaluate(
        lambda users, items: table[users], rows, rows, torch.tensor(TARGET), **options
    )


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_errors_are_numpys(block):
    error = PREDICTION - TARGET
    mse, mae = (error**2).mean(), abs(error).mean()
    assert evaluate(PREDICTION, block=block) == pytest.approx((mse, math.sqrt(mse), mae))
    clipped = PREDICTION.clip(1, 5) - TARGET
    got = evaluate(PREDICTION, block=block, clip=(1, 5))
    assert got.mse == pytest.approx((clipped**2).mean())
    assert got.mae == pytest.approx(abs(clipped).mean())


def test_evaluation_is_in_blocks():
    sizes = []

    def predict(users, items):
        sizes.append(len(users))
        return torch.ones(len(users))

    train.evaluate(predict, ROWS, ROWS, RATINGS, block=4)
    assert sizes == [4, 4, 2]


def test_seconds_are_of_training_alone(monkeypatch):
    """On a clock that the caller moves on between the epochs."""
    now = 0.0
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)

    def loss_and_grad(params, rows):
        nonlocal now
        now += 1
        return torch.zeros(()), [torch.zeros(())]

    for epoch in train.fit(
        [torch.zeros(())],
        ROWS,
        loss_and_grad=loss_and_grad,
        optimizer=(lambda params: None, lambda *changed: None),
        n_epochs=3,
        batch_size=4,
        generator=torch.Generator(),
    ):
        now += 100  # the caller's evaluation
        assert epoch.seconds == 3


def test_an_error_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="the mean squared error is nan"):
        train.evaluate(lambda users, items: torch.full((10,), math.nan), ROWS, ROWS, RATINGS)


def test_no_prediction_is_bent_to_shape():
    rows = torch.arange(4)
    with pytest.raises(ValueError, match=r"shape is \(4, 1\), the ratings' is \(4,\)"):
        train.evaluate(lambda users, items: torch.ones(4, 1), rows, rows, torch.ones(4))
    with pytest.raises(ValueError, match="0 ratings"):
        train.evaluate(lambda users, items: torch.ones(0), rows[:0], rows[:0], torch.ones(0))
