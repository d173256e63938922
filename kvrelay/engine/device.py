"""How this process uses its machine: threads, and what device and dtype `auto` stand for."""

import torch


def use_threads(num_threads: int) -> None:
    """Sets how many CPU threads one operation uses. Once, before any model runs."""
    torch.set_num_threads(num_threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)


def choose_device(device: str) -> str:
    """cpu or cuda; auto takes cuda when there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(dtype: str, device: str) -> str:
    """auto is float32 on a CPU, and on cuda stays auto: the model's own."""
    return "float32" if dtype == "auto" and device == "cpu" else dtype
