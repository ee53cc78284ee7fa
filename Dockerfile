# The first stage builds the wheel and installs it; the second holds what runs and no more.
FROM python:3.11-slim AS builder

# PyTorch's own index of CPU builds: PyPI's Linux build brings gigabytes of CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# [otel] to send traces, as in --build-arg EXTRAS=[otel].
ARG EXTRAS=

# By environment, the constraints also hold for the build backend that pip fetches by itself.
ENV PIP_CONSTRAINT=/source/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /source
COPY constraints.txt ./
RUN python -m venv --without-pip /opt/dropserve \
    && pip --python /opt/dropserve/bin/python install \
        --no-deps --index-url "${TORCH_INDEX}" torch

COPY pyproject.toml README.md ./
COPY models models
COPY service service
RUN pip wheel --no-deps --wheel-dir dist . \
    && pip --python /opt/dropserve/bin/python install "$(ls dist/*.whl)${EXTRAS}"


FROM python:3.11-slim

# Named volumes take over the owner of the folder that they cover.
RUN install --directory --owner=10001 --group=10001 /checkpoints /data

COPY --from=builder /opt/dropserve /opt/dropserve

# /tmp is the one folder that stays writable where the root file system is read-only.
ENV PATH=/opt/dropserve/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DROPSERVE_HOST=0.0.0.0 \
    DROPSERVE_CHECKPOINTS=/checkpoints \
    DROPSERVE_DATA_DIR=/data

# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["dropserve"]
CMD ["serve"]
