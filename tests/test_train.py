import copy
import math
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy
import polars
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import schedule
import train

HEAD = model.bounded(0, 5.5)
ROWS = torch.arange(10)
RATINGS = torch.arange(10, dtype=torch.float32)
NO_OPTIMIZER = (lambda params: None), (lambda params, grads, state, step: None)


def fit_recorded(columns=(ROWS, ROWS, RATINGS), batch_size=4, **options):
    """Two epochs, and their batches, of a loss that is the ratings' mean and has no gradient."""
    batches = []

    def loss_and_grad(params, users, items, ratings):
        torch.testing.assert_close(users.float(), ratings, rtol=0, atol=0, equal_nan=True)
        batches.append(users.tolist())
        return ratings.mean(), [torch.zeros(())]

    options |= {"loss_and_grad": loss_and_grad, "optimizer": NO_OPTIMIZER, "n_epochs": 2}
    generator = torch.Generator().manual_seed(0)
    epochs = train.fit([], *columns, batch_size=batch_size, generator=generator, **options)
    return list(epochs), batches


def test_an_epoch_is_every_rating_once(monkeypatch):
    epochs, batches = fit_recorded()
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = ([row for batch in batches[i : i + 3] for row in batch] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != sorted(second)
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    assert [epoch.train_loss for epoch in epochs] == [pytest.approx(4.5)] * 2, "weighted by size"
    for n_rows in (1, 8):
        monkeypatch.setattr(train, "SHUFFLED_AT_ONCE", n_rows)
        assert fit_recorded()[1] == batches
    _, batches = fit_recorded(drop_last=True)
    assert [len(batch) for batch in batches] == [4, 4] * 2
    assert set(batches[0] + batches[1]) != set(batches[2] + batches[3]), "another two are left out"
    assert [len(batch) for batch in fit_recorded(batch_size=64, drop_last=True)[1]] == [10] * 2


def test_what_cannot_be_trained():
    with pytest.raises(ValueError, match="the columns have 10, 10, 9 rows"):
        fit_recorded((ROWS, ROWS, RATINGS[:9]))
    with pytest.raises(ValueError, match="cannot cut 10 ratings into batches of 0"):
        fit_recorded(batch_size=0)
    with pytest.raises(ValueError, match="cannot cut 0 ratings"):
        fit_recorded((ROWS[:0],))
    nan = torch.full((10,), math.nan)
    with pytest.raises(ValueError, match="the loss is nan in epoch 1: try a smaller lr"):
        fit_recorded((nan, nan, nan))


def test_seconds_are_of_training_alone(monkeypatch):
    """On a clock that moves on with each batch, and by the caller between the epochs."""
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: sum(now))

    def loss_and_grad(params, rows):
        now.append(1)
        return torch.zeros(()), []

    options = {"batch_size": 4, "generator": torch.Generator(), "optimizer": NO_OPTIMIZER}
    for epoch in train.fit([], ROWS, n_epochs=3, loss_and_grad=loss_and_grad, **options):
        now.append(100)
        assert epoch.seconds == 3


def make_columns():
    """Users, items, ratings and two features of each rating; 50 rows."""
    generator = torch.Generator().manual_seed(2)
    users, items = (torch.randint(8, (50,), generator=generator) for _ in "12")
    ratings = torch.randint(6, (50,), generator=generator).double()
    return users, items, ratings, torch.rand(50, 2, generator=generator, dtype=torch.float64)


