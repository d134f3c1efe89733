"""Swaps between runs against plain passes of one text each; test_tracing.py finds a planted place with them."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import activations
from helpers.activations import site
from helpers.directions import logits
from helpers.patching import COMPONENTS, Component, Runs, Swap, ran, swapped
from helpers.prompts import tokens

# Longer than the tiny models' sliding window of 16 tokens, short, and alone; then the other versions of the first two.
LONG = "He saw how {} the ice had grown before they came back over the lake that night. He knew"
SHORT = "The ice {} under our van. He knew"
TEXTS = [LONG.format("thin"), SHORT.format("broke"), "The door was open.", LONG.format("thick"), SHORT.format("held")]
LENGTH = [21, 10, 6, 21, 10]  # position 0 counted
THIN, BROKE, ALONE, THICK, HELD = range(5)
# Whose run is changed, whose activations it gets, and at which tokens from which.
ROWS = [
    (THICK, THIN, {4: 4}),
    (THIN, THICK, {pos: pos for pos in range(4, 21)}),
    (BROKE, THIN, {3: 4, 9: 20}),  # other places of another text
    (THIN, BROKE, {5: 4, 6: 5, 7: 5, 20: 5}),  # one token for several
    (ALONE, HELD, {1: 2, 5: 8}),
]
HEADS = torch.tensor([[True, False], [False, True], [False, True], [True, True], [False, False]])
LAYERS = {component: range(4 if component == "residual stream" else 3) for component in COMPONENTS}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
SAME = {"atol": 2e-6, "rtol": 1e-6}
EACH = pytest.mark.parametrize("component", COMPONENTS)
ERRORS = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks of the tests, as in a notebook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def runs(any_model: TransformerBridge) -> Runs:
    return ran(any_model, TEXTS)


@pytest.fixture(scope="module")
def held(any_model: TransformerBridge) -> dict[tuple[Component, int], list[Tensor]]:
    """What stands at every hook point when each text runs alone."""
    found = {(component, layer): [] for component in COMPONENTS for layer in LAYERS[component]}
    hooks = [
        (hook_point(any_model, *key), lambda acts, hook, kept=kept: kept.append(acts[0].clone()))
        for key, kept in found.items()
    ]
    with torch.no_grad(), any_model.hooks(fwd_hooks=hooks):
        for text in TEXTS:
            any_model.original_model(input_ids=tokens(any_model, [text]).ids)
    return found


@pytest.fixture(scope="module")
def slow(any_model: TransformerBridge, held: dict) -> dict[tuple[Component, int], Tensor]:
    """What leaves the last block at the last token of every row, each in a whole pass of its own."""
    return {key: changed(any_model, key, given) for key, given in held.items()}


def test_a_run_holds_what_a_plain_pass_of_its_text_alone_holds(runs: Runs, held: dict):
    for (component, layer), alone in held.items():
        for row, acts in enumerate(alone):
            assert len(acts) == LENGTH[row]
            torch.testing.assert_close(runs.held(component, layer)[row, : LENGTH[row]], acts, **CLOSE)
    torch.testing.assert_close(runs.last, torch.stack([acts[-1] for acts in held["residual stream", 3]]), **CLOSE)


def test_attention_and_mlp_are_what_a_block_adds(runs: Runs):
    added = runs.stream[:, :, 1:] - runs.stream[:, :, :-1]
    real = runs.read.real
    torch.testing.assert_close((runs.outputs["attention"] + runs.outputs["MLP"])[real], added[real], **CLOSE)
    assert runs.outputs["heads"].shape == (5, 21, 3, 2, 16)


def test_only_the_components_asked_for_are_kept(model: TransformerBridge):
    assert list(ran(model, TEXTS, ["MLP", "residual stream"]).outputs) == ["MLP"]


@EACH
def test_swaps_give_what_slow_passes_of_every_row_give(any_model, runs: Runs, slow: dict, component: Component):
    found = swapped(any_model, runs, swap_of(ROWS), component, LAYERS[component], all_of_it)
    for layer, last in zip(LAYERS[component], found, strict=True):
        torch.testing.assert_close(last, slow[component, layer], **CLOSE)


@EACH
def test_every_row_of_the_slow_passes_differs_from_its_run_unchanged(runs: Runs, slow: dict, component: Component):
    """Else the test above could pass with nothing swapped at all. A word alone may be too far away above layer 0."""
    for layer, rows in ((0, slice(None)), (1, slice(1, None))):
        moves = slow[component, layer] - runs.last[bases()]
        assert moves[rows].abs().amax(-1).min() > 1e-3


def test_single_heads_are_swapped_as_slow_passes_swap_them(any_model, runs: Runs, held: dict, slow: dict):
    found = swapped(any_model, runs, swap_of(ROWS, HEADS), "heads", range(3), all_of_it)
    for layer, last in enumerate(found):
        expected = changed(any_model, ("heads", layer), held["heads", layer], HEADS)
        torch.testing.assert_close(last, expected, **CLOSE)
    both, single = slow["heads", 0], found[0]
    assert (single[:3] - runs.last[bases()[:3]]).abs().amax(-1).min() > 1e-3
    assert (single[:3] - both[:3]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(single[3:], torch.stack([both[3], runs.last[ALONE]]), **CLOSE)


def test_all_heads_together_are_the_attention(slow: dict):
    for layer in range(3):
        torch.testing.assert_close(slow["heads", layer], slow["attention", layer], **CLOSE)


@EACH
def test_a_text_s_own_activations_change_nothing(any_model: TransformerBridge, runs: Runs, component: Component):
    rows = [(run, run, {pos: pos for pos in range(LENGTH[run])}) for run in range(5)] + [(THIN, BROKE, {})]
    found = swapped(any_model, runs, swap_of(rows), component, LAYERS[component], all_of_it)
    expected = runs.last[[*range(5), THIN]].expand_as(found)
    torch.testing.assert_close(found, expected, **SAME)
    if component == "residual stream":
        assert torch.equal(found[-1], expected[-1])


@EACH
def test_nothing_moves_before_the_changed_word(any_model: TransformerBridge, runs: Runs, component: Component):
    rows = [(THIN, THICK, {pos: pos for pos in range(4)}), (BROKE, HELD, {0: 0, 2: 2})]
    found = swapped(any_model, runs, swap_of(rows), component, [1], all_of_it)
    torch.testing.assert_close(found[0], runs.last[[THIN, BROKE]], **SAME)


def test_the_stream_from_the_changed_word_on_is_the_other_version(any_model: TransformerBridge, runs: Runs):
    """At every depth; what enters the first block differs at the word alone, what leaves the last counts at the end."""
    couples = [(THIN, THICK, 4), (THICK, THIN, 4), (BROKE, HELD, 3), (HELD, BROKE, 3)]
    everything = [(own, other, {pos: pos for pos in range(at, LENGTH[own])}) for own, other, at in couples]
    word = [(own, other, {at: at}) for own, other, at in couples]
    end = [(own, other, {LENGTH[own] - 1: LENGTH[own] - 1}) for own, other, _ in couples]
    expected = runs.last[[THICK, THIN, HELD, BROKE]]
    assert (expected - runs.last[[THIN, THICK, BROKE, HELD]]).abs().amax(-1).min() > 1e-2
    for rows, depths in ((everything, range(4)), (word, [0]), (end, [3])):
        found = swapped(any_model, runs, swap_of(rows), "residual stream", depths, all_of_it)
        torch.testing.assert_close(found, expected.expand_as(found), **SAME)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("batch_tokens", [1, 45])
def test_results_do_not_depend_on_the_batches(
    any_model: TransformerBridge, runs: Runs, slow: dict, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(activations.BATCH_TOKENS, "cpu", batch_tokens)
    for component in ("residual stream", "heads"):
        found = swapped(any_model, runs, swap_of(ROWS), component, [1], all_of_it)
        torch.testing.assert_close(found[0], slow[component, 1], **CLOSE)


def test_results_do_not_depend_on_the_rows_or_texts_beside_them(any_model: TransformerBridge, runs: Runs, slow: dict):
    chosen = [4, 2, 0, 2]
    found = swapped(any_model, runs, swap_of([ROWS[row] for row in chosen]), "MLP", [1], all_of_it)
    torch.testing.assert_close(found[0], slow["MLP", 1][chosen], **CLOSE)
    fewer = ran(any_model, [TEXTS[HELD], TEXTS[ALONE]])  # no longer text that they are padded to
    found = swapped(any_model, fewer, swap_of([(1, 0, ROWS[4][2])], width=10), "MLP", [1], all_of_it)
    torch.testing.assert_close(found[0, 0], slow["MLP", 1][4], **CLOSE)


def test_the_measure_reads_what_leaves_the_last_block_at_the_last_token(any_model, runs: Runs, generator: Generator):
    along = torch.randn(any_model.cfg.d_model, 3, generator=generator)
    whole = swapped(any_model, runs, swap_of(ROWS), "attention", [2, 0], all_of_it)
    found = swapped(any_model, runs, swap_of(ROWS), "attention", [2, 0], lambda last: last @ along)
    torch.testing.assert_close(found, whole @ along, **CLOSE)


@pytest.mark.parametrize("component", ["residual stream", "heads"])
def test_blocks_below_the_swap_do_not_run(any_model: TransformerBridge, runs: Runs, component: Component):
    seen = []
    watched = [(f"blocks.{i}.attn.hook_out", lambda out, hook, i=i: seen.append((i, len(out)))) for i in range(3)]
    with any_model.hooks(fwd_hooks=watched):
        for layer in LAYERS[component]:
            swapped(any_model, runs, swap_of(ROWS), component, [layer], all_of_it)
            assert seen == [(i, len(ROWS)) for i in range(layer, 3)]
            seen.clear()


@ERRORS
def test_nothing_stays_behind_after_a_swap_or_an_error_in_one(
    any_model: TransformerBridge, runs: Runs, slow: dict, error: type[BaseException]
):
    replaced = []

    def fail(*_: object, **__: object) -> Tensor:
        replaced.append(changed_blocks(any_model))
        raise error

    with pytest.raises(error), any_model.hooks(fwd_hooks=[("blocks.2.attn.hook_out", fail)]):
        swapped(any_model, runs, swap_of(ROWS), "heads", [2], all_of_it)
    assert_clean(any_model)
    with pytest.raises(error):
        swapped(any_model, runs, swap_of(ROWS), "heads", [1], fail)
    assert replaced == [[0, 1], []]  # while a block ran, and at the measure
    assert_clean(any_model)
    with pytest.raises(error), any_model.hooks(fwd_hooks=[("blocks.1.attn.hook_out", fail)]):
        ran(any_model, TEXTS)
    assert_clean(any_model)
    found = swapped(any_model, runs, swap_of(ROWS), "heads", [1], all_of_it)
    assert_clean(any_model)
    torch.testing.assert_close(found[0], slow["heads", 1], **CLOSE)
    torch.testing.assert_close(ran(any_model, TEXTS).last, runs.last, **SAME)


def test_a_hook_of_the_caller_s_own_stays(model: TransformerBridge):
    seen = []
    with model.hooks(fwd_hooks=[(site(model, 1), lambda resid, hook: seen.append(len(resid)))]):
        swapped(model, ran(model, TEXTS), swap_of(ROWS), "MLP", [1], all_of_it)
        model.original_model(input_ids=torch.tensor([[0, 5]]))
    assert seen == [len(TEXTS), len(ROWS), 1]


@pytest.mark.parametrize(
    "row", [(BROKE, BROKE, {10: 9}), (ALONE, THIN, {20: 20}), (THIN, BROKE, {12: 10}), (THIN, ALONE, {6: 6})]
)
@EACH
def test_a_place_outside_of_the_text_or_of_the_giver_s_is_refused(
    model: TransformerBridge, component: Component, row: tuple
):
    with pytest.raises(ValueError, match="a place to swap lies outside of its text"):
        swapped(model, ran(model, TEXTS), swap_of([ROWS[0], row]), component, [0], all_of_it)


def test_an_unknown_component_is_refused_with_the_known_ones(model: TransformerBridge, unchecked: None):
    known = "unknown component 'mlp': choose from residual stream, attention, MLP, heads"
    with pytest.raises(ValueError, match=known):
        ran(model, TEXTS, ["mlp"])
    with pytest.raises(ValueError, match=known):
        swapped(model, ran(model, TEXTS), swap_of(ROWS), "mlp", [0], all_of_it)


def test_a_depth_or_layer_that_the_model_does_not_have_is_refused(model: TransformerBridge):
    runs = ran(model, TEXTS)
    with pytest.raises(ValueError, match="depth 4 is out of range: local--tiny-gpt2 has depths 0 to 3"):
        swapped(model, runs, swap_of(ROWS), "residual stream", [0, 4], all_of_it)
    with pytest.raises(ValueError, match=r"local--tiny-gpt2 has no hook point 'blocks\.3\.hook_mlp_out'"):
        swapped(model, runs, swap_of(ROWS), "MLP", [3], all_of_it)


def test_logits_are_those_of_the_model_s_own_head(any_model: TransformerBridge, runs: Runs):
    found = logits(any_model, runs.last)
    for row, text in enumerate(TEXTS):
        expected = any_model.original_model(input_ids=tokens(any_model, [text]).ids).logits[0, -1]
        torch.testing.assert_close(found[row], expected, **CLOSE)
    assert torch.equal(logits(any_model, runs.last, [852, 0, 4000]), found[:, [852, 0, 4000]])


def all_of_it(last: Tensor) -> Tensor:
    return last


def bases() -> list[int]:
    return [base for base, _, _ in ROWS]


def hook_point(model: TransformerBridge, component: Component, layer: int) -> str:
    inner = {"attention": "hook_attn_out", "MLP": "hook_mlp_out", "heads": "attn.hook_z"}
    return site(model, layer) if component == "residual stream" else f"blocks.{layer}.{inner[component]}"


def changed(
    model: TransformerBridge, key: tuple[Component, int], given: list[Tensor], heads: Tensor | None = None
) -> Tensor:
    """What leaves the last block at the last token of each row, whose donor's text held what is `given`."""
    row, kept = 0, []

    def change(acts: Tensor, hook) -> Tensor:
        acts, (_, donor, places) = acts.clone(), ROWS[row]
        for pos, source in places.items():
            if heads is None:
                acts[0, pos] = given[donor][source]
            else:
                acts[0, pos, heads[row]] = given[donor][source, heads[row]]
        return acts

    hooks = [(hook_point(model, *key), change), (site(model, 3), lambda acts, hook: kept.append(acts[0, -1].clone()))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        for row in range(len(ROWS)):
            model.original_model(input_ids=tokens(model, [TEXTS[bases()[row]]]).ids)
    return torch.stack(kept)


def swap_of(rows: list[tuple[int, int, dict[int, int]]], heads: Tensor | None = None, width: int = 21) -> Swap:
    places, source = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (_, _, at) in enumerate(rows):
        for pos, pos_of_giver in at.items():
            places[row, pos], source[row, pos] = True, pos_of_giver
    base, donor = (torch.tensor([row[side] for row in rows]) for side in (0, 1))
    return Swap(base, donor, places, source, heads)


def changed_blocks(model: TransformerBridge) -> list[int]:
    return [number for number, block in enumerate(model.blocks) if "forward" in block.__dict__]


def assert_clean(model: TransformerBridge) -> None:
    assert not changed_blocks(model)
    assert not [name for name, point in model.hook_dict.items() if point.fwd_hooks]
