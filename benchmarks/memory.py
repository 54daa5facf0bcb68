"""What the operating system counts of this process's memory."""

from pathlib import Path


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most this program ever held. Not getrusage's figure: a child starts that with its parent's peak."""
    return _status("VmHWM")


def forget_peak() -> None:
    """From here on the peak is that of what follows."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux")
