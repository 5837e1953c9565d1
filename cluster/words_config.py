"""The section `words`: how the processes of a cluster talk to each other."""

from __future__ import annotations

from pydantic import model_validator

from cluster.section import Port, Positive, Seconds, Section, demand


class TlsConfig(Section):
    """All three files, or none: sessions are then in clear text."""

    cert_file: str | None = None
    """Certificate that this process shows, with those between it and the authority; PEM, on every node."""
    key_file: str | None = None
    """Its private key, without a password."""
    ca_file: str | None = None
    """Certificates of the authorities whose peers are let in and dialed."""
    server_name: str | None = None
    """Name that every worker's certificate bears; none: its address does."""

    @model_validator(mode="after")
    def _agree(self) -> TlsConfig:
        files = {"cert_file": self.cert_file, "key_file": self.key_file, "ca_file": self.ca_file}
        missing = [f"words.tls.{name}" for name, file in files.items() if file is None]
        if len(missing) == len(files):
            demand(self.server_name is None, "words.tls.server_name", f"is set without {', '.join(missing)}; set them")
        elif missing:
            demand(False, missing[0], "is not set, but other files of words.tls are; set all three, or none")
        return self


class WordsConfig(Section):
    host: str = "127.0.0.1"
    """Address that processes listen on and announce; 0.0.0.0 and :: listen on all, and announce the machine's own."""
    port_min: Port = 20000
    """First port to try for listening."""
    port_max: Port = 20999
    """Last port to try for listening."""
    heartbeat_s: Seconds = 0.3
    """Time between heartbeats."""
    heartbeat_timeout_s: Seconds = 1.5
    """A peer silent for this long is lost."""
    step_timeout_s: Seconds = 5.0
    """A peer with work that has not stepped for this long is unhealthy."""
    connect_timeout_s: Seconds = 5.0
    """For one dial with its handshake."""
    redial_max_s: Seconds = 2.0
    """Longest pause between two dials of a peer that does not answer."""
    outbox_max_bytes: Positive = 16 << 20
    """Bytes waiting to be written to one peer."""
    outbox_max_request_bytes: Positive = 1 << 20
    """Bytes of one request waiting to be written; past it that request alone ends."""
    secret_env: str = "SLUICE_CLUSTER_SECRET"
    """Environment variable that holds the cluster secret (never the secret itself)."""
    tls: TlsConfig = TlsConfig()

    @model_validator(mode="after")
    def _agree(self) -> WordsConfig:
        demand(
            self.port_min <= self.port_max,
            "words.port_max",
            f"{self.port_max} is under words.port_min = {self.port_min}; raise it",
        )
        demand(
            self.heartbeat_timeout_s >= 2 * self.heartbeat_s,
            "words.heartbeat_timeout_s",
            f"{self.heartbeat_timeout_s} is under two heartbeats ({self.heartbeat_s} s each); raise it",
        )
        demand(
            self.outbox_max_request_bytes <= self.outbox_max_bytes,
            "words.outbox_max_request_bytes",
            f"{self.outbox_max_request_bytes} is over words.outbox_max_bytes = {self.outbox_max_bytes}; lower it",
        )
        return self
