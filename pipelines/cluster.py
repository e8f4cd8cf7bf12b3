"""The options of a compiled package: what its tasks ask of a cluster (`cluster.yaml`); a local run has none."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lazydp.components.shared.errors import InputError
from lazydp.components.shared.image import IMAGE
from lazydp.components.shared.validation import read_yaml

FORMAT_VERSION = 1
TASKS = (
    "ingest",
    "budget-gate",
    "train",
    "export",
    "evaluate",
    "validate",
    "tune",
    "register",
    "deploy",
    "finish",
)
"""Names by which `tasks` of cluster.yaml gives one task options of its own."""

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
Name = Annotated[str, Field(pattern=rf"^{_DNS_LABEL}(\.{_DNS_LABEL})*$", max_length=253)]
AbsolutePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_.][A-Za-z0-9_./-]*$")]
Cpu = Annotated[str, Field(pattern=r"^([0-9]*[.])?[0-9]+m?$")]
Memory = Annotated[str, Field(pattern=r"^[1-9][0-9]*(E|Ei|P|Pi|T|Ti|G|Gi|M|Mi|K|Ki)?$")]
Url = Annotated[str, Field(pattern=r"^https?://[^/\s?#@{}]+$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SecretKey = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")]
_LABEL = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
LabelName = Annotated[str, Field(pattern=rf"^({_DNS_LABEL}(\.{_DNS_LABEL})*/)?{_LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^{_LABEL}?$")]
# What a person sees instead of a pattern.
_EXPECTED = {
    "cpu": "CPUs as Kubernetes writes them, such as 4 or 500m",
    "cpu_limit": "CPUs as Kubernetes writes them, such as 4 or 500m",
    "memory": "memory as Kubernetes writes it, such as 16Gi or 512Mi",
    "memory_limit": "memory as Kubernetes writes it, such as 16Gi or 512Mi",
    "shared_memory": "memory as Kubernetes writes it, such as 2Gi",
    "url": "a URL of scheme, host and port, such as http://registry:8080",
    "size": "a size as Kubernetes writes it, such as 100Gi",
    "mount": "an absolute path",
    "claim": "the name of a persistent volume claim: lower-case letters, digits, '-' and '.'",
    "secret": "the name of a secret: lower-case letters, digits, '-' and '.'",
    "image_pull_secret": "the name of a secret: lower-case letters, digits, '-' and '.'",
}


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class Accelerator(_Options):
    """GPUs of a task."""

    type: LabelName = Field(default="nvidia.com/gpu", description="resource name")
    count: int = Field(ge=1, description="how many")


class Toleration(_Options):
    """A taint of nodes that a task's pod may run on."""

    key: LabelName | None = Field(default=None, description="of the taint; empty, with operator Exists, for any")
    operator: Literal["Equal", "Exists"] = Field(default="Equal", description="Equal or Exists")
    value: str | None = Field(default=None, description="with Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="of the taint"
    )
    seconds: int | None = Field(default=None, ge=0, description="with NoExecute: how long the pod stays")

    @model_validator(mode="after")
    def _exists_has_no_value(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("operator Exists takes no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator Equal needs a key")
        return self


class Retries(_Options):
    """How often a failed pod is started again, and after how long."""

    count: int = Field(default=2, ge=0, description="pods after the first")
    backoff_s: int = Field(default=30, ge=0, description="seconds before the first retry")
    factor: float = Field(default=2.0, ge=1, description="each wait over the one before")
    max_s: int = Field(default=600, ge=1, description="longest wait, seconds")


class TaskOptions(_Options):
    """Options of one task; what is left out comes from `defaults`, then from the built-in ones."""

    cpu: Cpu | None = Field(default=None, description="CPUs requested")
    cpu_limit: Cpu | None = Field(default=None, description="CPUs at most; the request where left out")
    memory: Memory | None = Field(default=None, description="memory requested")
    memory_limit: Memory | None = Field(default=None, description="memory at most; the request where left out")
    accelerator: Accelerator | None = Field(default=None, description="GPUs: {type, count}")
    shared_memory: Memory | None = Field(default=None, description="size of /dev/shm")
    node_selector: dict[LabelName, LabelValue] | None = Field(
        default=None, description="labels that the node must have"
    )
    tolerations: tuple[Toleration, ...] | None = Field(
        default=None, description="taints tolerated: {key, operator, value, effect, seconds}"
    )
    timeout_s: int | None = Field(default=None, ge=1, description="seconds after which the pod is stopped")
    retries: Retries | None = Field(default=None, description="{count, backoff_s, factor, max_s}; the gate has none")
    environment: dict[Variable, str] | None = Field(default=None, description="variables, added to the package's")
    labels: dict[LabelName, LabelValue] | None = Field(default=None, description="of the pod, added to the package's")

    def over(self, base: TaskOptions) -> TaskOptions:
        """These options, and those of `base` where these say nothing."""
        found = {name: value for name, value in self if value is not None}
        return base.model_copy(update=found)


class LedgerSecret(_Options):
    """The Kubernetes secret of the ledger."""

    secret: Name = Field(default="lazydp-ledger", description="name of the secret")
    url_key: SecretKey = Field(default="url", description="key of the ledger's URL (PostgreSQL)")
    secret_key: SecretKey = Field(default="secret", description="key of the ledger's own secret, 64 hexadecimal digits")


class DataSecret(_Options):
    """The Kubernetes secret with the keys of the store that holds the data; given to ingest alone."""

    secret: Name = Field(description="name of the secret")
    variables: dict[Variable, SecretKey] = Field(
        default={"AWS_ACCESS_KEY_ID": "access_key", "AWS_SECRET_ACCESS_KEY": "secret_key"},
        description="variable in the pod -> key of the secret",
    )


class Runs(_Options):
    """Where run folders lie: checkpoints and noise keys. A claim that stays, or with `size` a volume for each run."""

    claim: Name = Field(default="lazydp-runs", description="persistent volume claim, ReadWriteMany")
    mount: AbsolutePath = Field(default="/mnt/runs", description="where it is mounted")
    size: Memory | None = Field(default=None, description="instead of the claim: size of a volume made for each run")
    storage_class: Name | None = Field(default=None, description="with size: storage class of that volume")
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"] = Field(
        default="ReadWriteMany", description="with size: access mode of that volume"
    )


