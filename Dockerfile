# Two images: `gateway` (no torch) and `worker` (prefill, decode, unified; ACCELERATOR=cpu or cuda).
#   docker build --target gateway -t tandem-gateway .
#   docker build --target worker -t tandem-worker --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
# BASE_IMAGE: Debian or Ubuntu with Python 3.11 or newer; for ACCELERATOR=cuda one with the CUDA runtime and Python.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# ---- build: a compiler for the operators, and a virtual environment for each image ---------------------------------
FROM ${BASE_IMAGE} AS build
# The versions are those of the base image's own distribution, which keeps only the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY scripts/requirements scripts/requirements

# What changes seldom comes first: a change of the code does not download torch again.
FROM build AS gateway-build
RUN python3 -m venv /opt/tandem \
    && python3 scripts/requirements otel >/tmp/requirements.txt \
    && /opt/tandem/bin/pip install -c constraints.txt -r /tmp/requirements.txt

FROM build AS worker-build
ARG ACCELERATOR=cpu
ARG TORCH_INDEX_URL=
RUN python3 -m venv /opt/tandem \
    && python3 scripts/requirements otel "${ACCELERATOR}" >/tmp/requirements.txt \
    && PIP_EXTRA_INDEX_URL="${TORCH_INDEX_URL}" /opt/tandem/bin/pip install -c constraints.txt -r /tmp/requirements.txt

FROM build AS wheel
COPY setup.py README.md LICENSE ./
COPY native native
COPY services services
RUN python3 -m venv /opt/wheel && /opt/wheel/bin/pip wheel --no-deps --wheel-dir /wheel .

FROM gateway-build AS gateway-installed
COPY --from=wheel /wheel /wheel
RUN /opt/tandem/bin/pip install --no-deps /wheel/*.whl && /opt/tandem/bin/pip uninstall -y pip setuptools

FROM worker-build AS worker-installed
COPY --from=wheel /wheel /wheel
RUN /opt/tandem/bin/pip install --no-deps /wheel/*.whl && /opt/tandem/bin/pip uninstall -y pip setuptools

# ---- what both images are ------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title="tandem" \
      org.opencontainers.image.description="Large language models served with prefill and decode on separate workers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# Everything that is written at run time goes to /tmp: the root file system may be read-only.
ENV PATH=/opt/tandem/bin:$PATH HOME=/tmp HF_HOME=/tmp/huggingface PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
ENTRYPOINT ["tandem"]
CMD ["--help"]

FROM runtime AS gateway
COPY --from=gateway-installed /opt/tandem /opt/tandem
USER 10001:10001
EXPOSE 50051 9090

FROM runtime AS worker
# libibverbs and its drivers are what Mooncake needs for RDMA, libnuma for placement, libgomp for torch.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ibverbs-providers libgomp1 libibverbs1 libnuma1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-installed /opt/tandem /opt/tandem
USER 10001:10001
EXPOSE 50051 50052 50053 9090