def make_net(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    return torch.nn.Sequential(*layers).double()


def by_autograd(net):
    """The loss of a module that predicts ratings from their context, and its gradient."""

    def loss_and_grad(params, users, items, ratings, context):
        loss = torch.nn.functional.mse_loss(net(context).squeeze(1), ratings)
        return loss, torch.autograd.grad(loss, params)

    return loss_and_grad


def test_a_module_is_trained_as_by_a_plain_loop_of_torch():
    net, (*_, ratings, context) = make_net(), make_columns()
    theirs = copy.deepcopy(net)
    oracle = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.99))
    for epoch in train.fit(
        net.parameters(),
        *make_columns(),
        loss_and_grad=by_autograd(net),
        optimizer=schedule.adamw(lambda step: schedule.Pace(0.05, 0.9), weight_decay=0.1),
        n_epochs=20,
        batch_size=50,
        generator=torch.Generator().manual_seed(0),
    ):
        oracle.zero_grad()
        loss = torch.nn.functional.mse_loss(theirs(context).squeeze(1), ratings)
        loss.backward()
        oracle.step()
        assert epoch.train_loss == pytest.approx(loss.item(), rel=1e-12)
        for param, other in zip(net.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(param.detach(), other.detach(), rtol=0, atol=1e-12)
        assert not any(tensor.grad_fn for tensor in epoch.state)


def record(epochs):
    """Number, loss and state of each epoch, as of its end."""
    return [(e.epoch, e.train_loss, [t.detach().clone() for t in e.state]) for e in epochs]


def bits(epochs):
    """What `record` returns as what == compares."""
    return [(n, loss, [t.numpy().tobytes() for t in state]) for n, loss, state in epochs]


# Three processes and 50 rows: the last batch of 20 is of 10, those of 7 are shares of 3, 2 and 2.
WAYS = {
    "dropout and context": {"batch_size": 20, "dropout": 0.3},
    "batches of one": {"batch_size": 1, "dropout": 0.3},
    "the last batch dropped": {"batch_size": 7, "drop_last": True},
    "features and two outputs": {"batch_size": 8, "dropout": 0.1, "way": "features"},
    "a module": {"batch_size": 8, "way": "module"},
}


def fit_small(share=lambda loss_and_grad: loss_and_grad, *, dropout=0.0, way="", seed=5, **options):
    """Three epochs of a real training in float64."""
    generator = torch.Generator().manual_seed(seed)
    head = model.ordinal([0, 2, 5], [0.8, 0.4]) if way == "features" else HEAD
    shape = {"n_factors": 3, "n_outputs": head.n_outputs, "dtype": torch.float64, "std": 0.5}
    params = [model.join(model.init_params(10, 10, generator=generator, **shape))]
    loss_and_grad = model.loss_and_grad
    if way == "features":
        identity = torch.arange(21), torch.arange(20), torch.ones(20).double()
        features = model.Features(identity, identity)
        loss_and_grad = partial(model.embedded_loss_and_grad, features=features)
    loss_and_grad = partial(loss_and_grad, n_users=10, head=head)
    if way == "module":
        net = make_net(seed)
        params, loss_and_grad = net.parameters(), by_autograd(net)
    loss_and_grad = share(loss_and_grad)
    if dropout:
        drawn = {"dropout": dropout, "n_factors": 3, "generator": generator}
        loss_and_grad = model.with_dropout(loss_and_grad, **drawn)
    pace = schedule.one_cycle(150, lr_max=0.05)
    options = {"generator": generator, "n_epochs": 3, **options}
    options |= {"optimizer": schedule.adamw(pace, weight_decay=0.1)}
    return train.fit(params, *make_columns(), loss_and_grad=loss_and_grad, **options)


@pytest.mark.parametrize("way", WAYS)
def test_resuming_is_to_the_bit(way):
    """Whatever the global random state, which stays."""
    whole = record(fit_small(**WAYS[way]))
    before = bits(whole)
    assert len(before) == 3
    for epoch, _, state in whole:
        epochs = fit_small(**WAYS[way], seed=9, resume=(epoch, state))
        torch.manual_seed(epoch)
        global_state = torch.get_rng_state()
        assert bits(record(epochs)) == before[epoch:]
        assert torch.equal(global_state, torch.get_rng_state())
    assert bits(whole) == before, "copied"
    assert bits(record(fit_small(**WAYS[way], seed=9))) != before


def test_a_state_that_does_not_fit():
    *_, last = fit_small(batch_size=20)
    table, *rest = last.state
    bad = [
        ((3, rest), "the state to resume from is ["),
        ((3, [table[1:], *rest]), "the state to resume from is ['torch.float64 (19, 4)', "),
        ((3, [table.float(), *rest]), "the state to resume from is ['torch.float32 (20, 4)', "),
        ((4, last.state), "cannot resume after 4 of 3 epochs"),
        ((-1, last.state), "cannot resume after -1 of 3 epochs"),
    ]
    for resume, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            next(fit_small(batch_size=20, resume=resume))


VALUE = {"pickled": [1.5, "text"], "large": list(range(100_000))}


def run_process(rank, size, folder):
    """All of WAYS; then process 1 is interrupted and ends, which the others must notice."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    results = [record(fit_small(train.share, **options)) for options in WAYS.values()]
    value = train.broadcast(VALUE if rank == 0 else None)
    if rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        while not Path(f"{folder}/1.pt").exists():
            time.sleep(0.01)
    with pytest.raises((KeyboardInterrupt, ConnectionError)) as caught:
        train.broadcast() if rank == 1 else list(fit_small(train.share, batch_size=1))
    torch.save((results, value, repr(caught.value)), f"{folder}/{rank}.pt")
    os._exit(0)  # as if killed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of three processes has to tell."""
    folder = tmp_path_factory.mktemp("processes")
    arguments, options = (3, str(folder)), {"nprocs": 3, "daemon": True, "join": False}
    context = torch.multiprocessing.spawn(run_process, arguments, **options)
    for _ in range(3):
        context.join(timeout=30)  # returns when one has ended
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_train_as_one_does(processes, way):
    first, *others = (results[list(WAYS).index(way)] for results, *_ in processes)
    alone = record(fit_small(**WAYS[way]))
    for (_, loss, state), (_, got_loss, got) in zip(alone, first, strict=True):
        assert got_loss == pytest.approx(loss, rel=1e-12)
        for ours, theirs in zip(got, state, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert [bits(other) for other in others] == [bits(first)] * 2


def test_what_processes_tell_each_other(processes):
    assert [value for _, value, _ in processes] == [VALUE] * 3
    gone = repr(ConnectionError("another process of this training has ended"))
    assert [caught for *_, caught in processes] == [gone, "KeyboardInterrupt()", gone]


def find_scripted(losses):
    """A range test in which step k's loss is `losses[k]`, and its batches."""
    batches, steps = [], []

    def loss_and_grad(params, rows):
        batches.append(rows.tolist())
        return torch.tensor(losses[len(batches) - 1], dtype=torch.float64), ["gradient"]

    got = train.find_lr(
        [torch.zeros(())],
        ROWS,
        loss_and_grad=loss_and_grad,
        optimizer=(lambda params: "state", lambda *given: steps.append(given[1:])),
        n_steps=len(losses),
        batch_size=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert steps == [(["gradient"], "state", k) for k in range(len(steps))]
    return got.tolist(), batches


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=12))
def test_the_range_test_smooths(losses):
    """Each is the mean of those so far, weighted by 0.98 to the power of their age."""
    weights = [[0.98 ** (t - k) for k in range(t + 1)] for t in range(len(losses))]
    expected = [numpy.average(losses[: len(w)], weights=w) for w in weights]
    assert find_scripted(losses)[0] == pytest.approx(expected, rel=1e-9)


def test_the_range_test_ends_when_the_loss_grows():
    assert len(find_scripted([1.0, 6.9, 1.0])[0]) == 3  # 0.98 + 6.9 is just below 4 times 1.98
    assert len(find_scripted([1.0, 7.0, 1.0])[0]) == 2
    got, batches = find_scripted([1.0, 1.0, math.nan, 1.0])
    assert (len(got), len(batches)) == (2, 3)


def test_the_range_test_draws_whole_batches_anew():
    _, batches = find_scripted([1.0] * 5)
    assert [len(set(batch)) for batch in batches] == [4] * 5
    assert len({*batches[0], *batches[1]}) == len({*batches[2], *batches[3]}) == 8
    assert batches[:2] != batches[2:4]


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_errors_are_numpys(block):
    predicted, target = numpy.array([0.5, 2.0, 3.5, 6.0]), numpy.array([1.0, 2.0, 5.0, 4.0])
    sizes = []

    def predict(users, items):
        sizes.append(len(users))
        return torch.tensor(predicted)[users]

    columns = ROWS[:4], ROWS[:4], torch.tensor(target)
    for clip, low, high in ((None, -9, 9), ((1, 5), 1, 5)):
        error = predicted.clip(low, high) - target
        mse = (error**2).mean()
        got = train.evaluate(predict, *columns, clip=clip, block=block)
        assert got == pytest.approx((mse, math.sqrt(mse), abs(error).mean()))
    assert max(sizes) == min(block, 4)


def test_errors_that_are_none():
    columns = ROWS, ROWS, RATINGS
    with pytest.raises(ValueError, match="the mean squared error is nan"):
        train.evaluate(lambda users, items: torch.full((10,), math.nan), *columns)
    with pytest.raises(ValueError, match=r"shape is \(10, 1\), the ratings' is \(10,\)"):
        train.evaluate(lambda users, items: torch.ones(10, 1), *columns)
    with pytest.raises(ValueError, match="0 ratings"):
        train.evaluate(lambda users, items: torch.ones(0), *(column[:0] for column in columns))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_ranking_is_brute_force(seed, k):
    draw = numpy.random.default_rng(seed)
    lists = [draw.permutation(8)[: draw.integers(1, k + 1)] for _ in range(5)]
    rows = [(u, p + 1, i) for u, items in enumerate(lists) for p, i in enumerate(items)]
    relevant = {(int(u), int(i)) for u, i in draw.integers(0, [7, 8], (12, 2))}
    frames = [
        polars.DataFrame(rows, schema=["user", "rank", "item"], orient="row"),
        polars.DataFrame(list(relevant), schema=["user", "item"], orient="row"),
    ]
    expected = []
    for user in sorted({u for u, _ in relevant}):
        wanted = {i for u, i in relevant if u == user}
        hits = [i in wanted for i in (lists[user] if user < 5 else ())]
        gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits))
        ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
        first = 1 / (hits.index(True) + 1) if any(hits) else 0
        expected.append((sum(hits) / k, sum(hits) / len(wanted), gain / ideal, any(hits), first))
    got = train.rank(*frames, k=k)
    assert got.pop("n_users") == len(expected)
    assert list(got) == ["precision", "recall", "ndcg", "hit_rate", "mrr"]
    assert list(got.values()) == pytest.approx(numpy.mean(expected, 0).tolist())
