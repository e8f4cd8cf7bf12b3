"""What is compiled: parameters that arrive as they were written, options that a cluster understands."""

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from lazydp.components.shared.errors import InputError
from lazydp.pipelines.cli import cli
from lazydp.pipelines.cluster import TASKS, Cluster, options_text
from lazydp.pipelines.package import documents_of, on_one_line
from support.kfp_backend import Backend
from support.kfp_backend.manifest import pod_of

# What a spec or a configuration may hold, as YAML; none of it may arrive as anything else.
VARIANTS = [
    """name: 'single "double" quotes'""",
    '''name: "it's # no comment"''',
    "name: |\n  two\n  lines\n",
    "name: >\n  folded\n\n  text\n",
    "name: 'ünïcödé, Привет, 你好'",
    'name: "\\U0001F600 \\u2028 \\u0085 \\x07"',
    "name: '{{workflow.name}} {{=1+1}} {{ }}'",
    "name: \"{{$.inputs.parameters['config']}} {{$}} {{$.pipeline_job_uuid}}\"",
    "name: '$HOME ${HOME} $(id) `id`'",
    "name: 'back\\slash \\n \\\\'",
    "values: [1e-5, 1.0e-5, 0.1, 1, -0.0, 9007199254740993, .5]",
    "values: [yes, 'yes', null, '', ~, 'null', 1.0, '1.0', 0x10, 2020-01-01]",
    "{a: {b: {c: {d: [[], {}, [{}]]}}}}",
    "base: &base {x: 1}\nother: *base\nmore: {<<: *base, y: 2}\n",
    "name: '%s %(x)s {0} {x!r} \t tab   spaces   '",
]


