"""The compiled package as a cluster runs it: the interpreter of `tests/support/kfp_backend` in place of Kubeflow."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from kfp_backend import Backend, BackendRun, PodHost

from lazydp.components.bundle.reader import Bundle
from lazydp.components.ledger_for_tests import Ledger
