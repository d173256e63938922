"""Structured output of the real model at temperature 1 satisfies its schema, also when a decode
worker dies in the middle.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import pytest_asyncio
from pydantic import BaseModel, ConfigDict, Field

from kvrelay.client import AsyncClient, Completion, ResponseFormat
from kvrelay.core.job import FinishReason
from kvrelay.errors import InvalidRequestError
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import FaultCluster
from tests.integration.clusters import CALM

pytestmark = [
    pytest.mark.integration,
    pytest.mark.real_model,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
]

SUBJECTS = (
    "a river",
    "an old teacher",
    "a red bicycle",
    "the moon",
    "a baker",
    "a small dog",
    "a violin",
    "a storm",
    "a king",
    "a tree",
)
NUM_FEW = 4
NUM_MANY = 100


class Fact(BaseModel):
    """What the model is asked for; bounded, so that it ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    title: Annotated[str, Field(max_length=24)]
    kind: Literal["person", "animal", "thing", "place"]
    year: Annotated[int, Field(ge=0, le=2030)]
    is_real: bool
    words: Annotated[list[Annotated[str, Field(pattern="^[a-z]{1,12}$")]], Field(min_length=1, max_length=3)]


SCHEMA = ResponseFormat.json_schema(Fact.model_json_schema())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(smollm2_path: Path) -> AsyncIterator[FaultCluster]:
    engine = {"num_kv_blocks": 512, "block_size": 16, "max_context_tokens": 1024, "prefill_chunk_tokens": 128}
    requests = {"local_prefill_tokens": 0}
    made = FaultCluster(num_prefill=1, num_decode=2, model=smollm2_path, engine=engine, requests=requests, server=CALM)
    async with made as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: FaultCluster) -> AsyncIterator[AsyncClient]:
    """Of the cluster, all of whose workers are up again."""
    for process in cluster.processes.values():
        if not process.is_running:
            await process.start_again()
    await cluster.wait_until_ready()
    async with cluster.client() as made:
        yield made


def question(number: int) -> list[dict[str, str]]:
    subject = SUBJECTS[number % len(SUBJECTS)]
    return [{"role": "user", "content": f"Write fact number {number} about {subject} as JSON."}]


async def ask(client: AsyncClient, number: int, **sampling: Any) -> Completion:
    sampling = {"temperature": 1.0, "seed": number, "max_tokens": 160, "response_format": SCHEMA, **sampling}
    return await client.generate(messages=question(number), timeout_s=200, **sampling).completion()


async def ask_all(client: AsyncClient, count: int) -> list[Completion]:
    return await asyncio.gather(*(ask(client, number) for number in range(count)))


def assert_all_parse(completions: Sequence[Completion]) -> None:
    for completion in completions:
        Fact.model_validate(json.loads(completion.text))
        assert completion.outputs[0].finish_reason is FinishReason.STOP


async def ask_all_over_a_kill(cluster: FaultCluster, client: AsyncClient, count: int) -> list[Completion]:
    fault = cluster.arm_one_of("decode", "decode.step_computed", FaultAction.KILL, at=20)
    completions = await ask_all(client, count)
    victim = await fault.wait_until_fired()
    await victim.wait_until_gone()
    return completions


async def test_json_parses_and_its_kv_crossed_the_wire(client: AsyncClient) -> None:
    completions = await ask_all(client, 2)
    assert_all_parse(completions)
    # On a busy machine a transfer may be given up, and the decode worker then computes the prompt
    # in another attempt.
    phases = [completion.finished.phases for completion in completions]
    assert all(each.transfer_bytes > 0 for each in phases if each.num_attempts == 1)
    assert any(each.transfer_bytes > 0 for each in phases)


async def test_forms_of_all_kinds_hold_greedily_with_log_probabilities_and_several_answers(client: AsyncClient) -> None:
    pattern = r"(yes|no), because [a-z ]{5,20}\."
    grammar = 'root ::= word (", " word)? "."\nword ::= "red" | "green" | "blue"'
    by_pattern, by_grammar, chosen = await asyncio.gather(
        ask(client, 1, response_format=ResponseFormat.regex(pattern), temperature=0.0, logprobs=2, max_tokens=60),
        ask(client, 2, response_format=ResponseFormat.grammar(grammar), n=2, max_tokens=60),
        ask(client, 3, response_format=ResponseFormat.choice(["left (1)", "right [2]"]), max_tokens=60),
    )
    assert re.fullmatch(pattern, by_pattern.text)
    assert all(token.logprob is not None and len(token.top_logprobs) == 2 for token in by_pattern.outputs[0].tokens)
    assert all(re.fullmatch(r"(red|green|blue)(, (red|green|blue))?\.", output.text) for output in by_grammar.outputs)
    assert chosen.text in ("left (1)", "right [2]")


async def test_others_in_the_batch_say_what_they_say_alone(client: AsyncClient) -> None:
    free = {"response_format": None, "max_tokens": 20}
    alone = await ask(client, 7, **free)
    beside, *_ = await asyncio.gather(ask(client, 7, **free), ask(client, 8), ask(client, 9))
    assert beside.text == alone.text


async def test_a_wrong_form_is_refused_by_name_and_nothing_is_lost(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling\.response_format\.regex cannot be used: .*look-around"):
        await ask(client, 1, response_format=ResponseFormat.regex("(?=a)b"))
    unknown_token = ResponseFormat.grammar('start: "a" <|no_such_token|>')
    with pytest.raises(InvalidRequestError, match="unknown special token"):
        await ask(client, 1, response_format=unknown_token)
    assert_all_parse([await ask(client, 5)])


async def test_json_is_the_same_when_a_decode_worker_dies_in_the_middle(
    cluster: FaultCluster, client: AsyncClient
) -> None:
    undisturbed = await ask_all(client, NUM_FEW)
    completions = await ask_all_over_a_kill(cluster, client, NUM_FEW)
    assert_all_parse(completions)
    assert [made.text for made in completions] == [made.text for made in undisturbed]
    assert any(completion.finished.phases.num_attempts > 1 for completion in completions)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_a_hundred_answers_parse_with_and_without_a_death(cluster: FaultCluster, client: AsyncClient) -> None:
    undisturbed = await ask_all(client, NUM_MANY)
    assert_all_parse(undisturbed)
    completions = await ask_all_over_a_kill(cluster, client, NUM_MANY)
    assert_all_parse(completions)
    assert [made.text for made in completions] == [made.text for made in undisturbed]
    assert any(completion.finished.phases.num_attempts > 1 for completion in completions)


async def test_nothing_is_held_afterwards(cluster: FaultCluster) -> None:
    await cluster.check(timeout_s=30)
