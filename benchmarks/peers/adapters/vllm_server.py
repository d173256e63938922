"""vLLM's server, its build for CPUs."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main
from benchmarks.peers.adapters.http_server import HttpServer, run_threads

KV_CACHE_GB = 2
MAX_MODEL_TOKENS = 2560
MODEL_NAME = "model"
DTYPES = {"f32": "float32", "bf16": "bfloat16"}


class VllmServerAdapter:
    _server: HttpServer | None = None

    def load(self, options: Options) -> str:
        from importlib.metadata import version

        if options.weights not in DTYPES:
            raise ValueError(f"vLLM computes in {' or '.join(DTYPES)} here, not in {options.weights}")
        command = [
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            options.model_folder,
            "--served-model-name",
            MODEL_NAME,
        ]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
            "--dtype",
            DTYPES[options.weights],
            "--max-model-len",
            str(MAX_MODEL_TOKENS),
        ]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if options.chunk_tokens is not None:
            command += ["--max-num-batched-tokens", str(options.chunk_tokens)]
        # vLLM binds its own threads and takes this for a wish that it warns of.
        os.environ.pop("OMP_NUM_THREADS", None)
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, options.cores)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._server = HttpServer(command, options.cores, environment)
        self._server.wait_until_ready()
        return version("vllm-cpu")

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        run_threads(requests, recorder, self._stream)

    def _stream(self, request: Request) -> Iterator[Sequence[int]]:
        assert self._server is not None
        body = {
            "model": MODEL_NAME,
            "prompt": request.token_ids,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        for event in self._server.stream("/v1/completions", body):
            for choice in event["choices"]:
                yield choice.get("token_ids") or []

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()


if __name__ == "__main__":
    main(VllmServerAdapter())
