"""OpenVINO GenAI, its continuous batching pipeline stepped in this process."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main, run_stepped, use_cores

FILES = {"f32": "f16.gguf", "bf16": "f16.gguf", "q8_0": "q8_0.gguf"}
"""It reads neither F32 nor BF16; weights of F16 are computed with in PRECISIONS."""
PRECISIONS = {"f32": "f32", "bf16": "bf16", "q8_0": "f32"}
"""Of products and of the KV cache."""
KV_CACHE_GB = 1


class OpenVINOAdapter:
    def load(self, options: Options) -> str:
        use_cores(options.cores)
        import openvino_genai

        self._genai: Any = openvino_genai
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = KV_CACHE_GB
        scheduling.enable_prefix_caching = False
        if options.chunk_tokens is not None:
            scheduling.max_num_batched_tokens = options.chunk_tokens
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            f"{options.converted_folder}/{FILES[options.weights]}",
            scheduling,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": PRECISIONS[options.weights],
                "KV_CACHE_PRECISION": PRECISIONS[options.weights],
                "INFERENCE_NUM_THREADS": options.num_threads,
            },
        )
        self._handles: dict[int, Any] = {}
        self._num_added = 0
        return str(openvino_genai.__version__)

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        run_stepped(self, requests, recorder)

    def add(self, request: Request) -> None:
        import numpy as np
        import openvino

        settings = self._genai.GenerationConfig(max_new_tokens=request.max_tokens, ignore_eos=True, do_sample=False)
        prompt = openvino.Tensor(np.array([request.token_ids], dtype=np.int64))
        self._num_added += 1
        self._handles[request.request_id] = self._pipeline.add_request(self._num_added, prompt, settings)

    def step(self) -> Iterator[tuple[int, Sequence[int]]]:
        self._pipeline.step()
        for request_id, handle in list(self._handles.items()):
            if handle.can_read():
                (output,) = handle.read().values()
                yield request_id, output.generated_ids
            elif handle.get_status() != self._running:
                del self._handles[request_id]

    @property
    def _running(self) -> Any:
        return self._genai.py_openvino_genai.GenerationStatus.RUNNING

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(OpenVINOAdapter())
