"""Classic BPF programs that say what a port of the switch loses, in the words of tc.

They need neither nft nor iptables. Each lets pass what it does not know (TC_ACT_UNSPEC), so that several may
stand one after the other.
"""

import socket
import struct

SHOT, NEXT = "6 0 0 2", "6 0 0 4294967295"


def _program(*instructions: str) -> str:
    return f"{len(instructions)},{','.join(instructions)},"


DROP_ALL = _program(SHOT)


def drop_address(address: str) -> str:
    """Lose IPv4 packets from and to an address; ARP passes."""
    number = struct.unpack("!I", socket.inet_aton(address))[0]
    return _program(
        "40 0 0 12",  # the type of the frame
        "21 0 5 2048",  # other than IPv4: the next may say
        "32 0 0 26",  # source
        f"21 2 0 {number}",
        "32 0 0 30",  # destination
        f"21 0 1 {number}",
        SHOT,
        NEXT,
    )


def drop_tcp_port(port: int) -> str:
    """Lose TCP segments from and to a port."""
    return _program(
        "40 0 0 12",
        "21 0 8 2048",
        "48 0 0 23",  # protocol
        "21 0 6 6",
        "177 0 0 14",  # x = length of the IP header
        "72 0 0 14",  # port of the source
        f"21 2 0 {port}",
        "72 0 0 16",  # port of the destination
        f"21 0 1 {port}",
        SHOT,
        NEXT,
    )
