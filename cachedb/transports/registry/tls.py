"""TLS: certificates of certs.d, and advice when a handshake fails."""

from __future__ import annotations

import ssl
from pathlib import Path

from urllib3.exceptions import SSLError

from cachedb.errors import ignore_os_errors

__all__ = ["advise_on_tls", "make_tls_context"]


_CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d", "~/.config/containers/certs.d")
_OTHER_HOST, _OUT_OF_DATE = (62, 64), (9, 10)  # what OpenSSL says of a certificate (x509_vfy.h)


def advise_on_tls(host: str, error: SSLError) -> str:
    """Return what to do where a registry's certificate is not good, or none came."""
    code = next((cause.verify_code for cause in error.args if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if code is None:
        return "use --plain-http if it speaks HTTP"
    if code in _OTHER_HOST:
        return "name it as its certificate does"
    if code in _OUT_OF_DATE:
        return "its certificate has to be made anew, or the clock of this host set right"
    return f"put the certificate of its authority into /etc/containers/certs.d/{host}/ca.crt or SSL_CERT_FILE"


def make_tls_context(registry: str | None) -> ssl.SSLContext:
    """Return what to trust: what the system does, and the files that podman and Docker keep for a registry."""
    context = ssl.create_default_context()
    for top in _CERTIFICATES if registry else ():
        folder = Path(top).expanduser() / str(registry)
        with ignore_os_errors():
            for path in sorted(folder.glob("*.crt")):
                context.load_verify_locations(path)
            for path in sorted(folder.glob("*.cert")):
                context.load_cert_chain(path, path.with_suffix(".key"))
    return context
