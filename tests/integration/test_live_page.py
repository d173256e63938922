"""A real cluster loses the decode worker of a request: both attempts are told and drawn, and each
token once.
"""

import io

import pytest
from rich.console import Console

from kvrelay.cli.views.waterfall import Waterfall
from kvrelay.core.timeline import SpanKind
from tests.support import left_out
from tools.headless_chromium import dump_dom, find_chromium
from tools.page_screenshot import DEATH_AFTER_TOKENS, NUM_TOKENS, PROMPT_TOKENS, WatchedCluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


async def test_a_request_that_survives_a_kill_is_told_and_drawn_with_both_attempts() -> None:
    watched = WatchedCluster()
    async with watched.faults as cluster, cluster.client() as client:
        survivor = await watched.survive_a_death(client)
        request_id = survivor.request.request_id
        first, second = survivor.timeline.jobs
        assert first.token_runs[0].num_tokens == DEATH_AFTER_TOKENS
        assert second.num_prompt_tokens == PROMPT_TOKENS + first.token_runs[0].num_tokens

        # What travelled: chunks that cover the whole prompt, and all bytes.
        assert first.kv_bytes > 0
        assert sum(chunk.num_bytes for chunk in first.kv_chunks) == first.kv_bytes
        assert max(chunk.token_end for chunk in first.kv_chunks) == PROMPT_TOKENS
        assert [chunk.token_begin for chunk in first.prompt_chunks[1:]] == [
            chunk.token_end for chunk in first.prompt_chunks[:-1]
        ]
        assert first.prompt_chunks[-1].token_end == PROMPT_TOKENS
        assert [span.kind for span in first.spans] == list(SpanKind)
        for job in (first, second):
            assert all(0 <= span.begin_ms <= span.end_ms <= survivor.timeline.duration_ms for span in job.spans)
        assert survivor.timeline.phases is not None
        assert survivor.timeline.phases.num_attempts == 2

        console = Console(file=io.StringIO(), width=120)
        console.print(Waterfall(survivor))
        drawn = console.file.getvalue()  # type: ignore[attr-defined]
        assert f"{DEATH_AFTER_TOKENS}-{NUM_TOKENS - 1}, attempt 2" in drawn

        if find_chromium() is not None:
            await check_page(f"{watched.url}#request={request_id}")
    if find_chromium() is None:
        pytest.skip(left_out.CHROMIUM)


async def check_page(url: str) -> None:
    """The page in a browser: both attempts, the token indices of each, every token, and the pause
    between.
    """
    dom = await dump_dom(url)
    assert f"0–{DEATH_AFTER_TOKENS - 1}, attempt 1" in dom
    assert f"{DEATH_AFTER_TOKENS}–{NUM_TOKENS - 1}, attempt 2" in dom
    assert f"{NUM_TOKENS}, each once" in dom
    assert "was lost" in dom
    assert dom.count('class="token"') == NUM_TOKENS
    assert 'class="transfer-chunk"' in dom
    assert 'class="prefill-chunk"' in dom
    assert 'class="pause"' in dom
