"""Works wait for their grammar: what comes for them in the meantime is kept in order, or dropped with them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from kvrelay.errors import InvalidRequestError, OverloadedError, PreconditionError
from kvrelay.grammar import CompiledGrammar
from kvrelay.model_spec import ModelSpec
from kvrelay.response_format import ResponseFormat
from kvrelay.sampling_params import SamplingParams
from kvrelay.testing.waiting import wait_until
from kvrelay.work import FailureKind, Work, WorkId
from kvrelay.worker_grammars import GrammarLoader, WorkPreparation, refuse_form
from tests.gateway.small_tokenizer import make_tokenizer, tokenizer_files
from tests.works import make_work

BOUND_S = 10.0
GRAMMAR = cast(CompiledGrammar, object())
FREE = make_work([1, 2], 4)
FORMED = make_work([1, 2], 4, "b" * 32, sampling=SamplingParams(max_tokens=4, response_format=ResponseFormat.regex("a+")))


class Prepared:
    """A preparation whose compile waits for a word, and all that it says, in order."""

    def __init__(self, error: Exception | None = None) -> None:
        self.said: list[object] = []
        self.go_on = threading.Event()
        self.num_compiled = 0
        self._error = error
        self.preparation = WorkPreparation(self._compile, self._note_failure)

    def _compile(self, form: ResponseFormat) -> CompiledGrammar:
        assert self.go_on.wait(BOUND_S)
        self.num_compiled += 1
        if self._error is not None:
            raise self._error
        return GRAMMAR

    def _note_failure(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        self.said.append((work_id, kind, message))

    def run(self, work: Work) -> None:
        self.said.append(work)

    def say(self, word: str) -> Callable[[], None]:
        return lambda: self.said.append(word)


async def test_a_work_without_a_form_runs_at_once() -> None:
    prepared = Prepared()
    prepared.preparation.prepare(FREE, prepared.run)
    assert prepared.said == [FREE]
    assert not prepared.preparation.defer(FREE.work_id, prepared.say("later"))
    assert not prepared.preparation.drop(FREE.work_id)


async def test_what_comes_meanwhile_is_done_behind_the_work_in_order() -> None:
    prepared = Prepared()
    prepared.preparation.prepare(FORMED, prepared.run)
    assert [prepared.preparation.defer(FORMED.work_id, prepared.say(word)) for word in ("one", "two")] == [True, True]
    assert prepared.said == []
    prepared.go_on.set()
    await wait_until(lambda: len(prepared.said) == 3, "the work runs")
    work, *words = prepared.said
    assert isinstance(work, Work)
    assert (work.work_id, work.grammar, words) == (FORMED.work_id, GRAMMAR, ["one", "two"])
    assert not prepared.preparation.defer(FORMED.work_id, prepared.say("late"))  # the caller's again


async def test_nothing_comes_of_a_work_that_is_dropped() -> None:
    prepared = Prepared()
    prepared.preparation.prepare(FORMED, prepared.run)
    prepared.preparation.defer(FORMED.work_id, prepared.say("one"))
    assert prepared.preparation.drop(FORMED.work_id)
    assert not prepared.preparation.drop(FORMED.work_id)
    other = make_work([1], 4, "c" * 32, sampling=FORMED.sampling)
    prepared.preparation.prepare(other, prepared.run)
    prepared.go_on.set()
    await wait_until(lambda: bool(prepared.said), "the other one runs")
    assert [work.work_id for work in prepared.said if isinstance(work, Work)] == [other.work_id]
    assert len(prepared.said) == prepared.num_compiled == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError("response_format.regex", "is wrong"), FailureKind.INVALID),
        (PreconditionError("the model has no tokenizer"), FailureKind.INVALID),
        (OverloadedError("too many"), FailureKind.OUT_OF_CAPACITY),
    ],
)
async def test_a_form_that_cannot_be_compiled_fails_its_work(error: Exception, kind: FailureKind) -> None:
    prepared = Prepared(error)
    prepared.preparation.prepare(FORMED, prepared.run)
    prepared.preparation.defer(FORMED.work_id, prepared.say("one"))
    prepared.go_on.set()
    await wait_until(lambda: bool(prepared.said), "the failure is told")
    assert prepared.said == [(FORMED.work_id, kind, str(error))]
    assert not prepared.preparation.drop(FORMED.work_id)


async def test_a_defect_of_the_compiler_fails_its_work_at_once_and_its_detail_stays_in_the_log() -> None:
    prepared = Prepared(RuntimeError("secret"))
    prepared.preparation.prepare(FORMED, prepared.run)
    prepared.go_on.set()
    await wait_until(lambda: bool(prepared.said), "the failure is told")
    message = "the output's form could not be compiled; the worker's log has the detail"
    assert prepared.said == [(FORMED.work_id, FailureKind.INTERNAL, message)]


# --- GrammarLoader -----------------------------------------------------------------------------------------------------------


def model_of(vocab_size: int) -> ModelSpec:
    """What the loader reads of a model."""

    class Spec:
        eos_token_ids = (vocab_size - 3,)

    Spec.vocab_size = vocab_size  # type: ignore[attr-defined]
    return cast(ModelSpec, Spec())


def test_a_models_tokens_are_read_once_and_with_the_first_form(tmp_path: Path) -> None:
    vocab_size = make_tokenizer().get_vocab_size()
    loader = GrammarLoader(tmp_path, model_of(vocab_size))
    file = tmp_path / "tokenizer.json"
    file.write_bytes(tokenizer_files()["tokenizer.json"])
    first = loader.compile(ResponseFormat.regex("a+"))
    file.unlink()
    assert loader.compile(ResponseFormat.regex("b+")) is not first


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r"no tokenizer\.json"):
        GrammarLoader(tmp_path, model_of(8)).compile(ResponseFormat.regex("a+"))


def test_where_no_tokens_are_known_a_form_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"response_format\.regex is not supported by this worker"):
        refuse_form(ResponseFormat.regex("a"))
