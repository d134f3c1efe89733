"""The playground's calls on tiny random models, and the objects that come back."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from helpers import playground, readouts, recordings
from helpers.activations import every_token, pair_residuals, residual_norms
from helpers.answers import MINE, Continuations, Reading, chosen, differing
from helpers.config import FIGURES
from helpers.continuations import generated
from helpers.directions import mean_difference
from helpers.doses import Meter
from helpers.emotions import names
from helpers.features import on_passages, token_activations
from helpers.playground import Playground, opened, parsed_pairs
from helpers.prompts import neutral_texts, pairs, passages
from helpers.saes import NoSAEs, load_sae
from helpers.stats import auroc
from helpers.steering import added

TEXT = "The wolf ran at her, and she fell."
PROMPT = "She opened the letter, and"
PAIRS = """The ice broke under him. | The ice held under him.

She fell from the roof. | She sat on the roof."""


@pytest.fixture(scope="module")
def play(model: TransformerBridge) -> Playground:
    """A playground of a tiny GPT-2 without SAEs."""
    return opened(model)


@pytest.fixture(scope="module")
def with_features(model_with_saes: TransformerBridge) -> Playground:
    return opened(model_with_saes)


def test_every_family_has_the_same_playground(any_model: TransformerBridge):
    play = opened(any_model)
    assert play.norm.equal(residual_norms(any_model, neutral_texts()))
    assert len(play.read(TEXT).tokens) == play.read(TEXT).scores.shape[0]
    found = play.steer(PROMPT, direction="afraid", strength=3.0, n_tokens=6)
    assert found.table["run"].tolist() == ["unsteered", "steered"]


def test_depth_and_position_are_those_of_notebook_01(
    model: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(playground, "FIGURES", tmp_path)
    assert (opened(model).depth, opened(model).position) == (2, "last token")  # half of 3, rounded to even
    path = tmp_path / model.cfg.model_name / "01_choices.csv"
    path.parent.mkdir()
    choice = pd.DataFrame({"depth": [1], "position": ["mean"]})
    choice.to_csv(path, index=False)
    assert (opened(model).depth, opened(model).position) == (1, "mean")
    assert opened(model).chosen_by != opened_with(choice.assign(depth=9), path, model).chosen_by
    assert opened(model).depth == 2


def opened_with(choice: pd.DataFrame, path: Path, model: TransformerBridge) -> Playground:
    choice.to_csv(path, index=False)
    return opened(model)


def test_a_reading_is_the_readout_of_every_token_beyond_neutral_talk(play: Playground, model: TransformerBridge):
    reading = play.read(TEXT, depth=2, emotions=["afraid", "calm"])
    references = readouts.from_texts(model, names(), "mean")
    states, neutral = every_token(model, [TEXT]), recordings.background(recordings.neutral_talk(model, 256), "token")
    scores = readouts.beyond_neutral(states, torch.arange(1, len(states) + 1), references, neutral)
    assert "".join(reading.tokens) == TEXT
    torch.testing.assert_close(reading.scores, scores)
    torch.testing.assert_close(torch.tensor(reading.table["calm"]), scores[:, names().index("calm"), 2].double())


def test_another_depth_is_what_reading_there_gives(play: Playground):
    moved = play.read(TEXT, depth=1, emotions=["sad"]).at(3, ["proud"])
    pd.testing.assert_frame_equal(moved.table, play.read(TEXT, depth=3, emotions=["proud"]).table)
    with pytest.raises(ValueError, match=r"depth 4 is out of range: choose 0 to 3"):
        moved.at(4, ["proud"])


def test_without_emotions_the_strongest_is_shown():
    scores = torch.zeros(2, 3, 1)
    scores[:, 1] = 5
    reading = Reading(["a", "b"], ["sad", "proud", "calm"], scores, 0, ["sad"])
    assert reading.strongest["emotion"].tolist() == ["proud", "sad", "calm"]
    assert reading.strongest["mean (SD)"].iloc[0] == 5


def test_the_strongest_emotion_of_a_text_shades_it(play: Playground):
    reading = play.read(TEXT)
    assert reading.emotions == [reading.strongest["emotion"].iloc[0]]


def test_tokens_within_a_character_belong_to_the_text(play: Playground):
    text = "Fear 😱 and 恐怖."
    assert "".join(play.read(text).tokens) == text
    assert "".join(play.steer(text, strength=2.0, n_tokens=5).pieces["steered"]).count("�") <= 5


@pytest.mark.parametrize(
    ("text", "options", "error", "said"),
    [
        (" \n", {}, ValueError, "the text is empty: type at least one word"),
        ("word " * 70, {}, ValueError, r"reads at most 63 in all: leave out at least \d+"),
        (TEXT, {"depth": 4}, ValueError, "depth 4 is out of range"),
        (TEXT, {"depth": -1}, ValueError, "depth -1 is out of range"),
        (TEXT, {"emotions": ["afriad"]}, LookupError, r"unknown name 'afriad'. Did you mean 'afraid'\?"),
        (TEXT, {"emotions": []}, LookupError, "no emotion is named"),
    ],
)
def test_what_cannot_be_read_is_named(play: Playground, text: str, options: dict, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        play.read(text, **options)


def test_a_name_may_stand_alone():
    assert chosen("calm", names()) == ["calm"]


def test_own_pairs_give_the_direction_of_their_mean_difference(play: Playground, model: TransformerBridge):
    found = play.direction(PAIRS, depth=2, position="last token")
    acts = pair_residuals(model, parsed_pairs(PAIRS), ["last token"])["last token"]
    torch.testing.assert_close(found.vectors, mean_difference(*acts))
    assert found.pairs == 2


def test_shipped_pairs_as_ones_own_give_the_shipped_direction_and_its_auroc(play: Playground, model: TransformerBridge):
    table = pairs("fear_calm", "train")
    lines = "\n".join(f"{row.emotional} | {row.neutral}" for row in table.itertuples())
    found = play.direction(lines, depth=2, position="last token")
    mine, shipped, random, in_sample = found.table.itertuples()
    assert mine[3:] == pytest.approx(shipped[3:])
    valid = pair_residuals(model, pairs("fear_calm", "validation"), ["last token"])["last token"][:, :, 2]
    assert mine.value == pytest.approx(auroc(*(valid @ found.vectors[2])).item())
    train = pair_residuals(model, table, ["last token"])["last token"][:, :, 2]
    assert in_sample.value == pytest.approx(auroc(*(train @ found.vectors[2])).item())
    assert random.low < random.value < random.high


def test_the_test_pairs_are_never_read(play: Playground):
    play.direction(PAIRS, depth=1, position="mean")
    read = {key[1] for key in play.kept if isinstance(key, tuple) and key[0] == "pairs"}
    assert read == {"train", "validation"}


def test_the_situations_of_an_emotion_land_beside_it(play: Playground):
    """Pairs whose texts are an emotion's own situations against another's: its cosine is the highest."""
    from helpers.emotions import situations

    told = situations("train")
    afraid, calm = (told.loc[told["emotion"] == name, "text"] for name in ("afraid", "calm"))
    lines = "\n".join(f"{one} | {other}" for one, other in zip(afraid, calm))
    near = play.direction(lines, depth=2, position="mean").near
    assert near["emotion"].iloc[0] == "afraid"
    assert near["emotion"].iloc[-1] == "calm"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at least two pairs, one per line; got 0"),
        ("He fell. | He sat.", "at least two pairs, one per line; got 1"),
        ("He fell. | He sat.\n\nShe ran", "line 3 has 0 separators"),
        ("He fell. | He sat. | He ran.\nA. | B.", "line 1 has 2 separators"),
        ("He fell. | He sat.\n | She sat.", "line 2 has nothing on one side of '|'"),
        ("He fell. | He sat.\nShe ran. | She ran.", "line 2 has the same text on both sides"),
        ("He fell. | He sat.\nHe fell. | She ran.", "the text 'He fell.' comes twice"),
    ],
)
def test_what_is_no_list_of_pairs_is_named(text: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        parsed_pairs(text)


def test_pairs_are_taken_as_written_but_for_spaces_at_their_ends():
    table = parsed_pairs("  He fell.|He  sat. \n\n She ran. | She sat.\n")
    assert table["emotional"].tolist() == ["He fell.", "She ran."]
    assert table["neutral"].tolist() == ["He  sat.", "She sat."]
    assert table["pair"].tolist() == ["line 1", "line 3"]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("He fell | He sat.\nA. | B.", {"position": "final punctuation"}, "emotional text in line 1 does not end in"),
        ("He fell. | He sat.\nA. | B" + " c" * 70, {}, "the neutral text in line 2 is"),
        (PAIRS, {"depth": 0, "position": "final punctuation"}, "at depth 0 both sides of your pairs read the same"),
        (PAIRS, {"depth": 4}, "depth 4 is out of range"),
    ],
)
def test_pairs_that_give_no_direction_are_named(play: Playground, text: str, options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        play.direction(text, **options)


def test_the_unsteered_side_is_what_the_model_writes_by_itself(play: Playground, model: TransformerBridge):
    found = play.steer(PROMPT, direction="afraid", strength=2.0, n_tokens=12)
    assert found.ids["unsteered"] == generated(model, [PROMPT], 12)[0]


@pytest.mark.parametrize("direction", ["fear", "afraid", MINE])
def test_the_steered_side_adds_the_direction_in_residual_norms(
    play: Playground, model: TransformerBridge, direction: str
):
    own = play.direction(PAIRS, depth=2, position="last token").vectors[2]
    train = pair_residuals(model, pairs("fear_calm", "train"), [play.position])[play.position]
    expected = {
        "fear": mean_difference(*train)[2],
        "afraid": readouts.from_texts(model, names(), "mean").axes[names().index("afraid"), 2],
        MINE: own,
    }[direction]
    found = play.steer(PROMPT, direction, depth=2, strength=1.5, which="prompt", n_tokens=12, seed=3)
    vector = 1.5 * residual_norms(model, neutral_texts())[2] * expected
    assert found.ids["steered"] == generated(model, [PROMPT], 12, added(2, vector[None], "prompt"), seeds=[3])[0]
    assert found.ids["steered"] != found.ids["unsteered"]


def test_the_dose_is_that_of_the_meter(play: Playground, model: TransformerBridge):
    from helpers.steering import Add

    vector = play.references().axes[names().index("sad"), 2] * play.norm[2]
    meter = Meter.on(model, neutral_texts()[:: playground.DOSED_ON])
    dose = meter.effects(2, Add(vector[None]), torch.tensor([0]), torch.tensor([0.5]))[0]
    assert play.steer(PROMPT, "sad", depth=2, strength=0.5, n_tokens=2).dose == pytest.approx(dose.item(), abs=1e-6)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_strength_of_0_changes_nothing_and_says_so(play: Playground, seed: int | None):
    found = play.steer(PROMPT, "afraid", strength=0, n_tokens=10, seed=seed)
    assert found.same
    assert found.dose == 0
    assert found.table["differ"].tolist() == [0, 0]
    assert "<mark" not in found._repr_html_()
    assert "a strength of 0 adds nothing" in found._repr_html_()
    changed = play.steer(PROMPT, "afraid", strength=4.0, n_tokens=10, seed=seed)
    assert not changed.same
    assert "<mark" in changed._repr_html_()
    assert "adds nothing" not in changed._repr_html_()


def test_a_text_that_ends_at_once_is_shown():
    found = Continuations(PROMPT, {"unsteered": [], "steered": [5]}, {"unsteered": [], "steered": [" x"]}, "", 1.0, 0.0)
    assert "(the end of the text at once)" in found._repr_html_()
    assert found.table["tokens"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"prompt": ""}, ValueError, "the prompt is empty"),
        ({"prompt": "word " * 50}, ValueError, r"the prompt is \d+ tokens long, and 40 are to be written"),
        ({"strength": float("nan")}, ValueError, "the strength is nan"),
        ({"strength": float("inf")}, ValueError, "the strength is inf"),
        ({"strength": 1e39}, ValueError, "overflows: stay nearer to 0"),
        ({"depth": 4}, ValueError, "depth 4 is out of range"),
        ({"n_tokens": 0}, ValueError, "cannot write 0 tokens"),
        ({"seed": -1}, ValueError, "the seed is -1"),
        ({"direction": "joy"}, LookupError, "unknown name 'joy'.*fear, my direction"),
    ],
)
def test_what_cannot_steer_is_named(play: Playground, options: dict, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        play.steer(**{"prompt": PROMPT, "direction": "afraid"} | options)


def test_ones_own_direction_has_to_be_found_first(model: TransformerBridge):
    with pytest.raises(LookupError, match=r"no 'my direction' yet: .*play\.direction"):
        opened(model).steer(PROMPT, MINE)


def test_features_are_the_strongest_of_every_token(with_features: Playground, model_with_saes: TransformerBridge):
    found = with_features.features(TEXT, depth=1, top=2)
    every = token_activations(model_with_saes, load_sae(model_with_saes, 1), TEXT)
    for pos, here in every.groupby("pos"):
        best = here.sort_values("activation", ascending=False).head(2)
        ours = found.table[found.table["pos"] == pos]
        assert ours["feature"].tolist() == best["feature"].tolist()
        assert ours["rank"].tolist() == [1, 2]
        assert ours["activation"].tolist() == pytest.approx(best["activation"].tolist())
    assert "".join(found.tokens) == TEXT


def test_passages_are_those_that_the_whole_matrix_gives(
    with_features: Playground, model_with_saes: TransformerBridge, monkeypatch: pytest.MonkeyPatch
):
    texts = [text[:120] for text in passages()[:9]]
    monkeypatch.setattr(playground, "passages", lambda: texts)
    monkeypatch.setattr(playground, "PASSAGES", 8)
    found = with_features.passages(7, depth=2, count=3)
    on = on_passages(model_with_saes, load_sae(model_with_saes, 2), texts[:8], [7])
    pd.testing.assert_frame_equal(found.table, on.strongest(7, 3))
    assert f"{on.frequency[7]:.1%} of the tokens of 8 passages" in found.html
    assert "feature 7: strongest passages" in found.html


def test_passages_longer_than_the_context_are_left_out(with_features: Playground, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(playground, "passages", lambda: ["word " * 100])
    with pytest.raises(ValueError, match="none of the shipped passages fits"):
        with_features.passages(0, depth=3)


def test_a_model_without_saes_says_so(play: Playground):
    with pytest.raises(NoSAEs, match="There are no SAEs for"):
        play.features(TEXT)
    with pytest.raises(NoSAEs):
        play.passages(0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda play: play.features("", depth=1), "the text is empty"),
        (lambda play: play.features(TEXT, depth=1, top=0), "cannot show 0 features"),
        (lambda play: play.features(TEXT, depth=9), "depth 9 is out of range"),
        (lambda play: play.passages(64, depth=1), "feature 64 is out of range: the SAE at depth 1 has 0 to 63"),
    ],
)
def test_what_has_no_features_is_named(with_features: Playground, call: Callable, said: str):
    with pytest.raises((ValueError, IndexError), match=said):
        call(with_features)


@pytest.mark.parametrize(
    ("one", "other", "marks"),
    [
        ([1, 2, 3], [1, 2, 3], ("...", "...")),
        ([1, 2, 3], [1, 2], ("..x", "..")),
        ([1, 2, 3, 4], [1, 9, 3, 4], (".x..", ".x..")),
        ([1, 2, 3, 4], [1, 3, 4], (".x..", "...")),
        ([], [5], ("", "x")),
        ([7, 7, 7, 8], [7, 7, 9, 7, 8], ("....", "..x..")),
        ([1, 2], [3, 4], ("xx", "xx")),
    ],
)
def test_tokens_that_one_text_lacks_are_marked(one: list[int], other: list[int], marks: tuple[str, str]):
    assert tuple("".join(".x"[mark] for mark in side) for side in differing(one, other)) == marks


def test_a_token_that_many_others_equal_is_still_compared():
    """difflib drops what is frequent in a long text unless it is told not to."""
    one, other = [1, *[2, 3] * 150], [4, *[2, 3] * 150]
    assert sum(differing(one, other)[0]) == 1


def test_results_say_in_a_line_what_they_are(play: Playground, with_features: Playground):
    for found in (play, play.read(TEXT), play.direction(PAIRS, depth=1, position="mean"), with_features.features(TEXT)):
        assert "tensor" not in repr(found)
        assert len(repr(found)) < 200


def test_the_committed_choice_is_one_that_the_playground_takes():
    row = pd.read_csv(FIGURES / "bookworm" / "01_choices.csv").iloc[0]
    assert {"depth", "position"} <= set(row.index)
