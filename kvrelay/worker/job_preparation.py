"""Compiles a job's grammar before the engine thread gets the job.

start --no response format--> submitted at once
      --response format--> compiling --> submitted, then the commands that came meanwhile
                               '-- cancel, fail: never submitted
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import structlog

from kvrelay.core.job import FailureKind, Job, JobId
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError, KvrelayError, PreconditionError
from kvrelay.models.end_tokens import read_object
from kvrelay.models.tokenizer_settings import complete_tokenizer_json
from kvrelay.structured_output.grammar import CompiledGrammar, TokenVocabulary
from kvrelay.worker.commands import CancelJob, FailJob
from kvrelay.worker.sequence import PreparedJob

CommandT = TypeVar("CommandT")
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)

_log = structlog.get_logger(__name__)


CompileGrammar = Callable[[ResponseFormat], Awaitable[CompiledGrammar]]


async def refuse_response_format(response_format: ResponseFormat) -> CompiledGrammar:
    raise InvalidRequestError(response_format.field, "is not supported by this worker; leave it away")


class GrammarLoader:
    """Compiles response formats over a model's tokens, which it loads once. Thread-safe."""

    def __init__(self, folder: Path, model: ModelSpec) -> None:
        self._folder = folder
        self._model = model
        self._vocabulary: TokenVocabulary | None = None
        self._loading = threading.Lock()

    def compile(self, response_format: ResponseFormat) -> CompiledGrammar:
        """Raises InvalidRequestError for a bad format, PreconditionError for a bad tokenizer."""
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._load()
        return self._vocabulary.compile(response_format)

    def _load(self) -> TokenVocabulary:
        try:
            tokenizer_json = (self._folder / "tokenizer.json").read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise PreconditionError("the model has no tokenizer.json, so it cannot give structured output") from None
        return TokenVocabulary(self._completed(tokenizer_json), self._model.vocab_size, self._model.eos_token_ids)

    def _completed(self, tokenizer_json: str) -> str:
        """Adds the tokens of tokenizer_config.json, as gateways do."""
        config = {
            **read_object(self._folder / "special_tokens_map.json"),
            **read_object(self._folder / "tokenizer_config.json"),
        }
        try:
            completed = complete_tokenizer_json(tokenizer_json, config)
        except Exception as error:  # tokenizers raises nothing narrower
            raise PreconditionError(f"the model's tokenizer.json is broken: {error}; use another model") from error
        if completed is not tokenizer_json and (size := _vocabulary_size(completed)) > self._model.vocab_size:
            _log.warning(
                "structured output goes without the tokens that tokenizer_config.json adds:"
                " the model has no output for them",
                num_tokens=size,
                vocab_size=self._model.vocab_size,
            )
            return tokenizer_json
        return completed


def _vocabulary_size(tokenizer_json: str) -> int:
    added = json.loads(tokenizer_json)["added_tokens"]
    return 1 + max((int(token["id"]) for token in added), default=-1)


class EngineInbox(Protocol[CommandT_contra]):
    def submit(self, command: CommandT_contra) -> None: ...

    def submit_job(self, command: CommandT_contra) -> bool:
        """False when the inbox is full."""
        raise NotImplementedError


class JobPreparation(Generic[CommandT]):
    """Stands between the sessions and the engine thread, on the event loop.

    `on_cancelled` and `on_failed` are for jobs that end before the engine thread gets them.
    """

    def __init__(
        self,
        inbox: EngineInbox[CommandT | CancelJob | FailJob],
        compile_grammar: CompileGrammar,
        on_cancelled: Callable[[JobId], None],
        on_failed: Callable[[JobId, FailureKind, str], None],
    ) -> None:
        self._inbox = inbox
        self._compile_grammar = compile_grammar
        self._on_cancelled = on_cancelled
        self._on_failed = on_failed
        self._deferred: dict[JobId, list[CommandT]] = {}
        """Commands during compilation."""
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, job: Job, make_command: Callable[[PreparedJob], CommandT]) -> None:
        response_format = job.sampling.response_format
        if response_format is None:
            self._submit_first(make_command(PreparedJob(job)), job.job_id)
            return
        self._deferred[job.job_id] = []
        preparing = self._prepare(job, response_format, make_command)
        task = asyncio.create_task(preparing, name="grammar of a job")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def submit(self, job_id: JobId, command: CommandT) -> None:
        deferred = self._deferred.get(job_id)
        if deferred is None:
            self._inbox.submit(command)
        else:
            deferred.append(command)

    def cancel(self, job_id: JobId) -> None:
        if self._deferred.pop(job_id, None) is not None:
            self._on_cancelled(job_id)
        else:
            self._inbox.submit(CancelJob(job_id))

    def fail(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        if self._deferred.pop(job_id, None) is not None:
            self._on_failed(job_id, kind, message)
        else:
            self._inbox.submit(FailJob(job_id, kind, message))

    async def _prepare(
        self, job: Job, response_format: ResponseFormat, make_command: Callable[[PreparedJob], CommandT]
    ) -> None:
        try:
            grammar = await self._compile_grammar(response_format)
        except KvrelayError as error:
            is_invalid = isinstance(error, InvalidRequestError | PreconditionError)
            kind = FailureKind.INVALID if is_invalid else FailureKind.OUT_OF_CAPACITY
            self._fail_preparing(job.job_id, kind, error.message)
            return
        except Exception:  # otherwise the job would wait until its deadline
            _log.exception("a response format cannot be compiled", **job.log_fields)
            message = "the output's form could not be compiled; the worker's log has the detail"
            self._fail_preparing(job.job_id, FailureKind.INTERNAL, message)
            return
        deferred = self._deferred.pop(job.job_id, None)
        if deferred is None:  # cancelled or failed meanwhile
            return
        self._submit_first(make_command(PreparedJob(job, grammar)), job.job_id)
        for command in deferred:
            self._inbox.submit(command)

    def _fail_preparing(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        if self._deferred.pop(job_id, None) is not None:
            self._on_failed(job_id, kind, message)

    def _submit_first(self, command: CommandT, job_id: JobId) -> None:
        if not self._inbox.submit_job(command):
            self._on_failed(job_id, FailureKind.OUT_OF_CAPACITY, "the worker's inbox is full")
