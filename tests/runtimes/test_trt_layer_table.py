"""The table of compiled layers: read from a log and from inspectors of two versions, and summed up honestly."""

from __future__ import annotations

import json
import math

import onnx
import pytest
from onnx import TensorProto, helper

from kit.gpus import gpu
from runtimes.trt.build.account import account, sentence
from runtimes.trt.layer_table import Layer, Tensor, by_block, from_inspector, from_log, kernels, type_of

L4 = gpu("l4")


def tensor(name: str, dims: str, kind: str) -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{dims}], Strides: [1], StrideOrder: [0], Datatype: {kind}, "
        "Format: (Linear) Row major linear format }"
    )


LOG = [
    "Engine Layer Information:\n"
    "Name: start, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: \n"
    f"Name: product, LayerType: gemm, Inputs: [ {tensor('x', '1,64,32', 'FP8')}], "
    f"Constants: [ {tensor('w', '32,128', 'FP8')}, {tensor('alpha', '1', 'Float')}], "
    f"Outputs: [ {tensor('y', '1,64,128', 'BFloat16')}], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: transformer_blocks.0.ff/MatMul\x1etransformer_blocks.0.ff/DequantizeLinear]\n"
    f"Name: _gemm_mha_v2_1, LayerType: kgen, Inputs: [ {tensor('q', '2,64,16', 'BFloat16')}, "
    f"{tensor('k', '2,16,64', 'BFloat16')}, {tensor('v', '2,64,16', 'BFloat16')}], Constants: [], "
    f"Outputs: [ {tensor('o', '2,64,16', 'FP8')}], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: transformer_blocks.0.attn/Softmax]",
    "an ordinary line",
]


def inspected(key: str) -> str:
    return json.dumps(
        {
            "Layers": [
                "a layer of which only the name is known",
                {
                    "Name": "product",
                    "LayerType": "gemm",
                    "Inputs": [{"Name": "x", "Dimensions": [1, 64, 32], key: "Row major linear FP8 format"}],
                    "Constants": [{"Name": "w", "Dimensions": [32, 128], key: "FP8"}],
                    "Outputs": [{"Name": "y", "Dimensions": [1, 64, 128], key: "BFloat16"}],
                    "Metadata": "[ONNX Layer: transformer_blocks.0.ff/MatMul]",
                },
            ]
        }
    )


def model(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "g", [], []))


def quantized_product(name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("DequantizeLinear", ["a", "s"], [f"{name}.x"]),
        helper.make_node("DequantizeLinear", ["b", "s"], [f"{name}.w"]),
        helper.make_node("MatMul", [f"{name}.x", f"{name}.w"], [f"{name}.y"], name=name),
    ]


def test_a_build_log_gives_kernels_with_types_shapes_and_nodes() -> None:
    layers = from_log(LOG)
    assert [layer.name for layer in kernels(layers)] == ["product", "_gemm_mha_v2_1"]
    product, attention = layers[1:]
    assert (product.reads, product.writes, product.is_product) == ("fp8", "bf16", True)
    assert product.constants[0] == Tensor("w", (32, 128), "fp8")
    assert product.nodes == ("transformer_blocks.0.ff/MatMul", "transformer_blocks.0.ff/DequantizeLinear")
    assert product.flops() == 2 * 64 * 32 * 128
    assert product.moved() == 64 * 32 + 32 * 128 + 4 + 2 * 64 * 128
    assert attention.is_attention
    assert attention.flops() == 4 * 2 * 64 * 64 * 16
    assert product.block == attention.block == "transformer_blocks.0"


@pytest.mark.parametrize("key", ["Format/Datatype", "Datatype"])
def test_inspectors_of_both_versions_give_the_same_table(key: str) -> None:
    named, layer = from_inspector(inspected(key))
    assert (named.reads, named.kind) == ("unknown", "")
    assert (layer.reads, layer.writes, layer.kind) == ("fp8", "bf16", "gemm")
    assert layer.inputs[0].dims == (1, 64, 32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BFloat16", "bf16"),
        ("Float", "fp32"),
        ("Row major linear FP8 format", "fp8"),
        ("Int8", "int8"),
        ("UInt8", "u8"),
        ("Half", "fp16"),
        ("Int64", "i64"),
        ("Quaternion", "unknown"),
    ],
)
def test_every_word_for_a_type_is_known_or_said_to_be_unknown(text: str, expected: str) -> None:
    assert type_of(text) == expected


def test_a_block_adds_up_its_kernels_and_takes_at_least_their_bytes() -> None:
    (block,) = by_block(from_log(LOG), L4).values()
    assert block.kernels == 2
    assert block.products == {"fp8>bf16": 1}
    assert block.attention == ("bf16,bf16,bf16>fp8",)
    assert block.seconds > block.bytes / L4.bandwidth


def test_a_product_counts_in_the_layer_that_multiplies() -> None:
    """A node stands in the metadata of its neighbours' kernels too; int8 products were reported as fp32 for that."""
    narrow = Tensor("x", (4, 4), "int8")
    wide = Tensor("y", (4, 4), "fp32")
    layers = [
        Layer("p", "gemm", (narrow,), (narrow,), (wide,), ("p",)),
        Layer("scale", "kgen", (wide,), (), (wide,), ("p", "other")),
    ]
    told = account(layers, model(*quantized_product("p")), L4)
    assert told["quantized"] == {"asked": 1, "run": 1, "share": 1.0}
    assert told["missed"] == []
    assert told["product_outputs"] == {"int8>fp32": 1}


def test_a_product_that_fell_back_is_named_and_broken_attention_is_counted() -> None:
    wide = Tensor("y", (4, 4), "bf16")
    narrow = Tensor("x", (4, 4), "fp8")
    layers = [
        Layer("p", "gemm", (narrow,), (narrow,), (wide,), ("p",)),
        Layer("q", "gemm", (wide,), (wide,), (wide,), ("q",)),
        Layer("softmax", "kgen", (wide,), (), (wide,), ("transformer_blocks.0/Softmax",)),
    ]
    softmax = helper.make_node("Softmax", ["p.y"], ["z"], name="transformer_blocks.0/Softmax")
    told = account(layers, model(*quantized_product("p"), *quantized_product("q"), softmax), L4)
    assert told["missed"] == ["q"]
    assert told["attention"] == {
        "asked": 1,
        "fused": 0,
        "unfused": ["transformer_blocks.0/Softmax"],
        "types": {},
    }
    assert "1 of 2 quantized products in FP8" in sentence(told)
    assert "attention fused 0 of 1 (not)" in sentence(told)


def test_a_kernel_that_only_casts_is_counted_as_a_move() -> None:
    big = Tensor("y", (512, 512), "fp32")
    cast = helper.make_node("Cast", ["x"], ["y"], name="c", to=TensorProto.FLOAT)
    told = account([Layer("c", "kgen", (big,), (), (big,), ("c",))], model(cast), L4)
    assert told["moves"] == 1


def test_dynamic_sizes_have_no_bytes() -> None:
    assert math.isnan(Tensor("x", (-1, 32), "bf16").bytes)
