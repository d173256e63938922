"""CTranslate2's generator: requests that arrive together run as one batch; it has no continuous
batching.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main, use_cores


class CTranslate2Adapter:
    def load(self, options: Options) -> str:
        if options.weights != "f32":
            raise ValueError(f"CTranslate2 computes in f32 here, not in {options.weights}")
        use_cores(options.cores)
        import ctranslate2

        folder = Path(options.converted_folder) / "ctranslate2"
        self._tokens: list[str] = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        self._generator: Any = ctranslate2.Generator(
            str(folder), device="cpu", compute_type="float32", inter_threads=1, intra_threads=options.num_threads
        )
        return str(ctranslate2.__version__)

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        if len({(request.at_s, request.max_tokens) for request in requests}) != 1:
            raise ValueError("the generator runs one batch of equal lengths")

        def receive(step: Any) -> bool:
            recorder.receive(requests[step.batch_id].request_id, [step.token_id])
            return False

        for request in requests:
            recorder.submit(request.request_id)
        self._generator.generate_batch(
            [[self._tokens[token_id] for token_id in request.token_ids] for request in requests],
            max_length=requests[0].max_tokens,
            min_length=requests[0].max_tokens,  # no end before
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=receive,
        )

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(CTranslate2Adapter())
