"""`lazydp pipeline run | compile`."""

from __future__ import annotations

import getpass
from pathlib import Path

import click


@click.group(name="pipeline")
def command() -> None:
    """Run the whole pipeline on this machine, or compile it for a cluster."""


def _read(path: Path, what: str) -> str:
    from lazydp.components.shared.errors import InputError

    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not text: {error}") from error


def _on_one_line(path: Path, what: str) -> str:
    """The file's YAML as JSON, which is YAML: kfp writes defaults into comments, where a line break breaks the file."""
    import json

    import yaml

    from lazydp.components.shared.errors import InputError

    try:
        return json.dumps(yaml.safe_load(_read(path, what)), default=str)
    except yaml.YAMLError as error:
        raise InputError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error


@command.command(
    name="run",
    epilog="Example: lazydp pipeline run --input interactions.parquet --spec spec.yaml --config train.yaml --out run",
)
@click.option("--sample", is_flag=True, help="Use the built-in sample, which is made first.")
@click.option("--input", "inputs", multiple=True, metavar="URI", help="Parquet file or folder; may be repeated.")
@click.option("--spec", type=click.Path(path_type=Path), help="Feature spec, YAML.")
@click.option("--config", type=click.Path(path_type=Path), help="Training configuration, YAML.")
@click.option("--users", metavar="URI", default="", help="Users table, where not as the spec says.")
@click.option("--items", metavar="URI", default="", help="Items table, where not as the spec says.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for everything the run makes; private."
)
@click.option("--ledger", envvar="LAZYDP_LEDGER", help="URL of the ledger.  [default: a file in --out]")
@click.option("--budget-epsilon", type=float, default=0.0, help="First budget of a dataset that has none.")
@click.option("--budget-delta", type=float, default=1e-5, show_default=True, help="Delta of that budget.")
@click.option("--compare", is_flag=True, help="Also train and measure the same model without privacy.")
@click.option(
    "--compare-config", type=click.Path(path_type=Path), help="Configuration of that model; --config's if left out."
)
@click.option("--ask", is_flag=True, help="Then start the service, ask it, show its answers, and stop it.")
def run(
    sample: bool,
    inputs: tuple[str, ...],
    spec: Path | None,
    config: Path | None,
    users: str,
    items: str,
    out: Path,
    ledger: str | None,
    budget_epsilon: float,
    budget_delta: float,
    compare: bool,
    compare_config: Path | None,
    ask: bool,
) -> None:
    """Ingest, reserve the budget, train, export and evaluate, on this machine.

    The components are those of the cluster, run by Kubeflow's local runner.
    """
    if sample:
        if inputs or spec is not None:
            raise click.UsageError("--sample brings its own --input and --spec")
        spec, inputs = _make_sample(out / "sample-data")
        config = config if config is not None else out / "sample-data" / "train.yaml"
        budget_epsilon = budget_epsilon or 10.0
    if not inputs or spec is None or config is None:
        raise click.UsageError("give --input, --spec and --config, or --sample")
    from lazydp.components.shared.locations import join_locations
    from lazydp.pipelines.show import run_and_show

    run_and_show(
        arguments={
            "input_uri": join_locations(inputs),
            "spec": str(spec.absolute()),
            "config": _read(config, "training configuration"),
            "users_uri": users,
            "items_uri": items,
            "runs_folder": str((out / "runs").absolute()),
            "ledger_url": ledger or f"sqlite:///{(out / 'ledger.db').absolute()}",
            "budget_epsilon": budget_epsilon,
            "budget_delta": budget_delta,
            "operator": getpass.getuser(),
            "compare_config": _read(compare_config or config, "training configuration"),
        },
        out=out,
        compare=compare or compare_config is not None,
        ask=ask,
    )


def _make_sample(folder: Path) -> tuple[Path, tuple[str, ...]]:
    from lazydp.pipelines.cli import cli

    if not (folder / "spec.yaml").exists():
        cli.main(["sample-data", "--out", str(folder)], standalone_mode=False)
    return folder / "spec.yaml", (str((folder / "interactions.parquet").absolute()),)


@command.command(
    name="compile", epilog="Example: lazydp pipeline compile --spec spec.yaml --config train.yaml --out pipeline.yaml"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The package to write, *.yaml.")
@click.option("--spec", type=click.Path(path_type=Path), help="Feature spec that becomes the parameter's default.")
@click.option("--config", type=click.Path(path_type=Path), help="Training configuration, likewise.")
@click.option("--compare", is_flag=True, help="Also train and measure the same model without privacy.")
@click.option("--runs-claim", default="lazydp-runs", show_default=True, help="Volume claim for run folders.")
@click.option("--runs-mount", default="/mnt/runs", show_default=True, help="Where it is mounted.")
@click.option("--ledger-secret", help="Secret with the ledger's `url` and `secret`.")
@click.option("--cpu", default="4", show_default=True, help="CPUs for training.")
@click.option("--memory", default="16Gi", show_default=True, help="Memory for training.")
def compile_(
    out: Path,
    spec: Path | None,
    config: Path | None,
    compare: bool,
    runs_claim: str,
    runs_mount: str,
    ledger_secret: str | None,
    cpu: str,
    memory: str,
) -> None:
    """Write the pipeline as YAML for a cluster.

    The image is that of the environment variable LAZYDP_IMAGE. Spec and configuration are parameters: they may be
    given when a run is started instead.
    """
    from lazydp.pipelines.local import compile_pipeline
    from lazydp.pipelines.recommender import Cluster, recommender_pipeline

    cluster = Cluster(runs_claim=runs_claim, runs_mount=runs_mount, ledger_secret=ledger_secret, cpu=cpu, memory=memory)
    defaults = {"runs_folder": runs_mount}
    if spec is not None:
        defaults["spec"] = _on_one_line(spec, "feature spec")
    if config is not None:
        defaults["config"] = defaults["compare_config"] = _on_one_line(config, "training configuration")
    compile_pipeline(recommender_pipeline(compare=compare, cluster=cluster), out, defaults=defaults)
