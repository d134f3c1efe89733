"""A planted site is found and only it; pairs that correspond, the parts of a sentence, and the share that moves."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pandas as pd
import pytest
import torch
from tokenizers.normalizers import Lowercase
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.activations import site
from helpers.models import load_model
from helpers.patching import COMPONENTS, Runs
from helpers.prompts import Tokens, pairs, sides, tokens
from helpers.tracing import GIVERS, Trace, _source, aligned, heads, moved, shares, traced

STEM = "He knew"
SAME_KIND = "another sentence of the same kind"
# Of different lengths; nothing stands between the changed word and the full stop of the last.
SENTENCES = [
    ("He saw how {} the ice had grown.", "thin", "thick"),
    ("The ice {} under our van.", "broke", "held"),
    ("The door was {}.", "open", "shut"),
]
PLACES = ["changed word", "next token", "in between", "full stop", "He", "knew"]
WHERE = [  # by hand, position 0 counted
    [[4], [5], [6, 7, 8], [9], [10], [11]],
    [[3], [4], [5, 6], [7], [8], [9]],
    [[4], [], [], [5], [6], [7]],
]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
PLANTED = [(0, 1), (1, 0), (2, 1)]  # layer, head


def table_of(*both: tuple[str, str]) -> pd.DataFrame:
    rows = [(str(i), "test", "ice", *versions) for i, versions in enumerate(both)]
    return pd.DataFrame(rows, columns=["pair", "split", "topic", "emotional", "neutral"])


TABLE = table_of(*((text.format(word), text.format(other)) for text, word, other in SENTENCES))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks of the tests, as in a notebook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", params=PLANTED, ids=lambda planted: "layer {}, head {}".format(*planted))
def planted(
    request: pytest.FixtureRequest, model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TransformerBridge, int, int]:
    """A GPT-2 in which one head reads the changed word's kind and writes it to `verdict`; with its layer and number.

    Directions are differences of two coordinates, so that a LayerNorm leaves them apart: 0 and 1 say that a word is a
    changed one, 2 and 3 which of both kinds, 4 and 5 hold the verdict, 6 and 7 what every block adds whatever it reads.
    Coordinates from 8 on tell words apart, and nothing reads them. The planted head looks at changed words alone.
    """
    layer, head = request.param
    folder = tmp_path_factory.mktemp("planted") / "tiny-gpt2"
    shutil.copytree(model_folder("gpt2"), folder)
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    first = 16 * head
    with torch.no_grad():
        words = torch.zeros(8192, 32)
        words[:, 8:] = torch.randn(8192, 24, generator=torch.Generator().manual_seed(1))
        words -= words.mean(-1, keepdim=True) * 32 / 24 * (words != 0)
        words *= 3 / words.norm(dim=-1, keepdim=True)
        for kind, column in ((1.0, 1), (-1.0, 2)):
            for sentence in SENTENCES:
                [id_] = tokenizer(f" {sentence[column]}", add_special_tokens=False)["input_ids"]
                words[id_, :4] = torch.tensor([3.0, -3.0, kind, -kind])
        hf.transformer.wte.weight.copy_(words)
        hf.transformer.wpe.weight.zero_()
        for block in hf.transformer.h:
            for written in (block.attn.c_proj, block.mlp.c_proj):
                written.weight.zero_()
                written.bias.zero_()
                written.bias[6:8] = torch.tensor([0.5, -0.5])
        attn = hf.transformer.h[layer].attn
        for part in range(3):  # query, key, value
            attn.c_attn.weight[:, 32 * part + first : 32 * part + first + 16] = 0
            attn.c_attn.bias[32 * part + first : 32 * part + first + 16] = 0
        attn.c_attn.bias[first] = 400
        attn.c_attn.weight[:2, 32 + first] = torch.tensor([1.0, -1.0])
        attn.c_attn.weight[2:4, 64 + first] = torch.tensor([1.0, -1.0])
        attn.c_proj.weight[first, 4:6] = torch.tensor([1.0, -1.0])
    hf.save_pretrained(folder)
    return load_model(str(folder)), layer, head


def verdict(last: Tensor) -> Tensor:
    return last[:, 4:5] - last[:, 5:6]


@pytest.fixture(scope="module")
def planted_trace(planted: tuple[TransformerBridge, int, int]) -> Trace:
    return trace_of(planted[0], verdict)


def test_the_stream_carries_a_planted_difference_at_the_word_up_to_its_block_and_at_the_end_from_there(
    planted: tuple, planted_trace: Trace
):
    model, layer, _ = planted
    expected = torch.zeros(6, 4)
    expected[PLACES.index("changed word"), : layer + 1] = 1
    expected[PLACES.index("knew"), layer + 1 :] = 1
    assert planted_trace.total.min() > 1
    found = of_total(planted_trace, moved(model, planted_trace, "residual stream", verdict))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_only_the_planted_head_moves_the_difference(planted: tuple, planted_trace: Trace):
    model, layer, head = planted
    expected = torch.zeros(2, 3)
    expected[head, layer] = 1
    found = of_total(planted_trace, heads(model, planted_trace, verdict))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("component", ["attention", "heads", "MLP"])
def test_attention_moves_it_at_the_end_and_at_the_planted_layer_only_and_no_mlp_does(
    planted: tuple, planted_trace: Trace, component: str
):
    model, layer, _ = planted
    expected = torch.zeros(6, 3)
    if component != "MLP":
        expected[PLACES.index("knew"), layer] = 1
    found = of_total(planted_trace, moved(model, planted_trace, component, verdict))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("shift", [1, 2])
def test_another_sentence_of_the_same_kind_moves_nothing_in_the_planted_model(
    planted: tuple, planted_trace: Trace, component: str, shift: int
):
    found = moved(planted[0], planted_trace, component, verdict, SAME_KIND, shift=shift)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1, 2])
def test_another_sentence_moves_half_of_what_both_pairs_differ_in_at_the_planted_place(planted: tuple, shift: int):
    """The last pair is turned round: its emotional version has the neutral word."""
    model, layer, _ = planted
    table = TABLE.copy()
    table.loc[2, ["emotional", "neutral"]] = table.loc[2, ["neutral", "emotional"]].tolist()
    trace = traced(model, aligned(model, table), STEM, verdict, ["verdict"], ["residual stream"])
    found = moved(model, trace, "residual stream", verdict, SAME_KIND, ["changed word", "full stop"], shift)
    torch.testing.assert_close(trace.total.sign().flatten(), torch.tensor([1.0, 1, -1]))
    expected = torch.zeros(2, 4, 3, 1)
    expected[0, : layer + 1] = (trace.total - trace.total.roll(-shift, 0)) / 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_planted_shares_are_in_the_table(planted: tuple, planted_trace: Trace, generator: Generator):
    model, layer, _ = planted
    effects = moved(model, planted_trace, "residual stream", verdict, places=["knew", "He"])
    found = shares(planted_trace, effects, ["knew", "He"], generator).set_index(["place", "depth"])
    for column in ("value", "low", "high"):
        assert found[column]["knew"].tolist() == pytest.approx([float(depth > layer) for depth in range(4)], abs=1e-5)
        assert found[column]["He"].tolist() == pytest.approx([0.0] * 4, abs=1e-5)


@pytest.mark.parametrize("giver", GIVERS)
def test_what_moves_is_the_mean_of_both_directions_by_plain_passes(any_model: TransformerBridge, giver: str):
    """Pairs of different lengths: a place takes the giver's same place from its start on, the last token for more."""
    along = torch.randn(any_model.cfg.d_model, 2, generator=torch.Generator().manual_seed(2))
    trace = trace_of(any_model, lambda last: last @ along)
    chosen = ["in between", "changed word", "next token"]
    found = moved(any_model, trace, "residual stream", lambda last: last @ along, giver, chosen)
    assert found.shape == (3, 4, 3, 2)
    texts, gain, none = [f"{text} {STEM}" for text in sides(TABLE)], torch.zeros(3, 3, 2), []
    alone = [passed(any_model, text)[0] for text in texts]
    for row, place in enumerate(chosen):
        for pair in range(3):
            other = pair if giver == "the other version" else (pair + 1) % 3
            at, given = (WHERE[each][PLACES.index(place)] for each in (pair, other))
            none += [(row, pair)] * (not at or not given)
            for base, sign in ((pair, -1), (3 + pair, 1)):  # into the emotional version, into the neutral one
                source = alone[other + 3 * ((base >= 3) == (giver == SAME_KIND))]
                places = {pos: source[given[min(i, len(given) - 1)]] for i, pos in enumerate(at) if given}
                change = passed(any_model, texts[base], places)[1] - passed(any_model, texts[base])[1]
                gain[row, pair] += sign / 2 * (change @ along)
    torch.testing.assert_close(found[:, 1], gain, **CLOSE)
    assert len(none) == (4 if giver == SAME_KIND else 2)
    for row, pair in none:
        assert found[row, :, pair].abs().max() < 1e-5
    assert found[1, 0].abs().min() > 1e-3


