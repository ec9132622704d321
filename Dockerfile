# docker build -t mopt .
# With a GPU: docker build -t mopt --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH_INDEX= .
ARG BASE=python:3.12-slim
FROM $BASE

# Empty: pip's own index, whose torch is for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Ubuntu's images have no Python.
RUN command -v python3 || { apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev; }
RUN python3 -m venv /opt/mopt

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY modelopt_convert /src/modelopt_convert
COPY presets /src/presets
RUN /opt/mopt/bin/pip install --no-cache-dir -c /src/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN /opt/mopt/bin/pip install --no-cache-dir -c /src/constraints.txt /src

WORKDIR /data
ENTRYPOINT ["/opt/mopt/bin/mopt"]
