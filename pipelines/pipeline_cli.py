"""`lazydp pipeline run | compile | submit | options`."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazydp.components.shared.ledger_url import LEDGER, URL_VARIABLE, default_ledger_url, is_on_the_command_line

if TYPE_CHECKING:
    from lazydp.pipelines.cluster import Cluster


@click.group(name="pipeline")
def command() -> None:
    """Run the whole pipeline on this machine, or compile it for a cluster."""


def _parameter(path: Path, what: str) -> str:
    """The file's YAML as a parameter of a package."""
    from lazydp.components.shared.validation import read_text
    from lazydp.pipelines.package import on_one_line

    return on_one_line(read_text(path, what=what), where=path)


def _ledger(ledger: str | None, *, made_up: bool, out: Path) -> str:
    """The ledger as a parameter: empty where the tasks find it in the environment, for parameters are logged."""
    if ledger is not None:
        return ledger if is_on_the_command_line(click.get_current_context()) else ""
    # The people of the built-in sample are made up: it need not draw on anybody's budget.
    if made_up:
        return f"sqlite:///{(out / 'ledger.db').absolute()}"
    url = default_ledger_url()
    if "@" not in url:
        return url
    os.environ[URL_VARIABLE] = url
    return ""


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
@LEDGER
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
    from lazydp.components.shared.validation import read_text
    from lazydp.pipelines.show import run_and_show

    run_and_show(
        arguments={
            "input_uri": join_locations(inputs),
            "spec": str(spec.absolute()),
            "config": read_text(config, what="training configuration"),
            "users_uri": users,
            "items_uri": items,
            "runs_folder": str((out / "runs").absolute()),
            "ledger_url": _ledger(ledger, made_up=sample, out=out),
            "budget_epsilon": budget_epsilon,
            "budget_delta": budget_delta,
            "operator": getpass.getuser(),
            "compare_config": read_text(compare_config or config, what="training configuration"),
        },
        out=out,
        compare=compare or compare_config is not None,
        ask=ask,
    )


def _make_sample(folder: Path) -> tuple[Path, tuple[str, ...]]:
    import contextlib
    import io

    from lazydp.pipelines.cli import cli

    if not (folder / "spec.yaml").exists():
        with contextlib.redirect_stdout(io.StringIO()):  # it says what to do next, which this very command does
            cli.main(["sample-data", "--out", str(folder)], standalone_mode=False)
    return folder / "spec.yaml", (str((folder / "interactions.parquet").absolute()),)


