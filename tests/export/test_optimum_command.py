"""`optimum-cli export flux2` runs the kit's exporter from optimum's command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kit.artifact import verify
from tests.conftest import ByFamily

CLI = Path(sys.executable).with_name("optimum-cli")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CLI), "export", "flux2", *argv], capture_output=True, text=True, timeout=300, check=False
    )


def test_optimum_cli_writes_an_artifact(checkpoint_of: ByFamily, tmp_path: Path) -> None:
    done = run(str(checkpoint_of("klein")), str(tmp_path / "out"), "--parts", "vae_decoder", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["variant"] == "klein-custom"
    manifest = verify(tmp_path / "out", kinds=("onnx",))
    assert list(manifest.parts) == ["vae_decoder"]
    assert (tmp_path / "out" / "vae_decoder" / "model.onnx").is_file()  # optimum's names for diffusion pipelines


def test_its_errors_and_exit_codes_are_those_of_the_kit(tmp_path: Path) -> None:
    done = run("nowhere", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "error: nowhere does not exist" in done.stderr
