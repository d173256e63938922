"""transformers' continuous batching, its engine on a thread of this process."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main, run_stepped, use_cores

NUM_BLOCKS = 48
"""Of 256 tokens each: 12,288 tokens, what the workloads need."""
NO_TOKEN = -1


class TransformersBatchingAdapter:
    _manager: Any = None

    def load(self, options: Options) -> str:
        if options.weights != "f32":
            raise ValueError(f"transformers computes in f32 here, not in {options.weights}")
        use_cores(options.cores)
        import torch
        import transformers

        torch.set_num_threads(options.num_threads)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            options.model_folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        generation = transformers.GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, max_new_tokens=16)
        batching = transformers.ContinuousBatchingConfig(
            num_blocks=NUM_BLOCKS, max_batch_tokens=options.chunk_tokens, allow_block_sharing=False
        )
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.start()
        self._num_received: dict[int, int] = {}
        self._num_added = 0
        return str(transformers.__version__)

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        run_stepped(self, requests, recorder)

    def add(self, request: Request) -> None:
        self._num_received[request.request_id] = 0
        self._num_added += 1
        self._manager.add_request(
            request.token_ids,
            request_id=f"{self._num_added}:{request.request_id}",
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=NO_TOKEN,
        )

    def step(self) -> Iterator[tuple[int, Sequence[int]]]:
        # A short wait: a request that becomes due meanwhile must not wait for the next token.
        output = self._manager.get_result(timeout=0.01)
        if output is None:
            if not self._manager.is_running():
                raise RuntimeError("the engine's thread has ended")
            return
        if output.error:
            raise RuntimeError(output.error)
        request_id = int(output.request_id.partition(":")[2])
        seen = self._num_received[request_id]
        self._num_received[request_id] = len(output.generated_tokens)
        yield request_id, output.generated_tokens[seen:]

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True)


if __name__ == "__main__":
    main(TransformersBatchingAdapter())
