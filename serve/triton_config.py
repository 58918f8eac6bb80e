"""config.pbtxt of every model, derived from the request fields, the ports and the tuning of a deployment.

The ensemble has no batch axis: a request sends fields of shape [1] and receives [N] images. The text encoder, the
denoiser and the VAE decoder have one, so Triton batches requests there; a request is one row, or N rows of latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from kit.dtypes import triton_type
from kit.ports import PartName, Port
from pipeline.request import FIELDS
from serve.settings import Settings
from serve.wire import DENOISER, IMAGE_ENCODER, TENSORS, RequestTensor

ENSEMBLE = "flux2"


@dataclass(frozen=True)
class Wire:
    """One input or output of a Triton model, without its batch axis."""

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False  # requests of one batch may have different sizes


# All are optional, even the prompt: the tokenizer reports that it is missing, the ensemble an "unexpected deadlock".
_REQUEST = tuple(Wire(f.name, f.type, f.dims, optional=True) for f in FIELDS)
# An ensemble has one namespace: an output named "seed" would collide with the input.
_IMAGES = (Wire("image", "TYPE_STRING", (-1,)), Wire("seed_used", "TYPE_INT64", (1,)))


def wires(ports: Sequence[Port]) -> tuple[Wire, ...]:
    """Convert the ports of a graph to Triton's form: no batch axis, dynamic axes as -1."""
    return tuple(
        Wire(p.name, triton_type(p.dtype), tuple(-1 if isinstance(d, str) else d for d in p.dims[1:])) for p in ports
    )


def configs(settings: Settings) -> dict[str, str]:
    """Return the text of config.pbtxt by model name."""
    made = (
        _tokenizer(settings),
        _text_encoder(settings),
        _denoiser(settings),
        _vae_decoder(settings),
        _image_encoder(),
        _ensemble(settings),
    )
    return {config.name: text_format.MessageToString(config) for config in made}


def _batched(wire: Wire) -> Wire:
    """Add an explicit batch axis, for a model that Triton does not batch."""
    return Wire(wire.name, wire.type, (-1, *wire.dims), wire.optional)


def _row(tensor: RequestTensor) -> Wire:
    """Describe a tensor for a model that Triton batches."""
    return Wire(tensor.name, tensor.type, tensor.dims, ragged=tensor.many)


def _whole(tensor: RequestTensor) -> Wire:
    """Describe a tensor for a model that Triton does not batch."""
    return _batched(_row(tensor)) if tensor.batched else _row(tensor)


def _model(name: str, inputs: Iterable[Wire], outputs: Iterable[Wire], max_batch: int) -> Any:
    config = proto.ModelConfig(name=name, backend="python", max_batch_size=max_batch)
    for wire in inputs:
        config.input.add(
            name=wire.name,
            data_type=proto.DataType.Value(wire.type),
            dims=wire.dims,
            optional=wire.optional,
            allow_ragged_batch=wire.ragged,
        )
    for wire in outputs:
        config.output.add(name=wire.name, data_type=proto.DataType.Value(wire.type), dims=wire.dims)
    config.instance_group.add(kind=proto.ModelInstanceGroup.KIND_CPU, count=1)
    return config


def _text_inputs(settings: Settings) -> tuple[Wire, ...]:
    return wires(settings.ports["text_encoder"].inputs)


def _tokenizer(settings: Settings) -> Any:
    passes = ("", "negative_") if settings.variant.guidance == "cfg" else ("",)
    texts = [Wire(p + w.name, w.type, w.dims) for p in passes for w in _text_inputs(settings)]
    outputs = [*(_batched(wire) for wire in texts), *(_whole(tensor) for tensor in TENSORS)]
    config = _model("tokenizer", _REQUEST, outputs, 0)
    config.dynamic_batching.default_queue_policy.max_queue_size = settings.tuning.queue_size
    return config


def _text_encoder(settings: Settings) -> Any:
    config = _part(settings, "text_encoder", settings.tuning.text_batch)
    config.dynamic_batching.max_queue_delay_microseconds = 500
    return config


