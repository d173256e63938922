"""What a process at rest holds, to be compared with what it held before: memory, descriptors, threads, tasks, objects of ours."""

from dataclasses import dataclass

from kvrelay.testing.process import FaultProcess

BYTES_PER_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process at one moment."""

    resident_bytes: int
    num_descriptors: int
    num_threads: int
    num_tasks: int
    num_objects: int
    """Live objects of kvrelay's own classes."""

    def growth_since(self, before: "Footprint") -> dict[str, float]:
        """By how much each is more than it was, in percent; negative when less."""
        pairs = {name: (getattr(before, name), getattr(self, name)) for name in Footprint.__dataclass_fields__}
        return {name: round((after - first) / max(first, 1) * 100, 1) for name, (first, after) in pairs.items()}

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
        num_objects=sum(snapshot["objects"].values()),
    )
