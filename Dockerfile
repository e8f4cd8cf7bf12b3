# The one image of every component and of the service. Build: docker build -t lazydp:VERSION .
# For GPUs: --build-arg BASE=<a CUDA 13 devel image with Python 3.11+> --build-arg LAZYDP_CUDA=1
ARG BASE=python:3.11-slim
FROM ${BASE} AS build
ARG TORCH=torch==2.13.0
ARG LAZYDP_CUDA=0
ENV LAZYDP_CUDA=${LAZYDP_CUDA} PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
RUN python3 -m venv /opt/lazydp && /opt/lazydp/bin/pip install -c constraints.txt "setuptools>=77" wheel ninja "${TORCH}"
COPY api api
COPY kernels kernels
COPY components components
COPY pipelines pipelines
COPY service service
# The environment that is there already builds the extension: an isolated build would fetch a second torch.
RUN /opt/lazydp/bin/pip install -c constraints.txt --no-build-isolation ".[pipelines,postgres,ann,otel]"

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 lazydp
COPY --from=build /opt/lazydp /opt/lazydp
ENV PATH=/opt/lazydp/bin:$PATH
USER 10001
ENTRYPOINT ["lazydp"]
