"""How many tokens routing expected in workers' prefix caches, and how many were there. Pure."""

from collections import Counter

from kvrelay.core.member import MemberRole


class CacheHits:
    """Counts prompts whose workers have reported."""

    def __init__(self) -> None:
        self.num_prompt_tokens: Counter[MemberRole] = Counter()
        self.num_expected: Counter[MemberRole] = Counter()
        self.num_found: Counter[MemberRole] = Counter()
        self._expected: dict[str, dict[str, tuple[int, int]]] = {}
        """(prompt tokens, cached ones) by request and worker, until the worker reports."""

    def expect(self, request_id: str, num_tokens: int, expected: dict[str, int]) -> None:
        """`expected`: by worker chosen."""
        self._expected[request_id] = {worker_id: (num_tokens, cached) for worker_id, cached in expected.items()}

    def on_found(self, request_id: str, role: MemberRole, worker_id: str, num_cached_tokens: int) -> None:
        expectation = self._expected.get(request_id, {}).pop(worker_id, None)
        if expectation is not None:
            self.num_prompt_tokens[role] += expectation[0]
            self.num_expected[role] += expectation[1]
            self.num_found[role] += num_cached_tokens

    def forget(self, request_id: str) -> None:
        self._expected.pop(request_id, None)