def test_all_heads_and_the_whole_stream_move_the_whole_difference(any_model: TransformerBridge):
    """Of one layer's heads one by one; of the stream, at the changed word before the first block, at the end behind."""
    along = torch.randn(any_model.cfg.d_model, 1, generator=torch.Generator().manual_seed(3))
    trace = trace_of(any_model, lambda last: last @ along)
    found = moved(any_model, trace, "residual stream", lambda last: last @ along, places=["changed word", "knew"])
    torch.testing.assert_close(found[0, 0], trace.total, **CLOSE)
    torch.testing.assert_close(found[1, 3], trace.total, **CLOSE)
    assert found[1, 0].abs().max() < 1e-5  # the same token
    by_head = heads(any_model, trace, lambda last: last @ along)
    assert by_head.shape == (2, 3, 3, 1)
    assert (by_head[0] - by_head[1]).abs().amax((-1, -2)).min() > 1e-3


def test_the_heads_of_a_layer_are_swapped_from_the_changed_word_on(model: TransformerBridge):
    along = torch.randn(model.cfg.d_model, 1, generator=torch.Generator().manual_seed(3))
    trace = trace_of(model, lambda last: last @ along)
    found = heads(model, trace, lambda last: last @ along)
    texts = [f"{text} {STEM}" for text in sides(TABLE)]
    for head in range(2):
        for pair in range(3):
            expected = torch.zeros(1)
            for base, donor, sign in ((pair, 3 + pair, -1), (3 + pair, pair, 1)):
                given = passed(model, texts[donor], point="blocks.1.attn.hook_z")[0]
                places = {pos: given[pos, head] for pos in range(WHERE[pair][0][0], len(given))}
                after = passed(model, texts[base], places, "blocks.1.attn.hook_z", head)[1]
                expected += sign / 2 * ((after - passed(model, texts[base])[1]) @ along)
            torch.testing.assert_close(found[head, 1, pair], expected, **CLOSE)


