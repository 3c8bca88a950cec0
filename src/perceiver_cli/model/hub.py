"""Files that the user names on the Hugging Face hub, the only address that this program opens. No torch."""

from __future__ import annotations

import re
import socket
import threading
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from perceiver_cli.errors import UsageError
from perceiver_cli.files import cause, show_path, show_text

ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)  # ORG/NAME
CONNECT_S = 2  # for the first connection


def download(repository: str, name: str, absent: str = "") -> Path | None:
    """Return the path of a repository's file in the local cache, after a download if needed.

    None if there is no file of the name `absent`. Raises UsageError for another one, or without a connection.
    """
    try:
        import huggingface_hub as hub  # type: ignore[import-not-found, unused-ignore]
        from huggingface_hub import constants, errors as hub_errors, logging
    except ImportError as error:
        message = f"{show_path(repository)}: not a path here, and the hub needs huggingface_hub"
        raise UsageError(message, "pip install 'perceiver-cli[hub]'") from error
    offline = cannot_connect(constants.ENDPOINT)
    logging.set_verbosity_error()  # each retry is a line
    try:
        return Path(hub.hf_hub_download(repository, name, local_files_only=offline is not None))  # what is kept, else
    except Exception as error:  # from HTTP, the file system or the hub: the user can do the same about each
        missing = isinstance(error, hub_errors.EntryNotFoundError)
        if missing and not isinstance(error, hub_errors.LocalEntryNotFoundError):  # the latter concerns the cache
            if name == absent:
                return None
            raise UsageError(f"{show_path(repository)}: has no {name} on the hub") from error
        reason = offline or show_text(" ".join(str(error).split())) or type(error).__name__
        raise UsageError(f"{show_path(repository)}: cannot get {name} from the hub: {reason}") from error


@cache
def cannot_connect(address: str) -> str | None:
    """Return why no connection to an address or its proxy is made within CONNECT_S, or None if one is.

    The hub's client tries for half a minute.
    """
    where = urlsplit(address)
    if (proxy := getproxies().get(where.scheme)) and not proxy_bypass(where.hostname or ""):
        where = urlsplit(proxy)
    reason = [f"{where.hostname} does not answer in {CONNECT_S} s"]

    def connect() -> None:
        try:
            port = where.port or (80 if where.scheme == "http" else 443)
            socket.create_connection((where.hostname, port), CONNECT_S).close()
            reason.clear()
        except OSError as error:
            reason[:] = [f"cannot connect to {where.hostname}: {cause(error)}"]

    # A name server that does not answer would take longer than the connection.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(CONNECT_S)
    return reason[0] if reason else None
