"""Sampling that a model's authors recommend.

Ignores `do_sample`, as vLLM, SGLang and TGI do: temperature 0 asks for greedy decoding.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import structlog

from kvrelay.core.sampling_params import DEFAULTED_PARAMETERS, PARAMETERS, SamplingDefaults
from kvrelay.errors import InvalidRequestError

GENERATION_CONFIG_FILE = "generation_config.json"
_MADE_UP = "_from_model_config"
"""transformers writes it where there was no such file."""

_log = structlog.get_logger(__name__)


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    path = folder / GENERATION_CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return SamplingDefaults()
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("sampling defaults cannot be read; kvrelay's own hold", file=str(path), error=str(error)[:200])
        return SamplingDefaults()
    if not isinstance(config, dict):
        _log.warning(
            "sampling defaults cannot be read; kvrelay's own hold", file=str(path), error="it holds no JSON object"
        )
        return SamplingDefaults()
    found: dict[str, Any] = {}
    for name in DEFAULTED_PARAMETERS:
        value = config.get(name)
        if value is None:
            continue
        try:
            found[name] = _usable(name, value)
        except InvalidRequestError as error:
            _log.warning("a sampling default is left out", file=str(path), parameter=name, problem=error.problem)
    return SamplingDefaults(**found)


def recommend_sampling(folder: Path, defaults: SamplingDefaults) -> None:
    """Changes no file that an author wrote, or that states a default."""
    path = folder / GENERATION_CONFIG_FILE
    try:
        config = json.loads(path.read_bytes()) if path.exists() else {_MADE_UP: True}
        if not config.pop(_MADE_UP, False) or any(config.get(name) is not None for name in DEFAULTED_PARAMETERS):
            return
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", delete=False) as file:
            file.write(json.dumps({**config, "do_sample": True, **defaults.stated()}, indent=2) + "\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)  # another process may be reading it
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("sampling defaults cannot be written; kvrelay's own hold", file=str(path), error=str(error)[:200])


def _usable(name: str, value: object) -> float | int:
    whole = PARAMETERS[name].type is int
    if whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    if name == "top_k" and value == -1:
        value = 0  # vLLM writes -1 for all tokens
    PARAMETERS[name].check(value)
    assert isinstance(value, int | float)
    if isinstance(value, bool):
        raise InvalidRequestError(name, f"is {value}; it must be a number")
    return value if whole else float(value)
