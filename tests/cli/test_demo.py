"""`kvrelay demo` with a tiny model and real processes: an answer, KV bytes that travelled, and
nothing left behind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.tiny_models import make_tiny_model

PROMPT = "The prefill worker runs the prompt. " * 10


@pytest.mark.integration
@pytest.mark.timeout(240)
def test_demo_answers_transfers_kv_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "tiny")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    options = (
        "--model",
        str(model),
        "--kv-cache-mib",
        "8",
        "--num-threads",
        "1",
        "--max-tokens",
        "5",
        "--prompt",
        PROMPT,
        "--json",
    )
    command = [sys.executable, "-m", "kvrelay.cli", "demo", *options]
    before = set(psutil.Process().children(recursive=True))
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    phases = answer["finished"]["phases"]
    assert answer["finished"]["usage"]["num_output_tokens"] >= 1
    assert phases["transfer_bytes"] > 0
    assert not phases["prefilled_on_decode_worker"]
    assert set(psutil.Process().children(recursive=True)) == before
    assert list(tmp_path.glob("kvrelay-demo-*.log")) == []


@pytest.mark.integration
def test_demo_names_the_log_of_a_cluster_that_does_not_start(tmp_path: Path) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    for name, text in (("config.json", '{"model_type": "llama"}'), ("model.safetensors", ""), ("tokenizer.json", "{}")):
        (model / name).write_text(text)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "kvrelay.cli", "demo", "--model", str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=100)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (log,) = tmp_path.glob("kvrelay-demo-*.log")
    assert f"The processes' log: {log}" in result.stderr
