"""Run what both READMEs quote, and print what differs: `python tests/tools/report.py`.

Each `sh` block that runs this project is run, in the order of the files, in one folder for each;
the `text` block or the table below it is what it prints. What is not a number must be the same, and
numbers within `--tolerance`, for another processor rounds otherwise; seconds and memory, which are
of a machine, are not compared. `report.py figures panel` runs the commands with one of these words
alone. MovieLens 1M may be a file, `--ml-1m FILE`. With `--write` the READMEs get what is printed.
The exit status is 0 where nothing differs. All takes about an hour, in which nothing else may run.
"""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
from common import ROOT, notice

import data

READMES = ROOT / "README.md", ROOT / "tests" / "README.md"
BLOCK = re.compile(
    r"```sh\n(.*?)\n```\n(?:\n```text\n(.*?)\n```\n|\n((?:\|[^\n]*\n)+))?", re.DOTALL
)
OF_MACHINE = ("second", "range", "MiB", "time")  # of a column's head
PAIRS = "user,item\n196,242\n22,50\n"


class Quote(NamedTuple):
    """A command of a README, and what it says that it prints."""

    command: str
    shown: str | None
    span: tuple[int, int] | None  # of what is shown, in the text


def read_quotes(text):
    """The `Quote`s of a README: of its commands of Python, without what installs."""
    quotes = []
    for block in BLOCK.finditer(text):
        command = block[1].split(" && ")[-1]
        group = next((number for number in (2, 3) if block[number]), None)
        shown, span = (block[group].strip(), block.span(group)) if group else (None, None)
        if re.match("python (collab|tests)|torchrun", command):
            quotes.append(Quote(command, shown, span))
    return quotes


def write_files(folder):
    """The files that commands of the README read: of pairs, ratings and titles."""
    archive = data.get_dataset("ml-100k")
    names = {"item": "sku"}
    (folder / "pairs.csv").write_text(PAIRS)
    data.read_ratings(archive).rename(names).write_csv(folder / "ratings.csv")
    titles = data.read_items(archive).select("item", "title").rename(names)
    titles.write_csv(folder / "titles.csv")


def find_differences(shown, printed, *, tolerance):
    """Lines on where what is printed is not what is shown."""
    lines, others = shown.strip().splitlines(), printed.strip().splitlines()
    if lines and lines[0].startswith("|"):  # of tables alone
        others = [line for line in others if line.startswith("|")]
    if len(lines) != len(others):
        yield f"{len(lines)} lines are shown, {len(others)} printed"
    heads = []
    for line, other in zip(lines, others, strict=False):
        cells, others_cells = line.split("|"), other.split("|")
        heads = heads if len(heads) == len(cells) else cells
        pairs = zip(cells, others_cells, heads, strict=False)
        if len(cells) != len(others_cells) or not all(is_same(*p, tolerance) for p in pairs):
            yield f"- {line}\n+ {other}"


def is_same(cell, other, head, tolerance):
    """Whether two cells are the same, but for seconds and memory, and for near numbers."""
    cell, other = (re.sub(r"\d[\d.,]* (s|MiB)\b|-{3,}", "", text) for text in (cell, other))
    numbers, others = (re.findall(r"\d[\d,]*(?:\.\d+)?", text) for text in (cell, other))
    texts = [re.sub(r"\d[\d,]*(?:\.\d+)?|\s", "", text) for text in (cell, other)]
    if texts[0] != texts[1] or len(numbers) != len(others):
        return False
    values = ([float(number.replace(",", "")) for number in each] for each in (numbers, others))
    is_near = all(abs(a - b) <= tolerance for a, b in zip(*values, strict=True))
    return is_near or any(word in head for word in OF_MACHINE)


def run(command, folder, ml_1m):
    """What a command prints. CalledProcessError where it fails."""
    if ml_1m is not None:
        command = command.replace("--dataset ml-1m", f"--ratings {shlex.quote(str(ml_1m))}")
    program, *words = shlex.split(command)
    if program == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    words = [ROOT / word if word.endswith(".py") else word for word in words]
    done = subprocess.run([sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return done.stdout


def check(path, words, folder, *, is_written, tolerance, ml_1m):
    """Run the commands of a README with one of `words`; the number of those that differ."""
    text, n_differ, shift = path.read_text(), 0, 0
    for quote in read_quotes(text):
        is_asked = not words or any(word in quote.command for word in words)
        if not is_asked and "--save model.pt" not in quote.command:  # which others ask
            continue
        start = time.perf_counter()
        try:
            printed = run(quote.command, folder, ml_1m)
            shown = printed if quote.shown is None else quote.shown
            differences = list(find_differences(shown, printed, tolerance=tolerance))
        except subprocess.CalledProcessError as error:
            printed, differences = None, [f"exit status {error.returncode}"]
        notice(f"{quote.command}: {time.perf_counter() - start:.0f} s")
        if differences:
            n_differ += 1
            click.echo("\n".join([f"{path.relative_to(ROOT)}: {quote.command}", *differences]))
        if is_written and printed is not None and quote.span is not None:
            lines = [line for line in printed.splitlines() if line.startswith("|")]
            new = "\n".join(lines) + "\n" if quote.shown.startswith("|") else printed.strip("\n")
            first, last = (place + shift for place in quote.span)
            text = text[:first] + new + text[last:]
            shift += len(new) - (last - first)
            path.write_text(text)  # at once: an hour's work is not lost
    return n_differ


@click.command()
@click.argument("words", nargs=-1)
@click.option("--tolerance", default=2e-3, show_default=True)
@click.option("--write", "is_written", is_flag=True, help="Put what is printed in the READMEs.")
@click.option(
    "--ml-1m", type=click.Path(exists=True, path_type=Path), help="MovieLens 1M's ratings."
)
def main(words, **options):
    """Run the commands of both READMEs, those with one of WORDS if there are any, and compare."""
    n_differ = 0
    for path in READMES:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder))
            n_differ += check(path, words, folder, **options)
    click.echo(f"{n_differ} differ")
    sys.exit(n_differ > 0)


if __name__ == "__main__":
    main()
