"""Jobs wait for their grammar: what comes for them in the meantime is kept in order, or dropped
with them.
"""

import json
import threading
from pathlib import Path
from typing import cast

import pytest

from kvrelay.core.job import FailureKind, Job, JobId
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.response_format import ResponseFormat
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import InvalidRequestError, OverloadedError, PreconditionError
from kvrelay.models.tokenizer_settings import complete_tokenizer_json
from kvrelay.structured_output.grammar import CompiledGrammar
from kvrelay.structured_output.grammar_compiler import GrammarCompiler
from kvrelay.testing.waiting import wait_until
from kvrelay.worker.commands import CancelJob, FailJob
from kvrelay.worker.job_preparation import GrammarLoader, JobPreparation, refuse_response_format
from kvrelay.worker.sequence import PreparedJob
from tests.support.jobs import make_job
from tests.support.small_tokenizer import EOS_TOKEN, make_tokenizer, tokenizer_files

BOUND_S = 30.0
GRAMMAR = cast(CompiledGrammar, object())
FREE = make_job([1, 2], 4)
FORMED = make_job(
    [1, 2], 4, "b" * 32, sampling=SamplingParams(max_tokens=4, response_format=ResponseFormat.regex("a+"))
)


class Prepared:
    """A preparation whose compile waits for a word, and all that comes of it, in order."""

    def __init__(self, error: Exception | None = None) -> None:
        self.said: list[object] = []
        self.go_on = threading.Event()
        self.num_compiled = 0
        self._error = error
        compiler = GrammarCompiler(self._compile, self._check)
        self.preparation: JobPreparation[object] = JobPreparation(
            self, compiler.get, self._on_cancelled, self._on_failed
        )

    def start(self, job: Job) -> None:
        self.preparation.start(job, lambda job: job)

    def submit(self, command: object) -> None:
        self.said.append(command)

    def submit_job(self, command: object) -> bool:
        self.said.append(command)
        return True

    async def _check(self, response_format: ResponseFormat) -> int:
        """Takes all."""
        return 1

    def _compile(self, response_format: ResponseFormat) -> CompiledGrammar:
        assert self.go_on.wait(BOUND_S)
        self.num_compiled += 1
        if self._error is not None:
            raise self._error
        return GRAMMAR

    def _on_cancelled(self, job_id: JobId) -> None:
        self.said.append((job_id, "cancelled"))

    def _on_failed(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        self.said.append((job_id, kind, message))


async def test_a_job_without_a_form_runs_at_once() -> None:
    prepared = Prepared()
    prepared.start(FREE)
    assert prepared.said == [PreparedJob(FREE)]
    prepared.preparation.submit(FREE.job_id, "later")
    prepared.preparation.cancel(FREE.job_id)
    assert prepared.said[1:] == ["later", CancelJob(FREE.job_id)]


async def test_what_comes_meanwhile_is_done_behind_the_job_in_order() -> None:
    prepared = Prepared()
    prepared.start(FORMED)
    for word in ("one", "two"):
        prepared.preparation.submit(FORMED.job_id, word)
    assert prepared.said == []
    prepared.go_on.set()
    await wait_until(lambda: len(prepared.said) == 3, "the job runs")
    assert prepared.said == [PreparedJob(FORMED, GRAMMAR), "one", "two"]
    prepared.preparation.submit(FORMED.job_id, "late")
    assert prepared.said[3:] == ["late"]


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_comes_of_a_job_that_ends_meanwhile_but_word_of_it(fails: bool) -> None:
    prepared, job_id = Prepared(), FORMED.job_id
    prepared.start(FORMED)
    prepared.preparation.submit(job_id, "one")
    if fails:
        prepared.preparation.fail(job_id, FailureKind.DEADLINE, "late")
    else:
        prepared.preparation.cancel(job_id)
    [word] = prepared.said
    assert word == ((job_id, FailureKind.DEADLINE, "late") if fails else (job_id, "cancelled"))
    prepared.preparation.fail(job_id, FailureKind.DEADLINE, "again")
    other = make_job([1], 4, "c" * 32, sampling=FORMED.sampling)
    prepared.start(other)
    prepared.go_on.set()
    await wait_until(lambda: len(prepared.said) > 2, "the other one runs")
    assert prepared.said[1:] == [FailJob(job_id, FailureKind.DEADLINE, "again"), PreparedJob(other, GRAMMAR)]
    assert prepared.num_compiled == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError("response_format.regex", "is wrong"), FailureKind.INVALID),
        (PreconditionError("the model has no tokenizer"), FailureKind.INVALID),
        (OverloadedError("too many"), FailureKind.OUT_OF_CAPACITY),
    ],
)
async def test_a_form_that_cannot_be_compiled_fails_its_job(error: Exception, kind: FailureKind) -> None:
    prepared = Prepared(error)
    prepared.start(FORMED)
    prepared.preparation.submit(FORMED.job_id, "one")
    prepared.go_on.set()
    await wait_until(lambda: bool(prepared.said), "the failure is told")
    assert prepared.said == [(FORMED.job_id, kind, str(error))]
    prepared.preparation.cancel(FORMED.job_id)
    assert prepared.said[1:] == [CancelJob(FORMED.job_id)], "no longer prepared"


