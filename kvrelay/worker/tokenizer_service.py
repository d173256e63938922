"""Sends a model's tokenizer files to gateways, so that they need no model folder."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc

from kvrelay.errors import FingerprintError, PreconditionError
from kvrelay.v1 import session_pb2, session_pb2_grpc

PIECE_BYTES = 1024 * 1024

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class TokenizerService(session_pb2_grpc.ModelServiceServicer):
    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    async def GetTokenizer(
        self, request: session_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[session_pb2.GetTokenizerResponse]:
        if request.fingerprint != self._fingerprint:
            raise FingerprintError("this worker serves another model than the one that was asked for")
        for path in tokenizer_files(self._folder):
            for piece in _pieces(path):
                yield session_pb2.GetTokenizerResponse(file_name=path.name, content=piece)


def tokenizer_files(folder: Path) -> list[Path]:
    """Raises PreconditionError if tokenizer.json is missing."""
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(path.name == "tokenizer.json" for path in paths):
        raise PreconditionError("the model's folder has no tokenizer.json; text cannot be served, token ids can")
    return paths


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
