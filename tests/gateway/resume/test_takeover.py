"""Two callers take one request over; the second waited for what the first had at once."""

from types import SimpleNamespace
from typing import Any, cast

from gateway.resume.takeover import Takeovers
from tests.support.redis_fixtures import make_record


async def test_a_late_caller_joins_the_takeover_that_already_runs() -> None:
    running: list[Any] = []

    async def wait_and_select(model: str, timeout_s: float) -> Any:
        running.append(object())  # meanwhile, the other caller's takeover finishes
        return SimpleNamespace(model=SimpleNamespace(fingerprint="f" * 32))

    async def get_tokenizer(fingerprint: str) -> None:
        return None

    async def claim(*_: Any, **__: Any) -> Any:
        raise AssertionError("it runs here: a second attempt would run beside it")

    starter: Any = SimpleNamespace(check_open=lambda: None)
    preparation: Any = SimpleNamespace(
        models=SimpleNamespace(wait_and_select=wait_and_select), tokenizers=SimpleNamespace(get=get_tokenizer)
    )
    requests: Any = SimpleNamespace(find=lambda request_id: running[0] if running else None)
    takeovers = Takeovers(starter, preparation, requests, cast(Any, SimpleNamespace(take_over=claim)))
    assert await takeovers.take_over(make_record("r1")) is running[0]
    assert not takeovers._pending
