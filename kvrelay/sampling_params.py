"""How the next token is chosen: the parameters of a request, their ranges and their defaults.

Knows nothing of tensors or of the wire; `kvrelay.wire` converts and `kvrelay.engine.sampler` applies them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrelay.errors import InvalidRequestError
from kvrelay.response_format import ResponseFormat

MAX_SEQUENCES = 8
MAX_LOGIT_BIASES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 256
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request. `seed` and `max_tokens` are None until the gateway resolves them."""

    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set whose probability reaches this (Holtzman et al. 2020, nucleus sampling)."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (Keskar et al. 2019, CTRL)."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of tokens already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from logits once for every time the token was generated."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to what is added to its logit."""
    seed: int | None = None
    """A token's randomness is a function of (seed, sequence, index)."""
    stop: tuple[str, ...] = ()
    """Output ends before the first of these strings; applied by the gateway."""
    stop_token_ids: tuple[int, ...] = ()
    """Output ends with the first of these tokens."""
    min_tokens: int = 0
    """End of sequence and stop tokens cannot be chosen before so many tokens."""
    max_tokens: int | None = None
    """Most tokens to generate per sequence."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    logprobs: int | None = None
    """Return log probabilities, with so many alternatives; None returns none."""
    n: int = 1
    """How many sequences to generate from the one prompt."""
    response_format: ResponseFormat | None = None
    """What form the output must have; None: any."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on which tokens were generated before, beyond the model's own logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self) -> None:
        """Checks every range that does not depend on a model.

        Raises:
            InvalidRequestError: names the first field that is out of range, and the range.
        """
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, 0, 2**31)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("n", self.n, 1, MAX_SEQUENCES)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, MAX_SEED)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._validate_lists()
        self._validate_min_tokens()
        if self.response_format is not None:
            self._validate_response_format(self.response_format)

    def _validate_lists(self) -> None:
        _check_length("logit_bias", len(self.logit_bias), MAX_LOGIT_BIASES)
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        _check_length("stop", len(self.stop), MAX_STOP_STRINGS)
        for number, stop in enumerate(self.stop):
            if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
                raise InvalidRequestError(f"stop[{number}]", f"must have 1 to {MAX_STOP_BYTES} bytes of UTF-8")
        _check_length("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)

    def _validate_min_tokens(self) -> None:
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise InvalidRequestError("min_tokens", f"is {self.min_tokens}; it must lie between 0 and max_tokens")

    def _validate_response_format(self, response_format: ResponseFormat) -> None:
        response_format.validate()
        if self.min_tokens > 0:
            problem = f"is {self.min_tokens}; with a response_format it must be 0, for the form says where the output may end"
            raise InvalidRequestError("min_tokens", problem)
        if self.ignore_eos:
            raise InvalidRequestError("ignore_eos", "must be off with a response_format, for nothing can follow the form's end")


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    above_low = value > low if open_low else value >= low
    if math.isnan(value) or not (above_low and value <= high):
        bracket = "(" if open_low else "["
        raise InvalidRequestError(name, f"is {value}; it must lie in {bracket}{low}, {high}]")


def _check_length(name: str, length: int, maximum: int) -> None:
    if length > maximum:
        raise InvalidRequestError(name, f"has {length} entries; at most {maximum} are allowed")
