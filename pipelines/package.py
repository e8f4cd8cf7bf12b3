"""The package of a pipeline: what is uploaded to Kubeflow or applied to a cluster."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from lazydp.components.shared.errors import InputError
from lazydp.components.shared.validation import parse_yaml

_KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def documents_of(package: Path) -> list[Any]:
    """The documents of a compiled package: the pipeline, and the platform's configuration where there is one."""
    # libyaml's parser, where it is there: a package has thousands of lines.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return list(yaml.load_all(package.read_text(), Loader=loader))


class _OneLine(yaml.SafeDumper):
    """YAML on one line, in ASCII: every text in double quotes, everything else as YAML writes it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_OneLine.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def on_one_line(text: str, *, where: Path) -> str:
    """YAML as a parameter of a pipeline: the same document on one line, in which nothing looks like a placeholder.

    kfp writes defaults into comments, where a line break breaks the file; the launcher replaces `{{$...}}` by text, and
    Argo `{{...}}`, wherever it stands. Two braces can only meet inside quotes, where one of them is escaped.

    Args:
        text: a YAML document.
        where: its file.

    Raises:
        InputError: not YAML.
    """
    return one_line(parse_yaml(text, where=str(where)).content)


def one_line(document: Any) -> str:
    """A document of YAML as such a line."""
    line: str = yaml.dump(
        document, Dumper=_OneLine, default_flow_style=True, width=float("inf"), allow_unicode=False, sort_keys=False
    )
    return line.strip().replace("{{", "{\\x7b")


def compile_package(
    pipeline: Callable[..., Any], package: Path, *, defaults: Mapping[str, Any], kubernetes: str | None = None
) -> None:
    """Write the pipeline as YAML.

    Args:
        pipeline: a kfp pipeline function.
        package: the file, *.yaml.
        defaults: parameter -> value where a run gives none.
        kubernetes: the namespace for which to write the resources Pipeline and PipelineVersion (KFP's Kubernetes
            native API) instead of an archive to upload; None for the archive.

    Raises:
        InputError: the file's name does not end in .yaml, or its folder does not exist, or the namespace is no name.
    """
    if package.suffix != ".yaml":
        raise InputError(f"the package must be named *.yaml, found {package.name}")
    if not package.absolute().parent.is_dir():
        raise InputError(f"{package.absolute().parent}, where the package was to go, is no folder: make it first")
    if kubernetes is not None and not _KUBERNETES_NAME.fullmatch(kubernetes):
        raise InputError(f"expected the name of a namespace (lower-case letters, digits, '-'), found {kubernetes!r}")
    options = None
    if kubernetes is not None:
        options = compiler.KubernetesManifestOptions(namespace=kubernetes, include_pipeline_manifest=True)
    with warnings.catch_warnings():
        # kfp warns that our image is not a stock Python image: it holds this very package.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="kfp")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="kfp")
        compiler.Compiler().compile(
            pipeline,
            str(package),
            pipeline_parameters=dict(defaults),
            kubernetes_manifest_format=kubernetes is not None,
            kubernetes_manifest_options=options,
        )
