"""Authorities that sign certificates, for tests of TLS."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)


class Authority:
    def __init__(self, folder: Path, name: str) -> None:
        self.ca_file = folder / f"{name}-ca.pem"
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        signed = _builder(self._name, self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        self._write(self.ca_file, signed.sign(self._key, hashes.SHA256()))

    def settings(self, who: str, host: str = "127.0.0.1", *, days: int = 1, **more: object) -> dict[str, object]:
        """The section words.tls of a process with a fresh certificate; `days` below 0: it has run out."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
        builder = _builder(subject, self._name, key, days)
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        cert_file, key_file = self._folder / f"{who}.pem", self._folder / f"{who}.key"
        self._write(cert_file, builder.sign(self._key, hashes.SHA256()))
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return {"cert_file": str(cert_file), "key_file": str(key_file), "ca_file": str(self.ca_file), **more}

    def _write(self, path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = 1
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 3 * _DAY)
        .not_valid_after(now + days * _DAY)
    )
