"""Chats are rendered in children with limits: a hostile template ends its own chat only."""

import asyncio
import resource
from collections.abc import AsyncIterator

import pytest

from gateway.text.chat_renderer import CONFINEMENT, ChatRenderer
from gateway.text.template_source import MAX_TEMPLATE_BYTES, TemplateSource
from gateway.text.texts import Texts, TokenBound
from gateway.text.tokenizer import ModelTokenizer, may_have_template
from kvrelay.errors import DeadlineError, InvalidRequestError, NoChatTemplateError, PreconditionError
from kvrelay.runtime.confined_pool import ConfinedPool
from kvrelay.testing.waiting import wait_until
from tests.support.small_tokenizer import tokenizer_files

BOUND_S = 120.0
MAX_GROWTH_BYTES = 32 << 20
CHAT = [{"role": "user", "content": "<é> 日本 🎉"}]
PLAIN = TemplateSource("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", (("bos_token", "<s>"),))
HOSTILE = {
    "sorting": "{% for x in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "a wide number": "{{ '%0900000000d' | format(1) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "much text": "{% for i in range(400000) %}{{ 'abcdefgh' }}{% endfor %}",
    "a list of lists": "{{ range(99999) | batch(1) | list | map('list') | list | tojson(indent=20000) }}",
}


@pytest.fixture
async def renderer() -> AsyncIterator[ChatRenderer]:
    made = ChatRenderer(ConfinedPool("the rendering of chats", CONFINEMENT, max_wait_s=BOUND_S))
    yield made
    await made.close()


def soon() -> float:
    return asyncio.get_running_loop().time() + BOUND_S


def rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def test_chats_are_rendered_by_one_warm_child(renderer: ChatRenderer) -> None:
    for _ in range(3):
        assert await renderer.render(PLAIN, CHAT, "messages", soon()) == "<s><é> 日本 🎉"
    assert renderer.pool.num_started == 1
    assert renderer.outcomes["rendered"] == 3


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_template_is_stopped_and_others_chats_are_rendered_meanwhile(
    renderer: ChatRenderer, source: str
) -> None:
    await renderer.render(PLAIN, CHAT, "messages", soon())
    before = rss_bytes()
    hostile = asyncio.create_task(renderer.render(TemplateSource(source), CHAT, "prompt.chat", soon()))
    for _ in range(3):
        assert await renderer.render(PLAIN, CHAT, "messages", soon()) == "<s><é> 日本 🎉"
    with pytest.raises(InvalidRequestError, match=r"^prompt\.chat "):
        await hostile
    assert rss_bytes() - before <= MAX_GROWTH_BYTES
    assert await renderer.render(PLAIN, CHAT, "messages", soon()) == "<s><é> 日本 🎉"


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ 1 | unheard }}", "x" * (MAX_TEMPLATE_BYTES + 1), "{% if a %}" * 20_000],
    ids=["syntax", "filter", "size", "depth"],
)
async def test_a_template_that_does_not_compile_is_known_after_one_try(renderer: ChatRenderer, source: str) -> None:
    template = TemplateSource(source)
    for _ in range(2):
        with pytest.raises(PreconditionError, match=r"chat template is broken: .*; send text instead"):
            await renderer.render(template, CHAT, "messages", soon())
    assert renderer.outcomes["broken"] == 1


async def test_what_a_template_refuses_is_the_clients_mistake(renderer: ChatRenderer) -> None:
    refusing = TemplateSource("{{ raise_exception('role ' ~ messages[0].role ~ ' is unknown') }}")
    with pytest.raises(InvalidRequestError, match=r"messages are refused by .*: role user is unknown"):
        await renderer.render(refusing, CHAT, "messages", soon())
    assert renderer.outcomes["refused"] == 1


async def test_a_template_that_says_far_more_than_the_chat_is_refused(renderer: ChatRenderer) -> None:
    """Its text would be tokenized."""
    talkative = TemplateSource("{{ 'x' * 80000 }}")
    with pytest.raises(InvalidRequestError, match=r"become 80000 characters .*, too many for what they say"):
        await renderer.render(talkative, CHAT, "messages", soon())
    assert len(await renderer.render(talkative, [{"role": "user", "content": "x" * 4000}], "messages", soon())) == 80000


async def test_a_chat_is_rendered_by_its_deadline_or_not_at_all(renderer: ChatRenderer) -> None:
    with pytest.raises(DeadlineError):
        await renderer.render(PLAIN, CHAT, "messages", asyncio.get_running_loop().time())


async def test_a_chat_template_is_a_models_only_if_it_compiles(renderer: ChatRenderer) -> None:
    texts = Texts(renderer=renderer)
    for template, is_good in (("{{ messages[0].content }}", True), ("{% for %}", False), (None, False)):
        files = tokenizer_files(chat_template=template)
        assert await texts.has_chat_template(ModelTokenizer(files)) is is_good
        assert may_have_template(files) is (template is not None)


async def test_a_conversation_without_bounds_reaches_no_child(renderer: ChatRenderer) -> None:
    texts, bound = Texts(renderer=renderer), TokenBound("prompt", 10, "send less")
    long = [{"role": "user", "content": "x" * 100_000}]
    with pytest.raises(InvalidRequestError, match="100000 bytes"):
        await texts.encode_chat(ModelTokenizer(tokenizer_files()), long, "messages", bound, soon())
    with pytest.raises(NoChatTemplateError):
        await texts.render(ModelTokenizer(tokenizer_files(chat_template=None)), CHAT, "messages", bound, soon())
    assert renderer.pool.num_started == 0


async def test_a_child_waits_for_the_first_chat(renderer: ChatRenderer) -> None:
    renderer.pool.prestart()
    await wait_until(lambda: len(renderer.pool.pids) == 1, "a child is ready")
    await renderer.render(PLAIN, CHAT, "messages", soon())
    assert renderer.pool.num_started == 1
