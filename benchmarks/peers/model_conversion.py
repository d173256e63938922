"""Writes a model in the formats of the peers that do not read safetensors, once, into a folder that
is kept.

FOLDER/f32.gguf  f16.gguf  bf16.gguf  q8_0.gguf  ctranslate2/
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from kvrelay.errors import StartupError
from kvrelay.own_packages import own_module_command

CTRANSLATE2 = "ctranslate2"


def converted_folder(venvs: Path, model_folder: Path) -> Path:
    """Where the converted files of this model lie; other weights have another folder."""
    weights = (model_folder / "model.safetensors").stat()
    identity = f"{model_folder.resolve()} {weights.st_size} {weights.st_mtime_ns}"
    return venvs / "models" / f"{model_folder.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def ensure_converted(venvs: Path, model_folder: Path, conversion: str) -> None:
    """Converts unless that is done.

    Raises:
        StartupError: the conversion failed.
    """
    folder = converted_folder(venvs, model_folder)
    folder.mkdir(parents=True, exist_ok=True)
    if conversion == CTRANSLATE2:
        if not (folder / CTRANSLATE2).exists():
            _convert_for_ctranslate2(venvs, model_folder, folder)
    elif not (folder / f"{conversion}.gguf").exists():
        target = folder / f"{conversion}.gguf"
        _run(own_module_command("benchmarks.peers.gguf_writing", str(model_folder), str(target), "--type", conversion))


def _convert_for_ctranslate2(venvs: Path, model_folder: Path, folder: Path) -> None:
    source = folder / f".for-transformers-4.{os.getpid()}"
    unfinished = folder / f".{CTRANSLATE2}.{os.getpid()}"
    try:
        _write_for_transformers_4(model_folder, source)
        converter = venvs / CTRANSLATE2 / "bin" / "ct2-transformers-converter"
        _run([str(converter), "--model", str(source), "--output_dir", str(unfinished)])
        unfinished.rename(folder / CTRANSLATE2)
    finally:
        for leftover in (source, unfinished):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_for_transformers_4(model_folder: Path, target: Path) -> None:
    """The same model with a configuration that transformers 4 understands: it would take another
    rope theta without a word.
    """
    target.mkdir()
    config = json.loads((model_folder / "config.json").read_text("utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = json.loads((model_folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (target / name).symlink_to((model_folder / name).resolve())


def _run(command: list[str]) -> None:
    result = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if result.returncode != 0:
        raise StartupError(f"{' '.join(command)} ended with code {result.returncode}:\n{result.stdout[-2000:]}")
