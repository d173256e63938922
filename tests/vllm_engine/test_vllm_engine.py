"""VllmEngine's messages as plain values and back: sampling parameters, answers, the tokenizer's
archive, KV parameters.
"""

import asyncio
import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvrelay.core.job import FinishReason, Token, TopLogprob
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.response_format import FormatKind
from kvrelay.core.sampling_params import SamplingDefaults, SamplingParams
from kvrelay.errors import DeadlineError, InvalidRequestError, OverloadedError, UnsupportedError
from kvrelay.vllm_engine import tokenizer_bundle
from kvrelay.vllm_engine.answers import Answers
from kvrelay.vllm_engine.messages import common_pb, engine_pb
from kvrelay.vllm_engine.sampling import defaults_json, sampling_from_vllm, with_room
from kvrelay.vllm_engine.served_engine import ServedEngine
from kvrelay.vllm_engine.tokenizer_bundle import PIECE_BYTES, TokenizerDownloads, bundle, pieces
from kvrelay.vllm_engine.transfer_params import MAX_PARAMS_BYTES, asks_for_handoff, handoff_params, prefill_address_of
from kvrelay.vllm_engine.worker_service import WorkerVllmEngine
from kvrelay.wire.convert import with_model_defaults


def parsed(**fields: Any) -> SamplingParams:
    return sampling_from_vllm(engine_pb.SamplingParams(**fields))


def test_zeroes_of_fields_that_cannot_be_absent_are_defaults() -> None:
    assert parsed() == SamplingParams()
    assert parsed(temperature=0.0).greedy


def test_given_fields_are_taken_and_a_negative_seed_is_one_of_ours() -> None:
    sampling = parsed(temperature=0.5, top_k=4, n=2, seed=-1, stop=["x"], logprobs=3, max_tokens=7, logit_bias={5: 1.5})
    assert (sampling.top_k, sampling.n, sampling.seed, sampling.stop) == (4, 2, 2**64 - 1, ("x",))
    assert (sampling.logprobs, sampling.max_tokens, dict(sampling.logit_bias)) == (3, 7, {5: 1.5})


def test_a_models_defaults_stand_for_zeroes_and_are_told_as_json() -> None:
    model = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 10, 64, (0,), "f", SamplingDefaults(0.6, 20, 0.95))

    def resolved(**fields: Any) -> SamplingParams:
        message = engine_pb.SamplingParams(**fields)
        return with_model_defaults(sampling_from_vllm(message), message, model)

    assert resolved() == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert resolved(temperature=0.0, top_p=1.0, top_k=3) == SamplingParams(temperature=0.0, top_k=3)
    assert json.loads(defaults_json(model)) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert defaults_json(replace(model, sampling_defaults=SamplingDefaults())) == ""


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"logprobs": -1}, "logprobs"),
        ({"n": 9}, "n"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias[-1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"choice": engine_pb.ChoiceConstraint(choices=["x"] * 20_000)}, "response_format.choice"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parsed(**fields)
    assert refused.value.field == f"sampling_params.{field}"


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"truncate_prompt_tokens": 4}, {"structural_tag": "{}"}])
def test_what_is_not_offered_is_said_so(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        parsed(**fields)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"json_schema": '{"type": "object"}'}, FormatKind.JSON_SCHEMA),
        ({"json_object": True}, FormatKind.JSON_SCHEMA),
        ({"regex": "a+"}, FormatKind.REGEX),
        ({"grammar": 'root ::= "a"'}, FormatKind.GRAMMAR),
        ({"choice": engine_pb.ChoiceConstraint(choices=["a", "b"])}, FormatKind.REGEX),
    ],
)
def test_constraints_become_forms(fields: dict[str, Any], kind: FormatKind) -> None:
    response_format = parsed(**fields).response_format
    assert response_format is not None
    assert response_format.kind is kind


def test_output_without_a_bound_takes_the_room_there_is() -> None:
    assert with_room(SamplingParams(), 100).max_tokens == 100
    assert with_room(SamplingParams(max_tokens=5), 100).max_tokens == 5
    assert with_room(SamplingParams(), 0).max_tokens is None


