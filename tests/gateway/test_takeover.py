"""Two callers that take one request over, and the second has waited for what the first had at once."""

from types import SimpleNamespace
from typing import Any, cast

from gateway.relay import Relay
from gateway.takeover import take_over
from tests.redis_fixtures import make_record


async def test_a_caller_whose_wait_another_takeover_has_overtaken_joins_what_runs() -> None:
    running: list[Any] = []

    async def wait_and_select(model: str, timeout_s: float) -> Any:
        running.append(object())  # meanwhile, the other caller's takeover comes to its end
        return SimpleNamespace(model=SimpleNamespace(fingerprint="f" * 32))

    async def get_tokenizer(fingerprint: str) -> None:
        return None

    async def claim(*_: Any, **__: Any) -> Any:
        raise AssertionError("it runs here: a second attempt would run beside it")

    relay = SimpleNamespace(
        check_open=lambda: None,
        models=SimpleNamespace(wait_and_select=wait_and_select),
        tokenizers=SimpleNamespace(get=get_tokenizer),
        requests=SimpleNamespace(find=lambda request_id: running[0] if running else None),
        takeovers={},
        store=SimpleNamespace(take_over=claim),
    )
    assert await take_over(cast(Relay, relay), make_record("r1")) is running[0]
    assert not relay.takeovers
