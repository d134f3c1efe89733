"""Tables of turns and tokens against numbers worked out by hand, and planted effects found with their size."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import seeded
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModelForCausalLM

from helpers import emotions, readouts, recordings, turns
from helpers.activations import residuals
from helpers.readouts import Background, References
from helpers.recordings import Recording, neutral_talk, recorded
from helpers.scenarios import TEMPLATE, Conversation, Scenario, Turn, typed
from helpers.turns import Scale

NAMES = ("happy", "calm", "sad")
CALM, DEPTH, DEPTHS, SIZE = 1, 1, 3, 8
SPEAKERS = {"user": "Anna", "assistant": "Tom"}
AT = torch.arange(1, 61)  # positions of neutral states, two at each
ROLES = ("user", "assistant")
FAR = 1e4  # of position 0, which is not to count


def references(names: tuple[str, ...] = NAMES) -> References:
    centroids = torch.randn(len(names), DEPTHS, SIZE, generator=seeded(0)) + 2
    return References(names, centroids, torch.zeros(DEPTHS, SIZE))


def usual(position: Tensor) -> Tensor:
    """The neutral state at every position: it drifts with the logarithm of the position."""
    drift, start = torch.randn(2, DEPTHS, SIZE, generator=seeded(1))
    return start + position.log1p()[:, None, None] * drift


def background() -> Background:
    """Two states at every position, as far to both sides of the usual one: so the spread around it is known."""
    half = torch.randn(DEPTHS, SIZE, generator=seeded(2))
    return Background(torch.cat([usual(AT) + half, usual(AT) - half]), AT.repeat(2))


def spread(refs: References) -> Tensor:
    """SD of the neutral states along every axis: emotion x depth."""
    half = torch.randn(DEPTHS, SIZE, generator=seeded(2))
    return (refs.axes * half).sum(-1).abs() * (120 / 119) ** 0.5


def scale(position: str = "end of turn", names: tuple[str, ...] = NAMES) -> Scale:
    return Scale(references(names), background(), position, DEPTH)


def ends(count: int) -> Tensor:
    """Position of every turn's last token, of turns with two tokens behind position 0."""
    return 2 * torch.arange(1, count + 1)


def heard(states: Tensor, roles: tuple[str, ...] | None = None, name: str = "talk") -> Recording:
    """A conversation by hand: position 0, then every turn's state (turn, depth, d_model) at both of its tokens."""
    roles = roles or tuple(ROLES[i % 2] for i in range(len(states)))
    said = tuple(Turn(SPEAKERS[role], role, f"turn {i}", 0, i) for i, role in enumerate(roles, 1))
    rows = [(0, 1, said[0], "<>", False)]
    for i, turn in enumerate(said):
        rows += [(2 * i + 1, i + 1, turn, f"a{i + 1}", False), (2 * i + 2, i + 1, turn, f"b{i + 1}", True)]
    tokens = pd.DataFrame(
        [(pos, number, turn.speaker, turn.role, turn.text, token, last) for pos, number, turn, token, last in rows],
        columns=["pos", "turn", "speaker", "role", "text", "token", "ends"],
    )
    stream = torch.cat([torch.full_like(states[:1], FAR), states.repeat_interleave(2, 0)])
    return Recording(Conversation(name, said), tokens, stream, None, torch.arange(len(rows)))


def anything(turn: int = 4, seed: int = 3) -> Tensor:
    return torch.randn(turn, DEPTHS, SIZE, generator=seeded(seed)) + 1


def as_like(wanted: Tensor, target: Tensor, seed: int = 4) -> Tensor:
    """Vectors of any length whose cosine with `target` is each of these."""
    along = normalize(target, dim=-1)
    other = torch.randn(len(wanted), SIZE, generator=seeded(seed))
    other = normalize(other - (other @ along)[:, None] * along, dim=-1)
    length = torch.rand(len(wanted), 1, generator=seeded(seed + 1)) + 0.5
    return length * (wanted[:, None] * along + (1 - wanted[:, None] ** 2).sqrt() * other)


def at_depth(vectors: Tensor) -> Tensor:
    """These at the scale's depth, anything at the others."""
    states = anything(len(vectors))
    states[:, DEPTH] = vectors
    return states


