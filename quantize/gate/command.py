"""`quantize gate`: compare the images of two artifacts and exit with 1 if they break the quality contract."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from kit.artifact import Manifest, tool_versions
from kit.atomic_folder import building
from kit.certificate import Certificate, certify
from kit.errors import CheckFailed, UsageError
from kit.graph_runtimes import DEFAULT_RUNTIME, GRAPH_RUNTIMES
from kit.hardware import look
from kit.outputs import GATE, file_of
from quantize import prompt_set
from quantize.gate import contract as contracts
from quantize.gate.admission import Admitted, admit, speaks_the_samples_grammar
from quantize.gate.contract import Contract
from quantize.gate.metrics import LATENT, METRICS
from quantize.gate.report import REPORT, Report, summarize, to_markdown

SAMPLE_PROMPTS = "sample:200"  # with fewer, the interval is too wide to prove a loss of less than a point
KIT_PROMPTS = "kit"
SHOWN = 24
PACKAGES = (
    "onnxruntime",
    "openvino",
    "numpy",
    "scipy",
    "scikit-image",
    "flip-evaluator",
    "rapidocr",
    "lpips",
    "torch",
    "transformers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quantize gate`."""
    parser.add_argument(
        "artifact",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="the candidate: an artifact of any kind that this machine can run, or with --url the one that the server "
        "deploys; the verdict is written into it as its certificate",
    )
    parser.add_argument(
        "--url", metavar="HOST:PORT", help="gRPC port of a server that generates the candidate's images; default: none"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        metavar="DIR",
        help="the high-precision artifact of the same checkpoint, of any kind that this machine can run",
    )
    parser.add_argument(
        "--prompts",
        metavar="SET",
        help=f"`kit`, `kit:N`, `sample:N`, `sample:N:SEED` or a file; default: {SAMPLE_PROMPTS} for the sample, "
        f"{KIT_PROMPTS} otherwise, without the prompts that DIR was calibrated on",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="images per prompt")
    parser.add_argument(
        "--contract",
        metavar="NAME|FILE",
        help="the name of a recipe, or a TOML or JSON file with bounds; default: the candidate's recipe",
    )
    parser.add_argument("--width", type=int, metavar="PIXELS", help="width of the images; default: the checkpoint's")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="height of the images; default: the checkpoint's")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps; default: the variant's")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; default: the variant's")
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="CLIP model in transformers' layout, for the CLIP score; default: none"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads of the runtime; 0: one per core")
    parser.add_argument(
        "--runtime",
        choices=GRAPH_RUNTIMES,
        default=DEFAULT_RUNTIME,
        help="runtime of the candidate's graphs; the reference runs in ONNX Runtime, and only a verdict on images that "
        "ONNX Runtime computed is stored as a certificate",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for report.json, report.md and index.html; default: no report is written",
    )
    parser.add_argument("--images", type=int, default=SHOWN, metavar="N", help="image pairs in the report")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the gate and return the facts; raises CheckFailed, once the report is written, if the contract is broken."""
    for name, least in (("seeds", 1), ("images", 0), ("threads", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)} is less than {least}")
    if args.artifact is None and args.url is None:
        raise UsageError("the candidate is missing: give the folder of an artifact, --url HOST:PORT, or both")
    if args.url is not None and args.runtime != DEFAULT_RUNTIME:
        raise UsageError(
            f"--runtime {args.runtime} is for a candidate in this process; the server at --url has its own"
        )
    if args.artifact is None and args.contract is None:
        raise UsageError("--url alone does not tell the recipe; give --contract NAME, or the folder that is deployed")
    inputs = [args.artifact, args.reference, args.clip, file_of(args.prompts), file_of(args.contract)]
    with _folder(args.out, inputs) as folder:
        report = gate(args, folder)
    print(to_markdown(report), end="")
    where = f"; see {args.out / REPORT}" if args.out else "; --out DIR keeps the report and the images"
    if report.faults:
        raise CheckFailed(f"contract {report.contract.name} broken: {'; '.join(report.faults)}{where}", report.facts())
    return {**report.facts(), "out": str(args.out) if args.out else None}


def gate(args: argparse.Namespace, folder: Path) -> Report:
    """Check everything that needs no image, generate, measure, and write the report to `folder`."""
    served = args.url is not None
    admitted = admit(args.artifact, args.reference, served)
    for warning in admitted.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    contract = _contract(args, admitted)
    prompts, more = choose(args.prompts, admitted, contract)
    if served:
        contract = contract.without(*LATENT)
        more = (*more, "a server returns no latents: only images are compared")
    for warning in more:
        print(f"warning: {warning}", file=sys.stderr)

    from pipeline.request import Limits, check  # imported once the arguments are known to be valid

    first = {"prompt": prompts.prompts[0].text, "seed": 0}
    wanted = {name: getattr(args, name) for name in ("width", "height", "steps", "guidance")}
    drawn = check(first | wanted, admitted.reference.variant, Limits())
    _check_lengths(args.reference, admitted.reference, prompts.prompts)

    from quantize.gate.drawing import Canvas, Generate, Side, compare, open_generator
    from quantize.gate.measures import Scope, available
    from quantize.gate.page import IMAGES, PAGE, chosen, keep_images, page

    canvas = Canvas(drawn.width, drawn.height, drawn.steps, drawn.guidance)
    if served:
        from quantize.gate.server import open_server

        opened = open_server(args.url, canvas)  # before the reference is drawn, which takes time

    def candidate() -> Generate:
        return opened if served else open_generator(args.artifact, canvas, args.threads, args.runtime)

    measures, unmeasured = available(Scope(prompts.prompts, drawn.width, drawn.height, args.clip))
    measurable = METRICS.keys() - unmeasured.keys()
    for gap in contract.gaps(measurable, unmeasured, len(prompts.prompts)):
        print(f"warning: the contract cannot be met: {gap}", file=sys.stderr)
    images = folder / IMAGES
    images.mkdir()
    from tqdm import tqdm

    total = 2 * len(prompts.prompts) * args.seeds
    with tqdm(total=total, desc="gate", unit="image", disable=not sys.stderr.isatty(), leave=False) as bar:

        def tick(side: Side) -> None:
            bar.set_postfix_str(side, refresh=False)
            bar.update()

        generators: dict[Side, Callable[[], Generate]] = {
            "reference": lambda: open_generator(args.reference, canvas, args.threads),
            "candidate": candidate,
        }
        pairs = compare(generators, prompts.prompts, args.seeds, measures, images, tick)
    setting = {
        "candidate": _identity(args.artifact, admitted.candidate, args.url),
        "reference": _identity(args.reference, admitted.reference),
        "prompts": {"spec": Path(prompts.spec).name, "digest": prompts.digest, "count": len(prompts.prompts)},
        "runtime": None if served else args.runtime,
        "seeds": args.seeds,
        "canvas": {"width": drawn.width, "height": drawn.height, "steps": drawn.steps, "guidance": drawn.guidance},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": _processor(),
        "versions": tool_versions(*PACKAGES),
    }
    report = summarize(pairs, unmeasured, contract, setting, admitted.warnings + more)
    if args.artifact is not None and args.runtime == DEFAULT_RUNTIME:
        _certify(args, report)
    shown = chosen(report, args.images)
    keep_images(images, pairs, shown)
    (folder / PAGE).write_text(page(report, shown), encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def choose(spec: str | None, admitted: Admitted, contract: Contract) -> tuple[prompt_set.PromptSet, tuple[str, ...]]:
    """Return the prompts to use, and warnings about them.

    By default these are the prompts that the candidate was not calibrated on, if there are enough of them.
    """
    default = SAMPLE_PROMPTS if speaks_the_samples_grammar(admitted.reference) else KIT_PROMPTS
    prompts = prompt_set.load(spec or default)
    source = admitted.candidate.source if admitted.candidate is not None else {}
    fresh = prompts.without(source.get("calibration_prompts", ()))
    seen = len(prompts.prompts) - len(fresh.prompts)
    if not seen or (spec is None and len(fresh.prompts) >= contract.least_prompts):
        return fresh, ()
    warning = (
        f"the candidate was calibrated on {seen} of these {len(prompts.prompts)} prompts, and may score better on them "
        "than on others: calibrate on fewer (--prompts kit:96), or gate with other --prompts"
    )
    return prompts, (warning,)


@contextmanager
def _folder(out: Path | None, inputs: Sequence[Path | None]) -> Iterator[Path]:
    """Provide the folder of the report, which is renamed to `out` when complete; without `out`, a temporary one."""
    if out is not None:
        with building(out, GATE, inputs) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="gate-") as temporary:
            yield Path(temporary)


def _check_lengths(artifact: Path, manifest: Manifest, prompts: Sequence[prompt_set.Prompt]) -> None:
    """Reject prompts that are too long for the text encoder before anything is generated."""
    from pipeline.prompts import PromptEncoder

    variant = manifest.variant
    encoder = PromptEncoder(artifact / "tokenizer", variant.text_encoder.kind, variant.text_tokens)
    for prompt in prompts:
        encoder.encode(prompt.text, f"prompt {prompt.id}")


def _processor() -> dict[str, Any]:
    """Name the CPU and the instruction sets that ONNX Runtime chooses its kernels by."""
    cpu = look(Path.cwd()).cpu
    return {"name": cpu.name, "cores": cpu.cores, "features": list(cpu.features)}


def _contract(args: argparse.Namespace, admitted: Admitted) -> Contract:
    """Return the contract that is asked for, or that of the candidate's recipe."""
    if args.contract:
        return contracts.find(args.contract)
    assert admitted.candidate is not None
    return contracts.of_recipe(admitted.candidate.recipe, speaks_the_samples_grammar(admitted.reference))


