"""Routing strategies on simulated conversations: counts, not times of this machine."""

import json
from pathlib import Path

import pytest

from benchmarks import routing
from benchmarks.routing_simulation import ClusterShape, RoutingOutcome, simulate, simulate_best
from benchmarks.routing_workload import Mix, make_conversations
from gateway.routing.routing import STRATEGIES

MIX = Mix(num_conversations=90, num_system_prompts=12, system_tokens=256, mean_turns=3.0)
SHAPE = ClusterShape(num_blocks=512)
TALK = make_conversations(MIX, seed=3)
NUM_REQUESTS = sum(len(conversation.turns) for conversation in TALK)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, RoutingOutcome]:
    return {strategy: simulate(TALK, SHAPE, strategy, seed=3) for strategy in STRATEGIES}


def test_conversations_grow_by_message_and_answer_and_popular_system_prompts_recur() -> None:
    beginnings = [conversation.turns[0].prompt[: MIX.system_tokens] for conversation in TALK]
    counts = sorted((beginnings.count(each) for each in set(beginnings)), reverse=True)
    assert counts[0] > 3 * counts[-1]
    for conversation in TALK:
        for turn, following in zip(conversation.turns, conversation.turns[1:], strict=False):
            assert following.prompt[: len(turn.prompt + turn.answer)] == turn.prompt + turn.answer
    assert make_conversations(MIX, seed=3) == TALK != make_conversations(MIX, seed=4)


def test_prefix_routing_finds_more_than_load_and_nearly_what_there_is(outcomes: dict[str, RoutingOutcome]) -> None:
    best = simulate_best(TALK, SHAPE, seed=3)
    assert {outcome.num_requests for outcome in outcomes.values()} == {best.num_requests} == {NUM_REQUESTS}
    found = {strategy: outcome.num_hit_tokens for strategy, outcome in outcomes.items()}
    assert best.num_hit_tokens >= found["prefix"] > 1.2 * found["load"]
    assert found["prefix"] > 0.9 * best.num_hit_tokens
    assert found["session"] > found["load"]


def test_prefix_routing_has_the_first_token_sooner_in_virtual_time(outcomes: dict[str, RoutingOutcome]) -> None:
    waited = {strategy: sum(outcome.ttft_s) for strategy, outcome in outcomes.items()}
    assert waited["prefix"] < 0.8 * waited["load"]


def test_expectations_are_what_is_found(outcomes: dict[str, RoutingOutcome]) -> None:
    prefix = outcomes["prefix"]
    assert prefix.num_expected_tokens > 0
    assert prefix.num_found_tokens == pytest.approx(prefix.num_expected_tokens, rel=0.05)
    assert outcomes["load"].num_expected_tokens == 0
    num_blocks = (SHAPE.num_prefill + SHAPE.num_decode) * SHAPE.num_blocks
    assert 0 < prefix.max_index_entries <= num_blocks


def test_an_index_without_room_stays_within_its_bound_and_still_helps(outcomes: dict[str, RoutingOutcome]) -> None:
    bounded = simulate(TALK, SHAPE, "prefix", seed=3, max_entries=600)
    assert outcomes["prefix"].max_index_entries > bounded.max_index_entries == 600
    assert bounded.num_hit_tokens > outcomes["load"].num_hit_tokens


def test_without_anything_in_common_prefix_routing_is_routing_by_load() -> None:
    alone = Mix(num_conversations=40, num_system_prompts=5000, zipf_exponent=0.0, mean_turns=1.0, system_tokens=16)
    talk = make_conversations(alone, seed=5)
    assert len({conversation.turns[0].prompt[:16] for conversation in talk}) == len(talk)
    by_prefix, by_load = (simulate(talk, SHAPE, strategy, seed=5) for strategy in ("prefix", "load"))
    assert by_prefix.num_hit_tokens == by_load.num_hit_tokens == 0
    assert by_prefix.ttft_s == by_load.ttft_s


def test_a_run_is_the_same_for_the_same_seed(outcomes: dict[str, RoutingOutcome]) -> None:
    assert simulate(TALK, SHAPE, "prefix", seed=3) == outcomes["prefix"]


def test_the_command_compares_all_strategies_with_the_best(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    routing.command(conversations=12, rate=2.0, system_prompts=3, workers=2, gateways=2, blocks=256, seed=1, json=path)
    results = json.loads(path.read_text())["results"]
    assert [result["routing"] for result in results] == [routing.BEST, *STRATEGIES]
    assert results[0]["percent_of_best"] == 100
    assert all(result["num_requests"] == results[0]["num_requests"] > 12 for result in results)
