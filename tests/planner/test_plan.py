"""The planner: which choices fit, in which order, how fast they are, under which load and at what cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kit.gpus import GB, GPUS, gpu
from kit.recipes import RECIPES
from kit.variants import VARIANTS
from planner.compare import compare
from planner.facts import facts
from planner.layout import Choice, lay_out
from planner.memory import Shape, activation_bytes, usable_bytes, weight_bytes
from planner.plan import Plan, plan
from planner.prices import read_prices
from planner.question import Question
from planner.reference import FLUX1_DEV
from planner.text import number, render, span
from planner.timing import Range, _streamed

KLEIN, DEV = VARIANTS["klein-4b"], VARIANTS["dev"]
PRICES = read_prices()


def ask(question: Question, price: float | None = None) -> Plan:
    return plan(question, PRICES, price)


def test_klein_4b_is_served_whole_on_every_gpu_with_bf16() -> None:
    for card in (card for card in GPUS.values() if card.has("bf16")):
        answer = ask(Question(KLEIN, card))
        assert answer.chosen is not None
        assert answer.chosen.choice == Choice(RECIPES[card.default_recipe], "resident")
        assert answer.per_minute is not None
        assert 0 < answer.per_minute.low < answer.per_minute.mid < answer.per_minute.high


def test_a_gpu_without_bf16_runs_in_fp32_with_streamed_weights_and_this_is_said() -> None:
    answer = ask(Question(KLEIN, gpu("t4")))
    assert answer.chosen is not None
    assert answer.chosen.choice.recipe.name == "fp32"
    assert answer.chosen.choice.streamed
    assert "no bf16: graphs run in fp32 only, and TensorRT for RTX starts at compute" in render(answer).splitlines()[0]


def test_dev_on_24_gb_streams_weights_and_says_why_nothing_else_came_before() -> None:
    answer = ask(Question(DEV, gpu("l4")))
    assert answer.chosen is not None
    assert answer.chosen.choice == Choice(RECIPES["fp8"], "evicted", streamed=True)
    assert answer.chosen.layout.needed <= usable_bytes(gpu("l4")) < 24 * GB
    before = answer.tried[: answer.tried.index(answer.chosen)]
    assert [t.layout.reason for t in before] == [
        "needs 52.8 GB (22.4 GB available): 33.0 GB weights of the transformer, 1.6 GB activations of the vae_decoder",
        "needs 37.2 GB (22.4 GB available): 33.0 GB weights of the transformer, 1.6 GB activations of the vae_decoder",
    ]


def test_dev_on_40_gb_evicts_the_text_encoder_and_80_gb_hold_everything() -> None:
    evicted, whole = ask(Question(DEV, gpu("a100-40g"))).chosen, ask(Question(DEV, gpu("h100"))).chosen
    assert evicted is not None
    assert whole is not None
    assert evicted.choice.text_encoder == "evicted"
    assert whole.choice.text_encoder == "resident"


def test_a_second_gpu_takes_the_text_encoder_and_costs_twice() -> None:
    question = Question(DEV, gpu("a100-40g"), gpus=2)
    answer = ask(question, price=1.0)
    assert answer.chosen is not None
    assert answer.chosen.choice.text_encoder == "own-gpu"
    assert answer.costs is not None
    assert answer.costs.per_hour.mid == 2.0
    alone = ask(replace(question, gpus=1, text_encoder="own-gpu"))
    assert alone.chosen is None
    assert "needs a second GPU (--gpus 2)" in str(alone.tried[0].layout.reason)


def test_a_text_encoder_too_large_for_its_own_gpu_is_said() -> None:
    layout = lay_out(DEV, gpu("l4"), Choice(RECIPES["bf16"], "own-gpu", streamed=True), Shape(1024, 1024), gpus=2)
    assert "the text encoder needs 34.8 GB on its own GPU (22.4 GB available)" in str(layout.reason)


def test_the_cache_takes_no_time_for_text_and_the_cpu_takes_more_than_a_gpu() -> None:
    found = {}
    for placement in ("resident", "cache", "cpu"):
        chosen = ask(Question(DEV, gpu("h100"), text_encoder=placement)).chosen
        assert chosen is not None
        assert chosen.timing is not None
        found[placement] = (chosen.timing.text.mid, chosen.layout.weights["text_encoder"])
    assert found["cache"] == (0.0, 0)
    assert found["cpu"][0] > found["resident"][0] > 0
    assert found["cpu"][1] == 0


def test_a_plan_with_a_prompt_cache_says_that_there_is_none_yet() -> None:
    note = "the kit has no cache of prompt embeddings yet, so this plan is an estimate that cannot be deployed"
    answer = ask(Question(KLEIN, gpu("l4"), text_encoder="cache"))
    assert facts(answer)["note"] == note
    assert f"note: {note}" in render(answer).splitlines()
    assert f"note: {note}" in compare([answer]).splitlines()


def test_a_prompt_cache_is_never_the_planners_own_choice() -> None:
    for card in GPUS.values():
        answer = ask(Question(DEV, card, gpus=2))
        assert "cache" not in {tried.choice.text_encoder for tried in answer.tried}
        assert "note" not in facts(answer)
        assert "note:" not in render(answer)


@pytest.mark.parametrize(("name", "sibling"), [("fp8-channel", "fp8"), ("int8-plain", "int8")])
def test_every_recipe_that_can_be_applied_can_be_planned(name: str, sibling: str) -> None:
    found, like = (ask(Question(KLEIN, gpu("h100"), recipe=recipe)).chosen for recipe in (name, sibling))
    assert found is not None
    assert like is not None
    assert found.choice.recipe.name == name
    assert found.layout == like.layout
    assert found.timing == like.timing


def test_prompts_that_queue_at_the_cpu_limit_the_throughput() -> None:
    slow, fast = (ask(Question(KLEIN, gpu("h100"), text_encoder="cpu", cores=n)).per_minute for n in (2, 64))
    assert slow is not None
    assert fast is not None
    assert slow.mid < fast.mid / 3


def test_references_are_tokens_of_every_step_and_images_for_the_vae_encoder() -> None:
    plain, edited = (ask(Question(KLEIN, gpu("h100"), references=count)) for count in (0, 2))
    assert plain.chosen is not None
    assert edited.chosen is not None
    assert plain.chosen.timing is not None
    assert edited.chosen.timing is not None
    assert plain.chosen.timing.references.mid == 0
    assert "vae_encoder" not in plain.chosen.layout.weights
    assert edited.chosen.layout.weights["vae_encoder"] == weight_bytes("vae_encoder", KLEIN, RECIPES["fp8"])
    longer = ask(Question(KLEIN, gpu("h100"), width=1536, height=2048)).chosen  # as many tokens, without references
    assert longer is not None
    assert longer.timing is not None
    assert edited.chosen.timing.step == longer.timing.step
    assert edited.chosen.layout.cache == 0
    assert "1024x1024, 4 steps, batch 1, 2 references of 1024x1024" in render(edited)


def test_klein_kv_reads_references_once_and_keeps_their_keys_and_values() -> None:
    variant = VARIANTS["klein-9b-kv"]
    every_step, once = (ask(Question(v, gpu("h100"), references=2)) for v in (VARIANTS["klein-9b"], variant))
    chosen = once.chosen
    assert every_step.chosen is not None
    assert chosen is not None
    assert chosen.timing is not None
    assert every_step.chosen.timing is not None
    assert {"transformer_extract", "transformer_cached"} <= chosen.layout.weights.keys()
    assert chosen.layout.cache / 2 / GB == pytest.approx(2.15, abs=0.01)  # per megapixel, as published
    assert chosen.timing.step.mid < 0.5 * every_step.chosen.timing.step.mid
    assert chosen.timing.image.mid < every_step.chosen.timing.image.mid
    found = facts(once)
    assert (found["references"], found["reference_side"]) == (2, 1024)
    assert found["memory"]["reference_keys_and_values"] == chosen.layout.cache
    assert found["seconds"]["references"][1] == round(chosen.timing.references.mid, 5)
    text = render(once)
    assert "keys and values of references" in text
    assert "references: VAE encoder, keys and values, s" in text
    plain = ask(Question(variant, gpu("h100"))).chosen
    assert plain is not None
    assert set(plain.layout.weights) == {"text_encoder", "transformer", "vae_decoder"}


def test_keys_and_values_that_do_not_fit_are_named_and_fewer_references_are_near() -> None:
    answer = ask(Question(VARIANTS["klein-9b-kv"], gpu("l4"), batch=4, references=4))
    assert answer.chosen is None
    assert "34.4 GB keys and values of references" in str(answer.tried[0].layout.reason)
    assert answer.nearest == "--batch 1"
    one = ask(Question(VARIANTS["klein-9b-kv"], gpu("t4"), references=4))
    assert one.nearest == "--references 0"


def test_a_hosted_price_without_references_is_not_compared() -> None:
    klein, dev = (ask(Question(v, gpu("h100"), references=2)) for v in (KLEIN, DEV))
    assert "no hosted service is known that states a price for reference images" in render(klein)
    assert dev.costs is not None
    assert [(even.hosted.offer, round(even.usd_per_image, 4)) for even in dev.costs.break_even] == [("fal", 0.036)]


def test_activations_agree_with_published_figures() -> None:
    flux1 = activation_bytes("transformer", FLUX1_DEV, RECIPES["bf16"], Shape(1024, 1024))
    flux2 = activation_bytes("transformer", DEV, RECIPES["bf16"], Shape(1024, 1024))
    assert flux1 / GB == pytest.approx(0.49, rel=0.1)
    assert flux2 / GB == pytest.approx(1.0, rel=0.1)


def test_unmeasured_int8_on_ampere_has_bf16_as_its_slow_end() -> None:
    int8, bf16 = (ask(Question(KLEIN, gpu("a10g"), recipe=name)).chosen for name in ("int8", "bf16"))
    assert int8 is not None
    assert bf16 is not None
    assert int8.timing is not None
    assert bf16.timing is not None
    assert int8.timing.step.high == pytest.approx(bf16.timing.step.high)
    assert int8.timing.step.mid < bf16.timing.step.mid


def test_weight_only_recipes_are_not_faster_than_bf16() -> None:
    plain, small = (ask(Question(KLEIN, gpu("l4"), recipe=name)).chosen for name in ("bf16", "int4-weights"))
    assert plain is not None
    assert small is not None
    assert plain.timing is not None
    assert small.timing is not None
    assert small.timing.step.mid == pytest.approx(plain.timing.step.mid)
    assert small.timing.step.high > plain.timing.step.high
    assert small.layout.needed < plain.layout.needed


def test_a_rate_gets_as_many_replicas_as_it_needs_and_waits_grow_with_load() -> None:
    question = Question(KLEIN, gpu("h100"), batch=4)
    p95 = []
    for rate in (30.0, 150.0, 900.0):
        load = ask(replace(question, rate=rate)).load
        assert load is not None
        assert load.waiting is not None
        assert load.slow is not None
        assert load.slow.load <= 0.85
        assert load.slow.p95 >= load.waiting.p95
        p95.append((load.replicas, load.waiting.p95))
    assert p95[0][0] == p95[1][0] == 1
    assert p95[1][1] > p95[0][1]
    assert p95[2][0] > 1


def test_a_step_that_was_measured_replaces_the_estimate() -> None:
    question = Question(KLEIN, gpu("l4"), step_seconds=0.5, rate=5.0, batch=2)
    answer = ask(question)
    assert answer.chosen is not None
    assert answer.chosen.timing is not None
    assert answer.chosen.timing.step.low == answer.chosen.timing.step.high == 0.5
    assert answer.per_minute is not None
    slower = ask(replace(question, step_seconds=1.0)).per_minute
    assert slower is not None
    assert answer.per_minute.mid > slower.mid


def test_one_replica_that_cannot_keep_up_is_called_overloaded_and_has_no_cost() -> None:
    answer = ask(Question(KLEIN, gpu("l4"), rate=100.0, replicas=1))
    assert answer.load is not None
    assert answer.load.waiting is None
    assert answer.costs is not None
    assert answer.costs.at_rate is None
    assert "overloaded: the queue grows without bound" in render(answer)


def test_break_even_is_the_months_rent_over_the_hosted_price() -> None:
    costs = ask(Question(KLEIN, gpu("l4")), price=0.8).costs
    assert costs is not None
    even = costs.break_even[0]
    assert even.hosted.offer == "Black Forest Labs"
    assert even.images == pytest.approx(0.8 * 730 / 0.014)
    assert even.possible
    dev = ask(Question(DEV, gpu("l4")), price=0.8).costs
    assert dev is not None
    assert not dev.break_even[0].possible


def test_a_hosted_price_of_another_step_count_is_not_compared() -> None:
    fifty, eight = (ask(Question(DEV, gpu("h100"), steps=steps)).costs for steps in (50, 8))
    assert fifty is not None
    assert eight is not None
    assert "fal turbo" not in {e.hosted.offer for e in fifty.break_even}
    assert "fal turbo" in {e.hosted.offer for e in eight.break_even}


@pytest.mark.parametrize(("compute", "moved"), [(0.001, 10.0), (1.0, 1.0), (10.0, 0.01), (1.0, 0.0)])
def test_a_streamed_estimate_lies_in_its_own_range(compute: float, moved: float) -> None:
    found = _streamed(Range(0.7 * compute, compute, 1.15 * compute), moved)
    assert found.low <= found.mid <= found.high <= 1.15 * compute + moved


def test_an_estimate_outside_its_range_cannot_be_made() -> None:
    with pytest.raises(AssertionError, match="an estimate outside its own range"):
        Range(1.0, 3.0, 2.0)


def test_fp32_is_multiplied_as_tf32_and_takes_twice_the_time_of_bf16() -> None:
    fp32, bf16 = (ask(Question(KLEIN, gpu("h100"), recipe=name)).chosen for name in ("fp32", "bf16"))
    assert fp32 is not None
    assert bf16 is not None
    assert fp32.timing is not None
    assert bf16.timing is not None
    assert fp32.timing.ceiling == pytest.approx(2 * bf16.timing.ceiling)
    assert 1.8 < fp32.timing.step.mid / bf16.timing.step.mid < 2.2


def test_the_offer_that_is_used_is_printed_and_can_hold_the_plan() -> None:
    answer = ask(Question(DEV, gpu("l4")))
    assert answer.costs is not None
    assert answer.costs.offer.offer == "AWS g6.4xlarge"  # weights in 51 GB of host memory; a g6.xlarge has 16 GiB
    assert "AWS g6.4xlarge: 16 cores, 64 GiB of host memory" in render(answer)
    small = replace(PRICES, gpus={"l4": PRICES.gpus["l4"][:2]})
    answer = plan(Question(DEV, gpu("l4")), small)
    assert answer.costs is None
    words = "no offer is known to have the 55.1 GB of host memory that this needs; set --price"
    assert f"cost: {words}" in render(answer)
    assert words in compare([answer])


def test_at_a_rate_the_cost_and_the_break_even_are_those_of_that_rate() -> None:
    answer = ask(Question(DEV, gpu("h100"), steps=28, rate=10.0))
    assert answer.load is not None
    assert answer.costs is not None
    assert answer.costs.replicas == answer.load.replicas == 3
    assert [even.cheaper for even in answer.costs.break_even] == [False, False]
    text = render(answer)
    assert "against fal ($0.012 per image, 2026-11-23): dearer at this rate (438,000 images per month); 3 repl" in text
    assert "cheaper from" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.41e-5, "<0.001"), (0.00123, "0.00123"), (0.0726, "0.0726"), (1.0, "1.00"), (99.96, "100"), (162258, "162,258")],
)
def test_numbers_are_printed_without_an_exponent(value: float, text: str) -> None:
    assert number(value) == text
    assert span(Range(0.0, 0.001, 0.001), 2) == "<0.01 (0.00-<0.01)"


def test_a_gpu_without_a_price_has_no_costs() -> None:
    answer = plan(Question(KLEIN, gpu("l4")), replace(PRICES, gpus={}))
    assert answer.costs is None
    assert "no price known for this GPU; set one with --price" in render(answer)
    assert "-" in compare([answer])


def test_nothing_that_fits_names_the_nearest_setting_and_other_gpus() -> None:
    answer = ask(Question(DEV, gpu("l4"), recipe="int4-weights", text_encoder="resident", batch=60))
    assert answer.chosen is None
    assert answer.nearest == "--batch 9"
    assert answer.elsewhere == ("h100", "a100-80g", "rtxpro6000", "h200", "b200")
    assert ask(Question(DEV, gpu("l4"), recipe="int4-weights", text_encoder="resident", batch=9)).chosen
    bf16 = ask(Question(DEV, gpu("l4"), recipe="bf16", text_encoder="resident"))
    assert bf16.nearest == "another --text-encoder"
    assert "does not fit" in compare([bf16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps 0: must be 1 to 100"),
        ({"batch": 65}, "--batch 65: must be 1 to 64"),
        ({"gpus": 0}, "--gpus 0: must be 1 to 10000"),
        ({"references": 5}, "--references 5: klein-4b takes 0 to 4 reference images"),
        ({"references": -1}, "--references -1: klein-4b takes 0 to 4 reference images"),
        ({"variant": DEV, "references": 11}, "--references 11: dev takes 0 to 10 reference images"),
        ({"cores": 0}, "--cores 0: must be 1 to 10000"),
        ({"replicas": 0}, "--replicas 0: must be 1 to 10000"),
        ({"rate": 0.0}, "--rate 0: must be more than 0 images per minute"),
        ({"rate": float("nan")}, "--rate nan: must be more than 0"),
        ({"step_seconds": 0.0}, "--step-seconds 0: must be more than 0 seconds"),
        ({"width": 1000}, "1000x1024: sides must be multiples of 16; nearest: 992x1024"),
        ({"width": 4096, "height": 4096}, "nearest: 2048x2048"),
        ({"gpu": gpu("a10g"), "recipe": "fp8"}, "fp8 needs compute capability 8.9 or newer; a10g has 8.6"),
    ],
)
def test_impossible_questions_are_refused(change: dict[str, object], message: str) -> None:
    assert message in str(replace(Question(KLEIN, gpu("l4")), **change).refusal())  # type: ignore[arg-type]


def test_the_facts_hold_what_the_text_says() -> None:
    answer = ask(Question(KLEIN, gpu("l4"), rate=10.0))
    found = facts(answer)
    assert found["plan"] == "fp8, text encoder on the GPU"
    assert found["basis"]["points_on_this_gpu"] == 0
    assert found["memory"]["total"] == sum(found["memory"]["weights"].values()) + sum(
        found["memory"][key] for key in ("activations", "requests")
    )
    text = render(answer)
    assert "fp8, text encoder on the GPU" in text
    assert "none of them on this GPU" in text
    assert "\033[" not in text
    assert "\033[32mYES\033[0m" in render(answer, colour=True)
