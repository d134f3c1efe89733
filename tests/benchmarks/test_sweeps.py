"""What steering sweeps cost, against the loops and the package that people use: `make bench`.

Random weights of GPT-2 small's size. The usual loops are timed on a part of the grid that holds every prompt and every
depth as often as the whole does, since every run of theirs costs the same; the sweeps are timed whole.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_reading import folder, medians, model  # noqa: F401, fixtures
from transformer_lens.model_bridge import TransformerBridge

from helpers import plots, sweeps
from helpers.activations import at_positions, pair_residuals, residual_norms, site
from helpers.config import FIGURES
from helpers.continuations import generated, log_odds
from helpers.directions import mean_difference, mean_gap, unit
from helpers.models import load_model, uncentred
from helpers.prompts import dilemmas, first_token, neutral_texts, pairs, sides, tokens
from helpers.steering import Add, added
from helpers.steering_plots import costs

STRENGTHS = [-20, -15, -10, -5, 0, 5, 10, 15, 20, 30, 40]
WRITTEN, DEPTH = 40, 6


@pytest.fixture(scope="module")
def direction() -> torch.Tensor:
    return unit(torch.randn(1, 768, generator=torch.Generator().manual_seed(0)))


def seconds(call: Callable[[], object]) -> float:
    """Of one call, the GPU's work included."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ids_of(bridge: TransformerBridge, text: str, first: Sequence[int] = ()) -> list[int]:
    return [*first, *bridge.tokenizer(text, add_special_tokens=False)["input_ids"]]


def steering(vector: torch.Tensor) -> Callable:
    """The hook that people write: a vector added everywhere but at position 0."""

    def add(resid: torch.Tensor, hook) -> torch.Tensor:
        if resid.shape[1] == 1:  # a decode step
            return resid + vector
        return torch.cat([resid[:, :1], resid[:, 1:] + vector], 1)

    return add


@torch.no_grad()
def one_by_one(bridge: TransformerBridge, runs: list[tuple], direction: torch.Tensor) -> list[float]:
    """One full forward pass with all logits per depth, strength, prompt and continuation."""
    found = []
    for depth, strength, row in runs:
        scores = []
        for continuation in (row.act, row.refrain):
            before, after = ids_of(bridge, row.text, [first_token(bridge)]), ids_of(bridge, continuation)
            hook = site(bridge, depth), steering(strength * direction.to(bridge.cfg.device))
            ids = torch.tensor([before + after], device=bridge.cfg.device)
            logits = bridge.run_with_hooks(ids, fwd_hooks=[hook])[0, len(before) - 1 : -1]
            scores.append(logits.log_softmax(-1).gather(-1, ids[0, len(before) :, None]).sum().item())
        found.append(scores[0] - scores[1])
    return found


def test_scoring_12_depths_11_strengths_24_prompts(
    benchmark,
    folder: Path,  # noqa: F811
    model: TransformerBridge,  # noqa: F811
    direction: torch.Tensor,
) -> None:
    """At least 5 times as fast as the usual loop in float32, with log-odds within 1e-4; bfloat16 apart."""
    table, depths = dilemmas(), range(12)
    methods = {depth: {"direction": Add(direction)} for depth in depths}
    runs = [(i % 12, STRENGTHS[i % 11], row) for i, row in enumerate(table.itertuples())]
    one_by_one(model, runs[:2], direction)
    expected = one_by_one(model, runs, direction)
    loop = seconds(lambda: one_by_one(model, runs, direction))
    began = time.perf_counter()
    found = benchmark.pedantic(sweeps.sweep, args=(model, table, methods, STRENGTHS), rounds=1)
    fast = time.perf_counter() - began
    loop = (loop + seconds(lambda: one_by_one(model, runs, direction))) / 2 * (12 * 11 * 24) / len(runs)
    for (depth, strength, row), value in zip(runs, expected):
        mine = found[(found["prompt"] == row.prompt) & (found["strength"] == strength)]
        mine = mine[(mine["depth"] == depth) | (strength == 0)]
        assert mine["log_odds"].item() == pytest.approx(value, abs=1e-4)
    half = load_model(str(folder), dtype=torch.bfloat16)
    halved = seconds(lambda: sweeps.sweep(half, table, methods, STRENGTHS))
    faster = loop / fast
    benchmark.extra_info |= {"against_loop": faster, "bfloat16": fast / halved}
    print(
        f"\n12 depths x 11 strengths x 24 prompts scored: {faster:.1f} x faster than the usual loop ({fast:.0f} s), "
        f"in bfloat16 {fast / halved:.1f} x faster still"
    )
    assert faster >= 5


def test_writing_24_prompts_11_strengths(
    benchmark,
    model: TransformerBridge,  # noqa: F811
    direction: torch.Tensor,
) -> None:
    """At least 5 times as fast as the usual loop with `generate`, which has its KV cache on too."""
    texts = dilemmas()["text"].tolist()
    every = [text for text in texts for _ in STRENGTHS]
    vectors = torch.tensor(STRENGTHS, dtype=torch.float32)[:, None] * direction

    @torch.no_grad()
    def usual_loop() -> None:
        for i, text in enumerate(texts[::2]):
            ids = torch.tensor([ids_of(model, text, [first_token(model)])], device=model.cfg.device)
            hook = site(model, DEPTH), steering(vectors[i % 11].to(model.cfg.device))
            with model.hooks(fwd_hooks=[hook]):
                model.original_model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITTEN, min_new_tokens=WRITTEN,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip

    def together() -> None:
        generated(model, every, WRITTEN, added(DEPTH, vectors.repeat(len(texts), 1)), min_tokens=WRITTEN)

    usual_loop()
    loop = seconds(usual_loop)
    fast = seconds(together)
    loop = (loop + seconds(usual_loop)) / 2 * len(every) / len(texts[::2])
    benchmark.extra_info |= {"against_loop": loop / fast}
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\n24 prompts x 11 strengths x 40 tokens written: {loop / fast:.1f} x faster than the loop ({fast:.0f} s)")
    assert loop / fast >= 5


