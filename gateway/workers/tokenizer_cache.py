"""Fetches each model's tokenizer from a worker once, and keeps it by fingerprint."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from gateway.text.tokenizer import KNOWN_FILES, ModelTokenizer, may_have_template
from gateway.workers.session import WorkerSession
from kvrelay.errors import KvrelayError, PreconditionError, UnavailableError
from kvrelay.runtime.single_flight_cache import SingleFlightCache
from kvrelay.v1 import session_pb2, session_pb2_grpc

MAX_TOTAL_BYTES = 64 * 1024 * 1024
MAX_TOKENIZERS = 8
FETCH_TIMEOUT_S = 20.0


class TokenizerCache:
    """`on_template` is called when the files of a model with a chat template have come."""

    def __init__(
        self, sessions: Callable[[], Iterable[WorkerSession]], on_template: Callable[[], None] = lambda: None
    ) -> None:
        self._sessions = sessions
        self._on_template = on_template
        self._tokenizers: SingleFlightCache[str, ModelTokenizer] = SingleFlightCache(
            self._fetch_from_any, MAX_TOKENIZERS, "tokenizer"
        )

    def cached(self, fingerprint: str) -> ModelTokenizer | None:
        return self._tokenizers.kept(fingerprint)

    async def get(self, fingerprint: str) -> ModelTokenizer:
        """Raises:
        UnavailableError: no worker of the model answers.
        PreconditionError: the files are missing, too large or broken.
        """
        return await self._tokenizers.get(fingerprint)

    async def files(self, fingerprint: str) -> dict[str, bytes]:
        """By name. Raises as `get`."""
        failure: KvrelayError = UnavailableError("no worker of the model is connected now; try again later")
        for session in list(self._sessions()):
            if session.identity.model.fingerprint == fingerprint:
                try:
                    return await fetch_files(session.channel, fingerprint)
                except UnavailableError as error:
                    failure = error
        raise failure

    async def _fetch_from_any(self, fingerprint: str) -> ModelTokenizer:
        files = await self.files(fingerprint)
        if may_have_template(files):
            self._on_template()
        return await asyncio.to_thread(ModelTokenizer, files)


async def fetch_files(channel: grpc.aio.Channel, fingerprint: str) -> dict[str, bytes]:
    """Skips unknown names.

    Raises:
        UnavailableError: the worker does not answer in time.
        PreconditionError: it sends more than MAX_TOTAL_BYTES.
    """
    files: dict[str, bytearray] = {}
    num_bytes = 0
    call: Any = session_pb2_grpc.ModelServiceStub(channel).GetTokenizer(
        session_pb2.GetTokenizerRequest(fingerprint=fingerprint), timeout=FETCH_TIMEOUT_S
    )
    try:
        # Not `async for`: a call and its iterator hold each other, and so the connection.
        while (piece := await call.read()) is not grpc.aio.EOF:
            num_bytes += len(piece.content)
            if num_bytes > MAX_TOTAL_BYTES:
                raise PreconditionError(
                    f"the model's tokenizer files are larger than {MAX_TOTAL_BYTES >> 20} MiB; send token ids"
                )
            if piece.file_name in KNOWN_FILES:
                files.setdefault(piece.file_name, bytearray()).extend(piece.content)
    except grpc.aio.AioRpcError as failure:
        problem = "a worker did not send its model's tokenizer; try again later"
        raise UnavailableError(problem) from failure.with_traceback(None)  # whose frames hold the call
    finally:
        call.cancel()
    return {name: bytes(content) for name, content in files.items()}
