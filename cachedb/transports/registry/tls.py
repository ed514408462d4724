"""Load TLS certificates from certs.d, and advise when a handshake fails."""

from __future__ import annotations

import ssl
from pathlib import Path

from urllib3.exceptions import SSLError

from cachedb.errors import ignore_os_errors

__all__ = ["advise_on_tls", "make_tls_context"]


_CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d", "~/.config/containers/certs.d")
_OTHER_HOST, _OUT_OF_DATE = (62, 64), (9, 10)  # OpenSSL's error codes (x509_vfy.h)


def advise_on_tls(host: str, error: SSLError) -> str:
    """Return advice for a bad certificate of a registry, or for a server without TLS."""
    code = next((cause.verify_code for cause in error.args if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if code is None:
        return "use --plain-http if it speaks HTTP"
    if code in _OTHER_HOST:
        return "use a host name that its certificate contains"
    if code in _OUT_OF_DATE:
        return "renew its certificate, or set the clock of this host"
    return f"put the certificate of its authority into /etc/containers/certs.d/{host}/ca.crt or SSL_CERT_FILE"


def make_tls_context(registry: str | None) -> ssl.SSLContext:
    """Return a TLS context with the system's certificates and those of podman and Docker for a registry."""
    context = ssl.create_default_context()
    for top in _CERTIFICATES if registry else ():
        folder = Path(top).expanduser() / str(registry)
        with ignore_os_errors():
            for path in sorted(folder.glob("*.crt")):
                context.load_verify_locations(path)
            for path in sorted(folder.glob("*.cert")):
                context.load_cert_chain(path, path.with_suffix(".key"))
    return context
