#!/usr/bin/env bash
# Fetches the wheels that `run.sh` needs on a machine with a GPU and no network, into build/gpu/wheels; copy that folder along.
#
#   tests/kernels/gpu/wheels.sh PYTHON_VERSION     (of that machine, as 3.12; its platform is Linux on x86-64)
set -euo pipefail
cd "$(dirname "$0")/../../.."
version=${1:?usage: tests/kernels/gpu/wheels.sh PYTHON_VERSION, as 3.12}
python=${PYTHON:-.venv/bin/python}
mkdir -p build/gpu/wheels
fetch() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps -c constraints.txt --only-binary=:all: \
    --python-version "$version" --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -d build/gpu/wheels "$@"
}
fetch pydantic annotated-types typing-extensions typing-inspection
# The one version of the compiled core that this version of pydantic takes.
fetch "$("$python" -c 'from importlib.metadata import requires; print(next(r for r in requires("pydantic") if r.startswith("pydantic-core")))')"
