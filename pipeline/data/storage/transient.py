"""Faults of storage that pass: which they are, and trying again with longer and longer waits."""

import http.client
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.errors import LongtailError, StorageError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PATIENCE_S = 150.0
"""How long after its first try a request is tried again: a store that is gone for a minute, and a
minute more for those who come back together."""
FIRST_WAIT_S = 0.25
"""Before the second try; doubled before each further one."""
LONGEST_WAIT_S = 15.0
_SAID_AFTER_S = 5.0
"""From when on the log says that storage is waited for."""
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes with which a server says that the same request may succeed later."""
_PASSING_NAMES = (
    "Timeout",
    "Disconnected",
    "PayloadError",
    "ConnectionClosed",
    "ConnectionError",
    "ConnectorError",
    "ClientOSError",
    "EndpointConnection",
    "IncompleteRead",
    "ResponseStreaming",
    "HTTPClientError",
    "RemoteProtocol",
    "ReadError",
)
"""Parts of the names of aiohttp's, botocore's, httpx's and requests' exceptions of that kind; the
packages themselves may be absent."""
_LASTING_NAMES = ("SSLCertVerificationError", "CertificateError")
"""Ends of the names of those that say that a server's certificate is not accepted; packages raise
them as, or wrap them in, connection errors. Other faults of TLS may be a connection that is cut."""


class ShortRead(OSError):  # noqa: N818 - an event, named as it is
    """Fewer bytes came than were asked for."""


def persist(action: str, url: str, attempt: Callable[[], Result]) -> Result:
    """`attempt()`, again after each passing fault of remote storage, for `PATIENCE_S` seconds.

    FileNotFoundError stays what it is, and a directory where a file should be is none; every other
    failure of storage is raised as `StorageError` with the URL, and the number of tries where there
    were several.
    """
    begun, wait, said, tries = time.monotonic(), FIRST_WAIT_S, False, 0
    while True:
        tries += 1
        try:
            return attempt()
        except (FileNotFoundError, LongtailError):
            raise
        except IsADirectoryError as error:
            raise FileNotFoundError(*error.args) from error
        except Exception as error:
            if not is_storage_fault(error):
                raise
            passing, waited = is_passing(error), time.monotonic() - begun
            if not passing or waited >= PATIENCE_S:
                tried = f" ({tries} tries in {waited:.0f} s)" if passing else ""
                raise StorageError(f"cannot {action} {url}{tried}: {describe(error)}") from error
            if waited > _SAID_AFTER_S and not said:
                said = True
                logger.warning(
                    "cannot %s %s: %s; trying again for up to %.0f s more",
                    action,
                    url,
                    describe(error),
                    PATIENCE_S - waited,
                )
            # Many readers that failed together must not come back together.
            time.sleep(min(wait * random.uniform(0.5, 1.0), PATIENCE_S - waited))
            wait = min(2 * wait, LONGEST_WAIT_S)


def is_storage_fault(error: Exception) -> bool:
    """Whether storage failed, and not this program: an OSError, or a storage package's own kind."""
    return isinstance(error, OSError | EOFError) or type(error).__module__ != "builtins"


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later; a status code decides where there is one."""
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUS
    if any(kind.__name__.endswith(_LASTING_NAMES) for kind in _kinds(error)):
        return False
    passing = (TimeoutError, ConnectionError, EOFError, ShortRead, http.client.HTTPException)
    if isinstance(error, passing):
        return True
    return any(part in kind.__name__ for kind in type(error).__mro__ for part in _PASSING_NAMES)


def _kinds(error: BaseException) -> Iterator[type]:
    """Classes of an error and of all that it was raised because of, or wraps."""
    following: list[BaseException] = [error]
    seen: set[int] = set()
    while following:
        one = following.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield from type(one).__mro__
        linked = (one.__cause__, one.__context__, *one.args)
        following += [each for each in linked if isinstance(each, BaseException)]


def status_of(error: BaseException) -> int | None:
    """The HTTP status code that a server gave, by where each package keeps it."""
    candidates = [getattr(error, "status", None), getattr(error, "code", None)]
    cause: BaseException | None = error
    while cause is not None:
        # s3fs raises an OSError because of botocore's error. A cause's `code` may be aiohttp's own
        # name, in numbers, for what is wrong with an answer.
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        candidates.append(getattr(response, "status_code", response))
        cause = cause.__cause__
    codes = (code for code in candidates if isinstance(code, int) and 100 <= code < 600)
    return next(codes, None)


def describe(error: Exception) -> str:
    """The status or the text of an error, which some packages leave empty."""
    status = status_of(error)
    if status is not None:
        return f"status {status}"
    return str(error) or type(error).__name__
