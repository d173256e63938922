"""Tables at the widths of terminals: no word is broken, no line is too wide, and nothing is lost."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from kvrelay.cli import main
from kvrelay.cli.views.fitted_table import FittedTable
from kvrelay.cli.views.phase_table import phase_table
from kvrelay.cli.views.status_tables import cluster_view, request_table
from kvrelay.cli.views.top_view import Rates, top_view
from kvrelay.cli.views.waterfall import Waterfall
from kvrelay.client.results import (
    Cluster,
    Finished,
    GatewayInfo,
    RequestInfo,
    RequestState,
    RequestTimeline,
    TransferTotal,
    Usage,
    WorkerInfo,
    WorkerRole,
)
from kvrelay.core.job import FinishReason, WorkerLoad
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.timeline import JobOutcome, JobTimeline, Phases, SpanKind, Timeline, TimelineSpan, TokenRun

WIDTHS = (80, 110, 160)
NOW = datetime(2026, 1, 2, tzinfo=UTC)
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL = ModelSpec(MODEL_NAME, "llama", KVLayout(30, 3, 64, "bfloat16"), 49152, 8192, (2,), "f" * 16)
REQUEST_ID = "cafb8030a43a7439e32c1227da346116"
ERROR = "decode-8f28063b84fc19c0 was lost three times while it computed the prompt; send the request again"
PREFILL, DECODE = "prefill-dd1e727db245c0fa", "decode-8f28063b84fc19c0"


def drawn(shown: RenderableType, width: int) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def words(text: str) -> set[str]:
    """What stands between spaces and lines of boxes."""
    return set(re.sub(r"[\u2500-\u257f]", " ", text).split())


def assert_fits(shown: RenderableType, width: int) -> None:
    text = drawn(shown, width)
    assert max(map(len, text.splitlines())) <= width, text
    assert words(text) == words(drawn(shown, 2000)), text


def request(error: str = "", state: RequestState = RequestState.DECODING) -> RequestInfo:
    return RequestInfo(
        REQUEST_ID, state, MODEL_NAME, "tenant", 3, 131072, 16384, "gateway-5f2c", PREFILL, DECODE, NOW, NOW, error
    )


def worker(role: WorkerRole, worker_id: str) -> WorkerInfo:
    load = WorkerLoad(
        num_running=128,
        num_waiting=1024,
        num_used_blocks=12000,
        num_cached_blocks=3000,
        num_blocks=65536,
        num_drafted_tokens=1_234_567,
        num_accepted_tokens=1_000_000,
    )
    return WorkerInfo(worker_id, role, "decode-worker-0.kvrelay.svc:50052", MODEL, load, True, 0.0, 16)


def cluster() -> Cluster:
    return Cluster(
        "gateway-5f2c9d118e3a4b67",
        (GatewayInfo("gateway-5f2c9d118e3a4b67", "gateway-0.kvrelay.svc:50050", 12345),),
        (worker(WorkerRole.PREFILL, PREFILL), worker(WorkerRole.DECODE, DECODE)),
        degraded=True,
        running_requests=(request(),),
        transfers=(TransferTotal(PREFILL, DECODE, 123456, 987_654_321_000, 123456.7),),
        num_output_tokens=10,
    )


def phases() -> Finished:
    phases = Phases(
        queue_ms=1.5,
        prefill_ms=136.257,
        transfer_ms=99.0,
        transfer_wire_ms=60.0,
        transfer_bytes=3_225_600_000,
        transfer_transport="shared-memory",
        decode_ms=50497.2,
        total_ms=50769.0,
        prefill_worker_id=PREFILL,
        decode_worker_id=DECODE,
        num_attempts=2,
    )
    return Finished((FinishReason.STOP,), Usage(131072, 300, 128), phases)


def timeline() -> RequestTimeline:
    lost = f"{DECODE} was lost while its second of three sequences was being decoded"
    jobs = tuple(
        JobTimeline(
            attempt=attempt,
            first_sequence=0,
            num_sequences=1,
            begin_ms=begin_ms,
            end_ms=begin_ms + 500,
            outcome=JobOutcome.RETRIED if attempt < 4 else JobOutcome.COMPLETED,
            end_reason=lost if attempt < 4 else "",
            failed_worker_id=DECODE if attempt < 4 else "",
            prefill_worker_id=PREFILL,
            decode_worker_id=DECODE,
            spans=(TimelineSpan(SpanKind.DECODE, begin_ms, begin_ms + 400, DECODE),),
            kv_bytes=22_000_000,
            transfer_wire_ms=100,
            token_runs=(TokenRun(0, first, num, begin_ms + 10, begin_ms + 400, (begin_ms + 10, begin_ms + 400), 1),),
        )
        for attempt, begin_ms, first, num in ((1, 0, 0, 1), (2, 500, 1, 4), (3, 1000, 5, 15), (4, 1500, 20, 80))
    )
    return RequestTimeline(request(ERROR), Timeline("g", NOW, 2000, True, (), jobs))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(cluster_view(cluster()), id="status"),
        pytest.param(request_table("Requests", [request(), request(ERROR, RequestState.FAILED)]), id="requests"),
        pytest.param(
            top_view(cluster(), [request(), request("", RequestState.SUCCEEDED)], Rates(12345.6, 7e9)), id="top"
        ),
        pytest.param(phase_table(phases()), id="phases"),
    ],
)
def test_what_a_cluster_does_is_shown_in_whole_words_at_each_width(shown: RenderableType, width: int) -> None:
    assert_fits(shown, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_waterfall_has_whole_words_at_each_width(width: int) -> None:
    text = drawn(Waterfall(timeline()), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(word in words(text) for word in ("decoded", "22.0", "GB/s", *ERROR.split()))
    # A run of one token has no room for its name, and shows no part of it either.
    (indices,) = re.findall(r"indices(.*)", text)
    assert set(indices.split()) <= {"0", "1", "1-4", "5-19", "5-19,", "20-99,", "attempt", "2", "3", "4"}, indices


def numbers(*, heads: int = 6) -> FittedTable:
    table = FittedTable("A title that is longer than its table is wide")
    table.add_text_column("name")
    for number in range(heads):
        table.add_text_column(f"column-{number}", right=True)
    for row in ("first", "second"):
        table.add_texts(f"{row}-row", *(f"{row}-{number}" for number in range(heads)))
    return table


def test_what_is_too_wide_is_split_and_each_part_says_what_its_rows_are() -> None:
    text = drawn(numbers(), 50)
    assert_fits(numbers(), 50)
    assert text.count("first-row") == 2
    assert text.count("column-5") == 1
    assert text.count("A title that is longer than its table is wide") == 1
    assert drawn(numbers(), 110).count("first-row") == 1


@pytest.mark.parametrize("width", [24, 30, 40])
def test_where_no_two_columns_fit_each_row_is_a_list(width: int) -> None:
    table = FittedTable()
    for head in ("model", "folder"):
        table.add_text_column(head)
    table.add_texts("a-model-of-20-letter", "/a/path/of/21/letters")
    table.add_texts("b", "c")
    text = drawn(table, width)
    assert max(map(len, text.splitlines())) <= width
    if width == 40:
        assert re.search(r"^model +a-model-of-20-letter *\nfolder +/a/path/of/21/letters *$", text, re.MULTILINE), text
    assert "".join(text.split()).count("model") == 3


@pytest.mark.parametrize("plain", [False, True])
def test_a_column_wraps_between_words_before_a_table_is_split(plain: bool) -> None:
    table = FittedTable(plain=plain)
    table.add_text_column("name")
    table.add_text_column("what went wrong")
    table.add_text_column("count", right=True)
    table.add_texts("worker-1", ERROR, "12345")
    for width in range(46, 130):
        assert_fits(table, width)
        assert drawn(table, width).count("worker-1") == 1


def test_a_column_without_content_is_left_out_and_brackets_are_text() -> None:
    table = FittedTable("[bold]/models[/bold]")
    for head in ("name", "kind", "count"):
        table.add_text_column(head)
    table.add_texts("[red]a[/red]", "", "1")
    table.add_texts("b", " ", "2")
    text = drawn(table, 80)
    assert "kind" not in text
    assert "[red]a[/red]" in text
    assert "[bold]/models[/bold]" in text
    empty = FittedTable()
    empty.add_text_column("worker")
    assert "worker" in drawn(empty, 80)


@pytest.mark.parametrize("width", WIDTHS)
def test_models_with_long_names_are_listed_in_whole_words(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "qwen3_5_moe_text", "dtype": "bfloat16"}
    store = tmp_path / "s"
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M-1a2b3c4d"):
        (store / name).mkdir(parents=True)
        (store / name / "config.json").write_text(json.dumps(config))
        (store / name / "model.safetensors").write_bytes(b"\0" * 100)
        (store / name / "generation_config.json").write_text(
            json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": 20})
        )

    def listed(columns: int) -> str:
        monkeypatch.setattr("kvrelay.cli.model_commands.console", lambda: Console(width=columns))
        with pytest.raises(SystemExit) as end:
            main(["models", "--model-dir", "s"])
        assert end.value.code == 0
        return capsys.readouterr().out

    text = listed(width)
    assert max(map(len, text.splitlines())) <= width
    assert words(text) == words(listed(2000))
    assert "DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M-1a2b3c4d" in text
