"""The family's variants, and reading a variant from a checkpoint's own configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from kit.checkpoint import resolve
from kit.configs import SCHEDULER_CONFIG, read_variant
from kit.errors import CheckpointError, UsageError
from kit.ports import PARTS, ports
from kit.variants import VARIANTS, Family, Variant
from tests.conftest import ByFamily


def test_one_megapixel_has_4096_tokens() -> None:
    assert VARIANTS["dev"].tokens(1024, 1024) == 4096


def test_every_variant_joins_three_hidden_states_of_its_text_encoder() -> None:
    for variant in VARIANTS.values():
        assert variant.transformer.joint_dim == 3 * variant.text_encoder.hidden
        assert max(variant.text_encoder.taps) < variant.text_encoder.layers
        assert sum(variant.transformer.rope_axes) == variant.transformer.head_dim


def test_only_dev_embeds_guidance_and_only_base_variants_run_two_passes() -> None:
    assert {v.name for v in VARIANTS.values() if v.transformer.guidance_embeds} == {"dev"}
    assert {v.name for v in VARIANTS.values() if v.guidance == "cfg"} == {"klein-base-4b", "klein-base-9b"}


@pytest.mark.parametrize("family", get_args(Family))
def test_a_checkpoint_tells_its_family(family: Family, checkpoint_of: ByFamily) -> None:
    variant = read_variant(checkpoint_of(family))
    assert variant.family == family
    assert variant.name == f"{family}-custom"
    assert variant.text_tokens == 512


@pytest.mark.parametrize("name", VARIANTS)
def test_the_published_sizes_are_recognised_by_their_configs(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    write_configs(variant, tmp_path)
    assert read_variant(tmp_path) == variant


def write_configs(variant: Variant, folder: Path) -> None:
    """Write the configs of a published variant as in its checkpoint."""
    t, e = variant.transformer, variant.text_encoder
    pipeline = {"dev": "Flux2Pipeline", "klein-kv": "Flux2KleinKVPipeline"}.get(variant.family, "Flux2KleinPipeline")
    text = {
        "num_hidden_layers": e.layers,
        "num_attention_heads": e.heads,
        "num_key_value_heads": e.kv_heads,
        "hidden_size": e.hidden,
        "head_dim": e.head_dim,
        "intermediate_size": e.ffn,
        "vocab_size": e.vocab,
        "rope_theta": e.rope_theta,
        "rms_norm_eps": e.eps,
    }
    configs = {
        "model_index.json": {"_class_name": pipeline, "is_distilled": variant.family == "klein"},
        "transformer/config.json": {
            "_class_name": "Flux2Transformer2DModel",
            "num_layers": t.double_blocks,
            "num_single_layers": t.single_blocks,
            "num_attention_heads": t.heads,
            "attention_head_dim": t.head_dim,
            "joint_attention_dim": t.joint_dim,
            "guidance_embeds": t.guidance_embeds,
        },
        "text_encoder/config.json": {"text_config": text} if variant.family == "dev" else text,
        "vae/config.json": {"_class_name": "AutoencoderKLFlux2", "block_out_channels": [128, 256, 512, 512]},
        "tokenizer/tokenizer_config.json": {"model_max_length": 131072},
        "scheduler/scheduler_config.json": dict(SCHEDULER_CONFIG),
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match="unknown variant 'klein-3b'; there are: klein-4b, klein-9b"):
        Variant.named("klein-3b")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", None, "model_index.json: missing"),
        ("model_index.json", "{", "model_index.json: not valid JSON"),
        ("model_index.json", "[]", "model_index.json: expected a JSON object, found list"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "'FluxPipeline' is not a FLUX.2 pipeline"),
        ("transformer/config.json", '{"_class_name": "UNet"}', "'UNet' is not Flux2Transformer2DModel"),
        (
            "transformer/config.json",
            '{"_class_name": "Flux2Transformer2DModel"}',
            "key 'attention_head_dim' is missing",
        ),
        ("text_encoder/config.json", "{}", "key 'num_attention_heads' is missing"),
        ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler"}', "_class_name is 'DDIMScheduler'"),
        ("vae/config.json", '{"_class_name": "AutoencoderKL"}', "'AutoencoderKL' is not AutoencoderKLFlux2"),
    ],
)
def test_a_broken_config_is_named(
    file: str, text: str | None, message: str, tmp_path: Path, checkpoint_of: ByFamily
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of("klein"), folder)
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_variant(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the graph is written for 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; the graph is written for False"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}, "rope_type 'linear' is not"),
    ],
)
def test_a_text_encoder_that_needs_another_graph_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path, checkpoint_of: ByFamily
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of("klein"), folder)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        read_variant(folder)


def change(folder: Path, file: str, **values: object) -> Path:
    """Change values of a config; returns the checkpoint."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("transformer/config.json", "num_layers", "2", r"num_layers is '2'; expected a whole number from 1 to 512"),
        ("transformer/config.json", "num_layers", [2], r"num_layers is \[2\]; expected a whole number"),
        ("transformer/config.json", "num_layers", True, "num_layers is True; expected a whole number"),
        ("transformer/config.json", "num_layers", 10**9, "num_layers is 1000000000; expected a whole number"),
        ("transformer/config.json", "axes_dims_rope", 32, "axes_dims_rope is 32; expected a list of whole numbers"),
        (
            "transformer/config.json",
            "axes_dims_rope",
            [8, 8],
            r"axes_dims_rope is \[8, 8\]; expected four even numbers",
        ),
        ("transformer/config.json", "eps", "tiny", "eps is 'tiny'; expected a finite number"),
        ("transformer/config.json", "guidance_embeds", "yes", "guidance_embeds is 'yes'; expected true or false"),
        ("transformer/config.json", "patch_size", 2, "patch_size is 2; the graph is written for 1"),
        ("transformer/config.json", "out_channels", 64, "out_channels is 64; the graph is written for None"),
        ("text_encoder/config.json", "rope_parameters", "x", "rope_parameters is 'x'; expected an object"),
        ("text_encoder/config.json", "rms_norm_eps", {}, "rms_norm_eps is {}; expected a finite number"),
        ("text_encoder/config.json", "num_hidden_layers", 3, "num_hidden_layers is 3; FLUX.2 reads the output of"),
        ("text_encoder/config.json", "num_key_value_heads", 3, "cannot share 3 key heads"),
        ("text_encoder/config.json", "model_type", "llama", "model_type is 'llama'; klein has a text encoder of type"),
        ("vae/config.json", "block_out_channels", 8, "block_out_channels is 8; expected a list"),
        ("vae/config.json", "block_out_channels", [8, 9, 8, 8], "expected four multiples of 8"),
        ("vae/config.json", "act_fn", "relu", "act_fn is 'relu'; the graph is written for 'silu'"),
        ("vae/config.json", "sample_size", "big", "sample_size is 'big'; expected a whole number"),
        ("tokenizer/tokenizer_config.json", "model_max_length", [1], r"model_max_length is \[1\]; expected a finite"),
        ("flux2_deploy.json", "text_tokens", 513, "text_tokens is 513; expected a whole number from 1 to 512"),
        ("flux2_deploy.json", "image_size", 100, "image_size 100 is not a multiple of 16"),
        ("flux2_deploy.json", "tokens", 64, "unknown key 'tokens'; there are: text_tokens, image_size"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(
    file: str, key: str, value: object, message: str, tmp_path: Path, checkpoint_of: ByFamily
) -> None:
    folder = shutil.copytree(checkpoint_of("klein"), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_variant(change(folder, file, **{key: value}))
    assert str(refusal.value).startswith(str(folder / file))


def test_null_means_absent(tmp_path: Path, checkpoint_of: ByFamily) -> None:
    folder = shutil.copytree(checkpoint_of("klein"), tmp_path / "checkpoint")
    for file, keys in (
        ("transformer/config.json", ("eps", "mlp_ratio", "rope_theta", "in_channels")),
        ("text_encoder/config.json", ("rms_norm_eps", "rope_scaling")),
        ("vae/config.json", ("batch_norm_eps", "sample_size", "decoder_block_out_channels")),
        ("tokenizer/tokenizer_config.json", ("model_max_length",)),
    ):
        change(folder, file, **dict.fromkeys(keys))
    assert read_variant(folder) == read_variant(checkpoint_of("klein"))


def test_what_diffusers_ignores_changes_nothing_and_is_said_once(
    tmp_path: Path, checkpoint_of: ByFamily, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(checkpoint_of("klein"), tmp_path / "checkpoint")
    (folder / "flux2_deploy.json").unlink()
    change(folder, "tokenizer/tokenizer_config.json", model_max_length=256)
    change(folder, "vae/config.json", sample_size=512)
    for _ in range(2):
        variant = read_variant(folder)
    assert (variant.text_tokens, variant.image_size) == (512, 1024)
    assert [record.getMessage().rpartition("/")[2] for record in caplog.records] == [
        "tokenizer_config.json: model_max_length 256 is ignored; texts have 512 tokens",
        "config.json: sample_size 512 is ignored; images have 1024 pixels a side by default",
    ]


def test_only_the_kits_own_settings_shorten_texts(tmp_path: Path, checkpoint_of: ByFamily) -> None:
    folder = shutil.copytree(checkpoint_of("klein"), tmp_path / "checkpoint")
    change(folder, "flux2_deploy.json", text_tokens=64)
    assert read_variant(folder).text_tokens == 64
    assert read_variant(resolve("sample")).text_tokens == 48


def test_a_checkpoint_without_a_tokenizer_has_a_variant(tmp_path: Path, checkpoint_of: ByFamily) -> None:
    folder = shutil.copytree(checkpoint_of("klein"), tmp_path / "checkpoint")
    shutil.rmtree(folder / "tokenizer")
    assert read_variant(folder).text_tokens == 512


def test_parts_of_different_variants_are_refused(tmp_path: Path, checkpoint_of: ByFamily) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of("klein"), folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"joint_attention_dim": 1}))
    with pytest.raises(CheckpointError, match="joint_attention_dim 1 is not 3 x the text encoder's hidden size 32"):
        read_variant(folder)


def test_ports_put_numbers_to_their_axes() -> None:
    decoder = ports("vae_decoder", VARIANTS["klein-4b"], "bf16")
    sizes = {"batch": 2, "latent_height": 64, "latent_width": 48}
    assert decoder.inputs[0].shape(sizes) == (2, 128, 64, 48)
    assert decoder.outputs[0].shape(sizes) == (2, 1024, 768, 3)


def test_a_missing_axis_is_named() -> None:
    with pytest.raises(KeyError, match="no size given for axis 'latent_height'"):
        ports("vae_decoder", VARIANTS["dev"], "fp32").inputs[0].shape({"batch": 1})


def test_only_dev_has_a_guidance_port() -> None:
    for variant in VARIANTS.values():
        names = [port.name for port in ports("transformer", variant, "fp32").inputs]
        assert ("guidance" in names) == (variant.name == "dev")
    assert len(PARTS) == 4
