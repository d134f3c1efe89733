"""What features do on text: planted ones are found, and every table agrees with a slow, direct computation."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge

from helpers import features
from helpers.activations import every_token, site, token_residuals
from helpers.features import (
    around_words,
    at_words,
    depth_of,
    encoded,
    on_passages,
    pursuit,
    strongest,
    token_activations,
    top,
)
from helpers.models import load_model
from helpers.prompts import neutral_texts, token_strings

PLANTED, EVERYWHERE, NOWHERE = 17, 5, 9
TEXTS = [
    "The happy boys came down the lane with their kites.",
    "Mrs. Pell was happy.",
    "He was so happy that he ran all the way to the sea.",
]
HAPPY = pd.DataFrame({"id": ["kites", "pell", "sea"], "sentence": TEXTS, "word": "happy"})
HUNGRY = HAPPY.assign(sentence=[text.replace("happy", "hungry") for text in TEXTS], word="hungry")
PASSAGES = ["Stop!", *TEXTS, "I walked home along the quiet road.", *neutral_texts()[:4]]


@pytest.fixture(scope="module")
def model(model_folder: Callable[[str], Path]) -> TransformerBridge:
    """A tiny GPT-2 in which the word `happy` stands out: its embedding is much longer than the others."""
    model = load_model(str(model_folder("gpt2")))
    with torch.no_grad():
        model.embed.weight[happy(model)] *= 8
    return model


@pytest.fixture(scope="module")
def sae(model: TransformerBridge, small_sae: Callable):
    """Depth 0, 48 features: 17 reads the word `happy`, 5 fires on every token, 9 on none, the others read at random."""
    rows = normalize(torch.randn(48, 32, generator=torch.Generator().manual_seed(3)), dim=-1)
    word = model.embed.weight[happy(model)] - model.embed.weight[happy(model)].mean()
    rows[PLANTED] = word / word.norm()
    bias = torch.zeros(48)
    bias[[PLANTED, EVERYWHERE, NOWHERE]] = torch.tensor([-word.norm() / 2, 100, -100])
    return small_sae(rows, site(model, 0), bias=bias)


@pytest.fixture(scope="module")
def deep(model: TransformerBridge, small_sae: Callable):
    """A random TopK SAE of what leaves the last block."""
    rows = torch.randn(48, 32, generator=torch.Generator().manual_seed(4))
    return small_sae(rows, site(model, 3), kind=TopKSAE, config=TopKSAEConfig, k=6)


@pytest.fixture(params=["sae", "deep"])
def either(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def happy(model: TransformerBridge) -> int:
    (id_,) = model.tokenizer(" happy", add_special_tokens=False)["input_ids"]
    return id_


def direct(model: TransformerBridge, sae, text: str) -> Tensor:
    """Every feature at every token of one text, position 0 included, by the formula and without sae-lens' encoder."""
    pre = token_residuals(model, text)[:, depth_of(model, sae)] @ sae.W_enc.detach() + sae.b_enc.detach()
    if isinstance(sae, TopKSAE):
        pre = pre.where(pre >= pre.topk(sae.cfg.k).values[:, -1:], 0)
    return pre.relu()


def place(model: TransformerBridge, text: str, word: str) -> int:
    """The position of a word of one token."""
    return token_strings(model, text).index(f" {word}")


# At words


def test_the_depth_of_an_sae_is_where_it_reads(model, small_sae, sae, deep):
    assert (depth_of(model, sae), depth_of(model, deep)) == (0, 3)
    assert [depth_of(model, small_sae(torch.eye(32), site(model, depth))) for depth in range(4)] == [0, 1, 2, 3]


def test_at_words_encodes_the_stream_at_the_word(model, either):
    rows = [direct(model, either, text)[place(model, text, "happy")] for text in TEXTS]
    assert torch.allclose(at_words(model, either, HAPPY), torch.stack(rows), atol=1e-4)


