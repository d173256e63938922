"""How much processor time control groups grant, as their files say it; and that engines count their
threads by it.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay.cluster import member_settings
from kvrelay.cluster.member_settings import with_cores
from kvrelay.config.settings import DecodeSettings
from kvrelay.runtime import cpu_cores
from kvrelay.runtime.cpu_cores import ProcessorShare, available_cores, processor_share
from kvrelay.runtime.cpu_quota import cpu_quota
from kvrelay.worker.engine_setup import default_num_threads

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


def make_root(folder: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A file system with control groups in it: /proc/self and whatever files below /sys/fs/cgroup."""
    everything = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    everything |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in everything.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "20000 10000\n", "cpu.max": "max 100000\n"}, 2.0),
        # the group's folder is not shown in this container
        ("0::/a/b\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../other\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/\n", {"cpu.max": "broken\n"}, None),
        ("0::/\n", {"cpu.max": "1 0\n"}, None),
    ],
)
def test_the_smallest_quota_of_all_groups_around_a_process_holds(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(make_root(tmp_path, groups, V2_MOUNT, files)) == expected


def v1_files(group: str, quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    folder = f"cpu,cpuacct/{group}".rstrip("/")
    return {f"{folder}/cpu.cfs_quota_us": f"{quota_us}\n", f"{folder}/cpu.cfs_period_us": f"{period_us}\n"}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        ("4:cpu,cpuacct:/a\n", V1_MOUNT, v1_files("a", 150_000), 1.5),
        ("4:cpu,cpuacct:/a\n", V1_MOUNT, v1_files("a", -1), None),
        ("4:cpu,cpuacct:/a/b\n", V1_MOUNT, v1_files("a", 25_000, 50_000) | v1_files("a/b", -1), 0.5),
        # A container without a namespace of its own for groups: the path is the host's, what is
        # mounted is its own part.
        ("4:cpu,cpuacct:/docker/1f\n", V1_MOUNT.replace(" / /sys", " /docker/1f /sys"), v1_files("", 200_000), 2.0),
        ("4:cpu,cpuacct:/docker/1f\n", V1_MOUNT.replace(" / /sys", " /elsewhere /sys"), v1_files("", 200_000), 2.0),
        ("3:cpuset:/a\n4:cpu,cpuacct:/\n", V1_MOUNT, v1_files("a", 100_000), None),
        # Both hierarchies at once, as older systemds have it: processors are limited in the one of
        # v1.
        (
            "4:cpu,cpuacct:/a\n0::/x\n",
            V1_MOUNT + V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            v1_files("a", 70_000),
            0.7,
        ),
    ],
)
def test_quotas_of_the_first_version_are_read_too(
    tmp_path: Path, groups: str, mounts: str, files: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(make_root(tmp_path, groups, mounts, files)) == expected


def test_without_a_proc_file_system_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "num_cores", "num_threads", "binds"),
    [
        ("50000", 8, 1, True),
        ("150000", 8, 1, True),
        ("400000", 8, 4, True),
        ("800000", 8, 8, False),
        ("max", 8, 8, False),
    ],
)
def test_threads_are_counted_by_quota_and_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, num_cores: int, num_threads: int, binds: bool
) -> None:
    monkeypatch.setattr(cpu_cores, "available_cores", lambda: tuple(range(num_cores)))
    root = make_root(tmp_path, "0::/\n", V2_MOUNT, {"cpu.max": f"{quota} 100000\n"})
    share = processor_share(root)
    assert (share.num_threads, share.quota is not None) == (num_threads, binds)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (ProcessorShare(tuple(range(8)), None), 4),
        (ProcessorShare((0,), None), 1),
        (ProcessorShare(tuple(range(8)), 0.5), 1),
        (ProcessorShare(tuple(range(8)), 3.0), 3),
    ],
)
def test_a_worker_by_itself_takes_half_the_machine_or_all_of_its_quota(share: ProcessorShare, expected: int) -> None:
    assert default_num_threads(share) == expected


def started_engines(
    monkeypatch: pytest.MonkeyPatch, share: ProcessorShare, num_workers: int
) -> list[tuple[int | None, str | None]]:
    """num_threads and cores of each worker of a cluster on a machine with that share."""
    monkeypatch.setattr(member_settings, "processor_share", lambda: share)
    engines = [with_cores(DecodeSettings(), num_workers, number).engine for number in range(num_workers)]
    return [(engine.num_threads, engine.cores) for engine in engines]


@pytest.mark.parametrize(("quota", "num_workers", "num_threads"), [(4.0, 2, 2), (4.0, 1, 4), (1.5, 2, 1), (0.5, 1, 1)])
def test_workers_divide_a_quota_and_are_kept_to_no_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float, num_workers: int, num_threads: int
) -> None:
    share = ProcessorShare(tuple(range(16)), quota)
    assert started_engines(monkeypatch, share, num_workers) == [(num_threads, None)] * num_workers


@pytest.fixture
def quota_group() -> Iterator[Path | None]:
    """A real control group with the quota of half a processor; None where this user may make none."""
    for parent, files in (
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        ("/sys/fs/cgroup", {"cpu.max": "50000 100000"}),
    ):
        group = Path(parent) / f"kvrelay-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                for name, text in files.items():
                    (group / name).write_text(text)
            except OSError:
                group.rmdir()
                continue
            yield group
            group.rmdir()
            return
    yield None


def test_a_process_in_a_group_with_half_a_processor_counts_one_thread(quota_group: Path | None) -> None:
    code = (
        "from kvrelay.runtime.cpu_cores import processor_share as s; share = s(); print(share.quota, share.num_threads)"
    )
    if quota_group is None:  # what the parser makes of the files is tested above
        assert processor_share().num_threads <= len(available_cores())
        return
    joins = f"import os; open({str(quota_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
    result = subprocess.run(
        [sys.executable, "-c", joins + code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout == "0.5 1\n"