def talk(*names: str, text: str = "I walked home along the quiet road.") -> Scenario:
    said = (Turn("Anna", "user", text, 0, 1), Turn("Tom", "assistant", "It was late, and it rained.", 0, 2))
    talks = tuple(Conversation(name, said) for name in names or ("talk",))
    return Scenario("walk", "x", "x", TEMPLATE, "every token", ("after mlp",), NAMES, talks, Path("walk.yaml"))


# The scale


def test_turns_are_read_at_two_positions_and_no_other(model):
    with pytest.raises(ValueError) as refusal:
        turns.scale(model, NAMES, "last token", 1, neutral_talk(model))
    assert str(refusal.value) == "turns are read at 'final punctuation' or 'mean', not at 'last token'"


@pytest.mark.parametrize(("asked", "of_turns"), [("final punctuation", "end of turn"), ("mean", "mean of turn")])
def test_references_and_neutral_turns_are_read_at_the_position_of_the_turns(model, asked, of_turns):
    found = turns.scale(model, NAMES, asked, 2, neutral_talk(model))
    expected = recordings.background(neutral_talk(model), of_turns)
    assert (found.position, found.depth) == (of_turns, 2)
    assert torch.equal(found.references.centroids, readouts.from_texts(model, NAMES, asked).centroids)
    assert torch.equal(found.background.states, expected.states)
    assert torch.equal(found.background.position, expected.position)


def test_an_unknown_emotion_has_no_scale(model):
    with pytest.raises(ValueError, match="unknown emotion 'angri'"):
        turns.scale(model, ("happy", "angri"), "mean", 1, neutral_talk(model))


def test_the_scale_reads_turns_at_its_position():
    states = anything()
    recording = heard(states)
    recording.stream[3] += 1  # the first token of the second turn
    assert torch.equal(scale("end of turn").states(recording), states)
    states[1] += 0.5
    torch.testing.assert_close(scale("mean of turn").states(recording), states)


def test_the_choice_has_every_position_and_depth_best_first(model):
    table = turns.choice(model)
    assert list(table) == ["way", "read-out", "texts at", "depth", "AUROC"]
    wanted = {(position, depth) for position in turns.TURNS_AT for depth in range(model.cfg.n_layers + 1)}
    assert len(table) == len(wanted) and set(zip(table["texts at"], table["depth"])) == wanted
    assert table["AUROC"].is_monotonic_decreasing
    assert (table["texts at"] == table["read-out"]).all()


def test_the_choice_goes_by_validation_situations_along_vectors_of_the_training_ones(model):
    row = turns.choice(model).iloc[0]
    told = {split: emotions.situations(split) for split in ("train", "validation")}
    acts = {
        split: residuals(model, table["text"].tolist(), [row["texts at"]])[row["texts at"]][:, row["depth"]].double()
        for split, table in told.items()
    }
    found = []
    for emotion in emotions.names():
        own = {split: torch.tensor((table["emotion"] == emotion).to_numpy()) for split, table in told.items()}
        vector = acts["train"][own["train"]].mean(0) - acts["train"].mean(0)
        found.append(roc_auc_score(own["validation"].numpy(), (acts["validation"] @ vector).numpy()))
    assert row["AUROC"] == pytest.approx(sum(found) / len(found), abs=1e-4)


# Turn by turn


def test_a_turn_reads_what_its_numbers_by_hand_are():
    against, states = scale(), anything()
    table = turns.by_turn(talk(), [heard(states)], against)
    row = table[(table["turn"] == 3) & (table["emotion"] == "sad")].iloc[0]
    state, centroids = states[2, DEPTH], against.references.centroids[:, DEPTH]
    centre = centroids.mean(0)
    beyond = (state - usual(torch.tensor([6]))[0, DEPTH]) @ normalize(centroids[2] - centre, dim=0)
    expected = {
        "cosine": cosine_similarity(state, centroids[2], 0),
        "error": (state - centroids[2]).abs().mean(),
        "overlap": float(state.abs().argmax() == centroids[2].abs().argmax()),
        "centred": cosine_similarity(state - centre, centroids[2] - centre, 0),
        "beyond neutral": beyond / spread(against.references)[2, DEPTH],
    }
    assert {name: row[name] for name in expected} == pytest.approx({n: float(v) for n, v in expected.items()}, abs=1e-3)
    names = ["turn", "speaker", "role", "text", "pos", "emotion", "conversation", "scenario"]
    assert row[names].tolist() == [3, "Anna", "user", "turn 3", 6, "sad", "talk", "walk"]


