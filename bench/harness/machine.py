"""The machine a figure was measured on, in a few words."""

import os
import platform
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """What a reader has to know to compare the figures with others."""
    return {
        "processor": _processor().get("model name", platform.machine()),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "hardware_virtualisation": hardware_virtualisation(),
        "shmem_huge_pages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def hardware_virtualisation() -> bool:
    """Does KVM, if it is there, run guest code on the processor? Without these flags it emulates it."""
    return bool({"vmx", "svm"} & set(_processor().get("flags", "").split()))


def _processor() -> dict[str, str]:
    """The last of the processors in /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _chosen(file: Path) -> str:
    """The word in brackets, as the kernel marks the one of several that holds."""
    try:
        words = file.read_text().split()
    except OSError:
        return "unknown"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def in_words(machine: dict[str, Any]) -> str:
    """One line for people."""
    kvm = "" if machine["hardware_virtualisation"] else "; KVM emulates guest code"
    return (
        f"{machine['processor']}, {machine['cpus']} processors, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {machine['kernel']}, load {machine['load_1min']:g}, "
        f"huge pages for shared memory: {machine['shmem_huge_pages']}{kvm}"
    )
