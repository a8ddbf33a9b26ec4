"""Ranges of objects by plain HTTP: of web servers, and of stores through URLs that they sign.

fsspec's clients build, sign and take apart each request anew, for several milliseconds of CPU time:
as much as decoding an image. Here connections stay open, and a URL that is signed once serves all
requests for a shard. Whatever does not work this way is left to fsspec, which also tries again and
finds the words for errors.

The query of a signed URL is a credential: it stays in this module, out of errors, logs, pickles.
"""

import logging
import re
import threading
import time

import fsspec
import urllib3

from pipeline.data.storage.files import ANSWER_S, CONNECT_S, open_filesystem, scheme_of
from pipeline.data.storage.transient import PASSING_STATUS, is_passing

logger = logging.getLogger(__name__)

VALID_S = 3600
"""How long a URL is signed for."""
RENEWED_BEFORE_S = 300
"""A URL is not used any more so long before its end."""
MAX_REFUSALS = 3
"""Requests that fail in a row, and not in passing, before there are no more of this kind."""
MAX_URLS = 4096
"""URLs that are kept, about half a kilobyte each."""
FORBIDDEN = 403
PARTIAL = 206
WEB_SCHEMES = ("http", "https")
LOCAL_SCHEMES = ("file", "local", "memory")


class WebRanges:
    """Ranges of the objects of one store, over at most `connections` that stay open.

    Safe for threads; no URL travels with a pickle.
    """

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._lock = threading.Lock()
        self._urls: dict[str, tuple[str, float]] = {}
        self._refusals = 0
        self._pool: urllib3.PoolManager | None = None

    def read(self, url: str, start: int, stop: int) -> bytes | None:
        """The bytes from `start` to before `stop`; None where fsspec has to ask.

        A signed URL that is refused is signed anew, once: the credentials behind it may have ended.
        A connection that breaks is begun anew, once: servers end those that they find idle.
        """
        for attempt in range(2):
            target = self._target(url)
            if target is None:
                return None
            try:
                status, data = self._get(target, start, stop)
            except (urllib3.exceptions.HTTPError, OSError):
                # Texts of these errors may hold the URL, so none of them goes further.
                if attempt == 0:
                    continue
                return None
            if status == PARTIAL and len(data) == stop - start:
                self._refusals = 0
                return data
            self._failed(url, passing=status == PARTIAL or status in PASSING_STATUS)
            if status != FORBIDDEN or target == url:
                return None
        return None

    def _get(self, target: str, start: int, stop: int) -> tuple[int, bytes]:
        """Status, and the bytes where they are a part of the object."""
        answer = self._manager().request(
            "GET",
            target,
            headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"},
            preload_content=False,
            retries=False,
        )
        if answer.status != PARTIAL:
            # A server without ranges sends all of a shard.
            answer.close()
            return answer.status, b""
        data = answer.read()
        answer.release_conn()
        return answer.status, data

    def _target(self, url: str) -> str | None:
        scheme = scheme_of(url)
        with self._lock:
            if self._refusals >= MAX_REFUSALS or scheme in LOCAL_SCHEMES:
                return None
            if scheme in WEB_SCHEMES:
                # Who gives fsspec headers or a user's name means them for these requests too.
                return None if fsspec.config.conf.get(scheme) else url
            signed, until = self._urls.get(url, ("", 0.0))
            if time.monotonic() < until:
                return signed
            filesystem, path = open_filesystem(url)
            asked = time.monotonic()
            try:
                signed = filesystem.sign(path, expiration=VALID_S)
            except Exception as error:
                # Stores without signatures, and credentials that cannot sign, each in its own way.
                if not is_passing(error):
                    self._refusals = MAX_REFUSALS
                    kind = type(error).__name__
                    logger.info("ranges are read by fsspec: %s has no signed URL (%s)", url, kind)
                return None
            self._urls[url] = signed, asked + VALID_S - RENEWED_BEFORE_S
            while len(self._urls) > MAX_URLS:
                del self._urls[next(iter(self._urls))]
            return signed

    def _failed(self, url: str, *, passing: bool) -> None:
        with self._lock:
            self._urls.pop(url, None)
            if passing:
                return
            self._refusals += 1
            if self._refusals == MAX_REFUSALS:
                logger.info("ranges are read by fsspec: plain HTTP does not serve %s", url)

    def _manager(self) -> urllib3.PoolManager:
        with self._lock:
            if self._pool is None:
                timeout = urllib3.Timeout(connect=CONNECT_S, read=ANSWER_S)
                self._pool = urllib3.PoolManager(maxsize=self._connections, timeout=timeout)
                logging.getLogger("urllib3.connectionpool").addFilter(_without_queries)
            return self._pool

    def __getstate__(self) -> dict[str, object]:
        return {"connections": self._connections}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _without_queries(record: logging.LogRecord) -> bool:
    """A filter that takes the queries out of the URLs that urllib3 logs."""
    record.msg, record.args = re.sub(r"\?\S+", "?...", record.getMessage()), ()
    return True