class Listener:
    """Stands in for the pods: notes what each task's process would be given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def run(self, arguments: list[str], *, pod: Path, **_: Any) -> tuple[int, str]:
        document = json.loads(arguments[arguments.index("--executor_input") + 1])
        task = pod.name.split("-", 1)[1].rsplit("-", 1)[0]
        self.given[task] = document["inputs"]["parameterValues"]
        file = Path(document["outputs"]["outputFile"])
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"parameterValues": {"Output": "run-x"}}))
        return 0, ""


def compiled(folder: Path, *options: str) -> Path:
    package = folder / "pipeline.yaml"
    result = CliRunner().invoke(cli, ["pipeline", "compile", "--out", str(package), *options])
    assert result.exit_code == 0, result.output
    return package


@pytest.mark.parametrize("first", range(0, len(VARIANTS), 2))
def test_parameters_arrive_as_they_were_written(tmp_path: Path, first: int) -> None:
    texts = {"spec": VARIANTS[first], "config": VARIANTS[(first + 1) % len(VARIANTS)]}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    package = compiled(tmp_path, *(part for name in texts for part in (f"--{name}", str(tmp_path / f"{name}.yaml"))))
    listener = Listener()
    backend = Backend(
        tmp_path / "backend",
        listener,  # type: ignore[arg-type]
        claims=("lazydp-runs",),
        secrets={"lazydp-ledger": {"url": "u", "secret": "s"}},
    )
    given = {"input_uri": "a 'b' \"c\" \\ $d ü\n2", "operator": "{0} %s", "name": "", "budget_epsilon": 8}
    run = backend.run(package, given)
    assert run.state == "SUCCEEDED", run.failed()
    assert yaml.safe_load(listener.given["ingest"]["spec"]) == yaml.safe_load(texts["spec"])
    for task in ("budget-gate", "train"):
        assert yaml.safe_load(listener.given[task]["config"]) == yaml.safe_load(texts["config"])
    assert listener.given["ingest"]["spec"].startswith("{"), "ingest takes it for text by its brace"
    assert listener.given["ingest"]["input_uri"] == given["input_uri"]
    gate = listener.given["budget-gate"]
    assert (gate["operator"], gate["budget_epsilon"], gate["budget_delta"]) == ("{0} %s", 8, 1e-5)
    assert gate["job_id"] == run.run_id


OPTIONS: dict[str, Any] = {
    "image": "registry.example/lazydp:1",
    "image_pull_secret": "puller",
    "image_pull_policy": "Always",
    "data": {"secret": "s3"},
    "labels": {"team": "recs"},
    "environment": {"OMP_NUM_THREADS": "4"},
    "defaults": {"node_selector": {"pool": "batch"}},
    "registry": {"url": "https://registry.example", "secret": "registry"},
    "deploy": {"name": "films", "namespace": "recs", "changes": {"spec": {"predictor": {"maxReplicas": 9}}}},
    "tasks": {
        "train": {
            "cpu": "8",
            "cpu_limit": 12,
            "memory": "32Gi",
            "accelerator": {"count": 2},
            "shared_memory": "2Gi",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "timeout_s": 3600,
            "retries": {"count": 5, "backoff_s": 60},
            "labels": {"stage": "train"},
        }
    },
}


def test_pods_are_what_kubernetes_takes_and_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(OPTIONS))
    spec, platform = documents_of(compiled(tmp_path, "--cluster", str(tmp_path / "cluster.yaml")))
    pods = {name: pod_of(name, spec, platform) for name in spec["deploymentSpec"]["executors"]}
    for pod in pods.values():
        kubernetes_validate.validate(pod, "1.37", strict=True)
        [container] = pod["spec"]["containers"]
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}, "a ResourceQuota refuses it"
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        assert container["image"] == "registry.example/lazydp:1"
        assert pod["spec"]["nodeSelector"] == {"pool": "batch"}
    [container] = pods["exec-register"]["spec"]["containers"]
    told = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry}
    assert told == {"LAZYDP_REGISTRY_TOKEN": {"name": "registry", "key": "token"}}
    train, gate = pods["exec-train"], pods["exec-budget-gate"]
    [container] = train["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "32Gi"},
        "limits": {"cpu": "12", "memory": "32Gi", "nvidia.com/gpu": "2"},
    }
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/mnt/runs"}
    assert train["spec"]["activeDeadlineSeconds"] == 3600
    assert train["metadata"]["labels"] == {"team": "recs", "stage": "train"}
    assert gate["spec"]["containers"][0]["resources"]["requests"] == {"cpu": "500m", "memory": "1Gi"}
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert set(tasks["register"]["dependentTasks"]) == {"export", "validate"}, "nothing is entered unchecked"
    assert set(tasks["deploy"]["dependentTasks"]) == {"export", "validate", "register"}
    given = tasks["deploy"]["inputs"]["parameters"]["changes"]["runtimeValue"]["constant"]
    assert yaml.safe_load(given) == OPTIONS["deploy"]["changes"]
    assert tasks["train"]["retryPolicy"] == {
        "backoffDuration": "60s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": "600s",
        "maxRetryCount": 5,
    }
    assert "retryPolicy" not in tasks["budget-gate"], "a refused budget stays refused"
    train["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(train, "1.37", strict=True)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"tasks": {"train": {"memory": "16GB"}}}, "tasks.train.memory: expected memory as Kubernetes writes it"),
        ({"tasks": {"train": {"cpu": "abc"}}}, "tasks.train.cpu: expected CPUs as Kubernetes writes them"),
        ({"runs": {"mount": "runs"}}, "runs.mount: expected an absolute path, found 'runs'"),
        ({"runs": {"claim": ""}}, "runs.claim: expected the name of a persistent volume claim"),
        ({"ledger": {"secret": "Bad_Name"}}, "ledger.secret: expected the name of a secret"),
        ({"tasks": {"trian": {}}}, "tasks.trian"),
        ({"tasks": {"train": {"memroy": "1Gi"}}}, "no such option; did you mean 'memory'?"),
        (
            {"tasks": {"train": {"tolerations": [{"operator": "Exists", "value": "x"}]}}},
            "operator Exists takes no value",
        ),
        ({"registry": {"url": "registry:8080"}}, "registry.url: expected a URL of scheme, host and port"),
        ({"deploy": {"name": "films"}}, "deploy.namespace: Field required"),
        ({"format_version": 2}, "format_version 2 is newer"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(document: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as raised:
        Cluster.parse(document, where="cluster.yaml")
    assert expected in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs: [", r"cluster\.yaml:1: not YAML"),
        ("runs: {claim: a}\ntasks: {}\nruns: {claim: b}\n", r"cluster\.yaml:3: the field 'runs' stands there twice"),
        ("- runs\n", r"cluster\.yaml:1: expected a mapping of options, found \['runs'\]"),
    ],
)
def test_a_wrong_file_of_options_is_told_with_its_line(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(InputError, match=expected):
        Cluster.load(tmp_path / "cluster.yaml")
    if text.startswith("runs"):  # and so is a file that becomes a parameter of the package
        with pytest.raises(InputError, match=expected):
            on_one_line(text, where=tmp_path / "cluster.yaml")


def test_an_empty_file_of_options_leaves_all_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("# none\n")
    assert Cluster.load(tmp_path / "cluster.yaml") == Cluster()


def test_the_printed_options_can_be_used_as_they_are() -> None:
    printed = Cluster.parse(yaml.safe_load(options_text()), where="printed")
    assert [printed.options(task) for task in TASKS] == [Cluster().options(task) for task in TASKS]
    for name in Cluster.model_fields:
        assert f"\n{name}:" in options_text() or f"\n# {name}:" in options_text()


def test_the_kubernetes_resources_hold_the_same_pipeline(tmp_path: Path) -> None:
    archive = documents_of(compiled(tmp_path))
    pipeline, version = documents_of(compiled(tmp_path, "--kubernetes", "recs"))
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert pipeline["metadata"]["namespace"] == version["metadata"]["namespace"] == "recs"
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    assert version["spec"]["pipelineSpec"] == archive[0]
    assert version["spec"]["platformSpec"] == archive[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sweep", "sweep.yaml"), "pipeline train-and-release tries no settings"),
        (("--pipeline", "sweep", "--compare"), "a sweep chooses the settings itself"),
    ],
)
def test_a_sweep_is_asked_for_as_a_whole(tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    (tmp_path / "sweep.yaml").write_text("{}")
    given = [str(tmp_path / part) if part.endswith(".yaml") else part for part in options]
    result = CliRunner().invoke(cli, ["pipeline", "compile", "--out", str(tmp_path / "pipeline.yaml"), *given])
    assert result.exit_code != 0
    assert expected in f"{result.output}{result.exception}"
