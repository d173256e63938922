"""Measures how fast prompts are computed, and how many of their tokens a step may take. Pure.

    alone    steps with prompts only:           seconds = step_s + tokens / rate
    shared   steps in which sequences decode:   rate = tokens / seconds

A value holds until the median of the last steps is an eighth away, so that noise turns no decision.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_CHUNK_TOKENS = 256
LEAST_CHUNK_TOKENS = 128
MAX_CHUNK_TOKENS = 1024
"""Bounds the memory of a step."""
CHUNK_S = 0.1
"""A short prompt waits for a step that has begun."""

NUM_VALUES = 32
MIN_VALUES = 3
"""A process's first step is slower than all others."""
HELD_SHARE = 0.125
MIN_SPREAD = 2
"""How much longer than the short steps the long ones are, for a line through both."""
CHUNK_UNIT = 16
"""Rows of a tile, and tokens of a block."""
SHARED_STEP_FACTOR = 1.5
"""How much longer than one without prompts a step with some may take in any case."""


class HeldMedian:
    """By weight, of the last values."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._values: deque[tuple[float, float]] = deque(maxlen=NUM_VALUES)

    def add(self, value: float, weight: float = 1.0) -> None:
        self._values.append((value, weight))
        if len(self._values) < MIN_VALUES:
            return
        new = _weighted_median(sorted(self._values))
        if self.value is None or abs(new - self.value) > HELD_SHARE * self.value:
            self.value = new


class StepLine:
    """seconds = fixed_s + tokens * s_per_token: a resistant line (Tukey 1977)."""

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self.s_per_token: float | None = None
        self._steps: deque[tuple[int, float]] = deque(maxlen=NUM_VALUES)

    def add(self, num_tokens: int, seconds: float) -> None:
        self._steps.append((num_tokens, seconds))
        if len(self._steps) < MIN_VALUES:
            return
        steps = sorted(self._steps, key=lambda step: step[0])
        half = len(steps) // 2
        short, long = _middle(steps[:half]), _middle(steps[-half:])
        fixed_s, s_per_token = _line_through(short, long) if half >= MIN_VALUES else (0.0, 0.0)
        if s_per_token == 0.0:
            s_per_token = _weighted_median(sorted((seconds / num_tokens, num_tokens) for num_tokens, seconds in steps))
        if any(self._is_off(num_tokens, fixed_s + num_tokens * s_per_token) for num_tokens, _ in (short, long)):
            self.fixed_s, self.s_per_token = fixed_s, s_per_token

    def _is_off(self, num_tokens: float, seconds: float) -> bool:
        if self.s_per_token is None:
            return True
        held = self.fixed_s + num_tokens * self.s_per_token
        return abs(seconds - held) > HELD_SHARE * held


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """`first` tokens a step until rates are measured; then what `step_s` allows, within the bounds."""

    first: int
    least: int
    most: int
    step_s: float = 0.0

    @classmethod
    def fixed(cls, num_tokens: int) -> "ChunkRange":
        return cls(num_tokens, num_tokens, num_tokens)

    def nearest(self, num_tokens: float, unit: int = 1) -> int:
        """A multiple of `unit`, between the bounds."""
        whole = int(min(num_tokens, self.most)) // unit * unit
        return min(max(whole, self.least), self.most)


class PromptPace:
    """Of one worker. Without a range, steps take as many tokens as they may."""

    def __init__(self, chunk: ChunkRange | None = None, shared_chunk: ChunkRange | None = None) -> None:
        self._chunk = chunk
        self._shared_chunk = shared_chunk
        self._alone = StepLine()
        self._shared_rate = HeldMedian()
        self._decode_step_s = HeldMedian()

    def record_step(self, num_prompt_tokens: int, num_decoding: int, seconds: float) -> None:
        if seconds <= 0.0:
            return
        if num_prompt_tokens == 0:
            self._decode_step_s.add(seconds)
        elif num_decoding == 0:
            self._alone.add(num_prompt_tokens, seconds)
        else:
            self._shared_rate.add(num_prompt_tokens / seconds, num_prompt_tokens)

    # --- 0: not measured

    def tokens_per_s(self, most: int) -> float:
        """In chunks of at most `most`."""
        s_per_token = self._alone.s_per_token
        if s_per_token is None:
            return 0.0
        chunk_tokens = self.chunk_tokens(most)
        return chunk_tokens / (self._alone.fixed_s + chunk_tokens * s_per_token)

    @property
    def step_ms(self) -> float:
        return self._alone.fixed_s * 1000

    def shared_tokens_per_s(self, most: int) -> float:
        """Until it is measured, what steps with prompts only and decode steps make likely."""
        if self._shared_rate.value is not None:
            return self._shared_rate.value
        line, chunk_tokens = self._alone, self.shared_chunk_tokens(most)
        if line.s_per_token is None:
            return 0.0
        return chunk_tokens / (max(line.fixed_s, self._decode_step_s.value or 0.0) + chunk_tokens * line.s_per_token)

    # --- Most prompt tokens of the next step

    def chunk_tokens(self, most: int) -> int:
        if self._chunk is None:
            return most
        line, num_tokens = self._alone, self._chunk.first
        if line.s_per_token is not None:
            num_tokens = self._chunk.nearest((self._chunk.step_s - line.fixed_s) / line.s_per_token, CHUNK_UNIT)
        return min(num_tokens, most)

    def shared_chunk_tokens(self, most: int) -> int:
        """Step by step, it comes to the chunk whose steps take as long as they may."""
        if self._shared_chunk is None:
            return most
        rate, decode_step_s = self._shared_rate.value, self._decode_step_s.value
        num_tokens = self._shared_chunk.first
        if rate is not None and decode_step_s is not None:
            step_s = max(self._shared_chunk.step_s, SHARED_STEP_FACTOR * decode_step_s)
            num_tokens = self._shared_chunk.nearest(rate * step_s)
        return min(num_tokens, most)


def _line_through(short: tuple[float, float], long: tuple[float, float]) -> tuple[float, float]:
    """Zeros if the steps are too alike, or the line makes no sense."""
    if long[0] < MIN_SPREAD * short[0]:
        return 0.0, 0.0
    s_per_token = (long[1] - short[1]) / (long[0] - short[0])
    fixed_s = short[1] - short[0] * s_per_token
    return (fixed_s, s_per_token) if s_per_token > 0.0 and fixed_s >= 0.0 else (0.0, 0.0)


def _middle(steps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    middle = len(steps) // 2
    return sorted(num_tokens for num_tokens, _ in steps)[middle], sorted(seconds for _, seconds in steps)[middle]


def _weighted_median(values: Sequence[tuple[float, float]]) -> float:
    half = sum(weight for _, weight in values) / 2
    below = 0.0
    for value, weight in values:
        below += weight
        if below >= half:
            return value
    return values[-1][0]
