"""Write a deployment: a Triton model repository, from an exported artifact."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from kit.artifact import (
    CERTIFICATE,
    MANIFEST,
    Manifest,
    PartRecord,
    digest,
    link_or_copy,
    step_versions,
    verified_or_none,
    verify,
    write_manifest,
)
from kit.atomic_folder import building
from kit.certificate import certificate_of, require
from kit.cuda_device import this_machine
from kit.errors import Flux2Error, UsageError
from kit.graph_runtimes import GRAPH_RUNTIMES
from kit.outputs import DEPLOYMENT, check_out
from kit.ports import KV_PARTS, PartName
from pipeline import preview
from pipeline.images import encode
from pipeline.local import LocalPipeline
from pipeline.request import Limits
from runtimes.aoti import record as aoti_record
from runtimes.open import open_parts
from runtimes.trt.record import KERNELS, RECORD, EngineRecord, mismatch, write_record
from serve import aoti_deploy, contents, fastest_runtime, reference_deploy, tensorrt_deploy
from serve.probe import ANSWER, question, this_kind
from serve.settings import GraphChoice, KnownAnswer, Runtime, Settings, Tuning
from serve.triton_config import configs
from serve.wire import DENOISER, IMAGE_STAGE, PROMPT_STAGE, VAE_ENCODER

REVISION = 9  # raise when the same artifact and settings give another deployment, including its models' code

RUNTIMES: Mapping[str, Runtime] = {"engine": "tensorrt", "aoti": "aoti"}  # by the kind of the artifact

# models, each with a part it runs and the folder of the part's graph below the version folder
_PLACES: tuple[tuple[str, PartName, str], ...] = (
    ("text_encoder", "text_encoder", "."),
    (DENOISER, "transformer", "transformer"),
    ("vae_decoder", "vae_decoder", "."),
)
_REFERENCE_PLACES: tuple[tuple[str, PartName, str], ...] = (
    (VAE_ENCODER, "vae_encoder", "."),
    *((DENOISER, part, "transformer") for part in KV_PARTS),  # graphs of one folder, which share its weights
)


def write_repository(
    artifact: Path,
    out: Path,
    limits: Limits,
    tuning: Tuning,
    known_answer: KnownAnswer = "generate",
    require_gate: bool = False,
    copy: bool = False,
    runtime: GraphChoice | Literal["auto"] = "ort-cpu",
    progress: contents.Progress = lambda done, total: None,
) -> Manifest:
    """Write a deployment of `artifact` to `out`; its files are hard links, or copies with `copy`.

    The known answer that `serve run` requests before it reports ready is generated here, by the same engines in this
    process, and the map of previews is fitted to the VAE encoder if the artifact has one. With "none", a deployment can
    be written on a machine that cannot load the engines; it has no previews, and `serve run` checks only the size of
    the image and that it has more than one color. A certificate of `quantize gate` is copied; with `require_gate` an
    artifact without one that passed is rejected by a CheckFailed. `runtime` is what runs ONNX graphs; "auto" is
    the fastest of this CPU, by steps that are timed here and kept in the manifest. Raises UsageError or ArtifactError
    if the artifact is incomplete or does not verify.
    """
    check_out(out, DEPLOYMENT, [artifact])
    manifest = verify(artifact, kinds=("onnx", "quantized", "engine", "aoti"))
    if require_gate and runtime == "openvino-bf16":
        raise UsageError(
            "--require-gate: certificates do not cover openvino-bf16, which rounds differently from the runtime that "
            "was judged"
        )
    if require_gate:
        require(artifact, manifest)
    record = EngineRecord.of(manifest) if manifest.kind == "engine" else None
    if record is not None:
        _check_engine(record, limits, known_answer)
    elif manifest.kind == "aoti":
        limits = aoti_deploy.limits_of(artifact, manifest, limits)
    elif runtime not in (*GRAPH_RUNTIMES, "auto"):
        if known_answer == "generate":
            raise UsageError(f"--runtime {runtime}: known answers are generated on a CPU; pass --known-answer none")
    elif manifest.compute != "fp32":
        raise UsageError(
            f"{artifact} computes in {manifest.compute}, which no CPU runtime supports; export it "
            "with --dtype fp32, or build engines from it"
        )
    if manifest.kind in RUNTIMES and runtime != "ort-cpu":
        raise UsageError(f"--runtime {runtime} is for ONNX graphs; {artifact} is an artifact of kind {manifest.kind!r}")
    measured: fastest_runtime.Seconds = {}
    if runtime == "auto":
        measured = fastest_runtime.measure(artifact, manifest, limits, tuning.threads)
        runtime = fastest_runtime.fastest(measured)
    chosen: Runtime = RUNTIMES.get(manifest.kind, runtime)
    limits = reference_deploy.limits_of(manifest, record, limits)
    wanted = reference_deploy.parts_of(manifest.variant, limits)
    places = [*_PLACES, *(place for place in _REFERENCE_PLACES if place[1] in wanted)]
    settings = Settings(
        variant=manifest.variant,
        compute=manifest.compute,
        limits=limits,
        tuning=tuning,
        ports={name: manifest.part(name).ports for name in sorted(part for _, part, _ in places)},
        tensorrt=tensorrt_deploy.models(record, wanted) if record is not None else {},
        runtime=chosen,
        gpu=aoti_deploy.on_gpu(manifest) if chosen == "aoti" else chosen not in GRAPH_RUNTIMES,
        recipe=manifest.recipe,
        checkpoint=digest(artifact / MANIFEST),
    )
    linked = {
        part: sorted(path for path in (artifact / manifest.part(part).graph).parent.iterdir() if path.suffix != KERNELS)
        for _, part, _ in places
    }
    total = contents.check_space(out, sorted({path for paths in linked.values() for path in paths})) if copy else 0
    weights: dict[str, contents.Content] = {}
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with building(out, DEPLOYMENT, [artifact]) as folder:
        for name, text in configs(settings).items():
            version = folder / name / "1"
            version.mkdir(parents=True)
            (folder / name / "config.pbtxt").write_text(text)
            if name not in (PROMPT_STAGE, IMAGE_STAGE) and not _is_native(name, settings):
                _add_code(name, version, settings)
        parts = {}
        for model, part, below in places:
            exported = manifest.part(part)
            source = artifact / exported.graph
            target = folder / model / "1" / below
            if manifest.kind in RUNTIMES:
                target = target if _is_native(model, settings) else folder / model / "1" / part
            for path in linked[part]:
                placed = target / path.name
                if placed.exists():
                    continue
                if copy:
                    found = contents.copy_file(path, placed, report)
                else:
                    link_or_copy(path, placed)
                    found = contents.Content.of(placed)
                if path.suffix == ".safetensors":
                    weights[str(placed.relative_to(folder))] = found
            if record is not None and not _is_native(model, settings):
                write_record(folder / model / "1" / RECORD, record)
            if chosen == "aoti":
                aoti_record.write_record(folder / model / "1" / aoti_record.RECORD, manifest)
            graph = (target / source.name).relative_to(folder)
            parts[part] = PartRecord(str(graph), exported.ports)
        shutil.copytree(artifact / "tokenizer", folder / "tokenizer" / "1" / "tokenizer")
        if chosen != "openvino-bf16" and certificate_of(artifact, manifest) is not None:
            shutil.copyfile(artifact / CERTIFICATE, folder / CERTIFICATE)
        deployment = Manifest(
            kind="deployment",
            variant=manifest.variant,
            compute=manifest.compute,
            recipe=manifest.recipe,
            options={
                **({"known_answer": this_kind()} if known_answer == "generate" and chosen == "ort-cpu" else {}),
                **({"step_seconds": dict(measured)} if measured else {}),
            },
            source=_source(artifact),
            parts=parts,
            versions=_versions(),
        )
        if known_answer == "generate":
            write_manifest(folder, deployment)
            if "vae_encoder" in manifest.parts:
                (encoder,) = open_parts(artifact, manifest, ("vae_encoder",)).values()
                preview.fit(encoder, manifest.compute).save(folder / DENOISER / "1" / preview.PREVIEW_FILE)
            local = (
                LocalPipeline(folder, limits, runtime=chosen)
                if chosen in GRAPH_RUNTIMES
                else LocalPipeline(artifact, limits)
            )
            answer = local.generate(question(limits))
            (folder / ANSWER).write_bytes(encode(answer.pixels[0], "png"))
        written = write_manifest(folder, deployment)
        contents.write_contents(folder, weights)
        return written


def _check_engine(record: EngineRecord, limits: Limits, known_answer: KnownAnswer) -> None:
    """Raise UsageError if requests could exceed the profiles, or if the known answer cannot be generated here."""
    if why := tensorrt_deploy.limits_refusal(record, limits):
        raise UsageError(why)
    if known_answer == "generate" and (why := mismatch(record, this_machine())):
        raise UsageError(f"the known answer cannot be generated here: {why}; or pass --known-answer none")


def _is_native(model: str, settings: Settings) -> bool:
    """Return whether Triton's own TensorRT backend runs a model, which then needs no Python code."""
    part = next((part for name, part, _ in (*_PLACES, *_REFERENCE_PLACES) if name == model), None)
    return part in settings.tensorrt and settings.tensorrt[part].backend == "tensorrt_plan"


def is_current(out: Path, artifact: Path, limits: Limits, tuning: Tuning) -> bool:
    """Return whether the deployment at `out` verifies and was made by this kit from this artifact and settings."""
    made = verified_or_none(out, ("deployment",))
    if made is None:
        return False
    try:
        settings = Settings.read(out / "tokenizer" / "1")
    except Flux2Error:
        return False
    if settings.runtime not in ("ort-cpu", *RUNTIMES.values()):
        return False
    same = (replace(settings.limits, sizes=(), no_references=""), settings.tuning) == (limits, tuning)
    return same and made.source == _source(artifact) and dict(made.versions) == _versions()


def _source(artifact: Path) -> dict[str, Any]:
    return {"artifact": artifact.name, "manifest": digest(artifact / MANIFEST)}


def _versions() -> dict[str, str]:
    return step_versions("serve", REVISION, "onnxruntime", "transformers", "numpy", "pillow", "torch")


def _code(model: str) -> str:
    return (resources.files("model_repository") / model / "1" / "model.py").read_text()


def _add_code(model: str, version: Path, settings: Settings) -> None:
    (version / "model.py").write_text(_code(model))
    settings.write(version)