def _certify(args: argparse.Namespace, report: Report) -> None:
    """Write the verdict into the candidate; a folder that cannot be written to is a warning."""
    facts = report.facts()
    certificate = Certificate(
        kept=report.kept,
        contract=report.contract.name,
        faults=tuple(report.faults),
        metrics={name: {key: row[key] for key in ("mean", "low", "high")} for name, row in facts["metrics"].items()},
        prompts=facts["prompts"],
        reference=facts["reference"],
        date=facts["date"],
        system=facts["system"],
        drawn_by=args.url or "this process",
        versions=facts["versions"],
    )
    try:
        certify(args.artifact, certificate)
    except OSError as error:
        print(f"warning: no certificate was written into {args.artifact}: {error.strerror}", file=sys.stderr)


def _identity(folder: Path | None, manifest: Manifest | None, url: str | None = None) -> dict[str, Any]:
    if folder is None or manifest is None:
        return {"name": str(url), "variant": None, "recipe": "unknown", "compute": "unknown", "kind": "server"}
    return {
        "name": folder.resolve().name,
        **({"url": url} if url else {}),
        "variant": manifest.variant.name,
        "recipe": manifest.recipe,
        "compute": manifest.compute,
        "kind": manifest.kind,
        "calibrated_on": _calibrated_on(manifest),
    }


def _calibrated_on(manifest: Manifest) -> dict[str, Any] | None:
    """Name the set of calibration prompts by its size and digest; None without one."""
    marks = sorted(manifest.source.get("calibration_prompts", ()))
    return {"prompts": len(marks), "digest": sha256("".join(marks).encode()).hexdigest()[:16]} if marks else None
