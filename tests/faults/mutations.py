"""`python -m tests.faults.mutations`: removes a guard, or the fault, in a copy of the sources, and expects the test to fail.

A test of a fault that passes without the fault, or without what protects from it, proves nothing. With `--check`, runs no test:
only looks whether each mutation still finds what it replaces.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("kvrelay", "gateway", "prefill_worker", "decode_worker", "tests", "benchmarks", "tools", "docs")
TIMEOUT_S = 150


@dataclass(frozen=True, slots=True)
class Mutation:
    """What is replaced where, and the test that must notice."""

    name: str
    path: str
    old: str
    new: str
    test: str

    def apply(self, folder: Path) -> str:
        """The file in that copy of the sources as it is with the mutation.

        Raises:
            AssertionError: the file has not what is replaced, or has it twice.
        """
        source = (folder / self.path).read_text("utf-8")
        assert source.count(self.old) == 1, f"{self.path} has changed: {self.old!r}"
        return source.replace(self.old, self.new)


MUTATIONS = (
    Mutation(
        "fault points do nothing",
        "kvrelay/fault_points.py",
        "    if _board is not None:\n        _board.reach(name, subjects)",
        "    return",
        "test_worker_deaths.py::test_d_dies_between_the_last_token_and_its_report",
    ),
    Mutation(
        "a chunk's digest is not looked at",
        "decode_worker/kv_receiver.py",
        "if not hmac.compare_digest(expected, chunk.digest):",
        "if False:",
        "test_links.py::test_a_corrupt_chunk_is_refused_and_sent_once_more",
    ),
    Mutation(
        "blocks are freed under their writer",
        "decode_worker/push_permits.py",
        "            on_close()\n        return False",
        "            on_close()\n        return True",
        "test_clients.py::test_a_late_write_after_a_cancel_keeps_its_blocks_until_it_has_ended",
    ),
    Mutation(
        "a new attempt forgets what was emitted",
        "gateway/sequence_outputs.py",
        "token_ids=request.prompt_token_ids + tuple(self.emitted[first_sequence]),",
        "token_ids=request.prompt_token_ids,",
        "test_worker_deaths.py::test_d_dies_after_token_n",
    ),
    Mutation(
        "a push waits for ever for its answers",
        "prefill_worker/kv_sender.py",
        "STALL_TIMEOUT_S = 3.0",
        "STALL_TIMEOUT_S = 3600.0",
        "test_links.py::test_p_and_d_cannot_reach_each_other_and_are_both_alive",
    ),
    Mutation(
        "silence is never taken for loss",
        "kvrelay/liveness.py",
        "    def lost(self, now: float) -> bool:",
        "    def lost(self, now: float) -> bool:\n        return False\n\n    def _lost(self, now: float) -> bool:",
        "test_stalls.py::test_a_zombie_that_comes_back_after_its_lease_is_not_heard",
    ),
    Mutation(
        "whoever ran alone when its worker died is a suspect only",
        "gateway/suspicion.py",
        "        if len(alone) != 1:",
        "        if True:",
        "test_worker_deaths.py::test_a_prompt_that_kills_workers_is_quarantined_after_two_deaths",
    ),
    Mutation(
        "a connection that breaks is taken for a death",
        "gateway/worker_sessions.py",
        "self._on_fate(worker_id, found_worker_id != worker_id)",
        "self._on_fate(worker_id, True)",
        "test_worker_deaths.py::test_connections_that_break_under_a_request_again_and_again_are_no_deaths",
    ),
    Mutation(
        "gateways do not ask each other's keys",
        "gateway/idempotency.py",
        "        return claim.request_id",
        "        return request_id",
        "test_clients.py::test_the_same_idempotency_key_fifty_times_at_once_is_one_request",
    ),
)


def main() -> int:
    """Exit code: 0 when every mutation was noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutations", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only look whether the mutations still apply")
    if parser.parse_args().check:
        for mutation in MUTATIONS:
            mutation.apply(ROOT)
        print(f"all {len(MUTATIONS)} apply")
        return 0
    unnoticed = [mutation.name for mutation in MUTATIONS if not is_noticed(mutation)]
    print("noticed all" if not unnoticed else f"not noticed: {unnoticed}")
    return len(unnoticed)


def is_noticed(mutation: Mutation) -> bool:
    """Whether the test fails with the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        for name in FOLDERS:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (Path(folder) / mutation.path).write_text(mutation.apply(Path(folder)))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "soak or not soak", f"tests/faults/{mutation.test}"]
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            print(f"{mutation.name}: noticed, did not end")
            return True
    last = result.stdout.strip().splitlines()[-1]
    is_noticed = result.returncode == 1 and " failed" in last  # an error in a fixture notices nothing
    print(f"{mutation.name}: {'noticed' if is_noticed else 'NOT NOTICED'} ({last})", flush=True)
    return is_noticed


if __name__ == "__main__":
    sys.exit(main())
