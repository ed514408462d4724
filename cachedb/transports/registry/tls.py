"""Load TLS certificates from certs.d, and advise when a handshake fails."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import NamedTuple

from urllib3.exceptions import SSLError

from cachedb.disk.existence import exists
from cachedb.errors import RegistryError

__all__ = ["Certificates", "advise_on_tls", "find_certificates", "make_tls_context"]


LOG = logging.getLogger("cachedb")

_CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d", "~/.config/containers/certs.d")
_OTHER_HOST, _OUT_OF_DATE = (62, 64), (9, 10)  # OpenSSL's error codes (x509_vfy.h)


class Certificates(NamedTuple):
    """The files of certificates for a host."""

    authorities: tuple[Path, ...]
    clients: tuple[Path, ...]  # client certificates; each has its key beside it


def find_certificates(registry: str, host: str | None = None) -> Certificates:
    """Return the certificates of podman and Docker for a registry, or for a host that it names.

    The authorities of a registry are also trusted for its token server and its blob store. Its client certificates are
    shown only to the registry itself.

    Args:
        registry: the registry's ``host[:port]``.
        host: the ``host[:port]`` of another host; None for the registry itself.

    Raises:
        RegistryError: if a client certificate has no key, or a key has no certificate.
    """
    authorities, clients = _list_files(registry)
    if host is not None and host != registry:
        more, clients = _list_files(host)
        authorities += more
    for path in clients:
        if not exists(path.with_suffix(".key")):
            raise RegistryError(f"{str(path)!r} has no key: put it into {path.stem}.key beside it, or remove the file")
    return Certificates(tuple(authorities), tuple(clients))


def _list_files(host: str) -> tuple[list[Path], list[Path]]:
    """Return the authorities and the client certificates in the folders of a host."""
    authorities, clients = list[Path](), list[Path]()
    for top in _CERTIFICATES:
        folder = Path(top).expanduser() / host
        try:
            names = sorted(os.listdir(folder))
        except OSError:  # such as a folder that only root may read
            continue
        authorities += [folder / name for name in names if name.endswith(".crt")]
        clients += [folder / name for name in names if name.endswith(".cert")]
        for name in names:
            if name.endswith(".key") and f"{name.removesuffix('.key')}.cert" not in names:
                certificate = f"{name.removesuffix('.key')}.cert"
                raise RegistryError(f"{str(folder / name)!r} has no certificate: put it into {certificate} beside it")
    return authorities, clients


def make_tls_context(certificates: Certificates, *, verify: bool = True) -> ssl.SSLContext:
    """Return a TLS context with the system's authorities and these certificates.

    Args:
        certificates: as from `find_certificates`.
        verify: whether to verify the certificate of the server.

    Raises:
        RegistryError: if a client certificate cannot be used.
    """
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for path in certificates.authorities:
        if reason := _load_authority(context, path):  # podman and Docker also go on with the other files
            LOG.warning("%r is not used: %s", str(path), reason)
    for path in certificates.clients:
        try:
            context.load_cert_chain(path, path.with_suffix(".key"), password=_refuse_passphrase)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise RegistryError(
                f"{str(path)!r} and its key cannot be used: {_explain(error)}: replace or remove them"
            ) from None
    return context


def _load_authority(context: ssl.SSLContext, path: Path) -> str:
    """Trust the authorities in a file; return why it cannot be used, or an empty string."""
    try:
        context.load_verify_locations(path)
    except OSError as error:
        return _explain(error)
    return ""


def _refuse_passphrase() -> str:
    """Raise, because OpenSSL would ask for the passphrase of an encrypted key on the terminal."""
    raise ValueError("the key has a passphrase")


def _explain(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return {"KEY_VALUES_MISMATCH": "the key is for another certificate"}.get(
            error.reason or "", "it has no certificate or key in PEM format"
        )
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def advise_on_tls(host: str, certificates: Certificates, error: SSLError) -> str:
    """Return advice for a bad certificate of a host, or for a server without TLS.

    Args:
        host: the ``host[:port]``.
        certificates: the certificates that were used.
        error: the error of the handshake.
    """
    code = next((cause.verify_code for cause in error.args if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if any("CERTIFICATE_REQUIRED" in (getattr(cause, "reason", "") or "") for cause in error.args):
        return f"put a client certificate into /etc/containers/certs.d/{host}/client.cert, and its key into client.key"
    if code is None:
        return "use --plain-http if it speaks HTTP"
    if code in _OTHER_HOST:
        return "use a host name that its certificate contains"
    if code in _OUT_OF_DATE:
        return "renew its certificate, or set the clock of this host"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unusable = [repr(str(path)) for path in certificates.authorities if _load_authority(context, path)]
    if unusable:
        return f"repair {', '.join(unusable)}, which has no certificate"
    return f"put the certificate of its authority into /etc/containers/certs.d/{host}/ca.crt or SSL_CERT_FILE"
