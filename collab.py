"""Train a collaborative-filtering model on MovieLens 100K: `python collab.py train`.

The command line and nothing else: a command reads its options, calls the four other modules and
prints. They are imported inside the functions that need them, so that `--help` is instant.
"""

import io
import json
import math
import sys
import time
from pathlib import Path

import click

SPLITS = ("ua", "ub", "u1", "u2", "u3", "u4", "u5", "random")

# fastai: fastai v1's lesson, matched in every detail. default: chosen by tests/tune.py on a
# validation part of ua.base.
RECIPES = {
    "fastai": {
        "n_factors": 40,
        "epochs": 10,
        "batch_size": 64,
        "drop_last": True,
        "lr_max": 0.01,
        "weight_decay": 0.1,
        "bias_decay": 0.1,
        "y_range": (0.0, 5.5),
    },
    "default": {
        "n_factors": 40,
        "epochs": 5,
        "batch_size": 512,
        "drop_last": False,
        "lr_max": 0.01,
        "weight_decay": 0.5,
        "bias_decay": 0.02,
        "y_range": (0.0, 5.5),
    },
}


def fit(part, test_part, ids, *, options, seed):
    """Train with `options`, a recipe's dict, and yield `(params, row)` after each epoch.

    `part`, `test_part` and `ids` come from `data.to_tensors`; `row` is a dict of the epoch's
    figures: epoch, train_loss, mse, rmse, mae, seconds (training), evaluate_seconds.
    ValueError when a rating lies outside `y_range`: no prediction could reach it.
    """
    from functools import partial

    import torch

    import model
    import schedule
    import train

    y_range, decay, bias_decay = (options[o] for o in ("y_range", "weight_decay", "bias_decay"))
    clip = part.ratings.min().item(), part.ratings.max().item()
    if clip[0] < y_range[0] or clip[1] > y_range[1]:
        text = "ratings from {:g} to {:g} are not all within y_range {:g} to {:g}"
        raise ValueError(text.format(*clip, *y_range))
    generator = torch.Generator().manual_seed(seed)
    batches = {"batch_size": options["batch_size"], "drop_last": options["drop_last"]}
    n_steps = options["epochs"] * train.count_batches(len(part.ratings), **batches)
    epochs = train.fit(
        model.init_params(
            len(ids.users), len(ids.items), n_factors=options["n_factors"], generator=generator
        ),
        *part,
        loss_and_grad=partial(model.loss_and_grad, y_range=y_range),
        optimizer=schedule.adamw(
            schedule.one_cycle(n_steps, lr_max=options["lr_max"]),
            weight_decay=(decay, decay, bias_decay, bias_decay),  # in the order of model.Params
        ),
        n_epochs=options["epochs"],
        generator=generator,
        **batches,
    )
    for epoch in epochs:
        start = time.perf_counter()
        predict = partial(model.predict, epoch.params, y_range=y_range)
        errors = train.evaluate(predict, *test_part, clip=clip)
        yield (
            epoch.params,
            {
                "epoch": epoch.epoch,
                "train_loss": epoch.train_loss,
                **errors._asdict(),
                "seconds": epoch.seconds,
                "evaluate_seconds": time.perf_counter() - start,
            },
        )


def _finite(context, parameter, value):
    """Refuses `nan` and `inf`, which click's FloatRange lets pass."""
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and not math.isfinite(number):
            raise click.BadParameter(f"{number} is not a finite number.")
    return value


def _interval(context, parameter, value):
    _finite(context, parameter, value)
    if value is not None and value[0] >= value[1]:
        raise click.BadParameter(f"{value[0]:g} is not below {value[1]:g}.")
    return value


