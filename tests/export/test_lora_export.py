"""An export with adapters: the output of the graph, the content of the manifest, and agreement with diffusers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file

from export import __main__ as command
from export.artifact import ExportConfig, export
from export.lora.terms import Lora
from export.passes import simplify
from export.trace import FakePart
from export.weights import attach
from kit import tiny
from kit.artifact import link_or_copy, verify
from kit.configs import read_variant
from tests.export.bfl import State, to_bfl, to_diffusers
from tests.export.test_lora_merge import (
    HEADER,
    OF_BFL,
    OF_DIFFUSERS,
    Made,
    Style,
    bind,
    linears,
    lokr,
    low_rank,
    merged,
    prefixed,
    stack,
    underscored,
    write,
)
from tests.export.test_single_file import feeds_of, reference, run, session

TOLERANCE = 1e-5
Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("lora") / "checkpoint", tiny.Tiny(text_tokens=64))


@pytest.fixture(scope="module")
def state(checkpoint: Path) -> State:
    loaded: State = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    return loaded


def assert_computes(artifact: Path, checkpoint: Path, expected: State) -> None:
    """Compare the exported graph with torch, relative to the largest output."""
    runner = session(artifact, "transformer")
    feeds = feeds_of(runner)
    wanted = reference(checkpoint, expected, feeds)
    difference = np.abs(run(runner, feeds) - wanted) / np.abs(wanted).max()
    assert difference.max() <= TOLERANCE, f"max {difference.max():.2e}, mean {difference.mean():.2e} of the scale"


def test_the_graph_with_a_stack_of_three_equals_torch_with_the_deltas_added(
    checkpoint: Path, state: State, tmp_path: Path
) -> None:
    loras, expected = stack(state, tmp_path)
    made = export(checkpoint, tmp_path / "out", ExportConfig(("transformer",), loras=tuple(loras)))
    assert made.parts[0].derived_bytes == (3 + 2) * 64 * 64 * 4
    assert_computes(tmp_path / "out", checkpoint, expected)


@pytest.mark.parametrize(
    "style",
    [
        lokr(prefixed("diffusion_model."), False, True, alpha=1.0),
        low_rank(underscored("lora_unet_"), "lora_down", "lora_up", alpha=0.5),
    ],
)
def test_the_graph_with_every_linear_adapted_equals_torch_with_the_deltas_added(
    checkpoint: Path, state: State, tmp_path: Path, style: Style
) -> None:
    bfl = to_bfl(state)
    made = style(linears(bfl))
    lora = Lora(write(tmp_path, made), 0.05)
    export(checkpoint, tmp_path / "out", ExportConfig(("transformer",), loras=(lora,)))
    summed = {n: w + 0.05 * made.deltas[n.removesuffix(".weight")] if w.ndim == 2 else w for n, w in bfl.items()}
    assert_computes(tmp_path / "out", checkpoint, to_diffusers(summed))


@pytest.fixture(scope="module")
def traced(checkpoint: Path) -> ir.Model:
    """Trace the transformer once; its weights are attached to a copy for every style."""
    model = FakePart("transformer", read_variant(checkpoint), "fp32", "matmul").trace()
    simplify(model)
    return model


@pytest.mark.parametrize("style", [*OF_DIFFUSERS, *(f"{name}, their names" for name in OF_BFL)])
def test_the_graph_of_every_style_equals_torch_with_the_deltas_added(
    checkpoint: Path, state: State, traced: ir.Model, tmp_path: Path, style: str
) -> None:
    """Every linear of the transformer is adapted, in the names and with the factors of one file style."""
    of_bfl = style.endswith(", their names")
    named = to_bfl(state) if of_bfl else state
    made = (OF_BFL[style.removesuffix(", their names")] if of_bfl else OF_DIFFUSERS[style])(linears(named))
    weight = 0.02
    folder = tmp_path / "transformer"
    folder.mkdir()
    bound = bind(checkpoint, Lora(write(tmp_path, made), weight))
    model = traced.clone()
    attach(model, bound.settle(folder))
    ir.save(model, folder / "model.onnx")
    for file in bound.files:
        link_or_copy(file, folder / file.name)
    summed = {
        name: tensor + weight * made.deltas[module]
        if (module := name.removesuffix(".weight")) in made.deltas
        else tensor
        for name, tensor in named.items()
    }
    assert_computes(tmp_path, checkpoint, to_diffusers(summed) if of_bfl else summed)


class TestManifest:
    """An artifact lists the adapters it contains, and is exported again if they change."""

    @pytest.fixture
    def lora(self, state: State, tmp_path: Path) -> Lora:
        return Lora(write(tmp_path, low_rank(prefixed("transformer."))({Q: state[f"{Q}.weight"]})), 0.5)

    def export(self, checkpoint: Path, out: Path, *loras: Lora) -> bool:
        """Export; returns whether the artifact was up to date."""
        made = export(checkpoint, out, ExportConfig(("transformer",), loras=loras))
        verify(out)
        return made.up_to_date

    def test_adapters_are_recorded_by_name_weight_and_content(
        self, checkpoint: Path, tmp_path: Path, lora: Lora
    ) -> None:
        self.export(checkpoint, tmp_path / "out", lora)
        (record,) = verify(tmp_path / "out").source["loras"]
        assert record.keys() == {"file", "weight", "digest"}
        assert (record["file"], record["weight"]) == ("adapter.safetensors", 0.5)
        assert len(record["digest"]) == 64
        assert "transformer/derived.safetensors" in verify(tmp_path / "out").files

    def test_the_same_adapters_are_up_to_date_and_others_are_not(
        self, checkpoint: Path, tmp_path: Path, lora: Lora
    ) -> None:
        out = tmp_path / "out"
        assert not self.export(checkpoint, out, lora)
        assert self.export(checkpoint, out, lora)
        assert not self.export(checkpoint, out, Lora(lora.file, 0.6))
        raw = bytearray(lora.file.read_bytes())
        raw[-1] ^= 1  # other values under the same header
        lora.file.write_bytes(raw)
        assert not self.export(checkpoint, out, Lora(lora.file, 0.6))
        assert not self.export(checkpoint, out)
        assert self.export(checkpoint, out)
        assert not (out / "transformer" / "derived.safetensors").exists()

    def test_a_checkpoint_changed_in_place_is_merged_again(self, checkpoint: Path, tmp_path: Path, lora: Lora) -> None:
        own = shutil.copytree(checkpoint, tmp_path / "own")
        assert not self.export(own, tmp_path / "out", lora)
        (own / "transformer" / "diffusion_pytorch_model.safetensors").touch()
        assert not self.export(own, tmp_path / "out", lora)


def test_the_command_merges_what_it_is_given(
    checkpoint: Path, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loras, expected = stack(state, tmp_path)
    argv = ["onnx", str(checkpoint), "--out", str(tmp_path / "out"), "--parts", "transformer", "--json"]
    for lora in loras:
        argv += ["--lora", f"{lora.file}={lora.weight}"]
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("MB of weights linked, 0.1 MB computed and written")
    assert json.loads(lines[-1])["derived_bytes"] == (3 + 2) * 64 * 64 * 4
    derived = load_file(tmp_path / "out" / "transformer" / "derived.safetensors")
    assert all(torch.allclose(tensor, expected[name], atol=TOLERANCE) for name, tensor in derived.items())


class TestAgainstDiffusers:
    """Where diffusers applies a file as it is meant, the kit merges the same weights."""

    # By style: whether the file has black-forest-labs' names, and the modules that diffusers can load from it. It drops
    # or misapplies modulations and the last layer's.
    LOADED: dict[str, tuple[bool, str, Style]] = {
        "diffusers": (False, r"(?!norm_out|.*modulation).*", low_rank(prefixed("transformer."))),
        "alpha in the header": (False, r".*\.to_[qkv]", low_rank(prefixed("transformer."), metadata=HEADER)),
        "ai-toolkit": (True, r"(?!.*modulation).*", low_rank(prefixed("diffusion_model."))),
        "peft": (True, r"(?!.*modulation).*", low_rank(prefixed("base_model.model."))),
        "kohya": (
            True,
            r"(?!.*modulation).*",
            low_rank(underscored("lora_unet_"), "lora_down", "lora_up", alpha=1.0),
        ),
        "expanded": (False, r".*_blocks\..*", low_rank(prefixed("diffusion_model."))),
    }

    @pytest.fixture
    def pipe(self, checkpoint: Path) -> Any:
        loaded = Flux2KleinPipeline.from_pretrained(checkpoint)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    def made(self, state: State, style: str) -> Made:
        of_bfl, pattern, make = self.LOADED[style]
        modules = linears(to_bfl(state) if of_bfl else state)
        return make({name: weight for name, weight in modules.items() if re.fullmatch(pattern, name)})

    def effective(self, pipe: Any) -> State:
        """Return the weights including the active adapters."""
        pipe.fuse_lora()
        fused = pipe.transformer.state_dict()
        return {n.replace(".base_layer.", "."): t for n, t in fused.items() if "lora_" not in n}

    def assert_same(self, ours: State, theirs: State) -> None:
        assert ours.keys() == theirs.keys()
        worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
        assert worst <= TOLERANCE

    @pytest.mark.parametrize("style", LOADED)
    def test_one_file(self, checkpoint: Path, state: State, tmp_path: Path, pipe: Any, style: str) -> None:
        file = write(tmp_path, self.made(state, style))
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        self.assert_same(merged(checkpoint, tmp_path, Lora(file)), self.effective(pipe))

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
    def test_several_files_with_weights(self, checkpoint: Path, state: State, tmp_path: Path, pipe: Any) -> None:
        weights = {"diffusers": 0.7, "kohya": -0.4, "alpha in the header": 1.3}
        loras = []
        for i, (style, weight) in enumerate(weights.items()):
            loras.append(Lora(write(tmp_path, self.made(state, style), f"{i}.safetensors"), weight))
            pipe.load_lora_weights(str(tmp_path), weight_name=f"{i}.safetensors", adapter_name=f"a{i}")
        pipe.set_adapters([f"a{i}" for i in range(len(loras))], list(weights.values()))
        self.assert_same(merged(checkpoint, tmp_path, *loras), self.effective(pipe))

    def test_a_lokr_file(self, checkpoint: Path, state: State, tmp_path: Path, pipe: Any) -> None:
        made = lokr(underscored("lycoris_"), False, True, alpha=1.0, height=8)({Q: state[f"{Q}.weight"]})
        file = write(tmp_path, made)
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        pipe.fuse_lora()
        fused = {n.replace(".base_layer.", "."): t for n, t in pipe.transformer.state_dict().items()}
        ours = merged(checkpoint, tmp_path, Lora(file))
        self.assert_same(ours, {name: fused[name] for name in ours})
