"""When a chat template rests. Pure; times are monotonic seconds.

    in use --MAX_FAILURES in a row--> on trial --the shortest chat fails too--> rests --> in use
                                              '-- it is rendered --> in use

The trial tells slow templates from clients' slow chats.
"""

MAX_FAILURES = 3
FIRST_REST_S = 10.0
LONGEST_REST_S = 300.0


class TemplateBreaker:
    def __init__(self) -> None:
        self._num_failures = 0
        self._rest_s = FIRST_REST_S
        self._rests_until = 0.0
        self.on_trial = False

    def rest_s(self, now: float) -> float:
        return max(self._rests_until - now, 0.0)

    def on_rendered(self) -> None:
        self._num_failures = 0
        self._rest_s = FIRST_REST_S

    def on_failure(self) -> bool:
        """Returns whether a trial is due."""
        self._num_failures += 1
        return self._num_failures >= MAX_FAILURES and not self.on_trial

    def on_trial_failed(self, now: float) -> None:
        self._rests_until = now + self._rest_s
        self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)
        self._num_failures = MAX_FAILURES - 1
