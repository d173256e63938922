"""A template that takes too much for every chat rests; one client's slow chats stop no others."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.text import template_breaker
from gateway.text.chat_renderer import CONFINEMENT, ChatRenderer
from gateway.text.template_breaker import FIRST_REST_S, LONGEST_REST_S, MAX_FAILURES, TemplateBreaker
from gateway.text.template_source import TemplateSource
from kvrelay.errors import InvalidRequestError, PreconditionError
from kvrelay.runtime.confined_child import Limit
from kvrelay.runtime.confined_pool import ConfinedPool

SLOW = TemplateSource("{% for x in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}")
SLOW_FOR_SOME = TemplateSource(
    "{% if messages[0].content == 'slow' %}{% for x in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)
CHAT = [{"role": "user", "content": "Hello"}]
SLOW_CHAT = [{"role": "user", "content": "slow"}]


@pytest.fixture
async def renderer() -> AsyncIterator[ChatRenderer]:
    quick = replace(CONFINEMENT, cpu_ms=100)
    made = ChatRenderer(ConfinedPool("the rendering of chats", quick, max_wait_s=120.0))
    yield made
    await made.close()


def soon() -> float:
    return asyncio.get_running_loop().time() + 120


async def fail(renderer: ChatRenderer, template: TemplateSource, chat: list[dict[str, str]]) -> None:
    with pytest.raises(InvalidRequestError, match="processor time"):
        await renderer.render(template, chat, "messages", soon())


async def test_a_template_that_is_slow_for_every_chat_is_refused_at_once(renderer: ChatRenderer) -> None:
    for _ in range(MAX_FAILURES - 1):
        await fail(renderer, SLOW, CHAT)
    for _ in range(20):
        with pytest.raises(PreconditionError, match=r"send text instead, or try again in \d+ s"):
            await renderer.render(SLOW, CHAT, "messages", soon())
    num_rendered = MAX_FAILURES + 1  # and the trial
    assert renderer.pool.num_killed[Limit.TIME] == num_rendered, "no child works for it while it rests"
    assert renderer.outcomes["resting"] == 20
    other = TemplateSource("{{ messages[0].content }}")
    assert await renderer.render(other, CHAT, "messages", soon()) == "Hello"


async def test_a_template_is_tried_again_after_its_rest(
    renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_breaker, "FIRST_REST_S", 0.0)
    for _ in range(MAX_FAILURES + 2):  # each rest is over at once
        await fail(renderer, SLOW, CHAT)
    assert renderer.outcomes["resting"] == 0


async def test_slow_chats_of_one_client_do_not_stop_others(renderer: ChatRenderer) -> None:
    for _ in range(3 * MAX_FAILURES):
        await fail(renderer, SLOW_FOR_SOME, SLOW_CHAT)
    assert await renderer.render(SLOW_FOR_SOME, CHAT, "messages", soon()) == "Hello"
    assert renderer.outcomes["resting"] == 0


def test_failures_count_only_in_a_row() -> None:
    breaker = TemplateBreaker()
    for _ in range(10):
        assert not any(breaker.on_failure() for _ in range(MAX_FAILURES - 1))
        breaker.on_rendered()
    assert [breaker.on_failure() for _ in range(MAX_FAILURES + 1)] == [False] * (MAX_FAILURES - 1) + [True] * 2


def test_one_trial_runs_at_a_time() -> None:
    breaker = TemplateBreaker()
    for _ in range(MAX_FAILURES):
        breaker.on_failure()
    breaker.on_trial = True
    assert not breaker.on_failure()


def test_rests_double_up_to_a_bound_and_begin_anew_after_a_success() -> None:
    breaker, now, rests = TemplateBreaker(), 0.0, []
    for _ in range(10):
        breaker.on_trial_failed(now)
        rests.append(breaker.rest_s(now))
        now += rests[-1]
        assert breaker.rest_s(now) == 0.0
        assert breaker.on_failure(), "one failure after the rest calls for a trial"
    assert rests[:3] == [FIRST_REST_S, 2 * FIRST_REST_S, 4 * FIRST_REST_S]
    assert max(rests) == LONGEST_REST_S
    breaker.on_rendered()
    breaker.on_trial_failed(now)
    assert breaker.rest_s(now) == FIRST_REST_S