def test_a_planted_feature_is_the_top_one_once_what_fires_everywhere_is_taken_off(model, sae):
    acts, others = at_words(model, sae, HAPPY), at_words(model, sae, HUNGRY)
    assert top(acts, 1).feature.tolist() == [EVERYWHERE]
    assert top(acts, 1, minus=others).feature.tolist() == [PLANTED]
    gap = (acts[:, PLANTED].mean() - others[:, PLANTED].mean()).item()
    assert top(acts, 1, minus=others).activation.tolist() == pytest.approx([gap])


def test_top_ranks_by_mean_activation_and_counts_the_prompts():
    acts = torch.tensor([[1.0, 0, 9, 0, 2], [1, 0, 0, 0, 2], [1, 0, 0, 0, 2], [1, 0, 0, 0, 0]])
    found = top(acts, 3)
    assert found.columns.tolist() == ["rank", "feature", "activation", "fires"]
    assert found["rank"].tolist() == [1, 2, 3]
    assert found.feature.tolist() == [2, 4, 0]
    assert found.activation.tolist() == [2.25, 1.5, 1]
    assert found.fires.tolist() == [0.25, 0.75, 1]


def test_top_minus_takes_off_the_mean_over_other_prompts_of_any_number():
    acts, others = torch.tensor([[4.0, 3, 1], [2, 3, 1]]), torch.tensor([[3.0, 1, 0]])
    found = top(acts, 3, minus=others)
    assert found.feature.tolist() == [1, 2] and found.activation.tolist() == [2, 1]  # feature 0 gains nothing
    assert found.fires.tolist() == [1, 1]


@pytest.mark.parametrize(("count", "features"), [(0, []), (1, [2]), (9, [2, 0])])
def test_top_leaves_out_features_without_a_positive_mean(count, features):
    acts = torch.tensor([[1.0, 0, 3, 1], [1, 0, 3, -2]])
    assert top(acts, count).feature.tolist() == features


# At every token


def test_encoded_keeps_the_shape_whatever_is_encoded_together(deep, generator, monkeypatch):
    acts = torch.randn(3, 5, 32, generator=generator)
    whole = encoded(deep, acts)
    assert whole.shape == (3, 5, 48) and not whole.requires_grad
    monkeypatch.setattr(features, "TOKENS_AT_ONCE", 4)
    assert torch.allclose(encoded(deep, acts), whole, atol=1e-6)
    assert torch.allclose(encoded(deep, acts[1, 2]), whole[1, 2], atol=1e-6)


def test_strongest_is_the_largest_over_tokens_without_position_0(model, either):
    expected = torch.stack([direct(model, either, text)[1:].amax(0) for text in PASSAGES])
    assert torch.allclose(strongest(model, either, PASSAGES), expected, atol=1e-4)
    with_bos = torch.stack([direct(model, either, text).amax(0) for text in PASSAGES])
    assert (with_bos > expected + 0.01).any()


def test_token_activations_of_chosen_features(model, either):
    found = token_activations(model, either, TEXTS[1], [PLANTED, 3])
    acts, words = direct(model, either, TEXTS[1]), token_strings(model, TEXTS[1])
    assert found.columns.tolist() == ["pos", "token", "feature", "activation"]
    assert list(zip(found.pos, found.feature)) == [(pos, f) for pos in range(1, len(words)) for f in (PLANTED, 3)]
    for row in found.itertuples():
        assert row.token == words[row.pos]
        assert row.activation == pytest.approx(acts[row.pos, row.feature].item(), abs=1e-4)


def test_token_activations_of_all_features_are_those_that_fire_strongest_first(model, either):
    found = token_activations(model, either, TEXTS[1])
    acts = direct(model, either, TEXTS[1])
    for pos in range(1, len(acts)):
        here = found[found.pos == pos]
        assert here.activation.is_monotonic_decreasing
        assert sorted(here.feature) == acts[pos].nonzero().flatten().tolist()
        assert here.activation.tolist() == pytest.approx(acts[pos][here.feature.tolist()].tolist(), abs=1e-4)


