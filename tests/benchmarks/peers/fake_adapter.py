"""An engine that gives token ids 0, 1, 2, ... one per step to each request, for tests of the
protocol. Prints, as engines do.
"""

import itertools
from collections.abc import Iterator, Sequence

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main, run_stepped


class FakeAdapter:
    def load(self, options: Options) -> str:
        print("an engine prints as it pleases")
        if options.weights != "f32":
            raise ValueError("only f32")
        self._open: dict[int, Iterator[int]] = {}
        return f"fake on {options.num_threads} threads"

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        if requests[0].max_tokens == 666:
            raise SystemExit("the engine crashed")
        run_stepped(self, requests, recorder)

    def add(self, request: Request) -> None:
        self._open[request.request_id] = iter(range(request.max_tokens))

    def step(self) -> Iterator[tuple[int, Sequence[int]]]:
        for request_id, token_ids in self._open.items():
            yield request_id, list(itertools.islice(token_ids, 1))

    def close(self) -> None:
        print("closed")


if __name__ == "__main__":
    main(FakeAdapter())
