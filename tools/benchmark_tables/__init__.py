"""The tables of docs/benchmarks, made from the JSON documents that `kvrelay bench --json` wrote.

Knows nothing of the pages that the tables stand in.
"""

from tools.benchmark_tables import attention, overview, peers, runs, serve, tls
from tools.benchmark_tables.documents import FOLDER, TABLES

__all__ = ["FOLDER", "TABLES", "attention", "overview", "peers", "runs", "serve", "tls"]
