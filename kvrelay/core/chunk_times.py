"""When chunks of a prompt, or of KV on the wire, were under way. Pure."""

from dataclasses import dataclass

MAX_CHUNK_TIMES = 64


@dataclass(frozen=True, slots=True)
class ChunkTime:
    begin_ms: float
    end_ms: float
    token_begin: int
    token_end: int
    layer_begin: int = 0
    layer_end: int = 0
    num_bytes: int = 0
    num_chunks: int = 1

    def joined(self, other: "ChunkTime") -> "ChunkTime":
        return ChunkTime(
            min(self.begin_ms, other.begin_ms),
            max(self.end_ms, other.end_ms),
            min(self.token_begin, other.token_begin),
            max(self.token_end, other.token_end),
            min(self.layer_begin, other.layer_begin),
            max(self.layer_end, other.layer_end),
            self.num_bytes + other.num_bytes,
            self.num_chunks + other.num_chunks,
        )


class ChunkLog:
    """Joins neighbours when there are more than `MAX_CHUNK_TIMES`."""

    def __init__(self) -> None:
        self._times: list[ChunkTime] = []
        self._num_per_entry = 1

    def add(self, chunk: ChunkTime) -> None:
        if self._times and self._times[-1].num_chunks < self._num_per_entry:
            self._times[-1] = self._times[-1].joined(chunk)
            return
        if len(self._times) == MAX_CHUNK_TIMES:
            pairs = zip(self._times[::2], self._times[1::2], strict=True)
            self._times = [first.joined(second) for first, second in pairs]
            self._num_per_entry *= 2
        self._times.append(chunk)

    @property
    def times(self) -> tuple[ChunkTime, ...]:
        return tuple(self._times)
