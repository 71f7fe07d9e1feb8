"""Runs a command under what a unit's sandboxing asks of the kernel, as far as that needs no namespace.

`python tests/sandboxed.py UNIT COMMAND...`: SystemCallFilter=, RestrictAddressFamilies= and LimitNOFILE= of
the unit file, MemoryDenyWriteExecute=, NoNewPrivileges= and an empty CapabilityBoundingSet=.
"""

import ctypes
import errno
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

NUMBERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_MDWE = 24, 38, 22, 65
CAPABILITIES = 41
FILTER = 2
AUDIT_ARCH_X86_64 = 0xC000003E
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_AT, ARCH_AT, FIRST_ARGUMENT_AT = 0, 4, 16


def missing() -> str | None:
    """What this machine lacks for it."""
    if platform.machine() != "x86_64" or not NUMBERS.exists():
        return "the numbers of the system calls (linux-libc-dev, x86_64)"
    return None if shutil.which("systemd-analyze") else "systemd-analyze"


def calls(group: str) -> set[str]:
    """The system calls of a group such as @system-service."""
    said = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
    ).stdout
    found: set[str] = set()
    for line in said.splitlines()[1:]:
        name = line.strip()
        if name.startswith("@"):
            found |= calls(name)
        elif name and not name.startswith("#"):
            found.add(name)
    return found


def allowed(unit: Path) -> set[str]:
    """What SystemCallFilter= leaves."""
    found: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit.read_text(), re.MULTILINE):
        groups: set[str] = set().union(*(calls(group) for group in line.removeprefix("~").split()))
        found = found - groups if line.startswith("~") else found | groups
    return found


def instruction(code: int, constant: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_so, if_not, constant)


def program(unit: Path) -> bytes:
    """The filter, in the kernel's own small language."""
    numbers = {
        name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", NUMBERS.read_text())
    }
    [line] = re.findall(r"^RestrictAddressFamilies=(.*)$", unit.read_text(), re.MULTILINE)
    families = [int(getattr(socket, name)) for name in line.split()]
    made = [
        instruction(LOAD, ARCH_AT),
        instruction(EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        instruction(RETURN, ERRNO | errno.EPERM),
        instruction(LOAD, NUMBER_AT),
        # any other call than socket() goes on after its part
        instruction(EQUAL, numbers["socket"], 0, 2 + 2 * len(families)),
        instruction(LOAD, FIRST_ARGUMENT_AT),
    ]
    for family in families:
        made += [instruction(EQUAL, family, 0, 1), instruction(RETURN, ALLOW)]
    made.append(instruction(RETURN, ERRNO | errno.EAFNOSUPPORT))
    for name in sorted(allowed(unit) & set(numbers) - {"socket"}):
        made += [instruction(EQUAL, numbers[name], 0, 1), instruction(RETURN, ALLOW)]
    made.append(instruction(RETURN, ERRNO | errno.EPERM))
    return b"".join(made)


def confine(unit: Path) -> None:
    """Put this process, and what it becomes, under the unit's rules."""
    filters = program(unit)
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, *arguments: int) -> None:
        padded = [*arguments, 0, 0, 0, 0][:4]
        if libc.prctl(option, *(ctypes.c_ulong(one) for one in padded)) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {option}")

    [files] = re.findall(r"^LimitNOFILE=(\d+)$", unit.read_text(), re.MULTILINE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
    if os.geteuid() == 0:
        for capability in range(CAPABILITIES):
            prctl(PR_CAPBSET_DROP, capability)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    try:
        prctl(PR_SET_MDWE, 1)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel does not know it
            raise
    code = ctypes.create_string_buffer(filters, len(filters))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    handed = Program(len(filters) // 8, ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, FILTER, ctypes.addressof(handed))


if __name__ == "__main__":
    confine(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
