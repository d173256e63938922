"""Measures what a process at rest holds, to find leaks."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay.config.settings import BYTES_PER_MIB
from kvrelay.testing.process import FaultProcess

NUM_SHOWN_CLASSES = 5


@dataclass(frozen=True, slots=True)
class Footprint:
    resident_bytes: int
    num_descriptors: int
    num_threads: int
    num_tasks: int
    objects: Mapping[str, int]
    """Live objects of kvrelay's classes."""

    @property
    def num_objects(self) -> int:
        return sum(self.objects.values())

    def growth_since(self, before: "Footprint") -> dict[str, float]:
        """In percent, by field."""
        names = ("resident_bytes", "num_descriptors", "num_threads", "num_tasks", "num_objects")
        pairs = {name: (getattr(before, name), getattr(self, name)) for name in names}
        return {name: round((after - first) / max(first, 1) * 100, 1) for name, (first, after) in pairs.items()}

    def more_objects_since(self, before: "Footprint") -> dict[str, int]:
        """The classes that grew most, and by how many objects."""
        more = {name: number - before.objects.get(name, 0) for name, number in self.objects.items()}
        most = sorted(more, key=lambda name: -more[name])[:NUM_SHOWN_CLASSES]
        return {name: more[name] for name in most if more[name] > 0}

    def figures(self) -> dict[str, float]:
        return {
            "memory_mib": round(self.resident_bytes / BYTES_PER_MIB, 1),
            "descriptors": self.num_descriptors,
            "threads": self.num_threads,
            "tasks": self.num_tasks,
            "objects": self.num_objects,
        }


async def footprint_of(process: FaultProcess) -> Footprint:
    """Measures after a garbage collection."""
    snapshot = await process.snapshot()
    return Footprint(
        resident_bytes=process.resident_bytes(),
        num_descriptors=process.num_descriptors(),
        num_threads=len(snapshot["threads"]),
        num_tasks=len(snapshot["tasks"]),
        objects=snapshot["objects"],
    )
