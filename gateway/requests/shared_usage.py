"""Exchanges with other gateways what keys use."""

import asyncio
import random
import time

import structlog

from gateway.requests.admission import Admission
from gateway.requests.reported_usage import Report, decode_report, encode_report
from kvrelay.errors import KvrelayError
from kvrelay.state.state_store import StateStore

EXCHANGE_INTERVAL_S = 0.5
REPORT_LIFETIME_S = 3.0

_log = structlog.get_logger(__name__)


class SharedUsage:
    def __init__(self, admission: Admission, store: StateStore) -> None:
        self._admission = admission
        self._store = store
        self._heard_at: float | None = None

    async def run(self) -> None:
        while True:
            try:
                await self.exchange()
            except KvrelayError as error:
                self._forget_old()
                _log.debug("usage of keys cannot be exchanged now", reason=error.message)
            await asyncio.sleep(EXCHANGE_INTERVAL_S * random.uniform(0.8, 1.0))

    async def exchange(self) -> None:
        """Raises KvrelayError if the store cannot be used."""
        report = encode_report(self._admission.report(time.monotonic()))
        stored = await self._store.exchange_usage(report, int(REPORT_LIFETIME_S * 1000))
        reports = {gateway_id: _decoded(gateway_id, data) for gateway_id, data in stored.items()}
        self._heard_at = time.monotonic()
        self._admission.set_elsewhere(reports, self._heard_at)

    def _forget_old(self) -> None:
        now = time.monotonic()
        if self._heard_at is not None and now - self._heard_at > REPORT_LIFETIME_S:
            self._heard_at = None
            self._admission.set_elsewhere({}, now)


def _decoded(gateway_id: str, data: bytes) -> Report:
    try:
        return decode_report(data)
    except KvrelayError as error:
        _log.warning("another gateway's usage of keys is unknown", gateway=gateway_id, reason=error.message)
        return {}
