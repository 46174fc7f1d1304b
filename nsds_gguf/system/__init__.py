"""The machine: memory, disk, threads, locks, files that appear only when they are complete."""
