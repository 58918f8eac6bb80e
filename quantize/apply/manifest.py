"""The manifest of a quantized artifact: each layer's scheme, the smoothing, and what the artifact was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kit.artifact import MANIFEST, Manifest, digest, step_versions
from kit.ports import PartName
from kit.recipes import Recipe
from quantize.apply.plan import QuantizationPlan
from quantize.calibration.record import Record

REVISION = 2  # raised when the same artifact, recipe and record give another result


def quantized_manifest(
    source: Path, manifest: Manifest, recipe: Recipe, record: Record | None, plans: Mapping[PartName, QuantizationPlan]
) -> Manifest:
    """Derive the manifest of the result from the manifest of the artifact at `source`, before anything is written."""
    layers = {
        part: {
            linear.name: {"scheme": change.scheme_name, "activation_scale": change.scale}
            for change in plan.changes
            for linear in change.linears
        }
        for part, plan in plans.items()
    }
    smoothing = {
        site: {"alpha": smoothing.alpha, "expected_gain": round(smoothing.gain, 3)}
        for plan in plans.values()
        for site, smoothing in plan.smoothings.items()
    }
    attentions = {found.block: found.scales for plan in plans.values() for found in plan.attentions}
    made = {"layers": layers, "smoothing": smoothing, **({"attention_scales": attentions} if attentions else {})}
    return replace(
        manifest,
        kind="quantized",
        recipe=recipe.name,
        options=json.loads(json.dumps({**manifest.options, **made})),
        source={
            **manifest.source,
            "parent": digest(source / MANIFEST),
            "weights": {file: (source / file).stat().st_mtime_ns for file in manifest.files if _holds_weights(file)},
            "calibration": record.digest if record is not None and recipe.needs_calibration else None,
            "calibration_prompts": record.marks if record is not None and recipe.needs_calibration else [],
        },
        versions={**manifest.versions, **step_versions("quantize", REVISION, "torch", "onnx-ir")},
        files={},
    )


def _holds_weights(file: str) -> bool:
    """Return whether a file holds weights: its digest covers only the header, so new values show in the time stamp."""
    return file.endswith(".safetensors")
