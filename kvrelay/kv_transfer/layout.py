"""Cuts a KV cache into messages, by spans: rectangles of layers and tokens.

layer 2  |        .=======.        |
layer 1  |        |  span |        |      layers [1, 3), tokens [a, b)
layer 0  |        '======='        |
         0        a       b     prompt's length
"""

from collections import deque
from dataclasses import dataclass

from kvrelay.core.model_spec import KVLayout

ALIGNED_TOKENS = 64  # cuts are at multiples, because whole blocks are copied faster


@dataclass(frozen=True, slots=True)
class KVSpan:
    layer_begin: int
    layer_end: int
    token_begin: int
    token_end: int

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_begin

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_begin

    def overlaps(self, other: "KVSpan") -> bool:
        return (
            self.layer_begin < other.layer_end
            and other.layer_begin < self.layer_end
            and self.token_begin < other.token_end
            and other.token_begin < self.token_end
        )

    def num_bytes(self, layout: KVLayout) -> int:
        return self.num_layers * self.num_tokens * layout.bytes_per_layer_token


def split_span(span: KVSpan, layout: KVLayout, max_bytes: int) -> list[KVSpan]:
    """Parts of at most `max_bytes`: whole layers, else parts of one. Tokens are never cut."""
    if span.num_tokens == 0:
        return []
    layers_per_message = layers_that_fit(span.num_tokens, layout, max_bytes)
    if layers_per_message == 0:
        return _split_tokens(span, layout, max_bytes)
    return [
        KVSpan(layer, min(layer + layers_per_message, span.layer_end), span.token_begin, span.token_end)
        for layer in range(span.layer_begin, span.layer_end, layers_per_message)
    ]


def layers_that_fit(num_tokens: int, layout: KVLayout, max_bytes: int) -> int:  # may be 0
    return max_bytes // (num_tokens * layout.bytes_per_layer_token)


def take_chunk(spans: deque[KVSpan], layout: KVLayout, max_bytes: int) -> KVSpan:
    """Takes the first span: joined with those after it that complete a rectangle, or cut."""
    taken = spans.popleft()
    while spans and (joined := _join(taken, spans[0])) is not None and joined.num_bytes(layout) <= max_bytes:
        spans.popleft()
        taken = joined
    first, *rest = split_span(taken, layout, max_bytes)
    spans.extendleft(reversed(rest))
    return first


def _join(first: KVSpan, second: KVSpan) -> KVSpan | None:  # the rectangle that both make
    same_tokens = (first.token_begin, first.token_end) == (second.token_begin, second.token_end)
    same_layers = (first.layer_begin, first.layer_end) == (second.layer_begin, second.layer_end)
    if (same_tokens and first.layer_end == second.layer_begin) or (
        same_layers and first.token_end == second.token_begin
    ):
        return KVSpan(first.layer_begin, second.layer_end, first.token_begin, second.token_end)
    return None


def _split_tokens(span: KVSpan, layout: KVLayout, max_bytes: int) -> list[KVSpan]:
    tokens_per_message = max(1, max_bytes // layout.bytes_per_layer_token)
    if tokens_per_message > ALIGNED_TOKENS:
        tokens_per_message -= tokens_per_message % ALIGNED_TOKENS
    return [
        KVSpan(layer, layer + 1, token, min(token + tokens_per_message, span.token_end))
        for layer in range(span.layer_begin, span.layer_end)
        for token in range(span.token_begin, span.token_end, tokens_per_message)
    ]


class SpanCoalescer:
    """Joins written layers into spans of at least one message.

    A span ends when no further layer fits or with the last layer, so within the step. The receiver
    has the tokens before `first_token`.
    """

    def __init__(self, layout: KVLayout, max_bytes: int, first_token: int) -> None:
        self._layout = layout
        self._max_bytes = max_bytes
        self._first_token = first_token
        self._open: KVSpan | None = None

    def add_layer(self, layer: int, token_begin: int, token_end: int) -> list[KVSpan]:
        """Layers of one token range come in order."""
        token_begin = max(token_begin, self._first_token)
        if token_begin >= token_end:
            return []
        begin = layer if self._open is None else self._open.layer_begin
        assert self._open is None or (self._open.layer_end, self._open.token_begin, self._open.token_end) == (
            layer,
            token_begin,
            token_end,
        ), "layers of one token range come in order"
        span = KVSpan(begin, layer + 1, token_begin, token_end)
        is_full = span.num_layers + 1 > layers_that_fit(span.num_tokens, self._layout, self._max_bytes)
        if is_full or layer + 1 == self._layout.num_layers:
            self._open = None
            return [span]
        self._open = span
        return []

    def add_all_layers(self, token_begin: int, token_end: int) -> list[KVSpan]:
        """The cache had this prefix."""
        span = KVSpan(0, self._layout.num_layers, max(token_begin, self._first_token), token_end)
        return [span] if span.token_begin < span.token_end else []