def _package_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `compile` and `submit` have in common: which pipeline, for what cluster, with what defaults."""
    for option in reversed(
        [
            click.option(
                "--pipeline",
                type=click.Choice(["train-and-release", "retrain", "sweep"]),
                default="train-and-release",
                show_default=True,
                help="retrain opens no budget: it stops where the family's has no room. sweep tries settings, as one.",
            ),
            click.option("--spec", type=click.Path(path_type=Path), help="Feature spec that becomes the default."),
            click.option("--config", type=click.Path(path_type=Path), help="Training configuration, likewise."),
            click.option("--sweep", type=click.Path(path_type=Path), help="What the sweep tries, likewise."),
            click.option("--compare", is_flag=True, help="Also train and measure the same model without privacy."),
            click.option(
                "--cluster",
                "cluster_file",
                type=click.Path(path_type=Path),
                help="cluster.yaml: image, secrets, volumes, resources. `lazydp pipeline options` lists them.",
            ),
            click.option("--image", help="Image of every task, instead of the cluster's."),
            click.option("--runs-claim", help="Volume claim for run folders, likewise."),
            click.option("--runs-mount", help="Where it is mounted, likewise."),
            click.option("--ledger-secret", help="Secret with the ledger's `url` and `secret`, likewise."),
            click.option("--cpu", help="CPUs for training, likewise."),
            click.option("--memory", help="Memory for training, likewise."),
        ]
    ):
        command = option(command)
    return command


def _cluster(
    file: Path | None,
    *,
    image: str | None,
    runs_claim: str | None,
    runs_mount: str | None,
    ledger_secret: str | None,
    cpu: str | None,
    memory: str | None,
) -> Cluster:
    from lazydp.pipelines.cluster import Cluster, default_cluster

    changes = {
        "image": image,
        "runs.claim": runs_claim,
        "runs.mount": runs_mount,
        "ledger.secret": ledger_secret,
        "tasks.train.cpu": cpu,
        "tasks.train.memory": memory,
    }
    if file is not None:
        return Cluster.load(file, **changes)
    return Cluster.parse({"image": default_cluster().image}, where="of the command line", changes=changes)


def _defaults(
    cluster: Cluster, pipeline: str, *, spec: Path | None, config: Path | None, sweep: Path | None
) -> dict[str, str]:
    defaults = {"runs_folder": cluster.runs.mount}
    if sweep is not None and pipeline != "sweep":
        raise click.UsageError(f"--sweep: pipeline {pipeline} tries no settings: say --pipeline sweep")
    if spec is not None:
        defaults["spec"] = _parameter(spec, "feature spec")
    if config is not None:
        defaults["config"] = _parameter(config, "training configuration")
        if pipeline != "sweep":
            defaults["compare_config"] = defaults["config"]
    if sweep is not None:
        defaults["sweep"] = _parameter(sweep, "sweep")
    return defaults


@command.command(
    name="compile", epilog="Example: lazydp pipeline compile --spec spec.yaml --config train.yaml --out pipeline.yaml"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The package to write, *.yaml.")
@click.option(
    "--kubernetes",
    metavar="NAMESPACE",
    help="Write the resources Pipeline and PipelineVersion for a namespace, to be applied with kubectl.",
)
@_package_options
def compile_(
    out: Path,
    kubernetes: str | None,
    pipeline: str,
    spec: Path | None,
    config: Path | None,
    sweep: Path | None,
    compare: bool,
    cluster_file: Path | None,
    **options: str | None,
) -> None:
    """Write the pipeline as YAML for a cluster.

    Spec and configuration are parameters: they may be given when a run is started instead.
    """
    from lazydp.pipelines.package import compile_package
    from lazydp.pipelines.recommender import PIPELINES

    cluster = _cluster(cluster_file, **options)
    compile_package(
        PIPELINES[pipeline](compare=compare, cluster=cluster),
        out,
        defaults=_defaults(cluster, pipeline, spec=spec, config=config, sweep=sweep),
        kubernetes=kubernetes,
    )
    click.echo(f"wrote {out}")


@command.command(
    name="submit",
    epilog="Example: lazydp pipeline submit --host https://kubeflow.example/pipeline --namespace recs "
    "--token-file token --spec spec.yaml --config train.yaml --parameter input_uri=s3://logs/interactions/ --wait",
)
@click.option("--host", required=True, envvar="LAZYDP_KUBEFLOW_HOST", help="URL of the API of Kubeflow Pipelines.")
@click.option("--namespace", default="", envvar="LAZYDP_KUBEFLOW_NAMESPACE", help="Profile; empty with one user only.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with a bearer token, read again for each request.  [default: LAZYDP_KUBEFLOW_TOKEN, the token itself]",
)
@click.option("--in-cluster", is_flag=True, help="Use the token that Kubeflow mounted in this pod.")
@click.option("--certificate", type=click.Path(path_type=Path), help="Authority that signed the host's certificate.")
@click.option("--experiment", default="Default", show_default=True, help="Experiment of the run.")
@click.option("--create-experiment", is_flag=True, help="Make the experiment where there is none.")
@click.option("--run-name", help="Name of the run.  [default: the pipeline's, and the time]")
@click.option("--parameter", "given", multiple=True, metavar="NAME=VALUE", help="Of the run; may be repeated.")
@click.option("--service-account", help="Kubernetes service account that the run's pods use.")
@click.option("--schedule", metavar="CRON", help="Start a recurring run instead, such as '30 2 * * *'.")
@click.option("--wait", is_flag=True, help="Wait for the end; status 1 where the run fails, with the task's last line.")
@click.option("--poll", type=click.FloatRange(min=0.01), default=5.0, show_default=True, help="Seconds between looks.")
@_package_options
def submit(
    host: str,
    namespace: str,
    token_file: Path | None,
    in_cluster: bool,
    certificate: Path | None,
    experiment: str,
    create_experiment: bool,
    run_name: str | None,
    given: tuple[str, ...],
    service_account: str | None,
    schedule: str | None,
    wait: bool,
    poll: float,
    pipeline: str,
    spec: Path | None,
    config: Path | None,
    sweep: Path | None,
    compare: bool,
    cluster_file: Path | None,
    **options: str | None,
) -> None:
    """Compile the pipeline, upload it to Kubeflow, and start it.

    The package is the one that `compile` writes. A version of the same content is not uploaded twice.
    """
    import datetime
    import os
    import tempfile

    from lazydp.pipelines.kubeflow import Kubeflow, Order, cron_of, token_of
    from lazydp.pipelines.package import compile_package, documents_of
    from lazydp.pipelines.parameters import parse_parameters
    from lazydp.pipelines.recommender import PIPELINES

    if schedule is not None:
        if wait:
            raise click.UsageError("--schedule starts a run each time, and --wait waits for one: give either")
        cron_of(schedule)
    cluster = _cluster(cluster_file, **options)
    token = token_of(file=token_file, in_cluster=in_cluster, environment=os.environ)
    with (
        tempfile.TemporaryDirectory(prefix="lazydp-submit-") as folder,
        Kubeflow(host, namespace=namespace, token=token, certificate=certificate) as kubeflow,
    ):
        package = Path(folder) / "pipeline.yaml"
        made = PIPELINES[pipeline](compare=compare, cluster=cluster)
        compile_package(made, package, defaults=_defaults(cluster, pipeline, spec=spec, config=config, sweep=sweep))
        compiled = documents_of(package)[0]
        parameters = parse_parameters(given, compiled, defaults={"operator": getpass.getuser()})
        experiment_id = kubeflow.experiment(experiment, create=create_experiment)
        uploaded = kubeflow.upload(package, name=f"lazydp-{pipeline}")
        click.echo(f"pipeline lazydp-{pipeline}, version {uploaded.version}")
        name = run_name or f"lazydp-{pipeline} {datetime.datetime.now():%Y-%m-%d %H:%M}"
        order = Order(experiment_id, name, parameters, service_account)
        if schedule is not None:
            recurring = kubeflow.schedule(uploaded, order, cron=schedule)
            click.echo(f"recurring run {recurring} ({cron_of(schedule)}): {host}/#/recurringrun/details/{recurring}")
            return
        run_id = kubeflow.start(uploaded, order)
        click.echo(f"run {run_id}: {kubeflow.link(run_id)}")
        if wait:
            kubeflow.wait(run_id, show=lambda line: click.echo(f"  {line}"), poll_s=poll)
            click.echo(f"run {run_id} succeeded")


@command.command(name="options", epilog="Example: lazydp pipeline options > cluster.yaml")
def options_() -> None:
    """Print every option of cluster.yaml, with its meaning and what it is where left out."""
    from lazydp.pipelines.cluster import options_text

    click.echo(options_text(), nl=False)