class Registry(_Options):
    """The Kubeflow Model Registry that releases are entered in."""

    url: Url = Field(description="such as http://model-registry-service.kubeflow.svc:8080")
    secret: Name | None = Field(default=None, description="secret with a bearer token; needed with https")
    token_key: SecretKey = Field(default="token", description="key of the token in that secret")


class Deployment(_Options):
    """The KServe InferenceService that serves the newest release."""

    name: Annotated[str, Field(pattern=rf"^{_DNS_LABEL}$", max_length=63)] = Field(description="of the service")
    namespace: Annotated[str, Field(pattern=rf"^{_DNS_LABEL}$", max_length=63)] = Field(description="of the service")
    service_account: Name | None = Field(default=None, description="of its pods: the one with the store's keys")
    changes: dict[str, Any] = Field(
        default={}, description="merged over the manifest, such as {spec: {predictor: ...}}"
    )
    apply: bool = Field(default=False, description="apply it; otherwise the manifest is an artifact, and no more")


class Cluster(_Options):
    """What a package asks of a cluster.

    `Cluster.load` reads it from a file.
    """

    format_version: int = Field(default=FORMAT_VERSION, description="of this file")
    image: str = Field(default=IMAGE, min_length=1, description="of every task; LAZYDP_IMAGE where left out")
    image_pull_secret: Name | None = Field(default=None, description="secret with which the image is pulled")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="of the image"
    )
    ledger: LedgerSecret = Field(default=LedgerSecret(), description="secret of the ledger")
    data: DataSecret | None = Field(default=None, description="secret of the data's store")
    runs: Runs = Field(default=Runs(), description="volume of run folders")
    input_is_immutable: bool = Field(
        default=False,
        description="let Kubeflow reuse the dataset of an earlier run with the same URIs; only where a URI never "
        "gets other content",
    )
    on_failure: Literal["keep", "void"] = Field(
        default="keep",
        description="a run that failed: keep its folder and reservation, so that it can be retried, or destroy the "
        "folder and void the reservation",
    )
    check_release: bool = Field(
        default=True, description="start the service on the release and ask it, before anybody else does"
    )
    max_latency_ms: float = Field(
        default=1000.0, gt=0, description="with check_release: 95th percentile of an answer that is tolerated"
    )
    registry: Registry | None = Field(default=None, description="model registry that releases are entered in")
    deploy: Deployment | None = Field(default=None, description="KServe service of the newest release")
    environment: dict[Variable, str] = Field(default={}, description="variables of every task")
    labels: dict[LabelName, LabelValue] = Field(default={}, description="labels of every pod")
    defaults: TaskOptions = Field(default=TaskOptions(), description="options of every task")
    tasks: dict[Literal[TASKS], TaskOptions] = Field(  # type: ignore[valid-type]
        default={}, description=f"options of one task; tasks are {', '.join(TASKS)}"
    )

    def options(self, task: str) -> TaskOptions:
        """The options of a task, none left out that a pod needs."""
        given = self.tasks.get(task, TaskOptions()).over(self.defaults.over(_built_in(task)))
        return given.over(TaskOptions(cpu_limit=given.cpu, memory_limit=given.memory))

    @classmethod
    def load(cls, path: Path, **changes: Any) -> Self:
        """Read cluster.yaml.

        Args:
            path: the file.
            changes: `section.field` -> value, over what the file says.

        Raises:
            InputError: not readable, not YAML, or a wrong option; one line that names file and option.
        """
        document = read_yaml(path, what="file of cluster options")
        content = {} if document.content is None else document.content
        if not isinstance(content, dict):
            raise document.error(f"expected a mapping of options, found {content!r:.60}")
        return cls.parse(content, where=str(path), changes=changes)

    @classmethod
    def parse(cls, document: Mapping[str, Any], *, where: str, changes: Mapping[str, Any] | None = None) -> Self:
        """Validate a mapping, with `changes` (`section.field` -> value, None for none) over it.

        Raises:
            InputError: one line that begins with `where`.
        """
        whole: dict[str, Any] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in document.items()
        }
        for name, value in (changes or {}).items():
            if value is not None:
                *sections, last = name.split(".")
                target = whole
                for section in sections:
                    target = target.setdefault(section, {})
                target[last] = value
        version = whole.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise InputError(f"{where}: format_version {version} is newer than this lazydp reads ({FORMAT_VERSION})")
        try:
            return cls.model_validate(whole)
        except ValidationError as error:
            raise InputError(f"cluster options {where}: {_problem(error)}") from error


