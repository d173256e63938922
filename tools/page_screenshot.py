"""Makes docs/guides/live-page.png anew: a decode worker dies in the middle of a request, and the
page shows its waterfall.

python -m tools.page_screenshot                  the real model (SmolLM2-135M-Instruct); needs Chromium
python -m tools.page_screenshot --tiny --dark    a tiny model with random weights, the dark colours
"""

import argparse
import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from kvrelay.client import AsyncClient
from kvrelay.client.results import RequestTimeline
from kvrelay.core.timeline import JobOutcome
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import FaultCluster
from kvrelay.testing.waiting import wait_until
from tools.headless_chromium import take_screenshot

DEFAULT_PATH = Path(__file__).resolve().parent.parent / "docs/guides/live-page.png"
REAL_MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 48
DEATH_AFTER_TOKENS = 18
PROMPT_TOKENS = 400


class WatchedCluster:
    """One gateway with a page, one prefill and two decode workers of which one can be made to die;
    every prompt travels.

    Args:
        model: None takes a tiny one.
    """

    def __init__(self, model: str | None = None) -> None:
        self._page_address = ""
        self.faults = FaultCluster(
            num_decode=2,
            model=model,
            engine={"num_kv_blocks": 512, "prefill_chunk_tokens": 96},
            requests={"local_prefill_tokens": 0},
            server={"http_port": 0},
            transfer={"transfer_transport": "auto"},
            on_line=self._note_line,
        )

    def _note_line(self, name: str, line: str) -> None:
        found = re.search(r"http_port=(\d+)", line)
        if name == "gateway" and found:
            self._page_address = f"127.0.0.1:{found[1]}"

    @property
    def url(self) -> str:
        """Of the gateway's page."""
        assert self._page_address, "the gateway has said where"
        return f"http://{self._page_address}/"

    async def survive_a_death(self, client: AsyncClient, num_tokens: int = NUM_TOKENS) -> RequestTimeline:
        """The timeline of a request whose decode worker was killed after some of its tokens, when
        it has ended.

        Raises:
            AssertionError: it does not show that.
        """
        # Others before it, so that what happens only once is not in the picture.
        for number in (1, 2):
            await client.generate(token_ids=prompt(PROMPT_TOKENS, number), max_tokens=4, ignore_eos=True).completion()
        # It is held before the step of the next token, so that the client has all tokens before it
        # when it is killed.
        fault = self.faults.arm_one_of("decode", "decode.step_begins", FaultAction.WAIT, at=DEATH_AFTER_TOKENS)
        stream = client.generate(
            token_ids=prompt(PROMPT_TOKENS, 5), max_tokens=num_tokens, temperature=0, ignore_eos=True
        )
        num_seen = 0
        async for delta in stream:
            num_seen += len(delta.tokens)
            if num_seen == DEATH_AFTER_TOKENS:
                await (await fault.wait_until_fired()).kill()
                fault.disarm()
        assert stream.accepted is not None
        request_id = stream.accepted.request_id
        await wait_until(lambda: _has_ended(client, request_id), "the request has ended")
        survivor = await client.timeline(request_id)
        check_survivor(survivor, num_tokens)
        return survivor


def check_survivor(survivor: RequestTimeline, num_tokens: int) -> None:
    """Raises AssertionError unless two attempts are told, the first on a lost worker, and no token
    index is left out or twice.
    """
    timeline = survivor.timeline
    assert [job.outcome for job in timeline.jobs] == [JobOutcome.RETRIED, JobOutcome.COMPLETED], timeline.jobs
    first, second = timeline.jobs
    assert first.failed_worker_id == first.decode_worker_id != second.decode_worker_id, timeline.jobs
    assert "was lost" in first.end_reason
    assert timeline.is_contiguous(0), timeline.token_runs(0)
    assert sum(run.num_tokens for run in timeline.token_runs(0)) == num_tokens


async def _has_ended(client: AsyncClient, request_id: str) -> bool:
    return (await client.timeline(request_id)).timeline.ended


def prompt(num_tokens: int, seed: int) -> Sequence[int]:
    """Token ids that no other seed's prompt begins with."""
    return [(seed * 7919 + number * number * 31 + number) % 90 + 5 for number in range(num_tokens)]


async def main(arguments: argparse.Namespace) -> None:
    """Runs everything and says what the picture shows."""
    cluster = WatchedCluster(None if arguments.tiny else REAL_MODEL)
    async with cluster.faults, cluster.faults.client() as client:
        survivor = await cluster.survive_a_death(client, arguments.num_tokens)
        # What runs while the picture is taken; a tiny model has no room for more.
        num_more = 100 if arguments.tiny else 800
        streams = [
            client.generate(token_ids=prompt(PROMPT_TOKENS, number), max_tokens=num_more, ignore_eos=True)
            for number in (7, 8)
        ]
        for stream in streams:
            await anext(aiter(stream))
        await take_screenshot(
            f"{cluster.url}#request={survivor.request.request_id}", arguments.path, dark=arguments.dark
        )
        for stream in streams:
            await stream.cancel()
    jobs = [f"attempt {job.attempt}: {job.end_reason or 'completed'}" for job in survivor.timeline.jobs]
    print(f"{arguments.path}: {arguments.path.stat().st_size} bytes; {'; '.join(jobs)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--num-tokens", type=int, default=NUM_TOKENS)
    asyncio.run(main(parser.parse_args()))
