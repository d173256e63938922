"""Decides whether a request's response format is taken, before anything else is spent."""

from collections.abc import Callable

from gateway.telemetry.metrics import GatewayMetrics
from gateway.workers.served_models import ModelLimits
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import InvalidRequestError, PreconditionError
from kvrelay.structured_output.format_checks import FormatChecks


class ResponseFormats:
    """`take_format` is called for each format that must be compiled, and may refuse it."""

    def __init__(
        self, checks: FormatChecks, metrics: GatewayMetrics, take_format: Callable[[], None] = lambda: None
    ) -> None:
        self.checks = checks
        self._metrics = metrics
        self._take_format = take_format

    async def check(self, sampling: SamplingParams, limits: ModelLimits) -> None:
        """Raises:
        InvalidRequestError: the format is wrong, too complex or not supported.
        OverloadedError, UnavailableError: it cannot be checked now.
        PreconditionError: the model has no end-of-sequence token.
        """
        response_format = sampling.response_format
        if response_format is None:
            return
        if not limits.model.eos_token_ids:
            raise PreconditionError(
                "the model has no end-of-sequence token, with which structured output ends; use another model"
            )
        try:
            with self._metrics.counting_refusals():
                if response_format not in self.checks:
                    self._take_format()
                await self.checks.check(response_format)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"sampling.{error.field}", error.problem) from None
