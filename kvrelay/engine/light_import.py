"""Imports of transformers without torch's compiler, distributed tensors and symbolic algebra, none of which a worker uses.

transformers imports them wherever it decorates a function for the compiler or may be given a distributed tensor. Together they
are most of a worker's start: over a thousand modules, seconds of processor time, a hundred megabytes. In `light_imports`
- `torch.distributed` says that it is not available, which transformers supports and remembers;
- stand-ins are in the place of the compiler's modules: decorators that only speak to the compiler return the function as it is;
- a model that is built on the meta device gets its number ranges on the CPU and no random weights: torch does arithmetic on meta
  tensors in Python, with the help of symbolic algebra.

Afterwards torch is as it was: whoever asks for the compiler gets it. Knows nothing of models.
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
DECORATORS = ("disable", "assume_constant_result", "allow_in_graph")
"""Of the compiler: hints for it, which change nothing about a function that is not compiled."""


@contextmanager
def light_imports() -> Iterator[None]:
    """What is imported within gets the stand-ins. Not for several threads at once."""
    if COMPILER in sys.modules:  # imported already: nothing to save, and nothing to be put in its place
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
    """Gives way to the module that it stands for when it is asked for anything it does not have.

    Args:
        name: of the module.
        stand_ins: all that stand in together, by name; one of them alone would keep the others' modules from being imported.
    """

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
    """Used where transformers makes masks by vmap: by then it may cost its import."""
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
    """transformers reads the files of all its models to learn their names, and again for its package `models`: once will do."""
    import_utils = package.utils.import_utils
    scan = import_utils.define_import_structure
    prefix = "models."

    def look_up(path: str) -> Any:
        found = scan(Path(path).parent, prefix="models")  # remembered from the first time
        return {
            needs: {module.removeprefix(prefix): names for module, names in modules.items() if module.startswith(prefix)}
            for needs, modules in found.items()
        }

    import_utils.define_import_structure = look_up
    try:
        yield
    finally:
        import_utils.define_import_structure = scan


transformers: Any = _import_transformers()
"""The package, imported lightly."""
