"""What a process gives up for good: privileges, system calls, resources.

The filter is a list of what is refused, for programs of any kind must run: whatever makes
namespaces or mounts, reaches other processes or the kernel's keys, is a known way to attack a
kernel, or holds memory that belongs to no process and no bounded disk. Sockets are local only:
network namespaces do not separate vsock.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Sequence

from actor.sandbox.box import Limits

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
INSIDE_UID = 1000  # and group; the only ones in a sandbox's user namespace
CAPABILITIES = 64  # more than any kernel has

# Name -> numbers on x86-64 and arm64 (linux/unistd.h).
_REFUSED = {
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "fsopen": (430, 430),
    "fspick": (433, 433), "fsconfig": (431, 431), "fsmount": (432, 432), "open_tree": (428, 428),
    "move_mount": (429, 429), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "fanotify_init": (300, 262), "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "mbind": (237, 235), "set_mempolicy": (238, 237), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "seccomp": (317, 277), "vmsplice": (278, 75),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _PRLIMIT = (56, 220), (435, 435), (41, 198), (302, 261)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEWEST = 456  # system calls beyond it were not looked at
_CLONE_NEWUSER = 0x10000000
_CLONE_NEW = 0x7E020000  # every kind of namespace
_AF_UNIX = 1

# Instructions of the classic packet filter, and what it returns.
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data; of the argument the low half, little end first


def supported() -> bool:
    """Whether the filter knows this machine's system calls."""
    return platform.machine() in _AUDIT_ARCH


def filter_program(machine: str) -> bytes:
    """The filter as ``struct sock_filter[]``. Raises ValueError for a machine that is not :func:`supported`."""
    which = list(_AUDIT_ARCH).index(machine)

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def refuse(number: int, error: int) -> list[bytes]:
        return [op(_EQUAL, number, 0, 1), op(_RETURN, _ERRNO | error)]

    def only(number: int, checks: list[bytes], error: int) -> list[bytes]:
        """``checks`` end in a jump: on to allow, over that to refuse."""
        body = [*checks, op(_RETURN, _ALLOW), op(_RETURN, _ERRNO | error)]
        return [op(_EQUAL, number, 0, len(body)), *body]

    own = [op(_LOAD, _ARGUMENT_0), op(_EQUAL, 0, 0, 1)]
    program = [
        op(_LOAD, _ARCH), op(_EQUAL, _AUDIT_ARCH[machine], 1, 0), op(_RETURN, _KILL),
        op(_LOAD, _NUMBER), op(_AT_LEAST, _NEWEST + 1, 0, 1), op(_RETURN, _ERRNO | errno.ENOSYS),
    ]  # fmt: skip  # x86's other ABI sets bit 30 of the number: beyond the newest
    for numbers in _REFUSED.values():
        program += refuse(numbers[which], errno.EPERM)
    program += refuse(_CLONE3[which], errno.ENOSYS)  # its flags lie in memory, unseen; the C library then uses clone
    namespaces = [op(_LOAD, _ARGUMENT_0), op(_AND, _CLONE_NEW), op(_EQUAL, 0, 0, 1)]
    program += only(_CLONE[which], namespaces, errno.EPERM)
    program += only(_SOCKET[which], [op(_LOAD, _ARGUMENT_0), op(_EQUAL, _AF_UNIX, 0, 1)], errno.EAFNOSUPPORT)
    program += only(_PRLIMIT[which], own, errno.EPERM)  # of oneself only: the supervisor has the same user
    program.append(op(_RETURN, _ALLOW))
    return b"".join(program)


def _prctl(option: int, *values: int) -> None:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *arguments) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def become(uid: int, owned: Sequence[str]) -> None:
    """From root to the user ``uid``, who is given the directories ``owned``. Raises OSError.

    Where the kernel lets users have namespaces the program sees INSIDE_UID instead, the same in every run.
    """
    for path in owned:
        os.chown(path, uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _prctl(PR_SET_DUMPABLE, 1)  # else the maps are root's to write
    if _libc.unshare(_CLONE_NEWUSER) == 0:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INSIDE_UID} {uid} 1"),
            ("gid_map", f"{INSIDE_UID} {uid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def drop_privileges() -> None:
    """Have no capabilities now or ever, and be looked into by nobody. Raises OSError."""
    for capability in range(CAPABILITIES):
        try:
            _prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # no such capability, or none are left to drop
            break
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, struct.pack("=6I", *[0] * 6)) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # becoming another user has cleared it


def go_first_without_memory() -> None:
    """If the machine's memory ends, this process is killed before others. Raises OSError."""
    _prctl(PR_SET_DUMPABLE, 1)  # a process that nobody may look into may not write to its own /proc files
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def filter_system_calls() -> None:
    """Refuse them for this process and all that it starts. Raises OSError."""
    program = filter_program(platform.machine())
    buffer = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog of 64 bits
    pointer = ctypes.create_string_buffer(described, len(described))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(pointer))


def limit_resources(limits: Limits) -> None:
    """Of this process and of each that it starts; what all may use together is watched from outside."""
    memory, disk = limits.memory_mb << 20, limits.disk_mb << 20
    cpu = max(1, int(limits.cpu_s) + 1)
    for which, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_FSIZE, disk, disk),
        (resource.RLIMIT_NPROC, limits.processes + 1, limits.processes + 1),  # the supervisor counts
        (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files),
        (resource.RLIMIT_CORE, 1, 1),  # 0 would still start the host's handler of core dumps: core(5)
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_SIGPENDING, 128, 128),
    ):
        _, most = resource.getrlimit(which)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(which, (soft, hard))
