"""A team's own test: its service against a real cluster, whose decode worker dies in mid-answer.

The fixture `kvrelay_cluster` is from kvrelay's pytest plugin: real processes, a tiny random model
(or model="..."), no GPU, Docker or Redis. Run `pytest examples/integration_test`.
"""

from collections.abc import Callable
from typing import Any

import pytest
from my_service import summarize

from kvrelay.testing import FaultAction

TEXT = "disaggregated serving computes prompts and tokens in separate workers"


@pytest.mark.asyncio
async def test_the_summary_is_the_same_when_the_decode_worker_dies(kvrelay_cluster: Callable[..., Any]) -> None:
    cluster = await kvrelay_cluster(num_decode=2)
    async with cluster.client() as client:
        expected = "".join([piece async for piece in summarize(client, TEXT)])

        # Whichever decode worker computes the 20th step from now on dies in it.
        fault = cluster.arm_one_of("decode", "decode.step_begins", FaultAction.KILL, at=20)
        assert "".join([piece async for piece in summarize(client, TEXT)]) == expected
    assert fault.num_fired == 1
    await cluster.restart_ended()
