"""Which parts of a push have arrived: per layer, a sorted list of disjoint token ranges. Pure.

layer 1  |   [====)[==)      |
layer 0  |[=================)|
         token_begin       token_end
"""

from bisect import bisect_left

from kvrelay.core.model_spec import KVLayout
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.layout import KVSpan

MAX_REFUSALS = 16
"""More refused chunks mean a broken sender."""


class KVReassembly:
    """Parts of tokens [token_begin, token_end) in all layers."""

    def __init__(self, layout: KVLayout, token_begin: int, token_end: int) -> None:
        self._layout = layout
        self._token_begin = token_begin
        self._token_end = token_end
        self._ranges: list[list[tuple[int, int]]] = [[] for _ in range(layout.num_layers)]
        self._num_cells = 0
        self._refused: set[tuple[int, int]] = set()
        self._awaited: set[tuple[int, int]] = set()
        """Not received again yet."""
        self.num_chunks = 0
        self.kv_bytes = 0

    @property
    def is_complete(self) -> bool:
        return self._num_cells == self._layout.num_layers * (self._token_end - self._token_begin)

    def problem_with(self, span: KVSpan, num_bytes: int) -> str | None:
        """Why a chunk of this size cannot be written."""
        if not 0 <= span.layer_begin < span.layer_end <= self._layout.num_layers:
            return f"layers [{span.layer_begin}, {span.layer_end}) are not within the model's {self._layout.num_layers}"
        if not self._token_begin <= span.token_begin < span.token_end <= self._token_end:
            return (
                f"tokens [{span.token_begin}, {span.token_end}) are not within the reservation's "
                f"[{self._token_begin}, {self._token_end})"
            )
        if num_bytes != span.num_bytes(self._layout):
            return f"the payload has {num_bytes} bytes instead of {span.num_bytes(self._layout)}"
        if any(self._overlaps(layer, span) for layer in range(span.layer_begin, span.layer_end)):
            return "a part of the chunk was received before"
        return None

    def add(self, span: KVSpan) -> None:
        for layer in range(span.layer_begin, span.layer_end):
            self._insert(self._ranges[layer], span.token_begin, span.token_end)
        self._awaited.discard((span.layer_begin, span.token_begin))
        self._num_cells += span.num_layers * span.num_tokens
        self.num_chunks += 1
        self.kv_bytes += span.num_bytes(self._layout)

    def refuse(self, span: KVSpan, problem: str) -> None:
        """Raises TransferError if it was refused before, or too many were."""
        name = (span.layer_begin, span.token_begin)
        if name in self._refused or len(self._refused) >= MAX_REFUSALS:
            raise TransferError(f"chunk of layer {name[0]}, token {name[1]} was refused again: {problem}")
        self._refused.add(name)
        self._awaited.add(name)

    @property
    def awaits_chunks(self) -> bool:
        """Even after the end, a refused chunk may come once more."""
        return bool(self._awaited)

    def check_end(self, num_chunks: int) -> None:
        """Raises TransferError if anything is missing."""
        if not self.is_complete:
            expected = self._layout.num_layers * (self._token_end - self._token_begin)
            raise TransferError(f"the push ended with {self._num_cells} of {expected} layer tokens received")
        if num_chunks != self.num_chunks:
            raise TransferError(f"the sender counted {num_chunks} chunks, the receiver {self.num_chunks}")

    def _overlaps(self, layer: int, span: KVSpan) -> bool:
        ranges = self._ranges[layer]
        position = bisect_left(ranges, (span.token_begin, span.token_begin))
        reaches_in = position > 0 and ranges[position - 1][1] > span.token_begin
        starts_within = position < len(ranges) and ranges[position][0] < span.token_end
        return reaches_in or starts_within

    @staticmethod
    def _insert(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
        """Joins a disjoint range with its neighbours."""
        position = bisect_left(ranges, (begin, end))
        if position < len(ranges) and ranges[position][0] == end:
            end = ranges.pop(position)[1]
        if position > 0 and ranges[position - 1][1] == begin:
            ranges[position - 1] = (ranges[position - 1][0], end)
        else:
            ranges.insert(position, (begin, end))
