"""What a process needs from its operating system: threads, cores, children, signals."""