@pytest.mark.parametrize("bad", [-1, 48])
def test_a_feature_that_the_sae_does_not_have_is_refused(model, sae, bad):
    message = f"feature {bad} is out of range: the SAE at depth 0 has 0 to 47"
    for refused in (lambda: token_activations(model, sae, "Stop!", [1, bad]),
                    lambda: around_words(model, sae, HAPPY, [bad]),
                    lambda: on_passages(model, sae, PASSAGES, [bad])):  # fmt: skip
        with pytest.raises(IndexError, match=message):
            refused()


@pytest.mark.parametrize(("before", "after"), [(3, 5), (0, 0), (1, 2)])
def test_around_words_counts_from_the_word(model, either, before, after):
    """As far as the text goes; position 0 is no token of it."""
    found = around_words(model, either, HAPPY, [PLANTED, 3], before, after)
    assert found.columns.tolist() == ["id", "offset", "feature", "activation"]
    expected = {}
    for id_, text in zip(HAPPY["id"], TEXTS):
        acts, word = direct(model, either, text), place(model, text, "happy")
        for pos in range(max(1, word - before), min(len(acts) - 1, word + after) + 1):
            expected |= {(id_, pos - word, feature): acts[pos, feature].item() for feature in (PLANTED, 3)}
    assert list(zip(found.id, found.offset, found.feature)) == list(expected)
    assert found.activation.tolist() == pytest.approx(list(expected.values()), abs=1e-4)


def test_a_planted_feature_fires_at_offset_0(model, sae):
    found = around_words(model, sae, HAPPY, [PLANTED])
    mean = found.groupby("offset").activation.mean()
    assert mean.idxmax() == 0 and mean[0] > 3 * mean.drop(0).max()


# On passages


def test_frequency_is_the_share_of_tokens_on_which_a_feature_fires(model, either):
    acts = torch.cat([direct(model, either, text)[1:] for text in PASSAGES])
    found = on_passages(model, either, PASSAGES, [PLANTED])
    assert torch.allclose(found.frequency, (acts != 0).float().mean(0), atol=1e-6)


def test_frequency_of_features_that_fire_always_or_never(model, sae):
    frequency = on_passages(model, sae, PASSAGES, []).frequency
    assert frequency[EVERYWHERE] == 1 and frequency[NOWHERE] == 0