def test_extraction_from_40_pairs_against_steering_vectors(benchmark, model: TransformerBridge) -> None:  # noqa: F811
    """At least as fast as the package with its own settings and with batches of 16, and the same direction."""
    package = pytest.importorskip(
        "steering_vectors", reason="`make bench` installs steering-vectors for this comparison"
    )
    raw = uncentred(model)
    table = pairs("fear_calm").head(40)
    samples = list(zip(table["emotional"], table["neutral"]))  # the bridge's tokenizer begins them with position 0
    read = tokens(raw, sides(table))

    def ours() -> torch.Tensor:
        acts = at_positions(raw, sides(table), (read.length - 1).cpu(), [DEPTH])[:, 0]
        return mean_gap(acts[:40], acts[40:])

    def theirs(size: int) -> torch.Tensor:
        found = package.train_steering_vector(
            raw.original_model, raw.tokenizer, samples, layers=[DEPTH - 1], batch_size=size,
            layer_config={"decoder_block": "transformer.h.{num}"},
        )  # fmt: skip
        return found.layer_activations[DEPTH - 1].cpu()

    taken = medians({"ours": ours, "theirs": lambda: theirs(1), "theirs, batches of 16": lambda: theirs(16)})
    cosine = torch.nn.functional.cosine_similarity(ours(), theirs(1), dim=0).item()
    faster = taken["theirs"] / taken["ours"], taken["theirs, batches of 16"] / taken["ours"]
    benchmark.extra_info |= {"against_package": faster[0], "against_package_in_batches": faster[1]}
    benchmark.pedantic(ours, rounds=1)
    print(
        f"\nextraction from 40 pairs: {faster[0]:.1f} x faster than steering-vectors as it comes, {faster[1]:.1f} x "
        f"in batches of 16; cosine {cosine:.5f}"
    )
    assert min(faster) >= 1
    assert cosine > 0.999


def test_how_far_bfloat16_moves_bookworm(benchmark) -> None:
    """Directions and log-odds in bfloat16 against float32: reported, with a bar that only a fault would miss."""
    exact, rough = load_model("bookworm"), load_model("bookworm", dtype=torch.bfloat16)
    train, table = pairs("fear_calm", "train"), dilemmas()
    fear, coarse = (
        mean_difference(*pair_residuals(each, train, ["last token"])["last token"]) for each in (exact, rough)
    )
    cosine = torch.nn.functional.cosine_similarity(fear, coarse, dim=-1)
    depth = exact.cfg.n_layers // 2
    vector = 0.2 * residual_norms(exact, neutral_texts())[depth] * fear[depth]
    asked = table["text"].tolist(), table["act"].tolist(), table["refrain"].tolist()
    steer = added(depth, vector.expand(len(table), -1))
    one, other = (log_odds(each, *asked, steer) for each in (exact, rough))
    benchmark.pedantic(lambda: None, rounds=1)
    print(
        f"\nbfloat16 on bookworm: cosine of directions {cosine.min():.4f} or more; log-odds differ "
        f"by {(one - other).abs().mean():.3f} nats in the mean, SD {one.std():.1f}"
    )
    assert cosine.min() > 0.95
    assert (one - other).abs().mean() < 0.1 * one.std()


def test_how_the_cost_grows(benchmark, model: TransformerBridge, direction: torch.Tensor) -> None:  # noqa: F811
    """A figure: seconds over depths, strengths, prompts and tokens, one of them growing at a time."""
    table, rows = dilemmas(), []

    def cost(what: str, count: int, depths: int = 1, strengths: int = 2, prompts: int = 6, n_tokens: int = 0) -> None:
        methods = {DEPTH + depth: {"direction": Add(direction)} for depth in range(depths)}
        asked, grid = table.head(prompts), [1.0 + s for s in range(strengths)]
        writing = sweeps.Writing(n_tokens) if n_tokens else None
        rows.append((what, count, seconds(lambda: sweeps.sweep(model, asked, methods, grid, writing=writing))))

    cost("warm-up", 0)
    for count in (1, 2, 3, 4):
        cost("depths (6 and up)", count, depths=count)
    for count in (2, 4, 8, 16):
        cost("strengths", count, strengths=count)
    for count in (3, 6, 12, 24):
        cost("prompts", count, prompts=count)
    for count in (10, 20, 40):
        cost("tokens written", count, n_tokens=count)
    found = pd.DataFrame(rows[1:], columns=["what", "count", "seconds"])
    found["device"] = str(model.cfg.device)
    plots.style()
    plots.save(costs(found), found, "sweep_costs", "gpt2-size-random")
    benchmark.pedantic(lambda: None, rounds=1)
    assert (FIGURES / "gpt2-size-random" / "sweep_costs.png").is_file()
