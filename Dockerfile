# syntax=docker/dockerfile:1
# The server in a container; docs/operations.md says how to run it.
#
#   docker build -t superserve .                               for CPUs
#   docker build -t superserve:cuda --build-arg VARIANT=cuda . for NVIDIA GPUs (x86-64); run it with --gpus all
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG VARIANT=cpu
# A folder of its own, so that the second stage copies all that was installed and nothing that installing needed.
RUN python -m venv /opt/superserve
ENV PATH=/opt/superserve/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# First what changes seldom. The package index has torch with CUDA; without it is a fifth of the size.
COPY requirements.txt ./
RUN case "$VARIANT" in \
      cpu) pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)" ;; \
      cuda) ;; \
      *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac \
    && pip install --requirement requirements.txt
COPY . ./
RUN pip install --no-deps . && superserve --check --device cpu

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/superserve /opt/superserve
# Latency tables that the server measures; a volume keeps them for the next container on this machine.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin superserve \
    && install --directory --owner=superserve /var/lib/superserve
ENV PATH=/opt/superserve/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/superserve
VOLUME /var/lib/superserve
EXPOSE 8000
# Alive, not ready: a server that is measuring its device must not be restarted for it.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=3)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["superserve", "--host", "0.0.0.0", "--port", "8000", "--table-dir", "/var/lib/superserve"]
