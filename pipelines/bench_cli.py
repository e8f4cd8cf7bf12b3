"""`lazydp bench pipeline`."""

from __future__ import annotations

import click


@click.command(name="pipeline", epilog="Example: lazydp bench pipeline --repeats 5")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(repeats: int, as_json: bool) -> None:
    """Run the whole pipeline on the built-in sample, beside the plain commands that do the same."""
    import contextlib
    import io
    import tempfile
    from pathlib import Path

    from lazydp.pipelines.bench import PIPELINE, PLAIN, run
    from lazydp.pipelines.cli import cli

    with tempfile.TemporaryDirectory(prefix="lazydp-bench-") as folder:
        sample = Path(folder) / "sample"
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(["sample-data", "--out", str(sample)], standalone_mode=False)
        results = run(sample=sample, scratch=Path(folder) / "scratch", repeats=repeats)
    if as_json:
        for result in results:
            click.echo(result.to_json())
        return
    for result in results:
        click.echo(f"{result.contestant:15} median {result.median_s:6.2f} s ({result.p10_s:.2f} to {result.p90_s:.2f})")
    medians = {result.contestant: result.median_s for result in results}
    click.echo(f"the pipeline adds {medians[PIPELINE] - medians[PLAIN]:+.2f} s ({repeats} interleaved rounds)")
