# The training program for TPUs or for NVIDIA GPUs:
#
#   docker build --build-arg EXTRA=tpu --tag REGISTRY/hybridnorm:tpu .
#   docker build --build-arg EXTRA=gpu --tag REGISTRY/hybridnorm:gpu .
#
# `docker run IMAGE train 550m key=value ...` runs `hybridnorm train`. docs/clusters.md explains more.
ARG PYTHON=3.12.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG EXTRA=tpu
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY configs/ configs/
COPY hybridnorm_jax/ hybridnorm_jax/
RUN python -m venv /opt/hybridnorm && \
    /opt/hybridnorm/bin/python -m pip install --no-cache-dir --no-compile ".[${EXTRA}]"

FROM python:${PYTHON}
ARG RUN_AS=1000
LABEL org.opencontainers.image.licenses=Apache-2.0
RUN useradd --uid 1000 --create-home --home-dir /train trainer
COPY --from=build /opt/hybridnorm /opt/hybridnorm
ENV PATH=/opt/hybridnorm/bin:$PATH PYTHONUNBUFFERED=1
# By number, so that Kubernetes can see that it is not root.
USER ${RUN_AS}
WORKDIR /train
ENTRYPOINT ["hybridnorm"]
CMD ["--help"]
