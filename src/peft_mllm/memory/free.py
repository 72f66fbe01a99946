"""How much memory a process may still take: of the device, or of the machine or the container that it runs in."""

from __future__ import annotations

from pathlib import Path

import torch

PROCESS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
MACHINE = Path("/proc/meminfo")
# of a cgroup, in its second and its first version: its limit and what it uses, in bytes
FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch holds and does not use is free to us as well
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [bytes for bytes in (_of_machine(), *_of_cgroups()) if bytes is not None]
    return min(found, default=None)


def _of_machine(path: Path = MACHINE) -> int | None:
    """What the kernel calls available: what is free, and what it can take back from its caches."""
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    said = lines.get("MemAvailable")
    return int(said.split()[0]) * 1024 if said else None


def _of_cgroups(root: Path = CGROUPS, process: Path = PROCESS) -> list[int]:
    """What the limits of this process's cgroup, and of those around it, leave."""
    left: list[int] = []
    for directory in _cgroups_of(root, process):
        for limit_file, used_file in FILES:
            limit, used = _number(directory / limit_file), _number(directory / used_file)
            if limit is not None and used is not None:
                left.append(limit - used + _cached(directory))
    return left


def _cgroups_of(root: Path, process: Path) -> list[Path]:
    """The directories of this process's cgroups, from its own up to the root."""
    named = [line.split(":", 2) for line in process.read_text().splitlines()] if process.is_file() else []
    found = [root, root / "memory"]
    for _, controllers, path in (parts for parts in named if len(parts) == 3):
        top = root / "memory" if "memory" in controllers.split(",") else root
        inside = top / path.lstrip("/")
        found += [inside, *(parent for parent in inside.parents if parent.is_relative_to(top))]
    return list(dict.fromkeys(found))


def _number(path: Path) -> int | None:
    """A file's number; None where there is none, as for no limit (`max`)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(directory: Path) -> int:
    """Bytes of files that count as used and are given back when memory is needed."""
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
