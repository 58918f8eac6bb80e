"""Optimization profiles: the sizes that an engine accepts, as ranges of the ports' named axes.

An engine has image tokens and latent rows, not images: 1024 x 1024 and 2048 x 512 are both 4096 tokens and use the same
profile of the transformer. The VAE convolves over height and width, so its profiles bound both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kit.errors import UsageError
from kit.image_size import MIN_SIDE, side_problem
from kit.image_size import PIXELS_PER_TOKEN as PIXELS
from kit.ports import PartName, Port, Ports, split_axis

REFERENCE_TOKENS = (1024 // PIXELS) ** 2  # reference images are scaled to at most one megapixel


@dataclass(frozen=True)
class AxisRange:
    """Sizes of one axis: the smallest, the size that kernels are tuned for, and the largest."""

    low: int
    best: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.best <= self.high:
            raise UsageError(f"range {self.low}..{self.best}..{self.high}: must be 1 <= low <= best <= high")

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Profile:
    """One range for every named axis of a part."""

    name: str  # the bucket's, or the user's
    axes: Mapping[str, AxisRange]

    def shapes(self, port: Port) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the smallest, best and largest shape of a port."""
        return (
            port.shape({axis: r.low for axis, r in self.axes.items()}),
            port.shape({axis: r.best for axis, r in self.axes.items()}),
            port.shape({axis: r.high for axis, r in self.axes.items()}),
        )

    def holds(self, sizes: Mapping[str, int]) -> bool:
        return all(sizes[axis] in wanted for axis, wanted in self.axes.items() if axis in sizes)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{axis} {wanted}' for axis, wanted in self.axes.items())})"


