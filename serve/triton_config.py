"""config.pbtxt of every model, derived from the request fields, the ports and the tuning of a deployment.

Clients call `flux2`, which admits requests, or `flux2_stream`, which calls `flux2` and reports progress. `flux2` brings
prompts to the denoiser with one ensemble, images with the VAE encoder, and ends a request with another ensemble; in
between the denoiser works on it, and no call to Triton waits (a call to a Python model that has died never returns).
None of them has a batch axis: a request sends fields of shape [1] and receives [N] images. The text encoder, the
denoiser and the VAE decoder have one; a request is one row, or N rows of latents. Triton batches requests for the text
encoder and the VAE decoder; the denoiser batches them itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from kit.dtypes import triton_type
from kit.hardware import cpu
from kit.ports import PartName, Port
from pipeline.request import FIELDS
from serve.settings import Settings
from serve.wire import (
    ACTION,
    DENOISED,
    DENOISER,
    FRONT,
    IMAGE_ENCODED,
    IMAGE_STAGE,
    KEYS,
    LATENTS,
    MASK,
    PROMPT_STAGE,
    STREAM,
    TICKET,
    VAE_ENCODER,
    RequestTensor,
)


@dataclass(frozen=True)
class Wire:
    """One input or output of a Triton model, without its batch axis."""

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False  # requests of one batch may have different sizes


# All are optional, even the prompt: `flux2` says that it is missing.
_REQUEST = tuple(Wire(f.name, f.type, f.dims, optional=True) for f in FIELDS)
# An ensemble has one namespace: an output named "seed" would collide with the input.
_IMAGES = (Wire("image", "TYPE_STRING", (-1,)), Wire("seed_used", "TYPE_INT64", (1,)))

_TEXT = (Wire("text", "TYPE_STRING", (1,)), Wire("field", "TYPE_STRING", (1,)))  # field: the one that the text is of
_ITEM = (Wire(ACTION, "TYPE_STRING", (1,)), Wire(KEYS, "TYPE_STRING", (-1,)))
_STARTED = Wire("started", "TYPE_INT64", (1,))
_ENCODED = (
    Wire("image", "TYPE_STRING", (1,)),
    Wire("field", "TYPE_STRING", (1,)),
    Wire("role", "TYPE_STRING", (1,)),  # reference, base or mask
    Wire("size", "TYPE_INT32", (2,)),  # of what a mask covers
    Wire("ticket", "TYPE_INT64", (1,)),
)
_PROGRESS = (Wire("step", "TYPE_INT32", (1,)), Wire("steps", "TYPE_INT32", (1,)), Wire("preview", "TYPE_STRING", (1,)))


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
        *([_vae_encoder(settings)] if settings.takes_references else []),
        _image_encoder(),
        _limited(_prompt_stage(settings), settings),
        _limited(_image_stage(settings), settings),
        _model(FRONT, _REQUEST, _IMAGES, 0),
        _stream(),
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
    return _model("tokenizer", _TEXT, [_batched(wire) for wire in _text_inputs(settings)], 0)


def _stream() -> Any:
    config = _model(STREAM, _REQUEST, (*_PROGRESS, *_IMAGES), 0)
    config.model_transaction_policy.decoupled = True
    return config


def _text_encoder(settings: Settings) -> Any:
    config = _part(settings, "text_encoder", settings.tuning.text_batch)
    config.dynamic_batching.max_queue_delay_microseconds = 500
    _prefer(config, settings)
    return config


def _part(settings: Settings, part: PartName, batch: int) -> Any:
    """Describe the model of a part: Triton's TensorRT backend, or the kit's Python model with any other runtime."""
    ports, engine = settings.ports[part], settings.tensorrt.get(part)
    config = _model(part, wires(ports.inputs), wires(ports.outputs), min(batch, engine.max_batch) if engine else batch)
    if settings.gpu:
        _on_gpu(config)
    if engine is not None and engine.backend == "tensorrt_plan":
        config.platform, config.backend = "tensorrt_plan", "tensorrt"
        config.instance_group[0].profile.extend(str(index) for index in range(engine.profiles))
        # allocate activations for the profile in use, not for the largest
        config.parameters["execution_context_allocation_strategy"].string_value = "ON_PROFILE_CHANGE"
    return config


def _on_gpu(config: Any) -> None:
    config.instance_group[0].kind = proto.ModelInstanceGroup.KIND_GPU
    config.instance_group[0].gpus.append(0)


def _denoiser(settings: Settings) -> Any:
    """Describe the denoiser: each action has some of the inputs, and each its output."""
    embeds = wires(settings.ports["text_encoder"].outputs)
    latents = wires(settings.ports["vae_decoder"].inputs)
    brought = (*embeds, Wire(LATENTS, "TYPE_FP32", latents[0].dims), Wire(MASK, "TYPE_FP32", (-1,)))
    checked = (_row(tensor) for tensor in DENOISED)
    optional = [replace(w, optional=True) for w in (_ITEM[1], *brought, *checked)]
    outputs = (*latents, _STARTED, Wire("missing", "TYPE_INT32", (-1,)))
    config = _model(DENOISER, [*optional, _ITEM[0], _row(TICKET)], outputs, settings.limits.max_images)
    if settings.gpu:
        _on_gpu(config)
    return config


def _vae_encoder(settings: Settings) -> Any:
    """Describe the model of images: one image at a time, since hardly two have the same size."""
    (latents,) = wires(settings.ports["vae_encoder"].outputs)
    config = _model(VAE_ENCODER, _ENCODED, (replace(latents, type="TYPE_FP32"), Wire("mask", "TYPE_FP32", (-1,))), 0)
    if settings.gpu:
        _on_gpu(config)
    return config


def _vae_decoder(settings: Settings) -> Any:
    config = _part(settings, "vae_decoder", settings.tuning.vae_batch)
    config.dynamic_batching.SetInParent()
    _prefer(config, settings)
    return config


def _prefer(config: Any, settings: Settings) -> None:
    """Let a CPU engine run as many rows at a time as it has cores: more take as long as calls one after the other."""
    if settings.runtime == "ort-cpu":
        rows = min(settings.tuning.threads or cpu().cores, config.max_batch_size)
        config.dynamic_batching.preferred_batch_size.append(rows)


def _image_encoder() -> Any:
    pixels = Wire("pixels", "TYPE_UINT8", (-1, -1, -1, 3))
    return _model("image_encoder", [pixels, *(_whole(tensor) for tensor in IMAGE_ENCODED)], _IMAGES, 0)


def _prompt_stage(settings: Settings) -> Any:
    item = (*_ITEM, _row(TICKET))
    config = _ensemble(PROMPT_STAGE, (*_TEXT, *map(_batched, item)), [_batched(_STARTED)])
    text_in = [w.name for w in _text_inputs(settings)]
    (embeds,) = (p.name for p in settings.ports["text_encoder"].outputs)
    _step(config, "tokenizer", _same(*(w.name for w in _TEXT)), _same(*text_in))
    _step(config, "text_encoder", _same(*text_in), _same(embeds))
    _step(config, DENOISER, _same(embeds, *(w.name for w in item)), _same(_STARTED.name))
    return config


def _image_stage(settings: Settings) -> Any:
    latents = [_batched(wire) for wire in wires(settings.ports["vae_decoder"].inputs)]
    config = _ensemble(IMAGE_STAGE, [*latents, *(_whole(tensor) for tensor in IMAGE_ENCODED)], _IMAGES)
    _step(config, "vae_decoder", _same("latents"), {"image": "pixels"})  # the graph names its output "image"
    _step(config, "image_encoder", _same("pixels", *(t.name for t in IMAGE_ENCODED)), _same("image", "seed_used"))
    return config


def _ensemble(name: str, inputs: Iterable[Wire], outputs: Iterable[Wire]) -> Any:
    config = _model(name, inputs, outputs, 0)
    config.ClearField("backend")
    config.ClearField("instance_group")
    config.platform = "ensemble"
    return config


def _limited(ensemble: Any, settings: Settings) -> Any:
    """Bound the requests in each step of an ensemble, where Triton can (since 25.11; 24.10 rejects the field).

    `flux2` starts no more than these, so the limit only matters if something else calls the ensemble.
    """
    if settings.tuning.triton == "26.11":
        ensemble.ensemble_scheduling.max_inflight_requests = settings.tuning.live_requests
    return ensemble


def _step(config: Any, model: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    config.ensemble_scheduling.step.add(model_name=model, model_version=-1, input_map=inputs, output_map=outputs)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}
