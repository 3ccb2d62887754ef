"""Errors of the operating system as sentences: what failed, why, and the way out."""

import errno
import os

_WAYS_OUT = {
    errno.EACCES: "choose a place that you may use, or change its permissions",
    errno.EPERM: "choose a place that you may use, or change its permissions",
    errno.EROFS: "this file system cannot be written; choose another place",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "your quota is used up; free some space, or choose another place",
    errno.EFBIG: "the file system does not take files of this size",
    errno.ENAMETOOLONG: "choose a shorter name (most systems allow 255 bytes a name)",
    errno.ENOTDIR: "a part of this path is a file where a folder is needed",
    errno.EISDIR: "expected a file, found a folder",
    errno.EEXIST: "something else is there already; choose another name",
    errno.ENOENT: "check the path; its folder must exist and allow new files",
    errno.ENOTEMPTY: "the folder is not empty; choose another name",
    errno.ELOOP: "the symbolic links of this path lead to each other",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "the system has too many files open",
    errno.ENOMEM: "there is not enough memory",
    errno.EBADF: "it is closed",
    errno.EIO: "the device reports a fault",
    errno.EXDEV: "both names must be on the same file system",
    errno.EADDRINUSE: "another program uses this port; choose another one",
    errno.ECONNREFUSED: "nothing answers there; check the address and the port",
}


def describe_os_error(error: OSError) -> str:
    """Return ``path: reason (way out)`` without the number of the error.

    The path is missing if the system did not say it, as for standard output.
    """
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if _is_path(n)]
    where = " -> ".join(names)
    return (f"{where}: " if where else "") + os_error_reason(error)


def os_error_reason(error: OSError) -> str:
    """Return ``reason (way out)`` without the path, which may be a temporary name."""
    reason = error.strerror or str(error) or type(error).__name__
    hint = _WAYS_OUT.get(error.errno or 0)
    sentence = f"{reason[:1].lower()}{reason[1:]}"
    return sentence + (f" ({hint})" if hint else "")


def _is_path(name: object) -> bool:
    return isinstance(name, str | bytes)
