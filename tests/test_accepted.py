"""Every row of docs/accepted.md is tested under its name, and every tested form has a row."""

from __future__ import annotations

import re
from pathlib import Path

from tests.export import lora_files, test_checkpoint_forms, test_lora_forms

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "accepted.md"
FORMS, LORAS = "tests/export/test_checkpoint_forms.py", "tests/export/test_lora_forms.py"
# Rows that are not parameters of one test, and the tests that show them.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "LoRA of the text encoder": (LORAS, "test_a_lora_is_merged_into_it"),
    "diffusers folder, sharded or not": ("tests/export/test_artifact.py", "shard_bytes"),
    "single file of Black Forest Labs": ("tests/export/test_single_file.py", "test_the_graph_computes_the_same"),
    "single file of a text encoder": (FORMS, "test_an_all_in_one_file_gives_each_part"),
    "all-in-one file": (FORMS, "test_an_all_in_one_file_gives_each_part"),
    "one variant of weight files": (FORMS, "test_the_one_there_is_read"),
    "several variants of weight files": (FORMS, "test_several_must_be_chosen_from"),
    "FP8, list of layers in the header": (FORMS, "test_fp8_with_a_list_of_layers_in_the_header_is_read"),
    "FP8 in folders and text encoders": (FORMS, "test_fp8_in_a_folder_is_read"),
    "artifact in a hub's cache": ("tests/kit/test_artifact.py", "test_an_artifact_in_a_hubs_cache_verifies"),
    "quantization_config": (FORMS, "test_a_quantization_in_a_config_is_named_first"),
    "no tokenizer.json": (FORMS, "test_it_is_needed_with_the_text_encoder_only"),
}


def rows(heading: str) -> set[str]:
    """Return the first cells of the table under a heading."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)) - {"style", "form"}


def test_every_row_is_a_tested_form_and_every_tested_form_a_row() -> None:
    tested = {
        "LoRAs that are merged": set(lora_files.ACCEPTED),
        "LoRAs that are refused": set(test_lora_forms.REFUSED),
        "Checkpoints that are read": set(test_checkpoint_forms.FP8_FORMS),
        "Checkpoints that are refused": set(test_checkpoint_forms.REFUSED),
    }
    for heading, names in tested.items():
        assert rows(heading) - set(ELSEWHERE) == names, heading


def test_the_tests_of_the_other_rows_exist() -> None:
    for row, (file, test) in ELSEWHERE.items():
        assert test in (ROOT / file).read_text(), row
        assert f"| {row} |" in PAGE.read_text()
