"""Kubeflow Pipelines' backend, as far as a compiled package can tell: an interpreter of the IR for tests.

It follows the driver and the launcher of KFP 2.17 where they are stricter than kfp's local runner:

- a placeholder such as `{{$.pipeline_job_uuid}}` is replaced only where it is the whole of a constant; a constant that
  contains a pipeline channel becomes that channel's value, whatever stands around it (`driver/resolver/parameters.go`);
- the launcher replaces `{{$}}` and then everything else that looks like a placeholder by text, values included;
- numbers are doubles that went through protojson, so 8.0 arrives as the integer 8;
- artifacts travel by URI: each pod downloads its inputs and uploads its outputs, and sees nothing of other pods;
- a pod has its own process, working folder and temporary folder, and only the environment that the package gives it;
- a persistent volume claim is there for the tasks that mount it, at the path at which they mount it, and no other;
- caching compares names, parameters, image and command, never the content behind a URI;
- a failed pod is started again as often as its retry policy says, in a fresh folder;
- an exit handler runs whatever happened, and is told how it went.

Beyond the backend's own rules it enforces two of a cautious cluster: a resource quota (each container states requests
and limits) and no network but loopback.
"""

from support.kfp_backend.backend import Backend, BackendRun, TaskRun
from support.kfp_backend.pods import PodHost

__all__ = ["Backend", "BackendRun", "PodHost", "TaskRun"]
