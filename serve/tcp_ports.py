"""The three ports a server listens on."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from kit.errors import UsageError


@dataclass(frozen=True)
class TcpPorts:
    """The addresses a server listens on; the default host is loopback."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    host: str = "127.0.0.1"

    @classmethod
    def free(cls) -> TcpPorts:
        """Choose three ports that are currently free."""
        sockets = [socket.socket() for _ in range(3)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        numbers = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        return cls(*numbers)

    def check_free(self) -> None:
        """Raise UsageError if one of the ports is no port, is given twice, or is in use."""
        numbers = [self.http, self.grpc, self.metrics]
        for name in ("http", "grpc", "metrics"):
            number = getattr(self, name)
            if not 1 <= number <= 65535:
                raise UsageError(f"--{name}-port {number}: a port is a number from 1 to 65535")
            if numbers.count(number) > 1:
                raise UsageError(f"--{name}-port {number}: given for two of http, grpc and metrics")
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    s.bind((self.host, number))
                except OSError as error:
                    raise UsageError(
                        f"port {number} on {self.host} cannot be used ({error.strerror}); choose another --{name}-port"
                    ) from None
