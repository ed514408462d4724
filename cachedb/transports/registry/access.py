"""Define how a registry is reached: the options of a pull or a push."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

__all__ = ["DEFAULT_ACCESS", "Access"]


class Access(NamedTuple):
    """How a registry is reached."""

    plain_http: bool | None = None  # True: HTTP, False: HTTPS, None: HTTP only for localhost
    tls_verify: bool | None = None  # False: any certificate, and HTTP if there is no HTTPS; None: as in registries.conf
    authfile: str | os.PathLike[str] | None = None  # a file of credentials; None: the files of podman and Docker
    credentials: tuple[str, str] | None = None  # user and password; they replace the files
    timeout: float = 600.0  # seconds to wait for the first byte of an answer, while the connection stays open

    def __repr__(self) -> str:
        return f"Access(plain_http={self.plain_http!r}, tls_verify={self.tls_verify!r}, ...)"  # not the password


DEFAULT_ACCESS: Final = Access()
