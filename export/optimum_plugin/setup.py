"""Builds the plug-in, and keeps it from claiming the name `optimum`."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):  # type: ignore[misc]  # no type information
    """Write the plug-in's module to top_level.txt in place of the namespace that it lies in.

    Otherwise two distributions provide `optimum`, and diffusers warns of that at every import.
    """

    def run(self) -> None:
        """Write the metadata, then correct the one file."""
        super().run()
        Path(self.egg_info, "top_level.txt").write_text("register_flux2\n")


if __name__ == "__main__":  # so pip runs it
    setup(cmdclass={"egg_info": EggInfo})