def test_a_stream_has_each_token_in_a_chunk_and_all_of_them_in_the_end() -> None:
    answers = Answers(3, 2, streams=True, stop_token_ids=[9])
    first = answers.add(1, [Token(7), Token(9)])
    assert first is not None
    assert (list(first.chunk.token_ids), first.chunk.index, first.chunk.completion_tokens) == ([7, 9], 1, 2)
    answers.add(0, [Token(5, -0.5, (TopLogprob(5, -0.5), TopLogprob(6, -1.0)))])
    zero, one = (answer.complete for answer in answers.complete([FinishReason.LENGTH, FinishReason.STOP], 2, "{}"))
    assert (list(zero.output_ids), zero.finish_reason, zero.index, zero.cached_tokens) == ([5], "length", 0, 2)
    assert list(zero.output_logprobs.token_logprobs) == [-0.5]
    assert list(zero.output_logprobs.top_logprobs[0].token_ids) == [5, 6]
    assert (list(one.output_ids), one.finish_reason, one.matched_token_id) == ([7, 9], "stop", 9)
    assert not one.HasField("output_logprobs")
    assert one.kv_transfer_params_json == "{}"


def test_what_does_not_stream_has_no_chunks_and_an_aborted_request_says_so() -> None:
    answers = Answers(3, 1, streams=False)
    assert answers.add(0, [Token(1)]) is None
    (aborted,) = answers.aborted()
    assert (list(aborted.complete.output_ids), aborted.complete.finish_reason) == ([1], "abort")


def test_the_tokenizers_archive_comes_whole_with_its_digest_at_the_end() -> None:
    files = {"tokenizer.json": bytes(range(256)) * 8, "noise": hashlib.shake_128(b"noise").digest(PIECE_BYTES * 2)}
    chunks = list(pieces(bundle(files)))
    archive = b"".join(chunk.data for chunk in chunks)
    assert len(chunks) > 2
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(archive).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == files


def test_a_decode_worker_finds_the_prefill_worker_of_its_own_model_and_no_other() -> None:
    params = handoff_params("10.0.0.1:50051", "same")
    assert prefill_address_of(params, "same") == "10.0.0.1:50051"
    with pytest.raises(InvalidRequestError, match="another model"):
        prefill_address_of(params, "other")
    with pytest.raises(InvalidRequestError, match="not from a kvrelay"):
        prefill_address_of(json.dumps({"do_remote_prefill": True, "remote_host": "x"}), "same")
    assert prefill_address_of("{}", "same") is None
    assert asks_for_handoff('{"do_remote_decode": true}')
    assert not asks_for_handoff(params)


@pytest.mark.parametrize("params", ["", "[]", "{", "1", "[" * 100_000])
def test_parameters_that_are_no_object_are_refused(params: str) -> None:
    with pytest.raises(InvalidRequestError):
        prefill_address_of(params, "same")


async def test_a_worker_tells_nobody_where_its_files_are(tmp_path: Path) -> None:
    layout = KVLayout(1, 1, 1, "float32")
    model = ModelSpec("m", "llama", layout, 10, 64, (0,), "f", SamplingDefaults(0.6, 20, 0.95))
    unused: Any = None
    worker = WorkerVllmEngine(ServedEngine(tmp_path, model, 16, 64, 8, "kv_consumer"), unused, unused, unused)
    info = await worker.GetModelInfo(engine_pb.GetModelInfoRequest(), unused)
    assert info.model_path == info.served_model_name == "m"
    assert str(tmp_path) not in str(info)


async def test_many_downloads_of_the_tokenizer_load_and_zip_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"tokenizer.json": b"x" * 3 * PIECE_BYTES}
    loads: list[str] = []

    async def load(fingerprint: str) -> dict[str, bytes]:
        loads.append(fingerprint)
        await asyncio.sleep(0)
        return files

    async def download() -> bytes:
        encoded: list[bytes] = []

        async def write(piece: bytes) -> None:
            encoded.append(piece)

        await downloads.send("f", write)
        messages = [common_pb.GetTokenizerChunk.FromString(piece) for piece in encoded]
        assert messages[-1].sha256 == hashlib.sha256(b"".join(message.data for message in messages)).hexdigest()
        return b"".join(message.data for message in messages)

    downloads = TokenizerDownloads(load)
    archives = await asyncio.gather(*(download() for _ in range(40)))
    assert set(archives) == {bundle(files)}
    assert loads == ["f"]
    assert downloads.num_running == 0
    monkeypatch.setattr(tokenizer_bundle, "MAX_DOWNLOADS", 0)
    with pytest.raises(OverloadedError, match="under way"):
        await download()


async def test_who_does_not_read_the_tokenizer_loses_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(fingerprint: str) -> dict[str, bytes]:
        return {"tokenizer.json": b"x"}

    async def write(piece: bytes) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(tokenizer_bundle, "DOWNLOAD_TIMEOUT_S", 0.0)
    downloads = TokenizerDownloads(load)
    with pytest.raises(DeadlineError):
        await downloads.send("f", write)
    assert downloads.num_running == 0


def test_long_parameters_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    with pytest.raises(InvalidRequestError, match="at most"):
        prefill_address_of("{" + " " * MAX_PARAMS_BYTES + "}", "f")
