"""transformers' `generate`: requests that arrive together and have prompts of one length run as one
batch, others not at all.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main, use_cores


class TransformersAdapter:
    def load(self, options: Options) -> str:
        if options.weights != "f32":
            raise ValueError(f"transformers computes in f32 here, not in {options.weights}")
        use_cores(options.cores)
        import torch
        import transformers

        torch.set_num_threads(options.num_threads)
        self._torch: Any = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model_folder, dtype=torch.float32)
        self._model.eval()
        self._model.generation_config.eos_token_id = None
        return str(transformers.__version__)

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        if len({(request.at_s, len(request.token_ids), request.max_tokens) for request in requests}) != 1:
            raise ValueError("generate runs one batch of equal lengths")
        torch = self._torch
        prompts = torch.tensor([request.token_ids for request in requests])

        class Watch:
            """Called after every step with all tokens so far: [num_sequences, num_tokens]. Never
            stops.
            """

            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                for request, token_id in zip(requests, input_ids[:, -1].tolist(), strict=True):
                    recorder.receive(request.request_id, [token_id])
                return torch.zeros(len(requests), dtype=torch.bool)

        for request in requests:
            recorder.submit(request.request_id)
        self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=requests[0].max_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[Watch()],
        )

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(TransformersAdapter())
