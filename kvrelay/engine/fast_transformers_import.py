"""Imports transformers without torch's compiler, distributed tensors and symbolic algebra.

They take seconds and a hundred megabytes, and a worker needs none. Within `light_imports`
- `torch.distributed` says that it is not available;
- stand-ins replace the compiler's modules: decorators return the function unchanged;
- models on the meta device get number ranges on the CPU and no random weights.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed

COMPILER = "torch._dynamo"
TRACING = "torch._dynamo._trace_wrapped_higher_order_op"
DECORATORS = ("disable", "assume_constant_result", "allow_in_graph")  # hints for the compiler


@contextmanager
def light_imports() -> Iterator[None]:  # not thread-safe
    if COMPILER in sys.modules:  # imported already: nothing to save
        yield
        return
    is_available, normal, arange = torch.distributed.is_available, torch.nn.init.normal_, torch.arange
    stand_ins = _make_stand_ins()
    sys.modules.update(stand_ins)
    torch.distributed.is_available = _never
    torch.nn.init.normal_ = _unless_on_meta(normal)
    torch.arange = _on_cpu(arange)
    try:
        yield
    finally:
        torch.nn.init.normal_, torch.arange = normal, arange
        torch.distributed.is_available = is_available
        _remove(stand_ins)


def _make_stand_ins() -> dict[str, types.ModuleType]:
    stand_ins: dict[str, types.ModuleType] = {}
    contents: dict[str, dict[str, Any]] = {
        COMPILER: {"__path__": [], **dict.fromkeys(DECORATORS, _undecorated)},
        TRACING: {"TransformGetItemToIndex": _transform_get_item_to_index},
    }
    for name, attributes in contents.items():
        stand_ins[name] = _StandIn(name, stand_ins)
        vars(stand_ins[name]).update(attributes)
    return stand_ins


class _StandIn(types.ModuleType):
    """On an unknown attribute, removes all stand-ins and imports the real module."""

    def __init__(self, name: str, stand_ins: dict[str, types.ModuleType]) -> None:
        super().__init__(name)
        self._stand_ins = stand_ins

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks for these
            raise AttributeError(name)
        _remove(self._stand_ins)
        return getattr(importlib.import_module(self.__name__), name)


def _remove(stand_ins: dict[str, types.ModuleType]) -> None:
    for name, stand_in in stand_ins.items():
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _never() -> bool:
    return False


def _undecorated(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """Both `@decorator` and `@decorator(...)`."""
    return (lambda decorated: decorated) if function is None else function


def _unless_on_meta(initialize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def initialize_values(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else initialize(tensor, *arguments, **keywords)

    return initialize_values


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_where_said(*arguments: Any, device: Any = None, **keywords: Any) -> torch.Tensor:
        return make(*arguments, device="cpu" if device is None else device, **keywords)

    return make_where_said


def _transform_get_item_to_index() -> Any:
    """Imports the compiler: transformers makes masks by vmap here."""
    return importlib.import_module(TRACING).TransformGetItemToIndex()


def _import_transformers() -> Any:
    with light_imports():
        package = importlib.import_module("transformers")
        with _one_scan_of_models(package):
            importlib.import_module("transformers.models")
        importlib.import_module("transformers.modeling_utils")
    return package


@contextmanager
def _one_scan_of_models(package: Any) -> Iterator[None]:
    """Otherwise transformers reads its models' files twice."""
    import_utils = package.utils.import_utils
    scan = import_utils.define_import_structure
    prefix = "models."

    def look_up(path: str) -> Any:
        found = scan(Path(path).parent, prefix="models")  # remembered from the first time
        return {
            needs: {
                module.removeprefix(prefix): names for module, names in modules.items() if module.startswith(prefix)
            }
            for needs, modules in found.items()
        }

    import_utils.define_import_structure = look_up
    try:
        yield
    finally:
        import_utils.define_import_structure = scan


transformers: Any = _import_transformers()