async def test_a_defect_of_the_compiler_fails_its_job_at_once_and_its_detail_stays_in_the_log() -> None:
    prepared = Prepared(RuntimeError("secret"))
    prepared.start(FORMED)
    prepared.go_on.set()
    await wait_until(lambda: bool(prepared.said), "the failure is told")
    message = "the output's form could not be compiled; the worker's log has the detail"
    assert prepared.said == [(FORMED.job_id, FailureKind.INTERNAL, message)]


# --- GrammarLoader --------------------------------------------------------------------------------


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


async def test_where_no_tokens_are_known_a_form_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"response_format\.regex is not supported by this worker"):
        await refuse_response_format(ResponseFormat.regex("a"))


TOOL_CALL = ResponseFormat.grammar('start: <tool> "a"')
LISTED = {"added_tokens_decoder": {"259": {"content": "<tool>", "special": True}}}


@pytest.mark.parametrize(
    "config",
    [
        LISTED,
        {"additional_special_tokens": ["<tool>"]},
        {"extra_special_tokens": {"tool_token": "<tool>"}},
        {"tool_token": "<tool>"},
    ],
    ids=["listed", "additional", "extra", "named"],
)
def test_tokens_that_only_tokenizer_config_has_may_stand_in_a_form(config: dict[str, object], tmp_path: Path) -> None:
    vocab_size = make_tokenizer().get_vocab_size()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_files()["tokenizer.json"])
    model = model_of(vocab_size + 1)
    with pytest.raises(InvalidRequestError):
        GrammarLoader(tmp_path, model).compile(TOOL_CALL)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    matcher = GrammarLoader(tmp_path, model).compile(TOOL_CALL).copy_matcher()
    tool_id = vocab_size
    assert matcher.validate_tokens([tool_id, tool_id]) == 1, "one, and not a second one"


@pytest.mark.parametrize(
    "content", ["{", json.dumps(LISTED)], ids=["broken", "tokens that the model has no output for"]
)
def test_a_tokenizer_config_that_adds_nothing_of_use_takes_no_form_away(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(content)
    GrammarLoader(tmp_path, model_of(make_tokenizer().get_vocab_size())).compile(ResponseFormat.regex("a+"))


@pytest.mark.parametrize(
    "config", [{"eos_token": EOS_TOKEN}, {"added_tokens_decoder": {"256": {"content": EOS_TOKEN, "special": True}}}]
)
def test_a_tokenizer_that_lacks_nothing_is_not_parsed_once_more(config: dict[str, object]) -> None:
    content = tokenizer_files()["tokenizer.json"].decode()
    assert complete_tokenizer_json(content, config) is content


def test_a_vocabulary_with_a_token_called_added_tokens_is_none_of_them() -> None:
    content = (
        '{"model": {"vocab": {"added_tokens": 1}}, "added_tokens": [{"id": 2, "content": "<x>", "special": true}]}'
    )
    assert complete_tokenizer_json(content, {"additional_special_tokens": ["<x>"]}) is content
