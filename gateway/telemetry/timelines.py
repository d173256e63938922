"""The timelines of a gateway's last requests, and the sums of their transfers. Bounded."""

import time
from collections import OrderedDict
from dataclasses import dataclass

from gateway.lifecycle.events import TransferDone
from gateway.telemetry.request_timeline import JobRecord, RequestTimeline

MAX_PAIRS = 256


@dataclass(slots=True)
class TransferSum:
    num_transfers: int = 0
    kv_bytes: int = 0
    wire_ms: float = 0.0


class Timelines:
    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._timelines: OrderedDict[str, RequestTimeline] = OrderedDict()
        self._transfers: OrderedDict[tuple[str, str], TransferSum] = OrderedDict()
        self.num_output_tokens = 0
        """Of ended requests only."""
        self._running: dict[str, RequestTimeline] = {}

    def begin(self, request_id: str, submit_time: float, num_tokens_before: tuple[int, ...] = ()) -> RequestTimeline:
        """A request starts or is taken over; `submit_time` in monotonic seconds."""
        start_time_s = time.time() - (time.monotonic() - submit_time)
        timeline = RequestTimeline(submit_time, start_time_s, num_tokens_before, self._on_transfer)
        self._timelines.pop(request_id, None)
        self._timelines[request_id] = self._running[request_id] = timeline
        while len(self._timelines) > self._max_requests:
            self._timelines.popitem(last=False)
        return timeline

    def on_ended(self, request_id: str) -> None:
        timeline = self._running.pop(request_id, None)
        if timeline is not None:
            self.num_output_tokens += timeline.num_tokens

    def find(self, request_id: str) -> RequestTimeline | None:
        """None if the request did not run here, or too long ago."""
        return self._timelines.get(request_id)

    @property
    def total_output_tokens(self) -> int:
        """Since the gateway started."""
        return self.num_output_tokens + sum(timeline.num_tokens for timeline in self._running.values())

    def transfers(self) -> list[tuple[str, str, TransferSum]]:
        """(prefill worker, decode worker, sum) of each recently used pair."""
        return sorted(((*pair, total) for pair, total in self._transfers.items()), key=lambda entry: entry[:2])

    def _on_transfer(self, record: JobRecord, done: TransferDone) -> None:
        if done.kv_bytes == 0 or record.decode_worker_id is None:
            return
        pair = (done.worker_id, record.decode_worker_id)
        total = self._transfers.setdefault(pair, TransferSum())
        self._transfers.move_to_end(pair)
        total.num_transfers += 1
        total.kv_bytes += done.kv_bytes
        total.wire_ms += done.wire_ms
        while len(self._transfers) > MAX_PAIRS:
            self._transfers.popitem(last=False)
