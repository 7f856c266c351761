# One image with one entry point: `docker run IMAGE` serves, `docker run IMAGE migrate` migrates.

# The Python that the tests run on. A build that must be repeatable to the byte passes one pinned by digest.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS builder
WORKDIR /opt/leaseq
COPY requirements/service.txt requirements/
# Wheels only: no compiler is needed and no dependency's build script runs. The environment has no pip of its own,
# so none is shipped; and no embedded PostgreSQL: a container's database lives outside it.
RUN python -m venv --without-pip venv \
    && pip --python venv/bin/python install --no-cache-dir --require-hashes --only-binary=:all: \
        --requirement requirements/service.txt
COPY alembic.ini openapi.yaml ./
COPY alembic alembic
COPY app app
# Compiled now, because the running container cannot write; by hash, because a copy may change the times of files.
# Readable by any user, whatever the umask of the checkout was.
RUN python -m compileall -q --invalidation-mode unchecked-hash app alembic \
    && chmod -R a+rX .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="leaseq" \
      org.opencontainers.image.description="A job queue that any language uses over HTTP, on PostgreSQL" \
      org.opencontainers.image.licenses="Apache-2.0"
# A running service installs nothing, so the base image's installers go. The user has a name because libraries ask
# for one, and a fixed number because Kubernetes can only tell from a number that it is not root.
RUN pip uninstall --yes --quiet --root-user-action=ignore pip setuptools wheel \
    && groupadd --system --gid 10001 leaseq \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin leaseq
WORKDIR /opt/leaseq
# Owned by root: the service cannot change its own code.
COPY --from=builder /opt/leaseq ./
# A container's loopback is reachable by nobody, so it listens on every address. Without API keys the service refuses
# that unless QUEUE_AUTH=off says that something else guards the port; the image must not say it for its operator.
ENV PATH="/opt/leaseq/venv/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    QUEUE_HOST=0.0.0.0 \
    QUEUE_PORT=8080
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# Liveness, not readiness: what acts on this check replaces the container, and a new container does not bring an
# absent database back. The empty ProxyHandler keeps an HTTP_PROXY of the environment out of a loopback call.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['QUEUE_PORT'] + '/health/live', timeout=2)"]
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve"]
