"""A cluster of real processes that a test can break.

    async with FaultCluster(num_decode=2) as cluster:
        ...
        await cluster["decode-0"].kill()

The pytest plugin has the fixture `kvrelay_cluster`; see docs/guides/test-your-cluster.md. Imports
are lazy, because every run of pytest loads the plugin where kvrelay is installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvrelay.runtime.fault_points import FaultAction
    from kvrelay.testing.fault_cluster import FaultCluster
    from kvrelay.testing.faults import ArmedFault
    from kvrelay.testing.load import LoadReport, Request, run_load
    from kvrelay.testing.process import FaultProcess
    from kvrelay.testing.proxy import FaultProxy, Link
    from kvrelay.testing.tiny_model import make_tiny_llama
    from kvrelay.testing.waiting import wait_until

__all__ = [
    "ArmedFault",
    "FaultAction",
    "FaultCluster",
    "FaultProcess",
    "FaultProxy",
    "Link",
    "LoadReport",
    "Request",
    "make_tiny_llama",
    "run_load",
    "wait_until",
]

_MODULES = {
    "ArmedFault": "kvrelay.testing.faults",
    "FaultAction": "kvrelay.runtime.fault_points",
    "FaultCluster": "kvrelay.testing.fault_cluster",
    "FaultProcess": "kvrelay.testing.process",
    "FaultProxy": "kvrelay.testing.proxy",
    "Link": "kvrelay.testing.proxy",
    "LoadReport": "kvrelay.testing.load",
    "Request": "kvrelay.testing.load",
    "make_tiny_llama": "kvrelay.testing.tiny_model",
    "run_load": "kvrelay.testing.load",
    "wait_until": "kvrelay.testing.waiting",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
