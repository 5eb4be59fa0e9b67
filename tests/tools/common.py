"""What the tools beside this file share: collab's command line, and Markdown tables."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a tool finds collab.py, wherever it is called from


def run_collab(*arguments):
    """Figures of `python collab.py ARGUMENTS`, a training, and the peak of its memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.json"
        command = [sys.executable, ROOT / "collab.py", *arguments, "--metrics", metrics]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as child:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command)
        return json.loads(metrics.read_text()) | {"peak_mib": usage.ru_maxrss / 1024}


def train(name, *arguments):
    """The figures of a `collab.py train`, in a list, as a system's row; seconds are the loop's."""
    figures = run_collab("train", *arguments)
    return [figures | {"system": name, "seconds": figures["fit_seconds"]}]


def notice(line):
    click.echo(line, err=True)


def echo_heads(*names):
    """The first two lines of a Markdown table."""
    echo_row(*names)
    click.echo("|---" * len(names) + "|")


def echo_row(*cells):
    click.echo(f"| {' | '.join(cells)} |")


def spread(values, digits=4):
    """A cell: mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
