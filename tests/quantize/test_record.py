"""The calibration record and the hooks that fill it, against slow references."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit.errors import UsageError
from quantize.calibration import record
from quantize.calibration.observe import LOWEST, Observer, Watch
from quantize.calibration.record import PER_OCTAVE, Record, Seen


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(*inputs: Tensor, weight: str = "w") -> Seen:
    watch = Watch()
    for step, x in enumerate(inputs):
        watch.see(x, step)
    return watch.seen(weight)


def a_record(digest: str = "d", **layers: Seen) -> Record:
    run = {"prompts": {"spec": "x", "digest": digest, "count": 2}, "seeds": [0], "steps": 4}
    return Record("klein-4b", (run,), {"transformer": layers})


def test_the_hooks_give_the_same_statistics_as_a_loop_over_every_value() -> None:
    random = np.random.default_rng(0)
    bins = random.integers(-30 * PER_OCTAVE, 10 * PER_OCTAVE, (3, 2, 5, 8))
    values = np.exp2((bins + 0.5) / PER_OCTAVE) * random.choice([-1, 1], bins.shape)
    values[0, 0, 0, :4] = 0
    watch = Watch()
    histogram: Counter[int] = Counter()
    largest, square = np.zeros(8), np.zeros(8)
    for step in (0, 1, 1):
        x = values[step]
        watch.see(torch.tensor(x, dtype=torch.float32), step)
        for row in x.reshape(-1, 8):
            for channel, value in enumerate(row):
                largest[channel] = max(largest[channel], abs(value))
                square[channel] += value**2
                if value:
                    histogram[math.floor(math.log2(abs(value)) * PER_OCTAVE)] += 1
    found = watch.seen("w")
    assert found.rows == 30
    assert found.amax == pytest.approx(largest.max(), rel=1e-6)
    assert found.amax_by_step == pytest.approx((np.abs(values[0]).max(), np.abs(values[1]).max()), rel=1e-6)
    assert found.channel_amax == pytest.approx(largest, rel=1e-6)
    assert found.channel_square == pytest.approx(square / 30, rel=1e-6)
    assert found.histogram == dict(histogram)


def test_magnitudes_outside_the_histogram_still_count_for_the_largest() -> None:
    found = seen(torch.tensor([[2.0 ** (LOWEST - 9), 0.0, 2.0**30, 1.5]]))
    assert found.amax == 2.0**30
    assert found.channel_amax[0] == 2.0 ** (LOWEST - 9)
    assert sum(found.histogram.values()) == 2
    assert found.percentile(99.9) == 2.0**24  # values above the last bin are counted in it


def test_watching_changes_no_input_and_ends_with_its_block() -> None:
    layer, x, observer = nn.Linear(8, 4), noise(2, 3, 8), Observer()
    before = x.clone()
    with observer.watching({"layer": layer}):
        observer.step = 1
        layer(x)
    layer(x)
    assert torch.equal(x, before)
    assert observer.watches["layer"].rows == 6
    assert observer.watches["layer"].amax_by_step == [0.0, float(x.abs().max())]
    assert not layer._forward_pre_hooks


def test_bf16_inputs_are_observed_without_rounding() -> None:
    x = noise(64, 16).bfloat16()
    assert replace(seen(x), weight="").histogram == seen(x.float()).histogram
    assert seen(x).channel_square == pytest.approx(x.float().square().mean(0).numpy(), rel=1e-6)


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99, 90.0, 50.0])
def test_percentiles_match_numpy_within_a_bin(percent: float) -> None:
    x = noise(500, 64) * torch.exp(noise(64, seed=1))
    x[:, 7] = 0
    exact = np.percentile(np.abs(x.numpy()), percent, method="inverted_cdf")
    found = seen(x).percentile(percent)
    assert exact <= found * 1.000001
    assert found <= exact * 2 ** (1 / PER_OCTAVE) * 1.000001
    assert seen(x).percentile(100) == float(x.abs().max())


def test_a_merged_record_is_the_record_of_both() -> None:
    a, b = noise(40, 16), 3 * noise(24, 16, seed=1)
    merged = record.merge([a_record(layer=seen(a, b)), a_record("e", layer=seen(b), other=seen(a))])
    both = Watch()
    for step, x in ((0, a), (1, b), (0, b)):
        both.see(x, step)
    found, expected = merged.parts["transformer"]["layer"], both.seen("w")
    assert (found.rows, found.amax, found.amax_by_step) == (expected.rows, expected.amax, expected.amax_by_step)
    assert found.histogram == expected.histogram
    assert np.array_equal(found.channel_amax, expected.channel_amax)
    assert found.channel_square == pytest.approx(expected.channel_square, rel=1e-5)
    assert set(merged.parts["transformer"]) == {"layer", "other"}
    assert len(merged.runs) == 2


def test_the_same_images_are_not_merged_twice() -> None:
    one, two = a_record(layer=seen(noise(4, 8))), a_record("e", layer=seen(noise(4, 8, seed=1)))
    with pytest.raises(UsageError, match=r"a\.json and b\.json contain the same run, whose images would count twice"):
        record.merge([one, one], ["a.json", "b.json"])
    with pytest.raises(UsageError, match="record 1 and record 2 contain the same run"):
        record.merge([record.merge([one, two]), two])


def test_parts_that_were_calibrated_apart_are_merged() -> None:
    each = [a_record(one=seen(noise(4, 8))), a_record(two=seen(noise(4, 8)))]
    assert set(record.merge(each).parts["transformer"]) == {"one", "two"}


def test_records_of_two_checkpoints_are_not_merged() -> None:
    mine = a_record(layer=seen(noise(4, 8)))
    with pytest.raises(
        UsageError, match="cannot merge records of different weights: layer differs; all must come from one che"
    ):
        record.merge([mine, a_record(layer=seen(noise(4, 8), weight="another"))])
    with pytest.raises(UsageError, match="cannot merge a record of dev into one of klein-4b"):
        record.merge([mine, replace(mine, variant="dev")])


def test_a_record_round_trips_through_its_file(tmp_path: Path) -> None:
    made = a_record(layer=seen(noise(30, 16), noise(30, 16, seed=1)))
    record.write(made, tmp_path / "new" / "cal.json")
    found = record.read(tmp_path / "new" / "cal.json")
    assert found.digest == made.digest
    assert found.runs == made.runs
    before, after = made.parts["transformer"]["layer"], found.parts["transformer"]["layer"]
    assert np.array_equal(before.channel_amax, after.channel_amax)
    assert np.array_equal(before.channel_square, after.channel_square)
    assert (before.histogram, before.amax_by_step) == (after.histogram, after.amax_by_step)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cal.json"]
    told = json.loads((tmp_path / "new" / "cal.json").read_text())["parts"]["transformer"]["layer"]["percentiles"]
    assert told["99.9"] == before.percentile(99.9)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cal.json"
    record.write(a_record(layer=seen(noise(4, 8))), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        record.write(a_record(layer=seen(noise(9, 8))), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cal.json"]


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    raw = record._plain(a_record(layer=seen(noise(4, 8))))
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cal\.json: not valid JSON"),
        ("[]", r"cal\.json: not a record of format 1; calibrate again"),
        (broken(lambda raw: raw.update(format=2)), r"cal\.json: not a record of format 1; calibrate again"),
        (broken(lambda raw: raw.pop("runs")), r"cal\.json: malformed \(KeyError\('runs'\)\); calibrate again"),
        (
            broken(lambda raw: raw["parts"]["transformer"]["layer"].pop("channel_amax")),
            r"malformed \(KeyError\('channel_amax'\)\)",
        ),
        (
            broken(lambda raw: raw["parts"]["transformer"]["layer"].update(channel_square="AAAA")),
            r"malformed \(ValueError",
        ),
        (
            broken(lambda raw: raw["parts"]["transformer"]["layer"].update(channel_square="AAAAAA==")),
            r"malformed \(ValueError\('channel statistics of different lengths'\)\)",
        ),
        (broken(lambda raw: raw["parts"].update(transformer=3)), r"malformed \(AttributeError"),
    ],
)
def test_an_invalid_record_is_rejected_by_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "cal.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        record.read(tmp_path / "cal.json")


def test_a_missing_record_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calibration record .*none\.json: No such file or directory"):
        record.read(tmp_path / "none.json")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_dropped(bad: float) -> None:
    x = noise(8, 8)
    x[2, 3] = bad
    for found in (seen(x), seen(x, noise(8, 8)), record._merge_seen("layer", seen(noise(8, 8)), seen(x))):
        with pytest.raises(
            UsageError, match="the input of layer has a value that is not finite .* calibrate again with --dtype"
        ):
            record.check("layer", found, "the transformer")


def test_zeros_alone_give_no_scale() -> None:
    with pytest.raises(
        UsageError, match=r"the input of layer was always zero \(amax 0\.0\), so it has no scale; calibrate w"
    ):
        record.check("layer", seen(torch.zeros(4, 8)), "the transformer")
