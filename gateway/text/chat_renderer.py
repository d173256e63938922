"""Renders chats with models' templates in confined children, because a template is a program."""

import asyncio
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence

import structlog

from gateway.text.template_breaker import TemplateBreaker
from gateway.text.template_source import MAX_TEMPLATE_BYTES, Message, TemplateSource
from kvrelay.errors import DeadlineError, InvalidRequestError, OverloadedError, PreconditionError, UnavailableError
from kvrelay.runtime.confined_child import Confinement, Limit, OverLimitError
from kvrelay.runtime.confined_pool import ConfinedPool
from kvrelay.runtime.single_flight_cache import SingleFlightCache

CPU_MS = 1000
WALL_MS = 20_000
MEMORY_MIB = 256
MAX_KEPT = 8
MAX_WAITING = 256
MAX_REPEATS = 4
"""How often a template may write the messages, besides `MAX_OWN_CHARACTERS` of its own."""
MAX_OWN_CHARACTERS = 64 * 1024
MAX_BYTES_PER_CHARACTER = 4
SHORTEST_CHAT: tuple[Message, ...] = ({"role": "user", "content": "a"},)
OUTCOMES = ("rendered", "refused", "broken", "resting", *(limit.value for limit in Limit))

_log = structlog.get_logger(__name__)

CONFINEMENT = Confinement("gateway.text.template_child", CPU_MS, WALL_MS, MEMORY_MIB << 20)


class ChatRenderer:
    """Used on one event loop."""

    def __init__(self, pool: ConfinedPool | None = None) -> None:
        self.pool = pool or ConfinedPool("the rendering of chats", CONFINEMENT, max_waiting=MAX_WAITING)
        self.outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        """Of chats; `broken` also of templates."""
        self._breakers: OrderedDict[TemplateSource, TemplateBreaker] = OrderedDict()
        self._problems: SingleFlightCache[TemplateSource, str | None] = SingleFlightCache(
            self._find_problem, MAX_KEPT, "check of a chat template"
        )

    async def problem_of(self, template: TemplateSource) -> str | None:
        """Says why the template cannot be used. Raises as `ConfinedPool.ask`, but OverLimitError."""
        return await self._problems.get(template)

    async def render(self, template: TemplateSource, messages: Sequence[Message], field: str, deadline: float) -> str:
        """`field` is where the client sent the messages; `deadline` in monotonic seconds.

        Raises:
            PreconditionError: the template is broken, or rests because it takes too much.
            InvalidRequestError: it refuses the messages, or takes too much for them.
            DeadlineError: the deadline passed first.
            OverloadedError, UnavailableError: as `ConfinedPool.ask`.
        """
        try:
            async with asyncio.timeout_at(deadline):
                problem = await self.problem_of(template)
                if problem is not None:
                    raise PreconditionError(problem)
                return await self._render(template, messages, field)
        except TimeoutError:
            problem = "the request's deadline passed before its chat was rendered; allow more time"
            raise DeadlineError(problem) from None

    async def close(self) -> None:
        await self.pool.close()

    def _breaker_of(self, template: TemplateSource) -> TemplateBreaker:
        breaker = self._breakers.pop(template, None) or TemplateBreaker()
        self._breakers[template] = breaker
        if len(self._breakers) > MAX_KEPT:
            self._breakers.popitem(last=False)
        return breaker

    async def _try_shortest(self, template: TemplateSource, breaker: TemplateBreaker) -> None:
        breaker.on_trial = True
        try:
            await self._ask(template, SHORTEST_CHAT)
            breaker.on_rendered()
        except OverLimitError:
            breaker.on_trial_failed(asyncio.get_running_loop().time())
            _log.warning("a chat template rests, because it takes too much for the shortest chat")
        except (OverloadedError, UnavailableError):
            pass  # the next failure tries again
        finally:
            breaker.on_trial = False

    def _check_rest(self, breaker: TemplateBreaker) -> None:
        rest_s = breaker.rest_s(asyncio.get_running_loop().time())
        if rest_s:
            self.outcomes["resting"] += 1
            raise PreconditionError(
                "the model's chat template takes too much processor time or memory even for the shortest chat; "
                f"send text instead, or try again in {math.ceil(rest_s)} s"
            )

    async def _render(self, template: TemplateSource, messages: Sequence[Message], field: str) -> str:
        breaker = self._breaker_of(template)
        self._check_rest(breaker)
        try:
            kind, text = await self._ask(template, messages)
            breaker.on_rendered()
        except OverLimitError as over:
            self.outcomes[over.limit.value] += 1
            if over.limit is not Limit.ANSWER and breaker.on_failure():
                await self._try_shortest(template, breaker)
                self._check_rest(breaker)
            problem = f"take {_too_much(over.limit)} in the model's chat template; send fewer or shorter messages"
            raise InvalidRequestError(field, problem) from None
        if kind == "r":
            self.outcomes["refused"] += 1
            raise InvalidRequestError(field, text)
        if kind == "b":
            self.outcomes["broken"] += 1
            raise PreconditionError(text)
        self.outcomes["rendered"] += 1
        return text

    async def _find_problem(self, template: TemplateSource) -> str | None:
        if len(template.source) > MAX_TEMPLATE_BYTES:
            problem = f"it has {len(template.source)} characters, of which at most {MAX_TEMPLATE_BYTES} are read here"
        else:
            try:
                kind, text = await self._ask(template, None)
            except OverLimitError as over:
                problem = f"it takes {_too_much(over.limit)} to compile"
            else:
                self.outcomes["broken"] += kind == "b"
                return text if kind == "b" else None
        self.outcomes["broken"] += 1
        return f"the model's chat template is broken: {problem}; send text instead"

    async def _ask(self, template: TemplateSource, messages: Sequence[Message] | None) -> tuple[str, str]:
        size = sum(len(message["role"]) + len(message["content"]) for message in messages or ())
        max_characters = MAX_REPEATS * size + MAX_OWN_CHARACTERS
        asked = {
            "source": template.source,
            "special_tokens": dict(template.special_tokens),
            "messages": None if messages is None else [dict(message) for message in messages],
            "max_characters": max_characters,
        }
        answer = await self.pool.ask(json.dumps(asked).encode(), 1 + MAX_BYTES_PER_CHARACTER * max_characters)
        return answer[:1].decode(), answer[1:].decode()


def _too_much(limit: Limit) -> str:
    match limit:
        case Limit.TIME:
            return f"more than {CPU_MS / 1000:g} s of processor time"
        case Limit.MEMORY:
            return f"more than {MEMORY_MIB} MiB of memory"
        case Limit.ANSWER:
            return "more text than they say"
