# Two images of one program:
#   docker build --target cpu --tag octavo:cpu --build-arg PIP_EXTRA_INDEX_URL=... .
#   docker build --target cuda --tag octavo:cuda .
#   docker run --publish 8000:8000 --volume octavo:/var/lib/octavo octavo:cpu serve smollm2
# The build argument is the address of PyTorch's own index of CPU builds. Without it pip takes the
# usual build, with gigabytes of CUDA libraries that a CPU does not need.
# The image contains no model: it is downloaded once, into the volume.

# ---- wheel: Octavo itself ------------------------------------------------------------------------
FROM python:3.11-bookworm AS wheel
WORKDIR /build
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --constraint constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
# The dependencies' ranges in a separate file: the layers that install them, by far the largest, stay
# cached when the source changes.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['cuda'], sep='\n')" > requirements-cuda.txt
COPY cache cache
COPY configs configs
COPY loadtest loadtest
COPY model model
COPY scheduler scheduler
COPY server server
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist .

# ---- dependencies, one environment a target ------------------------------------------------------
FROM python:3.11-bookworm AS build-cuda
WORKDIR /build
RUN python -m venv /opt/octavo
COPY --from=wheel /build/requirements.txt /build/requirements-cuda.txt /build/constraints.txt ./
RUN /opt/octavo/bin/python -m pip install --no-cache-dir \
    --requirement requirements.txt --requirement requirements-cuda.txt --constraint constraints.txt
COPY --from=wheel /build/dist dist
RUN /opt/octavo/bin/python -m pip install --no-cache-dir --no-deps dist/*.whl

FROM python:3.11-bookworm AS build-cpu
# pip reads it from the environment.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /build
RUN python -m venv /opt/octavo
COPY --from=wheel /build/requirements.txt /build/constraints.txt ./
RUN /opt/octavo/bin/python -m pip install --no-cache-dir \
    --requirement requirements.txt --constraint constraints.txt
COPY --from=wheel /build/dist dist
# The final image has no compiler, so the CPU op is built here, for every instruction set of the
# image's architecture: x86 or 64-bit Arm.
RUN /opt/octavo/bin/python -m pip install --no-cache-dir --no-deps dist/*.whl \
    && /opt/octavo/bin/python -m model.cpu.ops

# ---- runtime: no compiler, not root --------------------------------------------------------------
FROM python:3.11-slim-bookworm AS runtime
RUN groupadd --gid 10001 octavo \
    && useradd --uid 10001 --gid octavo --no-create-home --home-dir /var/lib/octavo octavo \
    && install --directory --owner=octavo --group=octavo /var/lib/octavo
ENV PATH=/opt/octavo/bin:$PATH \
    HOME=/var/lib/octavo \
    OCTAVO_HOME=/var/lib/octavo \
    OCTAVO_HOST=0.0.0.0 \
    OCTAVO_PORT=8000
WORKDIR /var/lib/octavo
VOLUME /var/lib/octavo
EXPOSE 8000
STOPSIGNAL SIGTERM
USER 10001:10001
# /ready, so that a container is healthy once it serves; a 401 (protect_metrics) counts too. The first
# start downloads a model. Change the port with OCTAVO_PORT, which this also reads.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
connection = http.client.HTTPConnection('127.0.0.1', int(os.environ['OCTAVO_PORT']), timeout=4); \
connection.request('GET', '/ready'); \
sys.exit(connection.getresponse().status not in (200, 401))"]
ENTRYPOINT ["octavo"]
CMD ["serve"]

# PyTorch has the CUDA libraries; the host's container runtime adds the driver.
FROM runtime AS cuda
COPY --from=build-cuda /opt/octavo /opt/octavo
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OCTAVO_DEVICE=cuda

FROM runtime AS cpu
COPY --from=build-cpu /opt/octavo /opt/octavo
ENV OCTAVO_DEVICE=cpu
# Without this check, a broken op would only make the server slow.
RUN ["python", "-c", "import sys; from model.cpu.library import load_cpu_library; \
found = load_cpu_library(); sys.exit(found if isinstance(found, str) else 0)"]