def _notice(line):
    click.echo(line, err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli():
    """Collaborative filtering in plain PyTorch."""


FILE = click.Path(path_type=Path)


@cli.command("train")
@click.option("--dataset", type=click.Choice(["ml-100k"]), default="ml-100k", show_default=True)
@click.option("--data-dir", type=FILE, help="Folder of the data sets.  [default: the user's cache]")
@click.option("--split", type=click.Choice(SPLITS), default="ua", show_default=True)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="default",
    show_default=True,
    help="A named set of defaults for the options from here to --y-range.",
)
@click.option("--n-factors", type=click.IntRange(1), help="Latent size.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training part.")
@click.option("--batch-size", type=click.IntRange(1), help="Ratings a step.")
@click.option("--drop-last/--keep-last", default=None, help="Leave out an incomplete last batch?")
@click.option(
    "--lr-max",
    type=click.FloatRange(0, min_open=True),
    callback=_finite,
    help="Step size at the peak of the cycle.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(0),
    callback=_finite,
    help="Decoupled: a step takes the share lr times this off every factor.",
)
@click.option(
    "--bias-decay", type=click.FloatRange(0), callback=_finite, help="The same for the biases."
)
@click.option(
    "--y-range",
    nargs=2,
    type=float,
    callback=_interval,
    metavar="LOW HIGH",
    help="Bounds of a prediction, of the sigmoid that makes it.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Of torch; one is fastest for small batches.",
)
@click.option("--save", type=FILE, help="Write the model to this file.")
@click.option("--metrics", type=FILE, help="Write the figures here, as JSON.")
def train_command(dataset, data_dir, split, recipe, seed, threads, save, metrics, **given):
    """Train a model, printing its error on the test part after each epoch."""
    options = RECIPES[recipe] | {name: value for name, value in given.items() if value is not None}
    if options["lr_max"] * max(options["weight_decay"], options["bias_decay"]) >= 1:
        raise click.UsageError("--lr-max times a decay must be below 1.")

    import torch

    import data

    for path in filter(None, (save, metrics)):
        data.check_writable(path)  # said now, not after the training
    torch.set_num_threads(threads)
    start = time.perf_counter()
    folder = data.get_ml_100k(data_dir, notice=_notice)
    frames = data.split(data.read_ratings(folder / "u.data"), split, seed=seed)
    part, test_part, ids = data.to_tensors(*frames)
    load_seconds = time.perf_counter() - start

    click.echo("epoch | train_loss | test_mse | test_rmse | test_mae |    time")
    line = (
        "{epoch:5} | {train_loss:10.4f} | {mse:8.4f} | {rmse:9.4f} | {mae:8.4f} | {seconds:5.2f} s"
    )
    params, rows, evaluate_seconds = None, [], 0.0
    terminal = sys.stderr.isatty()
    bar = click.progressbar(length=options["epochs"], file=sys.stderr, hidden=not terminal)
    with bar:
        for params, row in fit(part, test_part, ids, options=options, seed=seed):  # noqa: B007
            if terminal:  # the bar makes room for the line
                click.echo("\r\033[K", nl=False, err=True)
            click.echo(line.format_map(row))
            evaluate_seconds += row.pop("evaluate_seconds")
            rows.append(row)
            bar.update(1)
    fit_seconds = sum(row["seconds"] for row in rows)
    result = {name: rows[-1][name] for name in ("mse", "rmse", "mae")}
    text = "test mse {mse:.4f}, rmse {rmse:.4f}, mae {mae:.4f}".format_map(result)
    click.echo(f"{text} on {split}, trained in {fit_seconds:.2f} s")

    figures = {
        "recipe": recipe,
        "dataset": dataset,
        "split": split,
        "seed": seed,
        "options": options,
        "n_users": len(ids.users),
        "n_items": len(ids.items),
        "n_train": len(part.ratings),
        "n_test": len(test_part.ratings),
        "epochs": rows,
        **result,
        "fit_seconds": fit_seconds,
        "evaluate_seconds": evaluate_seconds,
        "load_seconds": load_seconds,
    }
    if save is not None:
        content = io.BytesIO()
        raw_ids = {"user_ids": ids.users.to_list(), "item_ids": ids.items.to_list()}
        torch.save({"params": params._asdict(), **raw_ids, "figures": figures}, content)
        data.write_file(save, content.getvalue())
    if metrics is not None:
        data.write_file(metrics, (json.dumps(figures, indent=1) + "\n").encode())


def main():
    """Run the command line; whatever a user can cause ends in one line, with no traceback."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _notice(f"Error: {error.format_message()}")
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _notice("interrupted")
        sys.exit(130)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _notice(f"Error: {name}{error.strerror or error}")
        sys.exit(1)
    except ValueError as error:
        _notice(f"Error: {error}")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        _notice("Error: not enough memory for these options")
        sys.exit(1)


if __name__ == "__main__":
    main()
