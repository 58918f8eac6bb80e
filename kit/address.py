"""Read the address of a server, and recognize Triton's HTTP port where its gRPC port is needed."""

from __future__ import annotations

import http.client
import re

from kit.errors import UsageError

_ADDRESS = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?P<host>\[[0-9a-f:.%]+\]|[^/:\[\]\s]+):(?P<port>\d+)/*", re.I
)
SCHEMES = ("http", "grpc")  # neither is needed; https and grpcs would need a certificate


def grpc_address(url: str) -> str:
    """Return HOST:PORT of an address that may have a scheme; raises UsageError for anything else."""
    found = _ADDRESS.fullmatch(url.strip())
    if found is None or not 0 < int(found["port"]) < 65536:
        raise UsageError(f"--url {url}: expected HOST:PORT of the server's gRPC port, for example 127.0.0.1:8001")
    if (found["scheme"] or "grpc").lower() not in SCHEMES:
        raise UsageError(
            f"--url {url}: {found['scheme']} is not supported; give HOST:PORT of the gRPC port, and for TLS the "
            "address of a proxy that terminates it"
        )
    return f"{found['host']}:{found['port']}"


def answers_http(address: str, timeout: float = 1.0) -> bool:
    """Return whether a server answers Triton's HTTP requests at HOST:PORT, which is then not its gRPC port."""
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", "/v2")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
