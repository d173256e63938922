"""Greedy generation by transformers' own `generate`, with the time of every token. Knows nothing of
kvrelay.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.float32_model import load_in_float32
from benchmarks.torch_threads import torch_threads


class _TokenClock:
    """What `generate` calls a streamer: told of the prompt first, then of every token."""

    def __init__(self) -> None:
        self.begin_s = time.perf_counter()
        self.token_times_s: list[float] = []
        self._has_prompt = False

    def put(self, _: Any) -> None:
        if self._has_prompt:
            self.token_times_s.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to be shown."""


class TransformersGeneration:
    """A model in float32 with the attention that transformers chooses.

    Args:
        folder: the model's folder.
        num_threads: CPU threads.
    """

    def __init__(self, folder: Path, num_threads: int) -> None:
        self._num_threads = num_threads
        self._model = load_in_float32(folder)

    def generate(self, prompt: Sequence[int], num_tokens: int, *, use_cache: bool) -> tuple[list[int], list[float]]:
        """Generates past any end of sequence.

        Returns:
            The new tokens, and the seconds that each took.
        """
        input_ids = torch.tensor([list(prompt)])
        with torch_threads(self._num_threads), torch.inference_mode():
            clock = _TokenClock()
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=num_tokens,
                min_new_tokens=None,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=False,
                num_beams=1,
                use_cache=use_cache,
                streamer=clock,
            )
        times_s = [clock.begin_s, *clock.token_times_s]
        seconds = [later - earlier for earlier, later in itertools.pairwise(times_s)]
        return output[0, len(prompt) :].tolist(), seconds

    def forward_seconds(self, token_ids: Sequence[int]) -> float:
        """Seconds of one forward over all the tokens, without a cache, with the logits of the last."""
        with torch_threads(self._num_threads), torch.inference_mode():
            begin_s = time.perf_counter()
            self._model(input_ids=torch.tensor([list(token_ids)]), use_cache=False, logits_to_keep=1)
            return time.perf_counter() - begin_s
