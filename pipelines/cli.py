"""The command `lazydp`: finds the command asked for and imports that one only, so that help is instant."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from lazydp.components.shared.errors import LazyDPError
from lazydp.components.shared.freed_memory import keep_freed_memory
from lazydp.components.shared.huge_pages import prefer_huge_pages

# name -> (where the click command lives, its line in `lazydp --help`)
_COMMANDS = {
    "sample-data": ("lazydp.components.sample.cli:command", "Make the built-in sample as Parquet."),
    "init": ("lazydp.components.commands.init_cli:command", "First spec and configuration for a log of your own."),
    "ingest": ("lazydp.components.ingest.cli:command", "A log to an encoded dataset."),
    "dataset": ("lazydp.components.commands.dataset_cli:command", "Show what a dataset holds (private)."),
    "train": ("lazydp.components.commands.train_cli:command", "Train a recommender with differential privacy."),
    "plan": ("lazydp.components.plan.cli:command", "Choose a method and its settings from public numbers."),
    "export": ("lazydp.components.export.cli:command", "Flush, prove it, and release a bundle."),
    "sign": ("lazydp.components.bundle.cli:command", "Sign a bundle, for a service that demands it."),
    "evaluate": ("lazydp.components.evaluate.cli:command", "Measure a bundle beside popularity (private figures)."),
    "audit": ("lazydp.components.audit.cli:command", "Bound epsilon from below by one training run with canaries."),
    "serve": ("lazydp.service.cli:command", "Answer recommendation queries over REST."),
    "recommend": ("lazydp.service.recommend_cli:command", "Ask a running service for recommendations."),
    "pipeline": ("lazydp.pipelines.pipeline_cli:command", "Run or compile the whole pipeline."),
    "budget": ("lazydp.components.budget.cli:command", "Show and govern the privacy budget."),
    "bench": ("lazydp.pipelines.cli:bench", "Measure against peers in the same run."),
}
_BENCHES = {
    "step": ("lazydp.components.bench.cli:step", "A training step, against SGD, eager DP-SGD and Opacus."),
    "scale": ("lazydp.components.bench.cli:scale", "Eager and lazy noise, against the size of the tables."),
    "train": ("lazydp.components.bench.cli:train", "Whole training runs, against a loop in plain torch."),
    "noise": ("lazydp.components.bench.cli:noise", "Drawing normals, against torch and numpy."),
    "flush": ("lazydp.components.bench.cli:flush", "Flushing a table, against copying and scaling it."),
    "ingest": ("lazydp.components.bench.cli:ingest", "Reading Parquet into a dataset, against plain reading."),
    "loader": ("lazydp.components.bench.loader_cli:command", "Reading batches from disk, against memory."),
    "quality": (
        "lazydp.components.bench.quality_cli:quality",
        "Ranking held-out items, private and not, against EASE and iALS.",
    ),
    "search": (
        "lazydp.components.bench.quality_cli:search",
        "The rule of a start, against settings found by a search.",
    ),
    "pipeline": ("lazydp.pipelines.bench_cli:command", "The whole pipeline, against the plain commands."),
    "serve": ("lazydp.service.bench.cli:command", "Answering requests, against a bare route and a bare product."),
}


class _LazyGroup(click.Group):
    """A group that imports a subcommand when it is invoked, not when it is listed."""

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._table:
            return None
        module, attribute = self._table[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._table.items()])


@click.group(
    cls=_LazyGroup,
    table=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: lazydp pipeline run --sample",
)
@click.version_option(package_name="lazydp")
@click.option("--verbose", "-v", is_flag=True, help="Log more, and show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Differentially private recommenders: ingest, train, export, serve, and prove what was spent."""
    ctx.ensure_object(dict)["verbose"] = verbose
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("lazydp").setLevel(logging.DEBUG if verbose else logging.INFO)


@click.group(name="bench", cls=_LazyGroup, table=_BENCHES)
def bench() -> None:
    """Measure against peers in the same run: interleaved repeats, medians, ratios."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit status 0, 1 (failed, one line), 2 (wrong usage), 130 (interrupted), 143 (SIGTERM)."""
    verbose = any(flag in (arguments or sys.argv[1:]) for flag in ("-v", "--verbose"))
    interrupts = _count_interrupts()
    prefer_huge_pages()
    keep_freed_memory()
    try:
        status = cli.main(args=arguments, prog_name="lazydp", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except LazyDPError as error:
        if verbose:
            raise
        click.echo(f"lazydp: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        _exit_interrupted(interrupts)
    except BrokenPipeError:
        # The reader of our output went away (`lazydp ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if verbose:
            raise
        if interrupts:
            _exit_interrupted(interrupts)
        # A path that cannot be read or written, a full disk: the machine's own words say it best.
        where = f"{error.filename}: " if error.filename is not None else ""
        click.echo(f"lazydp: {where}{error.strerror or error} (--verbose shows where)", err=True)
        sys.exit(1)
    except Exception:
        # A library that is interrupted while it loads may swallow the interrupt and fail later, of something else.
        if not interrupts or verbose:
            raise
        _exit_interrupted(interrupts)
    sys.exit(status if isinstance(status, int) else 0)


def _count_interrupts() -> list[int]:
    """Note every signal to stop in the list returned, and raise KeyboardInterrupt as Python does for Ctrl-C."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)
        signal.default_int_handler(signum, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    # By default these end the process at once, and private files that it works on stay behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, note)
    return seen


def _exit_interrupted(signals: Sequence[int]) -> NoReturn:
    click.echo("lazydp: interrupted; nothing was left half-written", err=True)
    sys.exit(128 + (signals[-1] if signals else signal.SIGINT))


if __name__ == "__main__":
    main()