def _built_in(task: str) -> TaskOptions:
    small = TaskOptions(cpu="500m", memory="1Gi", retries=Retries())
    larger = {
        "ingest": {"cpu": "2", "memory": "4Gi"},
        "train": {"cpu": "4", "memory": "16Gi"},
        "export": {"cpu": "2", "memory": "16Gi"},
        "evaluate": {"cpu": "2", "memory": "8Gi"},
        "validate": {"cpu": "1", "memory": "8Gi"},
        "tune": {"cpu": "4", "memory": "16Gi"},
    }
    return small.model_copy(update=larger.get(task, {}))


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "[key]"]
    name = place[-1] if place else ""
    expected = _EXPECTED.get(name)
    if first["type"] == "string_pattern_mismatch" and expected is not None:
        message = f"expected {expected}, found {first['input']!r}"
    elif first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, _names(Cluster), n=1)
        message = (
            f"no such option{f'; did you mean {close[0]!r}?' if close else ''} (`lazydp pipeline options` lists them)"
        )
    else:
        message = f"{first['msg'].removeprefix('Value error, ')}, found {first['input']!r:.60}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{'.'.join(place)}: {message}{more}"


def _names(model: type[BaseModel]) -> set[str]:
    found = set(model.model_fields)
    for part in (Accelerator, Toleration, Retries, TaskOptions, LedgerSecret, DataSecret, Runs, Registry, Deployment):
        found |= set(part.model_fields)
    return found


def options_text() -> str:
    """Every option of cluster.yaml with what it means and what it is where left out, as a commented YAML file."""
    lines = ["# cluster.yaml: what `lazydp pipeline compile --cluster` asks of a cluster."]
    lines += _section(Cluster, Cluster(), indent="")
    lines += ["", "# Built in, where neither `defaults` nor `tasks` says otherwise:"]
    for task in TASKS:
        found = Cluster().options(task)
        assert found.retries is not None
        retries = 0 if task == "budget-gate" else found.retries.count
        lines.append(f"#   {task:12} cpu {found.cpu}, memory {found.memory}, {retries} retries")
    return "\n".join(lines) + "\n"


_SECTIONS: dict[str, type[BaseModel]] = {
    "ledger": LedgerSecret,
    "data": DataSecret,
    "runs": Runs,
    "registry": Registry,
    "deploy": Deployment,
    "defaults": TaskOptions,
    "accelerator": Accelerator,
    "retries": Retries,
}
_ABSENT = {"data", "accelerator", "retries", "registry", "deploy"}


def _section(model: type[BaseModel], built_in: BaseModel | None, indent: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        lines.append(f"{indent}# {field.description}")
        section = _SECTIONS.get(name)
        if section is not None:
            # A section that is absent where left out stands in comments, so that what is printed can be used.
            mark = "# " if name in _ABSENT else ""
            lines += [f"{indent}{mark}{line}" for line in (f"{name}:", *_section(section, None, "  "))]
            continue
        value = getattr(built_in, name) if built_in is not None else field.get_default()
        text = "" if field.is_required() else yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()
        lines.append(f"{indent}{name}: {text}".rstrip())
    return lines


def default_cluster() -> Cluster:
    """The options where no file gives any."""
    return Cluster(image=os.environ.get("LAZYDP_IMAGE", IMAGE))
