"""Whether a folder is on a disk of this machine."""

from __future__ import annotations

import os

# File systems whose files other machines write to, or that share no memory between processes.
_NETWORK_TYPES = frozenset(
    [
        *("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "gfs", "gfs2", "glusterfs", "gpfs"),
        *("lustre", "nfs", "nfs4", "ocfs2", "orangefs", "pvfs2", "smb2", "smb3", "smbfs"),
        *("vboxsf", "virtiofs", "wekafs"),
    ]
)


def is_network_folder(folder: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """True where the folder's file system is known to be a network's; False where unknown.

    SQLite's write-ahead log needs memory shared by all its users, which two machines have not
    (https://sqlite.org/wal.html), so that there a rollback journal must do.
    """
    folder = os.path.realpath(folder)
    kind, longest = "", -1
    try:
        with open(mounts, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                # 36 35 98:0 /mnt1 /mnt/point rw,noatime master:1 - ext3 /dev/root rw
                left, _, right = line.partition(" - ")
                point = left.split()[4].replace("\\040", " ")
                is_above = folder == point or folder.startswith(point.rstrip("/") + "/")
                if is_above and len(point) >= longest:
                    kind, longest = right.split()[0], len(point)
    except (OSError, IndexError):
        return False
    return kind.split(".")[0] in _NETWORK_TYPES
