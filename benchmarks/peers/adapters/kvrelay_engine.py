"""kvrelay's engine in this process: model runner and sampler, with prompt chunks and decode steps
in one batch. No service.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main, run_stepped, use_cores
from benchmarks.peers.adapters.kvrelay_settings import engine_settings

if TYPE_CHECKING:
    from kvrelay.engine.kernel_batch import SequenceInput

KV_CACHE_MIB = 1024
DEFAULT_CHUNK_TOKENS = 256


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int]
    block_ids: list[int]
    num_to_generate: int
    num_computed: int = 0


class EngineAdapter:
    """First come, first served: all decoding sequences, and of the prompts as many tokens as a
    chunk has.
    """

    def load(self, options: Options) -> str:
        use_cores(options.cores)
        import kvrelay
        from kvrelay.core.sampling_params import SamplingParams
        from kvrelay.engine.kernel_batch import SequenceInput
        from kvrelay.engine.sampler import SamplingInput, sample
        from kvrelay.runtime.cpu_cores import format_cores
        from kvrelay.worker.engine_setup import build_engine

        settings = engine_settings(options, cores=format_cores(options.cores), kv_cache_mib=KV_CACHE_MIB)
        self._engine = build_engine(settings)
        self._engine.pin_thread()
        self._chunk_tokens = settings.prefill_chunk_tokens or DEFAULT_CHUNK_TOKENS
        self._free = list(range(self._engine.blocks.num_blocks))
        self._sequences: dict[int, _Sequence] = {}
        self._sampling = SamplingInput(SamplingParams(temperature=0.0), sequence=0, index=0)
        self._sample = sample
        self._sequence_input = SequenceInput
        return kvrelay.__version__

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        run_stepped(self, requests, recorder)

    def add(self, request: Request) -> None:
        num_blocks = -(-(len(request.token_ids) + request.max_tokens) // self._engine.blocks.block_size)
        blocks, self._free = self._free[:num_blocks], self._free[num_blocks:]
        if len(blocks) < num_blocks:
            raise ValueError(f"the pool of {KV_CACHE_MIB} MiB is too small for these requests")
        self._sequences[request.request_id] = _Sequence(list(request.token_ids), blocks, request.max_tokens)

    def step(self) -> Iterator[tuple[int, Sequence[int]]]:
        batch = self._schedule()
        sampled = [(request_id, item) for request_id, item in batch if item.num_logits]
        logits = self._engine.model_runner.run([item for _, item in batch])
        for request_id, item in batch:
            self._sequences[request_id].num_computed += len(item.token_ids)
        tokens = self._sample(logits, [self._sampling] * len(sampled))
        for (request_id, _), token in zip(sampled, tokens, strict=True):
            self._advance(request_id, token.token_id)
            yield request_id, [token.token_id]

    def _schedule(self) -> list[tuple[int, "SequenceInput"]]:
        batch: list[tuple[int, SequenceInput]] = []
        room = self._chunk_tokens
        for request_id, sequence in self._sequences.items():
            missing = sequence.token_ids[sequence.num_computed :]
            if len(missing) > 1:
                missing, room = missing[:room], room - len(missing[:room])
            if missing:
                complete = sequence.num_computed + len(missing) == len(sequence.token_ids)
                batch.append(
                    (
                        request_id,
                        self._sequence_input(missing, sequence.num_computed, sequence.block_ids, int(complete)),
                    )
                )
        return batch

    def _advance(self, request_id: int, token_id: int) -> None:
        sequence = self._sequences[request_id]
        sequence.token_ids.append(token_id)
        sequence.num_to_generate -= 1
        if sequence.num_to_generate == 0:
            self._free += sequence.block_ids
            del self._sequences[request_id]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(EngineAdapter())
