"""Errors of the machine and of servers, in words that say what to do."""

import errno

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from cfsd.errors import BadEnvironment, CfsdError
from cfsd.machine import home, without_password
from cfsd.store.disk import full_disk

RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
LIMITS = {
    errno.EMFILE: "this process may not open more files: raise the limit, as with ulimit -n 4096",
    errno.ENFILE: "this machine may not open more files: end other programs",
    errno.ENOMEM: "the memory is full: end other programs, or lower machine.threads and machine.processes",
    errno.EAGAIN: "this user may not start more processes: raise the limit, as with ulimit -u 4096",
    errno.ENAMETOOLONG: "a name is too long for this filesystem: shorten the name of the recipe or of a folder",
    errno.EIO: "the disk gives an error of its own: look at the system's log",
    errno.ESTALE: "a network disk lost the file: mount it again",
}  # fmt: skip
CONTINUE = "what is finished is kept: run the same command again"


def explained(error: BaseException) -> CfsdError | None:
    """Return `error` as one message, itself where it is one; None for what nobody expected."""
    if isinstance(error, CfsdError):
        return error
    if full := full_disk(error, home()):
        return full
    if isinstance(error, httpx.TransportError | PrefectHTTPStatusError):
        url = without_password(str(PREFECT_API_URL.value() or "")) or f"(its log is {home() / 'logs' / 'prefect.log'})"
        return BadEnvironment(f"Prefect's server {url} failed: {without_password(_first_line(error))}; {CONTINUE}")
    if isinstance(error, ConnectionError):
        return BadEnvironment(f"a connection failed: {error}; {CONTINUE}")
    return _of_the_system(error) if isinstance(error, OSError) else None


def _of_the_system(error: OSError) -> CfsdError | None:
    if error.errno in RIGHTS:
        place = error.filename2 or error.filename or "a file"
        return BadEnvironment(f"{place} cannot be used: {error.strerror}; change its rights, or choose another place")
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR) and error.filename:
        place = error.filename2 or error.filename
        return BadEnvironment(f"{place} cannot be written: {error.strerror}; choose another place")
    if error.errno in LIMITS:
        named = f" ({error.filename})" if error.filename else ""
        return BadEnvironment(f"{error.strerror}{named}: {LIMITS[error.errno]}")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
