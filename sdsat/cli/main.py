"""The command line, `sdsat COMMAND`: one file for each command.

They are generate, chat, bench, report, verify, eval, inspect, distill, train, export,
serve and doctor.
torch is imported where a command begins its work, so that `--help` need not wait for it.
"""

from __future__ import annotations

import typer

from sdsat.cli.bench import bench
from sdsat.cli.chat import chat
from sdsat.cli.distill import distill
from sdsat.cli.doctor import doctor
from sdsat.cli.eval import evaluate
from sdsat.cli.export import export
from sdsat.cli.generate import generate
from sdsat.cli.inspect import inspect
from sdsat.cli.program import run_app
from sdsat.cli.report import report
from sdsat.cli.serve import serve
from sdsat.cli.train import train
from sdsat.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Faster generation with a model's own weights: speculative decoding with semantic "
        "adaptive tokens."
    ),
)
app.command()(generate)
app.command()(chat)
app.command()(bench)
app.command()(report)
app.command()(verify)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(distill)
app.command()(train)
app.command()(export)
app.command()(serve)
app.command()(doctor)


def main() -> None:
    """Run the command line; the entry point of `sdsat`."""
    run_app(app)