def test_a_trace_holds_what_is_measured_on_each_text_as_it_is(any_model: TransformerBridge):
    trace = trace_of(any_model, lambda last: last[:, :2])
    expected = torch.stack([passed(any_model, f"{text} {STEM}")[1][:2] for text in sides(TABLE)])
    torch.testing.assert_close(trace.measured, expected, **CLOSE)
    torch.testing.assert_close(trace.total, expected[:3] - expected[3:], **CLOSE)
    assert trace.names == ("measure 0", "measure 1")


def test_an_unknown_giver_is_refused_with_the_known_ones(model: TransformerBridge, unchecked: None):
    known = "unknown giver 'itself': choose from the other version, another sentence of the same kind"
    with pytest.raises(ValueError, match=known):
        moved(model, trace_of(model, verdict), "MLP", verdict, "itself")


def test_pairs_whose_tokens_correspond_are_kept_with_the_ends_of_what_differs(model: TransformerBridge):
    table = table_of(
        ("The ice thinned.", "The ice held."),  # " thin" and "ned" against one token
        ("He saw how thin it was.", "He saw how thick it was."),
        ("He saw the thin ice.", "He met the thick ice."),  # two stretches
        ("He screamed loudly at us.", "He whispered softly at us."),
        ("He ran", "He ran off"),  # one begins the other
        ("It was thin", "It was thick"),
    )
    table.index = [7, 3, 5, 1, 2, 0]
    found = aligned(model, table)
    assert found["pair"].tolist() == ["1", "3", "5"]
    assert found.index.tolist() == [0, 1, 2]
    assert found[["first", "last"]].to_numpy().tolist() == [[4, 4], [2, 3], [3, 3]]
    assert found[list(table)].equals(table[table["pair"].isin(found["pair"])].reset_index(drop=True))
    read = tokens(model, sides(found))
    for i, pair in found.iterrows():
        differs = (read.ids[i] != read.ids[len(found) + i]).nonzero()[:, 0].tolist()
        assert differs == list(range(pair["first"], pair["last"] + 1))


