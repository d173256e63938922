"""What a process at rest holds, to be compared with what it held before: memory, descriptors, threads, tasks, objects of ours."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay.testing.process import FaultProcess

BYTES_PER_MIB = 1024 * 1024
NUM_SHOWN_CLASSES = 5


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process at one moment."""

    resident_bytes: int
    num_descriptors: int
    num_threads: int
    num_tasks: int
    objects: Mapping[str, int]
    """Live objects of kvrelay's own classes, by class."""

    @property
    def num_objects(self) -> int:
        return sum(self.objects.values())

    def growth_since(self, before: "Footprint") -> dict[str, float]:
        """By how much each is more than it was, in percent; negative when less."""
        names = ("resident_bytes", "num_descriptors", "num_threads", "num_tasks", "num_objects")
        pairs = {name: (getattr(before, name), getattr(self, name)) for name in names}
        return {name: round((after - first) / max(first, 1) * 100, 1) for name, (first, after) in pairs.items()}

    def more_objects_since(self, before: "Footprint") -> dict[str, int]:
        """The classes of which there are most more than there were, and how many more."""
        more = {name: number - before.objects.get(name, 0) for name, number in self.objects.items()}
        most = sorted(more, key=lambda name: -more[name])[:NUM_SHOWN_CLASSES]
        return {name: more[name] for name in most if more[name] > 0}

    def figures(self) -> dict[str, float]:
        """For people and JSON."""
        return {
            "memory_mib": round(self.resident_bytes / BYTES_PER_MIB, 1),
            "descriptors": self.num_descriptors,
            "threads": self.num_threads,
            "tasks": self.num_tasks,
            "objects": self.num_objects,
        }


async def footprint_of(process: FaultProcess) -> Footprint:
    """As it is now, after a collection of garbage.

    Raises:
        AssertionError: the process does not answer.
    """
    snapshot = await process.snapshot()
    return Footprint(
        resident_bytes=process.resident_bytes(),
        num_descriptors=process.num_descriptors(),
        num_threads=len(snapshot["threads"]),
        num_tasks=len(snapshot["tasks"]),
        objects=snapshot["objects"],
    )