@dataclass(frozen=True)
class Sizing:
    """The images and batches that engines are built for; the defaults of the command line."""

    sides: tuple[int, ...] = (256, 512, 1024, 1536, 2048)  # one bucket per square and all images with as many tokens
    max_batch: int = 4  # rows at one megapixel; larger buckets have fewer, for the same number of tokens
    references: int = 0  # reference images of a request
    min_side: int = MIN_SIDE

    def __post_init__(self) -> None:
        for side in (self.min_side, *self.sides):
            if problem := side_problem(side, low=PIXELS):
                raise UsageError(f"side {problem}")
        if not self.sides or list(self.sides) != sorted(set(self.sides)):
            raise UsageError(f"sides {', '.join(map(str, self.sides)) or 'none'}: must ascend, without repetition")
        if self.min_side > self.sides[0]:
            raise UsageError(f"side {self.sides[0]} is smaller than the smallest side {self.min_side}")
        if self.max_batch < 1:
            raise UsageError(f"max batch {self.max_batch}: must be at least 1")
        if not 0 <= self.references <= 10:
            raise UsageError(f"references {self.references}: must be between 0 and 10")

    def batch(self, tokens: int) -> AxisRange:
        """Return the batch range of a bucket, tuned for one row: a single request must not wait for others."""
        one_megapixel = (1024 // PIXELS) ** 2
        return AxisRange(1, 1, min(self.max_batch, max(1, self.max_batch * one_megapixel // tokens)))


def derive(ports: Ports, sizing: Sizing) -> tuple[Profile, ...]:
    """Return one profile per bucket for a part with image axes, and a single one for the text encoder."""
    axes = axes_of(ports)
    if axes == ("batch",):
        return (Profile("text", {"batch": AxisRange(1, 1, sizing.max_batch)}),)
    if "ref_tokens" in axes:  # a part of klein-kv: its cache of reference images has its own axis
        return _cache_profiles(sizing, axes)
    return tuple(
        _token_profile(sizing, index) if "image_tokens" in axes else _latent_profile(sizing, index)
        for index in range(len(sizing.sides))
    )


def _token_profile(sizing: Sizing, index: int) -> Profile:
    side = sizing.sides[index]
    tokens = (side // PIXELS) ** 2
    low = (sizing.sides[index - 1] // PIXELS) ** 2 + 1 if index else (sizing.min_side // PIXELS) ** 2
    most = tokens + sizing.references * REFERENCE_TOKENS
    return Profile(str(side), {"batch": sizing.batch(tokens), "image_tokens": AxisRange(low, tokens, most)})


def _cache_profiles(sizing: Sizing, axes: tuple[str, ...]) -> tuple[Profile, ...]:
    """Bound the image as in the transformer's profiles, and separately the references, at least one."""
    most = max(1, sizing.references) * REFERENCE_TOKENS
    references = {"ref_tokens": AxisRange((sizing.min_side // PIXELS) ** 2, REFERENCE_TOKENS, most)}
    if "image_tokens" not in axes:
        return (Profile("references", {"batch": sizing.batch(most), **references}),)
    images = [_token_profile(replace(sizing, references=0), index) for index in range(len(sizing.sides))]
    return tuple(Profile(image.name, {**image.axes, **references}) for image in images)


def _latent_profile(sizing: Sizing, index: int) -> Profile:
    rows = sizing.sides[index] // PIXELS
    side = AxisRange(sizing.min_side // PIXELS, rows, rows)
    return Profile(
        str(sizing.sides[index]), {"batch": sizing.batch(rows * rows), "latent_height": side, "latent_width": side}
    )


def axes_of(ports: Ports) -> tuple[str, ...]:
    """Return the named axes of a part's inputs, in order of appearance."""
    words = [split_axis(d)[1] for port in ports.inputs for d in port.dims if isinstance(d, str)]
    return tuple(dict.fromkeys(words))


def stated(part: PartName, text: str, ports: Ports, name: str) -> Profile:
    """Parse a user's profile of one part: "batch=1..4,image_tokens=256..1024..4096" (low..high or low..best..high).

    Raises UsageError, which names the axis, if one is unknown, missing or malformed.
    """
    axes = axes_of(ports)
    given: dict[str, AxisRange] = {}
    for word in text.split(","):
        axis, equals, numbers = word.partition("=")
        if not equals or axis.strip() not in axes:
            raise UsageError(f"profile {text!r}: the {part} has no axis {axis.strip()!r}; it has: {', '.join(axes)}")
        bounds = numbers.split("..")
        if not all(bound.strip().isdigit() for bound in bounds) or len(bounds) not in (1, 2, 3):
            raise UsageError(f"profile {text!r}: {axis.strip()}={numbers} is not low..high or low..best..high")
        values = [int(bound) for bound in bounds]
        given[axis.strip()] = AxisRange(values[0], values[-2] if len(values) == 3 else values[-1], values[-1])
    if missing := [axis for axis in axes if axis not in given]:
        raise UsageError(f"profile {text!r}: no range for {', '.join(missing)}; the {part} has: {', '.join(axes)}")
    return Profile(name, {axis: given[axis] for axis in axes})


def choose(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Return the index of the smallest profile that contains the sizes; raises UsageError, which lists the profiles.

    If none does, the batch is ignored: a caller can split a batch, but not an image.
    """
    fits = [i for i, profile in enumerate(profiles) if profile.holds(sizes)]
    if not fits:
        fits = [i for i, p in enumerate(profiles) if p.holds({a: s for a, s in sizes.items() if a != "batch"})]
    if not fits:
        asked = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "batch")
        raise UsageError(f"no profile of the engine accepts {asked}; it has: {', '.join(map(str, profiles))}")
    return fits[0]


def one_size(profiles: Sequence[Profile]) -> Profile | None:
    """Return the profile of one megapixel, or else the last, at its best sizes alone; None if all sizes are fixed."""
    chosen = next((profile for profile in profiles if profile.name == "1024"), profiles[-1])
    fixed = {axis: AxisRange(size, size, size) for axis, size in best_sizes(chosen).items()}
    made = Profile(chosen.name, fixed)
    return None if tuple(profiles) == (made,) else made


def best_sizes(profile: Profile) -> dict[str, int]:
    """Return the size of each axis that kernels are tuned for."""
    return {axis: bounds.best for axis, bounds in profile.axes.items()}