def test_fewer_than_two_pairs_whose_tokens_correspond_are_refused(model: TransformerBridge):
    dropped = [("He saw the thin ice.", "He met the thick ice."), ("She ran.", "She ran off.")]
    kept = ("He saw how thin it was.", "He saw how thick it was.")
    message = "{} of {} pairs have versions whose tokens correspond: patching needs two"
    with pytest.raises(ValueError, match=message.format(1, 3)):
        aligned(model, table_of(*dropped, kept))
    with pytest.raises(ValueError, match=message.format(0, 2)):
        aligned(model, table_of(*dropped))


def test_versions_that_a_tokenizer_reads_alike_are_dropped(model_folder: Callable[[str], Path]):
    model = load_model(str(model_folder("gpt2")))
    model.tokenizer.backend_tokenizer.normalizer = Lowercase()
    found = aligned(model, pd.concat([table_of(("He ran.", "HE RAN.")), TABLE.assign(pair=list("abc"))]))
    assert found["pair"].tolist() == list("abc")


def test_places_are_the_parts_of_the_sentence_and_the_tokens_of_the_stem(model: TransformerBridge):
    trace = trace_of(model, verdict)
    assert list(trace.places) == PLACES
    for pair, parts in enumerate(WHERE):
        for name, where in zip(PLACES, parts):
            assert trace.places[name][pair].nonzero()[:, 0].tolist() == where


@pytest.mark.parametrize("stem", ["He knew", "and then and then and", '"So," he said, "I', "Well."])
def test_every_token_from_the_changed_word_on_belongs_to_exactly_one_place(model: TransformerBridge, stem: str):
    more = table_of(
        ("He screamed loudly at us.", "He whispered softly at us."),
        ("How thin the ice was", "How thick the ice was"),  # no full stop
        ("He knew the ice was thin", "He knew the ice was thick"),
        ('He said: "The ice is thin."', 'He said: "The ice is thick."'),
    )
    found = aligned(model, pd.concat([TABLE, more.assign(pair=list("abcd"))]))
    assert len(found) == 7
    trace = traced(model, found, stem, verdict, ["verdict"], ["MLP"])
    at = torch.arange(trace.runs.read.ids.shape[1])
    after = (at >= torch.tensor(found["first"])[:, None]) & (at < trace.runs.read.length[:7, None])
    assert torch.equal(torch.stack(list(trace.places.values())).sum(0), after.long())
    for pair in range(7):
        changed = trace.places["changed word"][pair].nonzero()[:, 0].tolist()
        assert changed == list(range(found["first"][pair], found["last"][pair] + 1))