def _part(settings: Settings, part: PartName, batch: int) -> Any:
    """Describe the model of a part: ONNX Runtime, Triton's TensorRT backend, or TensorRT from Python."""
    ports, engine = settings.ports[part], settings.tensorrt.get(part)
    config = _model(part, wires(ports.inputs), wires(ports.outputs), min(batch, engine.max_batch) if engine else batch)
    if engine is not None:
        _on_gpu(config)
        if engine.backend == "tensorrt_plan":
            config.platform, config.backend = "tensorrt_plan", "tensorrt"
            config.instance_group[0].profile.extend(str(index) for index in range(engine.profiles))
            # allocate activations for the profile in use, not for the largest
            config.parameters["execution_context_allocation_strategy"].string_value = "ON_PROFILE_CHANGE"
    return config


def _on_gpu(config: Any) -> None:
    config.instance_group[0].kind = proto.ModelInstanceGroup.KIND_GPU
    config.instance_group[0].gpus.append(0)


def _denoiser(settings: Settings) -> Any:
    embeds = wires(settings.ports["text_encoder"].outputs)
    negative = (
        [Wire("negative_" + w.name, w.type, w.dims) for w in embeds] if settings.variant.guidance == "cfg" else []
    )
    latents = wires(settings.ports["vae_decoder"].inputs)
    config = _model(
        "denoiser", [*embeds, *negative, *(_row(tensor) for tensor in DENOISER)], latents, settings.tuning.live_requests
    )
    if "transformer" in settings.tensorrt:
        _on_gpu(config)
    batching = config.sequence_batching
    batching.iterative_sequence = True
    batching.max_sequence_idle_microseconds = settings.tuning.idle_seconds * 1_000_000
    batching.direct.SetInParent()
    control = proto.ModelSequenceBatching.Control
    for name, kind in (("START", control.CONTROL_SEQUENCE_START), ("READY", control.CONTROL_SEQUENCE_READY)):
        batching.control_input.add(name=name).control.add(kind=kind, int32_false_true=[0, 1])
    batching.control_input.add(name="CORRID").control.add(
        kind=control.CONTROL_SEQUENCE_CORRID, data_type=proto.DataType.Value("TYPE_UINT64")
    )
    return config


def _vae_decoder(settings: Settings) -> Any:
    config = _part(settings, "vae_decoder", settings.tuning.vae_batch)
    config.dynamic_batching.SetInParent()
    return config


def _image_encoder() -> Any:
    pixels = Wire("pixels", "TYPE_UINT8", (-1, -1, -1, 3))
    return _model("image_encoder", [pixels, *(_whole(tensor) for tensor in IMAGE_ENCODER)], _IMAGES, 0)


def _ensemble(settings: Settings) -> Any:
    config = _model(ENSEMBLE, _REQUEST, _IMAGES, 0)
    config.ClearField("backend")
    config.ClearField("instance_group")
    config.platform = "ensemble"
    text_in = [w.name for w in _text_inputs(settings)]
    (embeds,) = (p.name for p in settings.ports["text_encoder"].outputs)
    passes = ("", "negative_") if settings.variant.guidance == "cfg" else ("",)
    texts = [p + name for p in passes for name in text_in]

    def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        config.ensemble_scheduling.step.add(model_name=model, model_version=-1, input_map=inputs, output_map=outputs)

    def same(*names: str) -> dict[str, str]:
        return {name: name for name in names}

    step("tokenizer", same(*(f.name for f in FIELDS)), same(*texts, *(t.name for t in TENSORS)))
    for p in passes:
        step("text_encoder", {name: p + name for name in text_in}, {embeds: p + embeds})
    step("denoiser", same(*(p + embeds for p in passes), *(t.name for t in DENOISER)), same("latents"))
    step("vae_decoder", same("latents"), {"image": "pixels"})  # the graph names its output "image"
    step("image_encoder", same("pixels", *(t.name for t in IMAGE_ENCODER)), same("image", "seed_used"))
    return config
