"""A thread that draws the previews of requests in the denoiser, so that no step waits for one."""

from __future__ import annotations

import threading

from pipeline.images import encode
from pipeline.live_request import LiveRequest
from pipeline.preview import Float32, PreviewMap
from serve.ledger import Ledger


class PreviewWriter:
    """Draws the latest step of each request whose preview is wanted; a step that another overtakes is left out."""

    def __init__(self, preview: PreviewMap, ledger: Ledger) -> None:
        self._preview = preview
        self._ledger = ledger
        self._latest: dict[int, Float32] = {}  # latents [C, h, w] by ticket
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name="previews", daemon=True).start()

    def submit(self, ticket: int, live: LiveRequest) -> None:
        """Ask for a preview of the first image of a request after a step; returns at once."""
        if not self._ledger.wants_preview(ticket):
            return
        with self._wake:
            self._latest[ticket] = live.expected_latents()[0]
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._latest:
                    self._wake.wait()
                ticket = next(iter(self._latest))
                latents = self._latest.pop(ticket)
            self._ledger.write_preview(ticket, encode(self._preview.apply(latents), "png"))
            if not self._ledger.wants_preview(ticket):  # its stream has ended, and dropped what was there
                self._ledger.drop_preview(ticket)
