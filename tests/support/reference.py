"""Greedy generation by transformers, and how near each choice was to a tie, for contract tests.

Loads the same folder with transformers' own attention and cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

TIE_LOGITS = 1e-4
"""If the two best logits are closer than this, either token is right."""
CLEAR_LOGITS = 1e-3
"""If they are further apart than this, a full pass and a cached pass choose the same token."""


@dataclass(slots=True)
class NearTies:
    """Counts excused positions, which tests print."""

    num_positions: int = 0
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.places)} near ties at {self.num_positions} positions {self.places}"


class Reference:
    """Greedy generation by transformers in float32."""

    def __init__(self, model_path: Path) -> None:
        # transformers' default attention: sdpa, or eager for models that sdpa cannot do.
        auto_model: Any = AutoModelForCausalLM
        self._model: Any = auto_model.from_pretrained(model_path, dtype=torch.float32).eval()
        self._generated: dict[tuple[tuple[int, ...], int], tuple[list[int], list[float]]] = {}
        self._confirmed: dict[tuple[int, ...], tuple[int, ...]] = {}

    def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """Generates `num_tokens` without end of sequence, with the gap of the two best logits for
        each.
        """
        key = (tuple(prompt), num_tokens)
        if key not in self._generated:
            self._generated[key] = self._generate(prompt, num_tokens)
        return self._generated[key]

    def confirms(self, prompt: Sequence[int], actual: Sequence[int]) -> bool:
        """Whether each token of `actual` is clearly the greedy one, by one causal pass.

        By induction, greedy generation then gives `actual`, at a fraction of the cost. False proves
        nothing: see `check`. A confirmed beginning of the same prompt's answer is not computed
        again.
        """
        confirmed = self._confirmed.get(tuple(prompt), ())
        if confirmed[: len(actual)] == tuple(actual):
            return True
        if self._is_clearly_greedy(prompt, actual):
            self._confirmed[tuple(prompt)] = tuple(actual)
            return True
        return False

    def _is_clearly_greedy(self, prompt: Sequence[int], actual: Sequence[int]) -> bool:
        with torch.inference_mode():
            input_ids = torch.tensor([[*prompt, *actual[:-1]]])
            logits = self._model(input_ids, logits_to_keep=len(actual), use_cache=False).logits[0].float()
        best_two = logits.topk(2)
        gaps = best_two.values[:, 0] - best_two.values[:, 1]
        return best_two.indices[:, 0].tolist() == list(actual) and bool((gaps > CLEAR_LOGITS).all())

    def _generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        input_ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=num_tokens,
                min_new_tokens=None,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best_two = torch.stack(output.logits)[:, 0].float().topk(2).values
        gaps = (best_two[:, 0] - best_two[:, 1]).tolist()
        return output.sequences[0, len(prompt) :].tolist(), gaps

    def check(self, prompt: Sequence[int], actual: Sequence[int], ties: NearTies) -> None:
        """Checks that greedy generation gives `actual`: by one pass, or else by generating.

        Raises:
            AssertionError: names the first wrong position.
        """
        if self.confirms(prompt, actual):
            ties.num_positions += len(actual)
        else:
            self.check_by_generating(prompt, actual, ties)

    def check_by_generating(self, prompt: Sequence[int], actual: Sequence[int], ties: NearTies) -> None:
        """Like `check`, always with `transformers.generate`.

        At a near tie both tokens are right, and the reference continues after the chosen one.

        Raises:
            AssertionError: names the first wrong position.
        """
        ties.num_positions += len(actual)
        done: list[int] = []
        while len(done) < len(actual):
            expected, gaps = self.generate([*prompt, *done], len(actual) - len(done))
            rest = actual[len(done) :]
            differing = next(
                (at for at, (ours, theirs) in enumerate(zip(rest, expected, strict=True)) if ours != theirs), None
            )
            if differing is None:
                return
            index = len(done) + differing
            assert gaps[differing] < TIE_LOGITS, (
                f"token {index} behind a prompt of {len(prompt)} is {rest[differing]}; "
                f"transformers generates {expected[differing]} (two best logits {gaps[differing]:.2e} apart)"
            )
            ties.places.append(f"prompt of {len(prompt)}, token {index}")
            done = list(actual[: index + 1])
