"""`kvrelay plan` on a folder that holds a config and nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kvrelay.cli import main
from tests.models.test_shape import LLAMA_3_8B, write_config


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    return end.value.code


def test_the_plan_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "llama-3-8b", LLAMA_3_8B)
    lengths = ("--batch", "2", "--prompt-tokens", "8000", "--new-tokens", "193")
    assert run(str(folder), *lengths, "--memory-gib", "24", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    plan = next(each for each in document["plans"] if each["weights_dtype"] == "bfloat16")
    assert plan["weight_bytes"] == 2 * 8_030_261_248
    assert plan["kv_bytes"] == 2 * 8193 * 128 * 1024
    assert plan["num_blocks"] == 2 * 513
    assert plan["block_bytes"] == 2 * 513 * 2 * 1024**2
    # Of 24 GiB, 9,260 MiB are left behind the weights: 4,630 blocks.
    assert plan["max_sequences"] == 9
    float32 = next(each for each in document["plans"] if each["weights_dtype"] == "float32")
    assert (float32["max_sequences"], float32["max_tokens"]) == (0, 0)


def test_the_table_names_the_kind_of_attention_and_what_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "llama-3-8b", LLAMA_3_8B)
    assert run(str(folder), "--prompt-tokens", "9000") == 0
    shown = capsys.readouterr().out
    assert "about 8,030.3 million parameters, 32 layers, GQA with 32 heads, 8 KV heads of 128" in shown
    assert "the model was made for 8,192 tokens" in shown
    assert run(str(write_config(tmp_path / "mha", LLAMA_3_8B | {"num_key_value_heads": 32}))) == 0
    assert "4 x batch x layers x hidden size" in capsys.readouterr().out


def test_a_wrong_memory_is_a_wrong_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(write_config(tmp_path / "llama", LLAMA_3_8B)), "--memory-gib", "-1") == 2
    assert "--memory-gib" in capsys.readouterr().err


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "llama", LLAMA_3_8B)
    code = f"import sys; sys.modules['torch'] = None; from kvrelay.cli import main; main(['plan', {str(folder)!r}])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "bfloat16" in result.stdout


@pytest.mark.parametrize("width", [80, 110])
def test_the_plan_of_a_large_model_has_whole_numbers_at_each_width(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_config(tmp_path / "llama-3-8b", LLAMA_3_8B)

    def numbers(columns: int) -> set[str]:
        monkeypatch.setattr("kvrelay.cli.plan_command.console", lambda: Console(width=columns))
        assert run(str(folder), "--batch", "256", "--prompt-tokens", "8000", "--memory-gib", "4096") == 0
        table = capsys.readouterr().out.split("in int8: ")[1]
        assert max(len(line) for line in table.splitlines() if line[0] in "│┃┏└") <= columns
        return set(re.findall(r"[\d,.]+(?=[ │])", table))

    assert numbers(width) == numbers(300)
    assert "30,633.0" in numbers(width)
