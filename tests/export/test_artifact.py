"""An export writes a small graph, links the weights without reading them, and never leaves a partial artifact."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export import artifact as module
from export.artifact import ExportConfig, PartReport, export
from export.graphs.vae import CHUNKS
from kit import safetensors_file, tiny
from kit.artifact import verify
from kit.configs import read_variant
from kit.errors import CheckpointError, UsageError
from kit.ports import PARTS, PartName, ports

DECODER = ExportConfig(parts=("vae_decoder",))
ByFamily = Callable[[str], Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "checkpoint", tiny.Tiny(text_tokens=64))


def graphs(artifact: Path) -> dict[PartName, onnx.ModelProto]:
    """Load the graphs without their weights: the onnx package rejects external data that is hard linked."""
    return {part: onnx.load(artifact / part / "model.onnx", load_external_data=False) for part in PARTS}


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize("family", ["klein", "dev"])
class TestWrittenArtifact:
    """Content of the folder after an export of all parts."""

    def test_verifies_and_names_ports_and_source(
        self, artifact_of: ByFamily, checkpoint_of: ByFamily, family: str
    ) -> None:
        manifest = verify(artifact_of(family), kinds=("onnx",))
        variant = read_variant(checkpoint_of(family))
        assert manifest.variant == variant
        assert {part: record.ports for part, record in manifest.parts.items()} == {
            part: ports(part, variant, "fp32") for part in PARTS
        }
        assert manifest.options == {"opset": 23, "attention": "matmul"}
        assert "transformer/config.json" in manifest.source["files"]
        assert "model_index.json" in manifest.files
        assert "scheduler/scheduler_config.json" in manifest.files
        assert "tokenizer/tokenizer.json" in manifest.files

    def test_graph_inputs_and_outputs_are_the_ports(self, artifact_of: ByFamily, family: str) -> None:
        for part, record in verify(artifact_of(family)).parts.items():
            session = ort.InferenceSession(artifact_of(family) / record.graph, providers=["CPUExecutionProvider"])
            found = [(x.name, tuple(x.shape)) for x in (*session.get_inputs(), *session.get_outputs())]
            assert found == [(p.name, p.dims) for p in (*record.ports.inputs, *record.ports.outputs)], part

    def test_every_weight_is_a_byte_range_of_a_linked_file(
        self, artifact_of: ByFamily, checkpoint_of: ByFamily, family: str
    ) -> None:
        for part, graph in graphs(artifact_of(family)).items():
            stored = (
                safetensors_file.read_folder(checkpoint_of(family) / part.split("_enc")[0].split("_dec")[0])
                if part.startswith("vae")
                else safetensors_file.read_folder(checkpoint_of(family) / part)
            )
            weights = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
            assert weights
            for weight in weights:
                source, place = stored[weight.name], external(weight)
                assert tuple(weight.dims) == source.shape
                assert (int(place["offset"]), int(place["length"])) == (source.offset, source.nbytes)
                assert source.file.samefile(artifact_of(family) / part / place["location"])

    def test_graphs_are_small_and_hold_no_weight(self, artifact_of: ByFamily, family: str) -> None:
        for part, graph in graphs(artifact_of(family)).items():
            assert (artifact_of(family) / part / "model.onnx").stat().st_size < 1_000_000
            inside = [t for t in graph.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
            assert max(int(np.prod(t.dims)) for t in inside) <= 512 * 512  # the causal mask, one byte each

    def test_no_tensor_is_double_and_all_operators_are_standard(self, artifact_of: ByFamily, family: str) -> None:
        for part, graph in graphs(artifact_of(family)).items():
            typed = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
            types = {v.type.tensor_type.elem_type for v in typed.graph.value_info} | {
                t.data_type for t in graph.graph.initializer
            }
            assert onnx.TensorProto.DOUBLE not in types, part
            assert {node.domain for node in graph.graph.node} == {""}
            assert [(o.domain, o.version) for o in graph.opset_import] == [("", 23)]
            assert not any("Sequence" in node.op_type for node in graph.graph.node)

    def test_nodes_are_named_and_nothing_tells_where_it_was_made(self, artifact_of: ByFamily, family: str) -> None:
        graph = graphs(artifact_of(family))["transformer"]
        names = [node.name for node in graph.graph.node]
        assert len(set(names)) == len(names)
        assert "transformer_blocks.0.attn.to_q/MatMul" in names
        for part in PARTS:
            raw = (artifact_of(family) / part / "model.onnx").read_bytes()
            assert b"site-packages" not in raw
            assert os.fsencode(Path(module.__file__).parent) not in raw


@pytest.mark.parametrize("attention", ["matmul", "op"])
def test_attention_form_is_the_one_asked_for(checkpoint: Path, tmp_path: Path, attention: Any) -> None:
    config = ExportConfig(parts=("transformer", "vae_decoder"), attention=attention)
    export(checkpoint, tmp_path / "out", config)
    counts = {}
    for part in ("transformer", "vae_decoder"):
        graph = onnx.load(tmp_path / "out" / part / "model.onnx", load_external_data=False)
        operators = [node.op_type for node in graph.graph.node]
        counts[part] = operators.count("Attention"), operators.count("Softmax")
    blocks = tiny.Tiny().double_blocks + tiny.Tiny().single_blocks
    assert counts["transformer"] == ((blocks, 0) if attention == "op" else (0, blocks))
    assert counts["vae_decoder"] == (0, CHUNKS)  # no TensorRT has the operator for a head of its width


def test_no_weight_is_read(checkpoint: Path, tmp_path: Path) -> None:
    """The graphs of a checkpoint whose weights are all zero are identical, byte by byte."""
    export(checkpoint, tmp_path / "real", DECODER)
    zeros = tmp_path / "zeros"
    shutil.copytree(checkpoint, zeros)
    for file in zeros.rglob("*.safetensors"):
        size, begin = file.stat().st_size, min(t.offset for t in safetensors_file.read_header(file).values())
        os.truncate(file, begin)
        os.truncate(file, size)
    export(zeros, tmp_path / "zero", DECODER)
    name = "vae_decoder/model.onnx"
    assert (tmp_path / "real" / name).read_bytes() == (tmp_path / "zero" / name).read_bytes()


def test_shards_are_linked_only_where_a_part_needs_them(tmp_path: Path) -> None:
    sharded = tiny.save(tmp_path / "sharded", tiny.Tiny(text_tokens=64), shard_bytes=200_000)
    export(sharded, tmp_path / "out", ExportConfig(parts=("text_encoder", "vae_decoder")))
    shards = {file.name for file in (sharded / "text_encoder").glob("*.safetensors")}
    linked = {file.name for file in (tmp_path / "out" / "text_encoder").glob("*.safetensors")}
    assert linked < shards  # shards that hold only upper layers are left out
    ort.InferenceSession(tmp_path / "out" / "text_encoder" / "model.onnx", providers=["CPUExecutionProvider"])


def test_bf16_weights_under_an_fp32_graph_stay_bf16_with_a_cast(tmp_path: Path) -> None:
    stored = tiny.save(tmp_path / "bf16", tiny.Tiny(small_decoder=True), dtype="bf16")
    wide = tiny.save(tmp_path / "fp32", tiny.Tiny(small_decoder=True))
    latents = np.random.default_rng(0).normal(size=(1, 128, 4, 4)).astype(np.float32)
    images = []
    for checkpoint in (stored, wide):
        out = tmp_path / f"{checkpoint.name}-out"
        export(checkpoint, out, DECODER)
        session = ort.InferenceSession(out / "vae_decoder" / "model.onnx", providers=["CPUExecutionProvider"])
        images.append(session.run(None, {"latents": latents})[0].astype(int))
    assert 0 < np.abs(images[0] - images[1]).max() <= 8  # rounded weights, the same image
    graph = onnx.load(tmp_path / "bf16-out" / "vae_decoder" / "model.onnx", load_external_data=False)
    kinds = {t.data_type for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert kinds == {onnx.TensorProto.BFLOAT16}


def test_bf16_graphs_compute_in_bf16_and_norm_in_fp32(tmp_path: Path) -> None:
    checkpoint = tiny.save(tmp_path / "bf16", tiny.Tiny("dev", text_tokens=64), dtype="bf16")
    export(checkpoint, tmp_path / "out", ExportConfig(dtype="bf16", parts=("transformer",)))
    graph = onnx.load(tmp_path / "out" / "transformer" / "model.onnx", load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in typed.graph.value_info}
    outputs = {
        op: {types.get(n.output[0]) for n in graph.graph.node if n.op_type == op} for op in ("MatMul", "ReduceMean")
    }
    assert outputs["MatMul"] <= {onnx.TensorProto.BFLOAT16, None}  # the last one is the graph's output
    assert outputs["ReduceMean"] == {onnx.TensorProto.FLOAT}
    assert {p.name: p.type.tensor_type.elem_type for p in graph.graph.input}["timestep"] == onnx.TensorProto.FLOAT


class TestUpToDate:
    """A second export does nothing if the result would be the same, and runs completely otherwise."""

    def test_the_second_export_is_quick_and_writes_nothing(self, checkpoint: Path, tmp_path: Path) -> None:
        assert not export(checkpoint, tmp_path / "out", DECODER).up_to_date
        before = (tmp_path / "out" / "manifest.json").stat()
        again = export(checkpoint, tmp_path / "out", DECODER)
        assert again.up_to_date
        assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns
        assert again.parts == ()

    def test_another_revision_exports_again(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        export(checkpoint, tmp_path / "out", DECODER)
        monkeypatch.setattr(module, "REVISION", module.REVISION + 1)
        assert not export(checkpoint, tmp_path / "out", DECODER).up_to_date

    @pytest.mark.parametrize(
        "change",
        [{"attention": "op"}, {"dtype": "bf16"}, {"parts": ("vae_encoder",)}],
        ids=["attention", "dtype", "parts"],
    )
    def test_other_options_export_again(self, checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
        export(checkpoint, tmp_path / "out", DECODER)
        assert not export(checkpoint, tmp_path / "out", replace(DECODER, **change)).up_to_date

    def test_new_weights_under_an_old_header_export_again(self, checkpoint: Path, tmp_path: Path) -> None:
        export(checkpoint, tmp_path / "out", DECODER)
        other = tiny.save(tmp_path / "other", tiny.Tiny(text_tokens=64, seed=7))
        weights = "vae/diffusion_pytorch_model.safetensors"
        os.replace(other / weights, checkpoint / weights)
        assert not export(checkpoint, tmp_path / "out", DECODER).up_to_date
        linked = tmp_path / "out" / "vae_decoder" / "diffusion_pytorch_model.safetensors"
        assert linked.samefile(checkpoint / weights)

    def test_a_damaged_artifact_is_exported_again(self, checkpoint: Path, tmp_path: Path) -> None:
        export(checkpoint, tmp_path / "out", DECODER)
        (tmp_path / "out" / "vae_decoder" / "model.onnx").write_bytes(b"damaged")
        assert not export(checkpoint, tmp_path / "out", DECODER).up_to_date
        verify(tmp_path / "out")

    def test_copies_count_by_size_and_time(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        first = export(checkpoint, tmp_path / "out", DECODER)
        assert first.parts[0].copied_bytes > 1_000_000
        assert first.parts[0].linked_bytes == 0
        assert export(checkpoint, tmp_path / "out", DECODER).up_to_date
        os.utime(checkpoint / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))
        assert not export(checkpoint, tmp_path / "out", DECODER).up_to_date


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file but not its data."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


class TestRefusals:
    """A checkpoint that does not match its config is rejected by tensor name before anything is written."""

    WEIGHTS = "vae/diffusion_pytorch_model.safetensors"

    def refuse(self, checkpoint: Path, out: Path, message: str, config: ExportConfig = DECODER) -> None:
        with pytest.raises(CheckpointError, match=message):
            export(checkpoint, out, config)
        assert not list(out.parent.glob(f".{out.name}*"))
        assert not out.exists()

    def test_missing_tensor(self, checkpoint: Path, tmp_path: Path) -> None:
        rewrite_header(checkpoint / self.WEIGHTS, lambda header: header.pop("decoder.conv_in.weight"))
        self.refuse(
            checkpoint, tmp_path / "out", r"vae: tensor 'decoder.conv_in.weight' of shape \[32, 32, 3, 3\] is missing"
        )

    def test_mis_shaped_tensor(self, checkpoint: Path, tmp_path: Path) -> None:
        rewrite_header(
            checkpoint / self.WEIGHTS, lambda header: header["decoder.conv_in.weight"].update(shape=[32, 3, 3, 32])
        )
        self.refuse(
            checkpoint,
            tmp_path / "out",
            r"tensor 'decoder.conv_in.weight' has shape \[32, 3, 3, 32\], the config asks for \[32, 32, 3, 3\]",
        )

    def test_unknown_tensor(self, checkpoint: Path, tmp_path: Path) -> None:
        def rename(header: dict[str, Any]) -> None:
            header["decoder.conv_in.lora_A.weight"] = header["decoder.conv_in.bias"]

        rewrite_header(checkpoint / self.WEIGHTS, rename)
        self.refuse(
            checkpoint, tmp_path / "out", r"tensor 'decoder.conv_in.lora_A.weight' is not part of the vae_decoder"
        )

    def test_stored_type_that_no_graph_holds(self, checkpoint: Path, tmp_path: Path) -> None:
        rewrite_header(checkpoint / self.WEIGHTS, lambda header: header["decoder.conv_in.bias"].update(dtype="I32"))
        self.refuse(checkpoint, tmp_path / "out", r"'decoder.conv_in.bias' is stored as I32; .* F32, F16, BF16")

    def test_truncated_file(self, checkpoint: Path, tmp_path: Path) -> None:
        os.truncate(checkpoint / self.WEIGHTS, (checkpoint / self.WEIGHTS).stat().st_size - 1)
        self.refuse(checkpoint, tmp_path / "out", r"truncated: tensor '.*' ends at byte")

    def test_language_model_with_more_layers_than_its_config(self, checkpoint: Path, tmp_path: Path) -> None:
        def add(header: dict[str, Any]) -> None:
            header["model.layers.36.input_layernorm.weight"] = header["model.layers.35.input_layernorm.weight"]

        rewrite_header(checkpoint / "text_encoder" / "model.safetensors", add)
        self.refuse(
            checkpoint,
            tmp_path / "out",
            r"'model.layers.36.input_layernorm.weight' is not part of the text_encoder",
            ExportConfig(parts=("text_encoder",)),
        )

    def test_a_bad_part_keeps_the_good_ones_from_being_written(self, checkpoint: Path, tmp_path: Path) -> None:
        rewrite_header(checkpoint / self.WEIGHTS, lambda header: header.pop("decoder.conv_in.weight"))
        self.refuse(checkpoint, tmp_path / "out", "is missing", ExportConfig())

    def test_out_that_is_no_artifact(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        with pytest.raises(UsageError, match="is not an artifact; choose another --out"):
            export(checkpoint, tmp_path / "out", DECODER)
        assert (tmp_path / "out" / "precious").exists()


def test_an_interrupted_export_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(part: PartReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", DECODER, interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_older_key_layouts_of_the_language_model_are_found(tmp_path: Path) -> None:
    """Published encoders were saved under several prefixes; each weight is one byte range, whatever the prefix."""
    checkpoint = tiny.save(tmp_path / "checkpoint", tiny.Tiny("dev", text_tokens=64))
    file = checkpoint / "text_encoder" / "model.safetensors"

    def newer(header: dict[str, Any]) -> None:
        for name in list(header):
            if name.startswith("language_model.model."):
                header[name.replace("language_model.model.", "model.language_model.")] = header.pop(name)

    rewrite_header(file, newer)
    export(checkpoint, tmp_path / "out", ExportConfig(parts=("text_encoder",)))
    graph = onnx.load(tmp_path / "out" / "text_encoder" / "model.onnx", load_external_data=False)
    assert "model.language_model.embed_tokens.weight" in {t.name for t in graph.graph.initializer}
