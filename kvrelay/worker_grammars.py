"""Compiles a work's grammar before the engine thread sees the work. Lives on a worker's event loop.

prepare --no form--> ready at once
        --form--> compiling --> ready, then what was deferred in the meantime
                      '-- drop: nothing comes of it --'
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from kvrelay.errors import InvalidRequestError, KvrelayError, PreconditionError
from kvrelay.form_compiler import FormCompiler
from kvrelay.grammar import CompiledGrammar, TokenVocabulary
from kvrelay.model_spec import ModelSpec
from kvrelay.response_format import ResponseFormat
from kvrelay.work import FailureKind, Work, WorkId

_log = structlog.get_logger(__name__)


def refuse_form(form: ResponseFormat) -> CompiledGrammar:
    """Where no tokens are known."""
    raise InvalidRequestError(form.field, "is not supported by this worker; leave it away")


class GrammarLoader:
    """Compiles forms over a model's tokens, which are read when the first form comes. Called in any thread.

    Args:
        folder: the model's.
        model: the served model.
    """

    def __init__(self, folder: Path, model: ModelSpec) -> None:
        self._folder = folder
        self._model = model
        self._vocabulary: TokenVocabulary | None = None
        self._loading = threading.Lock()

    def compile(self, form: ResponseFormat) -> CompiledGrammar:
        """The form as a grammar.

        Raises:
            InvalidRequestError: it cannot be compiled.
            PreconditionError: the model has no tokenizer, or one that does not allow it.
        """
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._load()
        return self._vocabulary.compile(form)

    def _load(self) -> TokenVocabulary:
        try:
            tokenizer_json = (self._folder / "tokenizer.json").read_text()
        except (OSError, UnicodeDecodeError):
            raise PreconditionError("the model has no tokenizer.json, so it cannot give structured output") from None
        return TokenVocabulary(tokenizer_json, self._model.vocab_size, self._model.eos_token_ids)


class WorkPreparation:
    """Works whose grammar is being compiled.

    Args:
        compile_form: called in threads; may raise KvrelayError.
        fail: told that a work cannot be run, of what kind that failure is, and why.
    """

    def __init__(
        self, compile_form: Callable[[ResponseFormat], CompiledGrammar], fail: Callable[[WorkId, FailureKind, str], None]
    ) -> None:
        self._compiler = FormCompiler(compile_form)
        self._fail = fail
        self._deferred: dict[WorkId, list[Callable[[], None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def prepare(self, work: Work, run: Callable[[Work], None]) -> None:
        """Calls `run` with the work when its grammar is there: at once when it has none."""
        form = work.sampling.response_format
        if form is None:
            run(work)
            return
        self._deferred[work.work_id] = []
        task = asyncio.create_task(self._prepare(work, form, run), name="grammar of a work")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def defer(self, work_id: WorkId, action: Callable[[], None]) -> bool:
        """Has the action called behind `run`. False when the work is not being prepared: then it is the caller's."""
        if work_id not in self._deferred:
            return False
        self._deferred[work_id].append(action)
        return True

    def drop(self, work_id: WorkId) -> bool:
        """Gives a work up. False when it is not being prepared."""
        return self._deferred.pop(work_id, None) is not None

    async def _prepare(self, work: Work, form: ResponseFormat, run: Callable[[Work], None]) -> None:
        try:
            grammar = await self._compiler.get(form)
        except KvrelayError as error:
            if self.drop(work.work_id):
                is_invalid = isinstance(error, InvalidRequestError | PreconditionError)
                kind = FailureKind.INVALID if is_invalid else FailureKind.OUT_OF_CAPACITY
                self._fail(work.work_id, kind, error.message)
            return
        except Exception:  # the top of a task: without word of it the work would wait until its deadline
            _log.exception("a form cannot be compiled", **work.log_fields)
            if self.drop(work.work_id):
                message = "the output's form could not be compiled; the worker's log has the detail"
                self._fail(work.work_id, FailureKind.INTERNAL, message)
            return
        deferred = self._deferred.pop(work.work_id, None)
        if deferred is None:  # given up
            return
        run(replace(work, grammar=grammar))
        for action in deferred:
            action()