def test_stem_tokens_are_named_and_told_apart(model: TransformerBridge):
    trace = traced(model, aligned(model, TABLE), "and then and then He", verdict, ["verdict"], ["MLP"])
    assert list(trace.places)[4:] == ["and", "then", "and (3)", "then (4)", "He"]
    for step, name in enumerate(list(trace.places)[4:]):
        assert [where.nonzero()[:, 0].tolist() for where in trace.places[name]] == [[10 + step], [8 + step], [6 + step]]


def test_a_token_s_source_counts_from_the_place_s_start_and_stays_within_it():
    place = torch.zeros(4, 9, dtype=torch.bool)
    place[0, 2:6] = place[1, 4:6] = place[2, 8] = True  # four tokens, two, one, none
    at = list(range(9))
    by_next = _source(place, torch.tensor([1, 2, 0, 0]))
    assert by_next.tolist() == [[0, 1, 4, 5, 5, 5, 6, 7, 8], [0, 1, 2, 3, 8, 8, 6, 7, 8], [*at[:8], 2], at]
    assert _source(place, torch.arange(4)).tolist() == [at] * 4
    within = _source(place, torch.tensor([3, 3, 3, 3]))
    assert (within >= 0).all() and (within < 9).all()


def test_what_moves_all_has_share_one_and_every_row_its_labels(generator: Generator):
    trace = trace_with(torch.randn(12, 2, generator=generator))
    factor = torch.tensor([[[1.0, 0.5], [0.0, -0.25]], [[2.0, 0.75], [0.125, 1.0]], [[3.0, 4.0], [5.0, 6.0]]])
    found = shares(trace, factor[:, :, None] * trace.total, ["a", "b", "c"], generator)
    assert list(found) == ["place", "depth", "measure", "value", "low", "high"]
    assert len(found) == 12
    for column in ("value", "low", "high"):
        by_label = found.set_index(["place", "depth", "measure"])[column]
        for (place, depth, measure), value in by_label.items():
            expected = factor["abc".index(place), depth, ["fear", "joy"].index(measure)].item()
            assert value == pytest.approx(expected, abs=1e-6)


def test_a_share_is_the_slope_through_zero_by_hand(generator: Generator):
    trace = trace_with(torch.tensor([[1.0], [-2.0], [0.0]]), ["fear"])
    found = shares(trace, torch.tensor([1.0, 1.0, 50.0]).view(1, 1, 3, 1), ["a"], generator)
    assert found["value"].item() == pytest.approx((1 * 1 + 1 * -2) / (1 + 4))


def test_noise_has_share_nothing_and_an_interval_around_it(generator: Generator):
    """Noise with a mean of its own, where pairs differ this way and that; at 200 places."""
    trace = trace_with(torch.randn(40, 1, generator=generator), ["fear"])
    noise = 0.5 + torch.randn(200, 1, 40, 1, generator=generator)
    trace = Trace(trace.pairs, trace.runs, {}, centred(trace.measured), trace.names)
    found = shares(trace, noise, [str(i) for i in range(200)], generator)
    error = found["value"].std() / 200**0.5
    assert abs(found["value"].mean()) < 3 * error
    assert 0.85 < ((found["low"] < 0) & (found["high"] > 0)).mean() < 0.99


def test_the_interval_covers_a_planted_slope_about_as_often_as_it_says(generator: Generator):
    places = [str(i) for i in range(10)]
    covered = []
    for _ in range(30):
        trace = trace_with(1 + torch.randn(48, 1, generator=generator), ["fear"])
        effects = 0.4 * trace.total + 0.5 * torch.randn(10, 1, 48, 1, generator=generator)
        found = shares(trace, effects, places, generator)
        covered += ((found["low"] < 0.4) & (found["high"] > 0.4)).tolist()
        assert (found["high"] - found["low"]).between(0.05, 0.6).all()
    assert 0.89 < sum(covered) / len(covered) < 0.98


