"""What runs where little is installed: each case blocks every package of the kit but those that it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kit.extras import BRINGS

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "kit" / "sample" / "checkpoint" / "tokenizer"
TRITON = BRINGS["client"] | {"ml_dtypes"}  # which tritonclient imports and brings
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({blocked!r})); {code}"
COMMAND = "from kit.commands import flux2; sys.exit(flux2({argv!r}))"
ENCODE = (
    "from pathlib import Path; from pipeline.prompts import PromptEncoder; "
    f"print(PromptEncoder(Path({str(TOKENIZER)!r}), 'qwen3', 512).encode('a red circle').attention_mask.sum())"
)


def python(code: str, given: frozenset[str]) -> subprocess.CompletedProcess[str]:
    blocked = sorted(BRINGS["all"] - given)
    command = [sys.executable, "-c", WITHOUT.format(blocked=blocked, code=code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def flux2(*argv: str, given: frozenset[str] = frozenset()) -> subprocess.CompletedProcess[str]:
    return python(COMMAND.format(argv=list(argv)), given)


@pytest.mark.parametrize("argv", [("plan", "--variant", "klein-4b", "--gpu", "l4"), ("doctor",)])
def test_planning_needs_python_alone(argv: tuple[str, ...]) -> None:
    done = flux2("kit", *argv)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_client_needs_the_client_extra_alone(tmp_path: Path) -> None:
    out = str(tmp_path / "a.png")
    done = flux2("serve", "generate", "a cat", "--out", out, "--url", "127.0.0.1:9", given=TRITON)
    assert (done.returncode, done.stderr[:34]) == (1, "error: no FLUX.2 server responds a")


def test_prompts_become_tokens_without_torch() -> None:
    done = python(ENCODE, BRINGS["client"] | {"transformers", "tokenizers", "safetensors", "huggingface_hub", "tqdm"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3


@pytest.mark.parametrize(
    ("argv", "package", "extra"),
    [
        (("export", "onnx", "sample", "--out", "nowhere"), "onnx_ir", "export"),
        (("serve", "generate", "a cat", "--out", "nowhere.png"), "numpy", "client"),
        (("quantize", "gate", "nowhere", "--reference", "nowhere"), "numpy", "quality"),
        (("benchmarks", "outliers"), "numpy", "all"),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_extra_to_install(
    argv: tuple[str, ...], package: str, extra: str
) -> None:
    done = flux2(*argv, "--json", given=frozenset({"numpy", "tqdm"} if package != "numpy" else ()))
    said = f"{argv[0]} {argv[1]} needs the package {package}: pip install 'flux2-deploy[{extra}]'"
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
    assert json.loads(done.stdout) == {"error": said, "exit_code": 2}


def test_a_module_of_the_kit_that_is_missing_is_a_bug_with_its_traceback() -> None:
    done = python("sys.modules['planner.command'] = None; " + COMMAND.format(argv=["kit", "plan"]), frozenset())
    assert done.returncode == 1
    assert "Traceback" in done.stderr
