"""Under which address other machines find this process, where it listens on all of its addresses."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import Final

import psutil

# Of networks for documentation: nothing is sent there, the kernel only says which of our addresses it would be from.
_ELSEWHERE: Final = {"0.0.0.0": (socket.AF_INET, "192.0.2.1"), "::": (socket.AF_INET6, "2001:db8::1")}
_PORT: Final = 9


def announced(host: str) -> str:
    """`host`, or for 0.0.0.0 and :: the address that packets to other networks would come from; without such a route
    that of the first interface that is up, and on a machine without any the loopback's."""
    if host not in _ELSEWHERE:
        return host
    family, elsewhere = _ELSEWHERE[host]
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((elsewhere, _PORT))
            return str(probe.getsockname()[0])
        except OSError:
            return _of_an_interface(family)


def _of_an_interface(family: socket.AddressFamily) -> str:
    states = psutil.net_if_stats()
    addresses = [
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
        for address in addresses
        if address.family == family and "%" not in address.address  # a link's own address reaches that link only
    ]
    loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
    return next((address for address in addresses if address != loopback), loopback)