def test_without_a_difference_there_is_no_share_of_it(generator: Generator):
    total = torch.randn(8, 2, generator=generator)
    total[:, 0] = 0
    found = shares(trace_with(total), torch.ones(1, 1, 8, 2), ["a"], generator).set_index("measure")
    assert found.loc["fear", ["value", "low", "high"]].isna().all()
    assert found.loc["joy", ["value", "low", "high"]].notna().all()


def test_bookworm_s_one_word_pairs_move_all_at_the_word_below_and_at_the_end_above():
    bookworm = load_model()
    found = aligned(bookworm, pairs("one_word"))
    assert len(found) == len(pairs("one_word"))
    for word, text, first, last in zip(found["word_emotional"], found["emotional"], found["first"], found["last"]):
        assert bookworm.tokenizer.decode(tokens(bookworm, [text]).ids[0, first : last + 1]).strip() == word
    trace = traced(bookworm, found.iloc[:4].reset_index(drop=True), STEM, all_of_it, ["all"] * 256, [])
    effects = moved(bookworm, trace, "residual stream", all_of_it, places=["changed word", "knew"])
    torch.testing.assert_close(effects[[0, 1], [0, 8]], trace.total.expand(2, -1, -1), **CLOSE)
    torch.testing.assert_close(effects[[0, 1], [8, 0]], torch.zeros(2, 4, 256), **CLOSE)


def all_of_it(last: Tensor) -> Tensor:
    return last


def trace_of(model: TransformerBridge, measure: Callable[[Tensor], Tensor]) -> Trace:
    width = measure(torch.zeros(1, model.cfg.d_model)).shape[1]
    return traced(model, aligned(model, TABLE), STEM, measure, [f"measure {i}" for i in range(width)], COMPONENTS)


def of_total(trace: Trace, effects: Tensor) -> Tensor:
    """What moves as a share of the difference, the same for every pair."""
    share = (effects / trace.total)[..., 0]
    torch.testing.assert_close(share, share[..., :1].expand_as(share), atol=1e-5, rtol=0)
    return share.mean(-1)


def passed(
    model: TransformerBridge,
    text: str,
    places: dict[int, Tensor] | None = None,
    point: str = "blocks.1.hook_resid_pre",
    head: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What one text alone held at a hook point, and what leaves the last block at its last token after a change."""
    kept = []

    def change(acts: Tensor, hook) -> Tensor:
        kept.append(acts[0].clone())
        acts = acts.clone()
        for pos, given in (places or {}).items():
            acts[(0, pos) if head is None else (0, pos, head)] = given
        return acts

    hooks = [(point, change), (site(model, model.cfg.n_layers), lambda acts, hook: kept.append(acts[0, -1].clone()))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.original_model(input_ids=tokens(model, [text]).ids)
    return kept[0], kept[1]


def centred(measured: Tensor) -> Tensor:
    """The same with differences between versions that have a mean of 0."""
    gap = measured[: len(measured) // 2] - measured[len(measured) // 2 :]
    return torch.cat([gap - gap.mean(0), torch.zeros_like(gap)])


def trace_with(total: Tensor, names: list[str] | None = None) -> Trace:
    """A trace with these differences between versions, and nothing that ran."""
    count = len(total)
    neutral = torch.linspace(-1, 1, count)[:, None].expand_as(total)
    none = torch.zeros(2 * count, 1, dtype=torch.long)
    runs = Runs(Tokens(none, none[:, 0] + 1, none[:, 0], none[:, 0]), torch.zeros(2 * count, 1, 2, 4), {}, [])
    table = table_of(*((f"a {i}", f"b {i}") for i in range(count)))
    return Trace(table, runs, {}, torch.cat([neutral + total, neutral]), tuple(names or ["fear", "joy"]))
