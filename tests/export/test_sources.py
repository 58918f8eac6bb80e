"""Sources of an export: folders, single files that replace their parts, and the hub."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from export import __main__ as command
from export.sources import Sources, find_sources
from kit import checkpoint as kit_checkpoint
from kit import tiny
from kit.checkpoint import PUBLISHED, resolve
from kit.errors import CheckpointError, UsageError
from kit.ports import PARTS
from kit.variants import VARIANTS
from tests.export.bfl import to_bfl

ALL_FILES = [
    "model_index.json",
    "flux2-dev.safetensors",
    "ae.safetensors",
    "README.md",
    "teaser.png",
    "tokenizer/chat_template.jinja",
    "tokenizer/merges.txt",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "checkpoint", tiny.Tiny(text_tokens=64))


@pytest.fixture
def single(checkpoint: Path, tmp_path: Path) -> Path:
    file = tmp_path / "flux2.safetensors"
    save_file(to_bfl(load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")), file)
    return file


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Answer downloads with the tiny checkpoint; returns the list of requests."""
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, [f for f in ALL_FILES if any(fnmatch.fnmatch(f, p) for p in allow_patterns)]))
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


class TestSingleFiles:
    """--config, --transformer and --vae."""

    def test_a_single_file_is_the_transformer_of_its_config(self, checkpoint: Path, single: Path) -> None:
        expected = Sources(checkpoint, {"transformer": single})
        assert find_sources(str(single), PARTS, config=str(checkpoint)) == expected
        assert find_sources(str(checkpoint), PARTS, transformer=str(single)) == expected

    def test_a_vae_file_goes_with_either(self, checkpoint: Path, single: Path) -> None:
        found = find_sources(str(single), PARTS, config=str(checkpoint), vae=str(single))
        assert found.single_files == {"transformer": single, "vae": single}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"checkpoint": "{file}"}, "flux2.safetensors is a single file, which holds .* other parts as --config"),
            (
                {"checkpoint": "{file}", "transformer": "{file}"},
                "flux2.safetensors and --transformer .*flux2.safetensors both give the transformer; pass one",
            ),
            (
                {"checkpoint": "{folder}", "config": "{folder}"},
                "--config requires a single file; .*checkpoint is not a file",
            ),
            ({"checkpoint": "{folder}", "transformer": "nowhere"}, "--transformer nowhere is not a file"),
            ({"checkpoint": "{folder}", "vae": "{folder}"}, "--vae .*checkpoint is not a file"),
            (
                {"checkpoint": "{folder}", "vae": "{file}", "parts": ("transformer",)},
                "flux2.safetensors replaces the vae, which --parts leaves out",
            ),
            ({"checkpoint": "{file}", "config": "{file}"}, "flux2.safetensors: is a file; a checkpoint is a folder in"),
            ({"checkpoint": "{file}", "config": "nowhere"}, "nowhere does not exist; give a folder"),
        ],
    )
    def test_what_makes_no_sense_is_refused(
        self, checkpoint: Path, single: Path, options: dict[str, Any], message: str
    ) -> None:
        filled: dict[str, Any] = {"parts": PARTS} | {
            key: value.format(file=single, folder=checkpoint) if isinstance(value, str) else value
            for key, value in options.items()
        }
        with pytest.raises(UsageError, match=message):
            find_sources(**filled)

    def test_the_command_exports_a_single_file_without_the_folder_it_replaces(
        self, checkpoint: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        argv = ["onnx", str(single), "--config", str(checkpoint), "--out", str(tmp_path / "out")]
        assert command.main([*argv, "--parts", "transformer"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("MB computed and written")
        assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()
        assert (tmp_path / "out" / "transformer" / "flux2.safetensors").samefile(single)


class TestHub:
    """Hub ids and names of published variants."""

    def test_a_hub_id_is_downloaded_without_what_no_export_reads(
        self, hub: list[tuple[str, list[str]]], checkpoint: Path
    ) -> None:
        assert resolve("org/model") == checkpoint
        ((repository, files),) = hub
        assert repository == "org/model"
        unread = {
            "flux2-dev.safetensors",
            "ae.safetensors",
            "README.md",
            "teaser.png",
            "text_encoder/pytorch_model.bin",
        }
        assert set(ALL_FILES) - set(files) == unread

    def test_only_weights_that_are_exported_are_downloaded(
        self, hub: list[tuple[str, list[str]]], single: Path
    ) -> None:
        find_sources(str(single), ("transformer", "vae_decoder"), config="org/model")
        ((_, files),) = hub
        assert [f for f in files if f.endswith(".safetensors")] == ["vae/diffusion_pytorch_model.safetensors"]
        assert "text_encoder/model.safetensors" not in files
        assert "transformer/config.json" in files

    def test_a_published_variant_is_its_hub_id(self, hub: list[tuple[str, list[str]]], checkpoint: Path) -> None:
        assert set(PUBLISHED) == set(VARIANTS)
        assert resolve("klein-4b") == checkpoint
        assert hub[0][0] == "black-forest-labs/FLUX.2-klein-4B"

    def test_a_folder_of_that_name_comes_first(
        self, hub: list[tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        tiny.save(tmp_path / "klein-4b", tiny.Tiny(text_tokens=64))
        assert resolve("klein-4b") == tmp_path / "klein-4b"
        assert not hub

    def test_a_repository_of_another_layout_is_refused(
        self, hub: list[tuple[str, list[str]]], checkpoint: Path
    ) -> None:
        (checkpoint / "model_index.json").unlink()
        with pytest.raises(CheckpointError, match=r"org/model: has no model_index.json, so it is not a checkpoint"):
            resolve("org/model")

    def test_offline_is_one_clear_sentence(self) -> None:
        """The tests run with HF_HUB_OFFLINE, so this is what the library itself does."""
        with pytest.raises(UsageError, match=r"'org/model' cannot be downloaded from the hub \(.*\); give a folder in"):
            resolve("org/model")

    @pytest.mark.parametrize(
        "error", [LocalEntryNotFoundError("no network\nand much more"), ConnectionError("no network\nat all")]
    )
    def test_a_failed_download_is_one_line(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(UsageError, match=rf"\({type(error).__name__}: no network\); give a folder") as refusal:
            kit_checkpoint.download("org/model", ())
        assert "\n" not in str(refusal.value)
