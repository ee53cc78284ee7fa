# The first stage builds the wheel and installs it; the second holds what runs and no more.
FROM python:3.11-slim AS builder

# PyTorch's own index of CPU builds: PyPI's Linux build brings gigabytes of CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# [otel] to send traces, as in --build-arg EXTRAS=[otel].
ARG EXTRAS=

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

# Every package is held against the SHA-256 that a lock has for it, the build backend too; none is
# built from source. A PyTorch other than the one in torch.lock is refused.
WORKDIR /source
COPY torch.lock ./
RUN python -m venv --without-pip /opt/dropserve \
    && pip --python /opt/dropserve/bin/python install --no-compile --no-deps --only-binary :all: \
        --require-hashes --index-url "${TORCH_INDEX}" --requirement torch.lock
COPY requirements.lock ./
RUN pip download --no-deps --only-binary :all: --require-hashes --dest /wheels \
        --requirement requirements.lock

# From here on pip asks no index: what the lock lacks is missing.
COPY pyproject.toml README.md ./
COPY dropserve dropserve
COPY models models
COPY lab lab
COPY service service
RUN pip wheel --no-deps --no-index --find-links /wheels --wheel-dir dist . \
    && pip --python /opt/dropserve/bin/python install --no-compile --no-index --find-links /wheels \
        "$(ls dist/*.whl)${EXTRAS}"

# Left out: tests, headers, static libraries, and PyTorch's programs but the one that it starts.
RUN cd /opt/dropserve/lib/python3.11/site-packages \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find . -type d \( -name tests -o -path ./torch/test -o -path ./torch/include \) \
        -prune -exec rm -rf {} + \
    && find . -name '*.a' -delete

# One short run shows that nothing is missing and compiles what is imported. Bytecode of every module
# would take 140 MB more; without any, starting takes half as long again.
WORKDIR /tmp
RUN PATH=/opt/dropserve/bin:$PATH \
    && dropserve train --dataset digits --epochs 1 \
    && dropserve evaluate --name digits-mlp \
    && python -c 'import dropserve.service.server'


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
    DROPSERVE_PORT=8000 \
    DROPSERVE_CHECKPOINTS=/checkpoints \
    DROPSERVE_DATA_DIR=/data

# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
EXPOSE 8000
# An answer of 400 or more raises, and so exits with 1. The certificate, if any, is for another name.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=60s \
    CMD ["python", "-c", "import os, ssl, urllib.request as r; e = os.environ; s = 's' * ('DROPSERVE_TLS_CERT' in e); r.urlopen(f'http{s}://127.0.0.1:{e[\"DROPSERVE_PORT\"]}/readyz', timeout=3, context=ssl._create_unverified_context())"]
ENTRYPOINT ["dropserve"]
CMD ["serve"]
