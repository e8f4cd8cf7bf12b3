"""What the tasks of one pipeline run agree on: the run's name, its private folder, its ledger, who started it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lazydp.components.shared.errors import InputError

LEDGER_VARIABLE = "LAZYDP_LEDGER"
OPERATOR_VARIABLE = "LAZYDP_OPERATOR"
# Kubernetes sets it in every pod.
_IN_A_POD = "KUBERNETES_SERVICE_HOST"
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


def run_name(job_id: str, *, variant: str = "") -> str:
    """The name of a run in the ledger and of its folder.

    Args:
        job_id: the pipeline's own run id, so that a retried task finds what its first attempt left.
        variant: tells a second run of the same pipeline run from the first.

    Raises:
        InputError: it is no id. Kubeflow's backend replaces `{{$.pipeline_job_uuid}}` only where it is a whole
            parameter; a name that every run of a pipeline shares would join runs that have nothing in common.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise InputError(
            f"job_id: expected the id of the pipeline's run (letters, digits, '.', '_', '-'), found {job_id!r}: give "
            "dsl.PIPELINE_JOB_ID_PLACEHOLDER as the whole parameter, with no text around it"
        )
    return f"run-{job_id}-{variant}" if variant else f"run-{job_id}"


def run_folder(runs_folder: str, name: str) -> Path:
    """The private folder of a run: checkpoints and the noise key.

    Raises:
        InputError: `runs_folder` is not an absolute path that this process may write to.
    """
    folder = Path(runs_folder)
    if not folder.is_absolute():
        raise InputError(f"runs_folder: expected an absolute path, on a volume that outlives the pod, found {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"runs_folder {folder} cannot be made: {error.strerror}; is the volume mounted?") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"runs_folder {folder} is not writable for uid {os.getuid()}: a new volume belongs to root, and Kubeflow "
            "cannot set fsGroup; run the job deploy/volume/prepare.yaml on its claim once"
        )
    return folder / name


def ledger_of(ledger_url: str) -> str:
    """The ledger of a pipeline: the URL given, or that of LAZYDP_LEDGER.

    Raises:
        InputError: there is none, or it is a file that ends with the pod. A default would be a fresh ledger in every
            pod, in which nothing was ever spent.
    """
    url = ledger_url or os.environ.get(LEDGER_VARIABLE, "")
    if not url:
        raise InputError(
            f"a pipeline needs a ledger, and neither ledger_url nor {LEDGER_VARIABLE} names one: give the tasks the "
            "secret of the ledger (`ledger.secret` in cluster.yaml), or the parameter ledger_url"
        )
    if url.startswith("sqlite") and _IN_A_POD in os.environ:
        raise InputError(
            f"ledger {url} is a SQLite file in a pod: SQLite's locks do not hold across pods, so two runs could "
            "overspend together. Use PostgreSQL (docs/budget.md)"
        )
    return url


def act_as(operator: str) -> None:
    """Have the ledger's entries of this process name who started the pipeline; empty leaves it as it is."""
    if operator:
        os.environ[OPERATOR_VARIABLE] = operator
