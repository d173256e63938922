"""A model of transformers in float32, as a reference."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM


def load_in_float32(folder: Path, **options: str) -> Any:
    """The model of that folder, silently; `options` go to transformers."""
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    auto_model: Any = AutoModelForCausalLM
    return auto_model.from_pretrained(folder, dtype=torch.float32, **options).eval()
