# Two images from one file: `gateway` has no torch in it, `worker` has. Build arguments:
#   TORCH_INDEX_URL  index of torch wheels, such as one of CPU builds; empty takes what the default index has
# pip takes only files whose hashes are in requirements/, and builds none of them from source. `pip check` says that nothing is missing.

FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# Volumes of docker-compose.yml take owner and rights from these folders. Prometheus reads its key as a user of its own.
RUN useradd --create-home --uid 10001 kvrelay \
    && cd /home/kvrelay && mkdir -p /models .cache /secrets/authority /secrets/metrics \
    && for role in redis gateway prefill decode front; do mkdir /secrets/$role; done \
    && chown -R kvrelay /models /secrets .cache && chmod 700 /secrets/* && chmod 755 /secrets/metrics \
    && python -m venv /opt/kvrelay
ENV PATH=/opt/kvrelay/bin:$PATH KVRELAY_MODEL_DIR=/models LOCKED="--quiet --require-hashes --no-deps --only-binary=:all:"
WORKDIR /src
COPY requirements/gateway.txt requirements/
RUN pip install $LOCKED -r requirements/gateway.txt && pip check

FROM base AS worker-packages
# Workers compile their kernels for the processor that they run on.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements/worker.txt requirements/torch.txt requirements/torch-cpu.txt requirements/
ARG TORCH_INDEX_URL=""
RUN pip install $LOCKED -r requirements/worker.txt
# The build for the CPU where an index or PIP_FIND_LINKS has it, else the default one with CUDA's libraries.
RUN { pip install $LOCKED ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r requirements/torch-cpu.txt \
    || pip install $LOCKED -r requirements/torch.txt; } && pip check

FROM base AS wheel
COPY requirements/build.txt requirements/
RUN pip install $LOCKED -r requirements/build.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY kvrelay kvrelay
COPY gateway gateway
COPY prefill_worker prefill_worker
COPY decode_worker decode_worker
COPY protos protos
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base AS gateway
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps --no-index /wheels/*.whl && pip check && ! python -c "import torch" 2>/dev/null
USER kvrelay
WORKDIR /home/kvrelay
EXPOSE 50050 50080
ENTRYPOINT ["kvrelay"]
CMD ["serve", "gateway", "--host", "0.0.0.0", "--port", "50050"]

FROM worker-packages AS worker
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps --no-index /wheels/*.whl && pip check
USER kvrelay
WORKDIR /home/kvrelay
EXPOSE 50051 50080
ENTRYPOINT ["kvrelay"]
CMD ["serve", "decode", "--host", "0.0.0.0", "--port", "50051"]
