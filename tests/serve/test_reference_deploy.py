"""Which references a deployment takes, by its artifact: parts, engines, packages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.artifact import Manifest, PartRecord
from kit.errors import RequestError, UsageError
from kit.ports import SERVED_PARTS, PartName, parts_of, ports
from kit.variants import VARIANTS
from pipeline.request import Limits, check
from runtimes.trt.profiles import Sizing, derive
from runtimes.trt.record import EngineRecord, PlanRecord
from serve import reference_deploy, tensorrt_deploy
from serve.repository import write_repository
from serve.settings import Settings, Tuning
from tests.conftest import ByFamily
from tests.pipeline.test_edit_fields import IMAGE
from tests.runtimes.test_trt_record import RECORD


def manifest(name: str, without: tuple[str, ...] = (), kind: Any = "onnx") -> Manifest:
    variant = VARIANTS[name]
    parts: dict[PartName, PartRecord] = {
        part: PartRecord(f"{part}/model.onnx", ports(part, variant, "fp32"))
        for part in parts_of(variant)
        if part not in without
    }
    return Manifest(kind, variant, "fp32", "fp32", {}, {}, parts)


def record(name: str, references: int) -> EngineRecord:
    variant, sizing = VARIANTS[name], Sizing(references=references)
    plans: dict[PartName, tuple[PlanRecord, ...]] = {
        part: (PlanRecord(f"{part}/model.plan", derive(ports(part, variant, "bf16"), sizing), 1),)
        for part in parts_of(variant)
    }
    return replace(RECORD, plans=plans)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (manifest("klein-4b"), ""),
        (manifest("klein-9b-kv"), ""),
        (
            manifest("klein-4b", ("vae_encoder",)),
            "this deployment has no VAE encoder; deploy an artifact that has one",
        ),
        (
            manifest("klein-9b-kv", ("transformer_cached",)),
            "this deployment has no transformer_cached; deploy an artifact that has one",
        ),
        (
            manifest("klein-4b", kind="aoti"),
            "this deployment runs packages of fixed sizes and takes no references; deploy graphs or engines",
        ),
    ],
)
def test_a_request_is_told_what_the_deployment_lacks(made: Manifest, sentence: str) -> None:
    limits = reference_deploy.limits_of(made, None, Limits())
    assert limits.no_references == sentence
    expected = f"none: {sentence}" if sentence else "at most 4 a request"
    assert reference_deploy.describe(made.variant, limits) == expected
    if sentence:
        assert reference_deploy.parts_of(made.variant, limits) == ()
        with pytest.raises(RequestError, match=f"^images: {sentence}$"):
            check({"prompt": "x", "images": [IMAGE]}, made.variant, limits)
    else:
        assert set(reference_deploy.parts_of(made.variant, limits)) == set(parts_of(made.variant)) - set(SERVED_PARTS)


@pytest.mark.parametrize("name", ["klein-4b", "klein-9b-kv"])
def test_engines_take_as_many_references_as_they_were_built_for(name: str) -> None:
    made, wide = manifest(name, kind="engine"), record(name, 4)
    assert reference_deploy.limits_of(made, wide, Limits()) == Limits()
    with pytest.raises(UsageError, match="--max-references 10: the engines accept 2 beside the largest image: --max-r"):
        reference_deploy.limits_of(made, record(name, 2), Limits())
    two = Limits(max_references=2)
    assert reference_deploy.limits_of(made, record(name, 2), two) == two
    wanted = reference_deploy.parts_of(made.variant, two)
    assert {tensorrt_deploy.models(wide, wanted)[part].backend for part in wanted} == {"python"}


def test_an_image_that_no_profile_of_the_vae_encoder_takes_is_refused() -> None:
    made = record("klein-4b", 4)
    assert tensorrt_deploy.image_refusal(made, 1024, 1024) is None
    assert tensorrt_deploy.image_refusal(made, 2048, 512) is None
    assert tensorrt_deploy.image_refusal(made, 2896, 352) == (
        "2896 x 352 pixels are encoded; the engine of this deployment takes sides of 64 to 2048"
    )


def test_engines_built_without_references_still_generate() -> None:
    made = reference_deploy.limits_of(manifest("klein-4b", kind="engine"), record("klein-4b", 0), Limits())
    assert "were built without references; build them with --references N" in made.no_references


def test_a_deployment_without_references_has_no_vae_encoder(artifact_of: ByFamily, tmp_path: Path) -> None:
    write_repository(artifact_of("klein"), tmp_path / "deploy", Limits(max_references=0), Tuning(), "none")
    assert not (tmp_path / "deploy" / "vae_encoder").exists()
    settings = Settings.read(tmp_path / "deploy" / "denoiser" / "1")
    assert not settings.takes_references
    with pytest.raises(RequestError, match="images: this deployment takes no references; write it with --max-ref"):
        check({"prompt": "x", "images": [IMAGE]}, settings.variant, settings.limits)
