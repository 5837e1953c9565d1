"""Mutual TLS of the words plane: who listens and who dials each show a certificate that the other's authority signed.

It comes beside the cluster secret, never instead of it. The files are read when a process starts: new ones count from
its next start on, and the old and the new ones work together as long as one authority signs both, or each side knows
both authorities.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import grpc
import grpc.aio

from cluster.errors import ConfigError
from cluster.streams import OPTIONS
from cluster.words_config import TlsConfig


class Tls(NamedTuple):
    """What one process shows and trusts."""

    server: grpc.ServerCredentials
    channel: grpc.ChannelCredentials
    name: str | None  # that a listener's certificate must bear; None: the host that was dialed

    @classmethod
    def read(cls, config: TlsConfig) -> Tls | None:
        """None where none is configured. Raises ConfigError for files that are not there or do not fit together."""
        if config.cert_file is None or config.key_file is None or config.ca_file is None:
            return None
        cert, key, ca = (
            _read(f"words.tls.{name}_file", path)
            for name, path in (("cert", config.cert_file), ("key", config.key_file), ("ca", config.ca_file))
        )
        _check(config.cert_file, config.key_file, config.ca_file)
        return cls(
            grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True),
            grpc.ssl_channel_credentials(ca, key, cert),
            config.server_name,
        )


def open_channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    named = () if tls.name is None else (("grpc.ssl_target_name_override", tls.name),)
    return grpc.aio.secure_channel(address, tls.channel, options=(*OPTIONS, *named))


def add_port(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    """The port that the server listens on. Raises RuntimeError when it is taken."""
    return server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.server)


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(key, f"{path} cannot be read on this node ({error.strerror}); put it there") from None


def _check(cert: str, key: str, ca: str) -> None:
    """gRPC would tell of a bad file at the first session only, and not which."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password="")  # asks nobody
    except (ssl.SSLError, ValueError) as error:
        what = f"{key} is no private key, in PEM and without a password, of the certificate in {cert}"
        raise ConfigError("words.tls.key_file", f"{what} ({_reason(error)})") from None
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError("words.tls.ca_file", f"{ca} holds no certificates in PEM ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error) or type(error).__name__