def test_activations_of_the_chosen_features_are_kept_text_after_text(model, either):
    chosen = [30, PLANTED, 3]
    found = on_passages(model, either, PASSAGES, chosen)
    assert found.features == chosen and found.texts == PASSAGES
    assert found.first[0] == 0 and found.first[-1] == len(found.acts)
    for text, start, end in zip(PASSAGES, found.first, found.first[1:], strict=False):
        assert torch.allclose(found.acts[start:end], direct(model, either, text)[1:, chosen], atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_strongest_passages_agree_with_a_direct_search(model, either, count):
    found = on_passages(model, either, PASSAGES, [3, PLANTED]).strongest(PLANTED, count)
    acts = [direct(model, either, text)[1:, PLANTED] for text in PASSAGES]
    order = sorted(range(len(PASSAGES)), key=lambda i: -acts[i].max())
    order = [i for i in order if acts[i].max() > 0][:count]
    assert found["rank"].tolist() == list(range(1, len(order) + 1))
    assert found.passage.tolist() == order
    assert found.pos.tolist() == [1 + int(acts[i].argmax()) for i in order]
    assert found.activation.tolist() == pytest.approx([acts[i].max().item() for i in order], abs=1e-4)


def test_the_strongest_passages_of_a_planted_feature_are_those_with_its_word(model, sae):
    found = on_passages(model, sae, PASSAGES, [PLANTED]).strongest(PLANTED, 3)
    assert sorted(PASSAGES[i] for i in found.passage) == sorted(TEXTS)
    assert [token_strings(model, PASSAGES[i])[pos] for i, pos in zip(found.passage, found.pos)] == [" happy"] * 3


def test_a_feature_that_never_fires_has_no_strongest_passages(model, sae):
    assert on_passages(model, sae, PASSAGES, [NOWHERE]).strongest(NOWHERE).empty


@pytest.mark.parametrize(("texts_at_once", "tokens_at_once"), [(1, 2048), (32, 1), (3, 7)])
def test_passages_do_not_depend_on_what_is_encoded_together(model, either, texts_at_once, tokens_at_once, monkeypatch):
    whole = on_passages(model, either, PASSAGES, [PLANTED, 3])
    monkeypatch.setattr(features, "TEXTS_AT_ONCE", texts_at_once)
    monkeypatch.setattr(features, "TOKENS_AT_ONCE", tokens_at_once)
    parts = on_passages(model, either, PASSAGES, [PLANTED, 3])
    assert parts.first == whole.first
    assert torch.allclose(parts.frequency, whole.frequency, atol=1e-6)
    assert torch.allclose(parts.acts, whole.acts, atol=1e-4)


def test_a_stream_that_was_read_before_is_encoded_as_if_read_anew(model, either):
    stream = every_token(model, PASSAGES, [depth_of(model, either)])[:, 0]
    fresh, before = (on_passages(model, either, PASSAGES, [PLANTED], given) for given in (None, stream))
    assert torch.allclose(fresh.acts, before.acts, atol=1e-4) and torch.allclose(fresh.frequency, before.frequency)
    with pytest.raises(ValueError, match=f"the stream has {len(stream) - 1} tokens, but the texts have {len(stream)}"):
        on_passages(model, either, PASSAGES, [PLANTED], stream[1:])


# Directions as sums of features


@pytest.fixture
def rows(generator: torch.Generator) -> Tensor:
    """Decoder rows of many lengths, more of them than dimensions."""
    lengths = torch.rand(150, 1, generator=generator) + 0.5
    return normalize(torch.randn(150, 64, generator=generator), dim=-1) * lengths


def test_pursuit_recovers_planted_sums_with_their_signs(rows):
    planted = {"joy": {5: 3.0, 77: -2.0, 120: 1.5}, "fear": {140: -4.0, 5: 2.5, 9: 1.0}}
    unit = normalize(rows, dim=-1)
    targets = {name: sum(size * unit[f] for f, size in parts.items()) for name, parts in planted.items()}
    found = pursuit(targets, rows, 3)
    assert found.columns.tolist() == ["target", "step", "feature", "coefficient", "explained"]
    for name, parts in planted.items():
        here = found[found.target == name]
        assert here.step.tolist() == [1, 2, 3]
        assert dict(zip(here.feature, here.coefficient)) == pytest.approx(parts, abs=1e-4)
        assert here.explained.iloc[-1] == pytest.approx(1, abs=1e-6)


def test_every_step_of_a_pursuit_explains_more(rows, generator):
    """It adds the row most aligned with what is left, and fits all coefficients by least squares."""
    target = torch.randn(64, generator=generator)
    found = pursuit({"random": target}, rows, 20)
    assert found.step.tolist() == list(range(1, 21)) and found.feature.is_unique
    assert (found.explained.diff().dropna() > 0).all() and 0 < found.explained[0] < found.explained[19] < 1
    left, unit = target.double(), normalize(rows.double(), dim=-1)
    for step, feature in enumerate(found.feature, 1):
        assert (unit @ left).abs().argmax() == feature
        chosen = unit[found.feature[:step].tolist()].T
        fitted = torch.linalg.lstsq(chosen, target.double()[:, None]).solution
        left = target.double() - (chosen @ fitted)[:, 0]
        assert found.explained[step - 1] == pytest.approx(1 - (left.norm() / target.norm()).item() ** 2, abs=1e-6)
    assert found.coefficient.tolist() == pytest.approx(fitted[:, 0].tolist(), abs=1e-5)


def test_a_step_that_adds_nothing_ends_the_pursuit(rows):
    """A target that is one row needs one step; the other goes on."""
    found = pursuit({"one": -2 * rows[5], "two": rows[6] + rows[7]}, rows, 4)
    assert found.target.value_counts().to_dict() == {"one": 1, "two": 2}
    assert found.feature[0] == 5 and found.coefficient[0] == pytest.approx(-2 * rows[5].norm().item(), abs=1e-5)


def test_a_row_of_zeros_is_never_chosen(rows):
    rows[3] = 0
    assert 3 not in pursuit({"random": torch.ones(64)}, rows, 10).feature.tolist()
