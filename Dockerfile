# Two images from one file: `gateway` has no torch in it, `worker` has. Build arguments:
#   TORCH_INDEX_URL  index of torch wheels, such as one of CPU builds; empty takes what the default index has

FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 kvrelay \
    && mkdir -p /models /secrets/redis /secrets/gateway /secrets/worker /home/kvrelay/.cache \
    && chown -R kvrelay /models /secrets /home/kvrelay/.cache && chmod 700 /secrets/* \
    && python -m venv /opt/kvrelay
ENV PATH=/opt/kvrelay/bin:$PATH KVRELAY_MODEL_DIR=/models
WORKDIR /src
COPY constraints.txt ./

FROM base AS worker-packages
# Workers compile their kernels for the processor that they run on.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX_URL=""
RUN pip install --quiet ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -c constraints.txt torch transformers

FROM base AS source
COPY pyproject.toml README.md LICENSE ./
COPY kvrelay kvrelay
COPY gateway gateway
COPY prefill_worker prefill_worker
COPY decode_worker decode_worker
COPY protos protos

FROM source AS gateway
RUN pip install --quiet -c constraints.txt ".[openai,otel]" && ! python -c "import torch" 2>/dev/null
USER kvrelay
WORKDIR /home/kvrelay
EXPOSE 50050 50080
ENTRYPOINT ["kvrelay"]
CMD ["serve", "gateway", "--host", "0.0.0.0", "--port", "50050"]

FROM worker-packages AS worker
COPY --from=source /src /src
RUN pip install --quiet -c constraints.txt ".[worker,openai,otel]"
USER kvrelay
WORKDIR /home/kvrelay
EXPOSE 50051 50080
ENTRYPOINT ["kvrelay"]
CMD ["serve", "decode", "--host", "0.0.0.0", "--port", "50051"]
