"""Tokenizers of the models that are served: fetched from a worker once, kept by fingerprint. Knows no request."""

import asyncio
from collections.abc import Callable, Iterable

import grpc

from gateway.tokenizer import KNOWN_FILES, ModelTokenizer
from gateway.worker_session import WorkerSession
from kvrelay.errors import KvrelayError, PreconditionError, UnavailableError
from kvrelay.result_cache import ResultCache
from kvrelay.v1 import session_pb2, session_pb2_grpc

MAX_TOTAL_BYTES = 64 * 1024 * 1024
MAX_TOKENIZERS = 8
FETCH_TIMEOUT_S = 20.0


class TokenizerCache:
    """Tokenizers by fingerprint, the least recently used dropped first.

    Args:
        sessions: gives the sessions that are up.
    """

    def __init__(self, sessions: Callable[[], Iterable[WorkerSession]]) -> None:
        self._sessions = sessions
        self._tokenizers: ResultCache[str, ModelTokenizer] = ResultCache(self._fetch_from_any, MAX_TOKENIZERS, "tokenizer")

    def cached(self, fingerprint: str) -> ModelTokenizer | None:
        """The tokenizer when it is here already."""
        return self._tokenizers.kept(fingerprint)

    async def get(self, fingerprint: str) -> ModelTokenizer:
        """The tokenizer, fetched from a worker when it is not here. Many callers share one fetch.

        Raises:
            UnavailableError: no worker of the model answers.
            PreconditionError: the model's files are missing, too large or broken.
        """
        return await self._tokenizers.get(fingerprint)

    async def files(self, fingerprint: str) -> dict[str, bytes]:
        """The tokenizer's files by name, fetched anew from a worker.

        Raises:
            UnavailableError, PreconditionError: as `get`.
        """
        failure: KvrelayError = UnavailableError("no worker of the model is connected now; try again later")
        for session in list(self._sessions()):
            if session.identity.model.fingerprint == fingerprint:
                try:
                    return await fetch_files(session.channel, fingerprint)
                except UnavailableError as error:
                    failure = error
        raise failure

    async def _fetch_from_any(self, fingerprint: str) -> ModelTokenizer:
        return await asyncio.to_thread(ModelTokenizer, await self.files(fingerprint))


async def fetch_files(channel: grpc.aio.Channel, fingerprint: str) -> dict[str, bytes]:
    """A worker's tokenizer files by name; files of other names are skipped.

    Raises:
        UnavailableError: the worker does not answer in time.
        PreconditionError: it sends more than 64 MiB.
    """
    files: dict[str, bytearray] = {}
    num_bytes = 0
    call = session_pb2_grpc.ModelServiceStub(channel).GetTokenizer(
        session_pb2.GetTokenizerRequest(fingerprint=fingerprint), timeout=FETCH_TIMEOUT_S
    )
    try:
        async for piece in call:
            num_bytes += len(piece.content)
            if num_bytes > MAX_TOTAL_BYTES:
                call.cancel()
                raise PreconditionError(
                    f"the model's tokenizer files are larger than {MAX_TOTAL_BYTES >> 20} MiB; send token ids"
                )
            if piece.file_name in KNOWN_FILES:
                files.setdefault(piece.file_name, bytearray()).extend(piece.content)
    except grpc.aio.AioRpcError as failure:
        raise UnavailableError("a worker did not send its model's tokenizer; try again later") from failure
    return {name: bytes(content) for name, content in files.items()}