def test_every_turn_and_reference_of_every_conversation_has_its_row():
    talks = [heard(anything(4, 5), name="one"), heard(anything(2, 6), name="two")]
    table = turns.by_turn(talk(), talks, scale())
    wanted = [
        (name, turn, e) for name, count in (("one", 4), ("two", 2)) for turn in range(1, count + 1) for e in NAMES
    ]
    assert list(zip(table["conversation"], table["turn"], table["emotion"])) == wanted
    alone = turns.by_turn(talk(), talks[1:], scale())
    pd.testing.assert_frame_equal(table[12:].reset_index(drop=True), alone)
    assert table.index.is_unique and not table.isna().any().any()


def test_a_neutral_turn_reads_nothing_beyond_neutral():
    table = turns.by_turn(talk(), [heard(usual(ends(4)))], scale())
    assert table["beyond neutral"].abs().max() < 1e-3
    assert table["cosine"].abs().min() > 1e-3


# Token by token


def test_every_token_but_position_0_has_a_row_for_every_emotion_and_depth():
    table = turns.by_token(heard(anything()), references(), background())
    assert list(table) == ["pos", "turn", "speaker", "token", "emotion", "depth", "value"]
    wanted = [(pos, e, depth) for pos in range(1, 9) for e in NAMES for depth in range(DEPTHS)]
    assert list(zip(table["pos"], table["emotion"], table["depth"])) == wanted
    words = table.drop_duplicates("pos")
    assert words["token"].tolist() == ["a1", "b1", "a2", "b2", "a3", "b3", "a4", "b4"]
    assert words["turn"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert words["speaker"].tolist() == ["Anna", "Anna", "Tom", "Tom"] * 2
    assert (table.groupby("pos")["token"].nunique() == 1).all()


def test_a_token_reads_what_its_number_by_hand_is():
    refs, states = references(), anything()
    table = turns.by_token(heard(states), refs, background())
    for pos, turn in ((1, 0), (5, 2), (8, 3)):
        beyond = states[turn] - usual(torch.tensor([pos]))[0]
        expected = (refs.axes * beyond).sum(-1) / spread(refs)
        found = torch.tensor(table.loc[table["pos"] == pos, "value"].to_numpy()).view(len(NAMES), DEPTHS).float()
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_what_a_model_holds_at_a_token_is_what_is_read(any_model):
    [recording] = recorded(any_model, talk())
    of_emotions = readouts.from_texts(any_model, NAMES[:2], "mean")
    states = torch.randn(30, any_model.cfg.n_layers + 1, any_model.cfg.d_model, generator=seeded(7))
    neutral = Background(states, torch.arange(1, 31))
    table = turns.by_token(recording, of_emotions, neutral)
    pos = len(recording.ids) - 2
    hidden = recording.stream[pos]
    expected = readouts.beyond_neutral(hidden[None], torch.tensor([pos]), of_emotions, neutral).flatten()
    found = torch.tensor(table.loc[table["pos"] == pos, "value"].to_numpy()).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert table["pos"].tolist() == [p for p in range(1, len(recording.ids)) for _ in range(len(expected))]


# Logit lens


@torch.no_grad()
def test_at_the_last_depth_the_lens_is_the_models_own_prediction(any_model):
    [recording] = recorded(any_model, talk())
    table = turns.lens(any_model, recording, top=4)
    hf = AutoModelForCausalLM.from_pretrained(any_model.cfg.folder, attn_implementation="eager").eval()
    logits = hf(recording.ids[None]).logits[0, torch.tensor(recording.turns["pos"].to_numpy())]
    chances = logits.softmax(-1).topk(4)
    for turn in (1, 2):
        rows = table[(table["turn"] == turn) & (table["depth"] == any_model.cfg.n_layers)]
        assert rows["rank"].tolist() == [1, 2, 3, 4]
        assert rows["token"].tolist() == [any_model.tokenizer.decode([i]) for i in chances.indices[turn - 1].tolist()]
        assert rows["probability"].tolist() == pytest.approx(chances.values[turn - 1].tolist(), rel=1e-3, abs=1e-6)


@torch.no_grad()
def test_at_any_depth_the_lens_is_final_norm_and_unembedding(model):
    [recording] = recorded(model, talk())
    table = turns.lens(model, recording)
    assert list(table) == ["turn", "speaker", "depth", "rank", "token", "probability"]
    wanted = [(turn, SPEAKERS[role], depth) for depth in range(4) for turn, role in enumerate(ROLES, 1)]
    assert list(zip(table["turn"], table["speaker"], table["depth"])) == wanted
    hf = AutoModelForCausalLM.from_pretrained(model.cfg.folder, attn_implementation="eager").eval()
    for row in table.itertuples():
        state = recording.at_turns("end of turn")[row.turn - 1, row.depth]
        chance = hf.lm_head(hf.transformer.ln_f(state)).softmax(-1)
        assert row.token == model.tokenizer.decode([int(chance.argmax())])
        assert row.probability == pytest.approx(float(chance.max()), rel=1e-4)


# Raw cosines


def test_raw_cosines_over_depth_are_means_over_the_turn_ends_of_each_conversation():
    talks, centroids = [heard(anything(4, 5)), heard(anything(2, 6))], references().centroids
    found = turns.raw_over_depth(talks, centroids)
    assert found.shape == (2, len(NAMES), DEPTHS)
    by_hand = [cosine_similarity(state, centroids[2, 1], 0) for state in anything(4, 5)[:, 1]]
    assert found[0, 2, 1].item() == pytest.approx(float(sum(by_hand) / 4), abs=1e-5)
    torch.testing.assert_close(found[1:], turns.raw_over_depth(talks[1:], centroids))


def test_raw_and_centred_cosines_are_means_over_turn_ends_at_a_depth():
    talks, refs = [heard(anything(4, 5)), heard(anything(2, 6))], references()
    found = turns.raw_and_centred(talks, refs, 1)
    torch.testing.assert_close(found["raw"], turns.raw_over_depth(talks, refs.centroids)[..., 1])
    centre = refs.centroids.mean(0)[1]
    by_hand = [cosine_similarity(state - centre, refs.centroids[2, 1] - centre, 0) for state in anything(2, 6)[:, 1]]
    assert found["centred"][1, 2].item() == pytest.approx(float(sum(by_hand) / 2), abs=1e-5)


def test_the_published_depth_is_31_of_36_layers(model, monkeypatch):
    assert turns.published_depth(model) == 3
    monkeypatch.setattr(model.cfg, "n_layers", 36)
    assert turns.published_depth(model) == 31


# Calm shock absorber


def with_gaps(gaps: list[float], base: float = 0.0) -> Tensor:
    """What each turn reads in calm, where an assistant's turn reads so much more than the user's before it."""
    wave = base + 0.1 * torch.arange(len(gaps)).sin()
    return torch.stack([wave, wave + torch.tensor(gaps)], 1).flatten()


def test_a_planted_growth_of_raw_gaps_is_found():
    target = references().centroids[CALM, DEPTH]
    planted = [[0.1, 0.1, 0.9, -0.5, 0.4, 0.4], [0.3, -0.2, 0.1]]
    talks = [heard(at_depth(as_like(with_gaps(gaps), target))) for gaps in planted]
    assert turns.shock_absorber(talks, scale(), True).tolist() == pytest.approx([0.3, -0.2], abs=1e-4)


def test_a_planted_growth_of_gaps_beyond_neutral_is_found_whatever_drifts():
    refs = references()
    talks = []
    for gaps in ([1.0, 1.0, 9.0, -5.0, 4.0, 4.0], [3.0, -2.0, 1.0]):
        values = with_gaps(gaps, base=2.0)
        along = values[:, None] * spread(refs)[CALM, DEPTH] * refs.axes[CALM, DEPTH]
        talks.append(heard(at_depth(usual(ends(len(values)))[:, DEPTH] + along)))
    for position in ("end of turn", "mean of turn"):
        found = turns.shock_absorber(talks, scale(position), False).tolist()
        assert found == pytest.approx([3.0, -2.0], abs=0.01)


def test_the_gap_is_from_the_user_to_the_assistant_who_answers():
    """Where the assistant begins, its first turn answers nobody."""
    target = references().centroids[CALM, DEPTH]
    calm = torch.cat([torch.tensor([0.9]), with_gaps([0.1, 0.2, 0.5])])
    found = turns.shock_absorber([heard(at_depth(as_like(calm, target)), ROLES[::-1] * 3 + ROLES[1:])], scale(), True)
    assert found.tolist() == pytest.approx([0.4], abs=1e-4)


# Fading memory

FALLING = [0.75, 0.5, 0.9, 0.1, 0.25, -0.25]  # falls by 0.625


def with_similarity(similarity: list[float], origin: Tensor) -> Recording:
    """Turns whose cosine with the first turn, from an origin, is each of these."""
    opening = torch.randn(SIZE, generator=seeded(8))
    return heard(at_depth(torch.cat([opening[None], as_like(torch.tensor(similarity), opening)]) + origin))


def test_a_planted_fall_of_the_raw_similarity_to_the_opening_is_found():
    talks = [with_similarity(FALLING, torch.zeros(SIZE)), with_similarity([0.3, 0.3, 0.5, 0.5], torch.zeros(SIZE))]
    found = turns.similarity_to_opening(talks[0], scale(), True)
    assert found[0].tolist() == pytest.approx(FALLING, abs=1e-5)
    assert turns.fading(talks, scale(), True).tolist() == pytest.approx([0.625, -0.2], abs=1e-5)


def test_a_planted_fall_is_found_from_what_neutral_turns_hold_at_their_places():
    recording = with_similarity(FALLING, usual(ends(7))[:, DEPTH])
    for position in ("end of turn", "mean of turn"):
        found = turns.similarity_to_opening(recording, scale(position), False)
        assert found[0].tolist() == pytest.approx(FALLING, abs=1e-3)
        assert turns.fading([recording], scale(position), False).tolist() == pytest.approx([0.625], abs=1e-3)
    assert abs(turns.fading([recording], scale(), True).item() - 0.625) > 0.05


# Effects beside their control


def talks_of(count: int, turn: int = 8, seed: int = 10) -> list[Recording]:
    return [heard(anything(turn, seed + i), name=f"talk {i}") for i in range(count)]


def value(table: pd.DataFrame, effect: str, readout: str, of: str) -> pd.Series:
    [row] = table.query("effect == @effect and readout == @readout and of == @of").to_dict("records")
    return row


def test_effects_stand_beside_their_controls():
    scanned, control, spliced, against = talks_of(4), talks_of(3, 6, 20), talks_of(4, 8, 30), scale()
    table = turns.effects_of(scanned, control, spliced, against)
    assert list(table) == ["effect", "readout", "of", "value", "low", "high"]
    wanted = [
        (effect, readout, of)
        for readout in ("raw", "beyond neutral")
        for effect in ("calm shock absorber", "fading memory")
        for of in ("scenario", "control", "difference")
    ]
    assert list(zip(table["effect"], table["readout"], table["of"])) == wanted
    for readout, raw in (("raw", True), ("beyond neutral", False)):
        for effect, statistic, other in (
            ("calm shock absorber", turns.shock_absorber, control),
            ("fading memory", turns.fading, spliced),
        ):
            ours, theirs = (float(statistic(each, against, raw).mean()) for each in (scanned, other))
            found = [value(table, effect, readout, of)["value"] for of in ("scenario", "control", "difference")]
            assert found == pytest.approx([ours, theirs, ours - theirs], abs=1e-6)
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()


def test_a_planted_effect_is_found_and_its_interval_holds_it():
    target = references().centroids[CALM, DEPTH]
    scanned = [
        heard(at_depth(as_like(with_gaps([0.0, 0.5, 0.3 + jitter]), target))) for jitter in (-0.02, -0.01, 0.01, 0.02)
    ]
    flat = [heard(at_depth(as_like(with_gaps([0.2, 0.5, 0.2 + jitter]), target))) for jitter in (-0.02, 0, 0.02)]
    table = turns.effects_of(scanned, flat, None, scale())
    for of, expected in (("scenario", 0.3), ("control", 0.0), ("difference", 0.3)):
        row = value(table, "calm shock absorber", "raw", of)
        assert row["value"] == pytest.approx(expected, abs=1e-4) and row["low"] < expected < row["high"]
        assert row["high"] - row["low"] < 0.15


def test_a_scenario_spliced_into_itself_differs_by_nothing():
    scanned = talks_of(3)
    table = turns.effects_of(scanned, scanned, scanned, scale())
    for readout in ("raw", "beyond neutral"):
        row = value(table, "fading memory", readout, "difference")
        assert (row["value"], row["low"], row["high"]) == (0, 0, 0)
        own, control = (value(table, "fading memory", readout, of) for of in ("scenario", "control"))
        assert own["value"] == control["value"] != 0


def test_conversations_and_their_spliced_selves_are_compared_one_by_one():
    """What all pairs have much alike has little spread, however much the conversations differ."""
    before, shift = [0.7, 0.5, 0.3], [0.19, 0.2, 0.21]
    scanned = [with_similarity([b, b, 0.0, 0.0], torch.zeros(SIZE)) for b in before]
    spliced = [with_similarity([b, b, s, s], torch.zeros(SIZE)) for b, s in zip(before, shift)]
    table = turns.effects_of(scanned, scanned, spliced, scale())
    row, own = (value(table, "fading memory", "raw", of) for of in ("difference", "scenario"))
    assert row["value"] == pytest.approx(0.2, abs=1e-4) and row["high"] - row["low"] < 0.06
    assert own["high"] - own["low"] > 0.5


def test_a_single_conversation_has_values_and_no_intervals():
    table = turns.effects_of(talks_of(1), talks_of(1, 8, 20), talks_of(1, 8, 30), scale())
    assert len(table) == 12 and table["value"].notna().all()
    assert table["low"].isna().all() and table["high"].isna().all()
    assert [str(kind) for kind in table.dtypes[["value", "low", "high"]]] == ["float64"] * 3


def test_two_conversations_have_intervals():
    table = turns.effects_of(talks_of(2), talks_of(2, 8, 20), talks_of(2, 8, 30), scale())
    assert table.notna().all().all()


def test_without_spliced_conversations_the_fall_stands_alone():
    table = turns.effects_of(talks_of(3), talks_of(3, 8, 20), None, scale())
    assert table.loc[table["effect"] == "fading memory", "of"].tolist() == ["scenario"] * 2


def test_without_calm_among_the_references_there_is_no_shock_absorber():
    table = turns.effects_of(talks_of(3), talks_of(3, 8, 20), None, scale(names=("happy", "sad", "bored")))
    assert set(table["effect"]) == {"fading memory"} and len(table) == 2


@pytest.mark.parametrize("roles", [("user", "user"), ("assistant", "user"), ("assistant", "assistant")])
def test_where_nobody_answers_the_user_there_is_no_shock_absorber(roles):
    scanned = [*talks_of(2), heard(anything(2, 40), roles)]
    table = turns.effects_of(scanned, talks_of(3, 8, 20), None, scale())
    assert set(table["effect"]) == {"fading memory"}


def test_a_single_turn_has_no_effects():
    table = turns.effects_of([heard(anything(1))], talks_of(3), None, scale())
    assert len(table) == 0 and list(table) == ["effect", "readout", "of", "value", "low", "high"]


def test_what_is_typed_is_read(model):
    """From a text in a box to the tables of its turns and tokens."""
    scenario = typed("Anna: The mill is open.\nTom: I walked home.\nAnna: Was it cold?", NAMES)
    against = turns.scale(model, scenario.references, "mean", 2, neutral_talk(model))
    [found] = recorded(model, scenario)
    table = turns.by_turn(scenario, [found], against)
    assert table["text"].unique().tolist() == ["The mill is open.", "I walked home.", "Was it cold?"]
    assert table.select_dtypes("number").notna().all().all()
