"""Input and output scores against plain computations: what a vector promises, it must bring forth."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from helpers import prompts
from helpers.activations import every_token, site
from helpers.continuations import prompt_ids
from helpers.directions import isotropic
from helpers.features import top
from helpers.models import load_model
from helpers.output_features import gain, input_scores, output_scores
from helpers.prompts import key_words
from helpers.saes import load_sae

SAID = 1500  # a token of bookworm's
TEXTS = ["The box stood on the table.", "It was", "They walked home in the evening and had their supper."]


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_scores_are_those_of_a_plain_computation(
    any_model: TransformerBridge, model_folder: Callable[[str], Path], generator: Generator, depth: int
):
    vectors = isotropic(1, 4, 32, generator)[0] * torch.tensor([[1.0], [5], [20], [80]])
    found = output_scores(any_model, depth, vectors, TEXTS, top=7)
    assert list(found) == ["feature", "score", "unsteered"]
    assert found["feature"].tolist() == [0, 1, 2, 3]
    hf = AutoModelForCausalLM.from_pretrained(any_model.cfg.folder)
    for feature, vector in enumerate(vectors):
        promised = _promised(hf, vector - any_model.cfg.centred * vector.mean(), 7)
        for name, after in (("score", vector), ("unsteered", None)):
            plain = sum(_plain_score(any_model, text, depth, after, promised) for text in TEXTS) / len(TEXTS)
            assert found[name][feature] == pytest.approx(plain, rel=2e-3, abs=1e-7)
            assert 0 <= found[name][feature] <= 1
    assert (found["score"] - found["unsteered"]).abs().max() > 1e-4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def sure(
    request: pytest.FixtureRequest, model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> TransformerBridge:
    """A tiny random model with rows of the unembedding that are long enough for one token to take nearly all."""
    folder = tmp_path_factory.mktemp("sure") / request.param
    shutil.copytree(model_folder(request.param), folder)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    hf.get_output_embeddings().weight.data *= 5
    hf.save_pretrained(folder)
    return load_model(str(folder))


def test_a_token_s_own_row_at_the_last_depth_has_a_high_score_and_next_to_nothing_a_low_one(
    sure: TransformerBridge, generator: Generator
):
    row, noise = _row(sure), isotropic(1, 1, 32, generator)[0, 0]
    vectors = torch.stack([1000 * row, 1e-3 * noise, 1e-3 * row])
    found = output_scores(sure, sure.cfg.n_layers, vectors, TEXTS)
    assert found["score"][0] > 0.9 and found["unsteered"][0] < 0.1
    assert found["score"][1:].tolist() == pytest.approx(found["unsteered"][1:].tolist(), rel=0.02)
    assert found["score"][1:].max() < 0.1


def test_a_vector_that_comes_out_the_other_way_round_has_no_score(sure: TransformerBridge):
    """What counts is what the model says, not what the lens reads off."""
    vector = 1000 * _row(sure)[None]
    turned = ("blocks.2.attn.hook_out", lambda out, hook: out - 2 * vector.to(out))
    assert output_scores(sure, 2, vector, TEXTS)["score"][0] > 0.9
    with sure.hooks(fwd_hooks=[turned]):
        assert output_scores(sure, 2, vector, TEXTS)["score"][0] < 1e-3


def test_unsteered_does_not_depend_on_the_vectors_lengths(any_model: TransformerBridge, generator: Generator):
    vectors = isotropic(1, 3, 32, generator)[0]
    short, long = (output_scores(any_model, 2, times * vectors, TEXTS) for times in (5, 500))
    assert short["unsteered"].tolist() == pytest.approx(long["unsteered"].tolist(), rel=1e-5)
    assert (short["score"] - long["score"]).abs().max() > 1e-4
    assert short["unsteered"].nunique() == 3


def test_a_feature_s_score_depends_neither_on_the_others_nor_on_the_order_of_the_texts(
    model: TransformerBridge, generator: Generator
):
    vectors = 30 * isotropic(1, 4, 32, generator)[0]
    together = output_scores(model, 1, vectors, TEXTS)
    for feature, vector in enumerate(vectors):
        alone = output_scores(model, 1, vector[None], TEXTS[::-1]).iloc[0]
        assert alone["score"] == pytest.approx(together["score"][feature], rel=1e-4)
        assert alone["unsteered"] == pytest.approx(together["unsteered"][feature], rel=1e-4)


def test_the_score_is_the_mean_over_texts(model: TransformerBridge, generator: Generator):
    vectors = 30 * isotropic(1, 2, 32, generator)[0]
    each = [output_scores(model, 1, vectors, [text])[["score", "unsteered"]] for text in TEXTS]
    expected = sum(each) / len(TEXTS)
    together = output_scores(model, 1, vectors, TEXTS)
    assert together["score"].tolist() == pytest.approx(expected["score"].tolist(), rel=1e-4)
    assert together["unsteered"].tolist() == pytest.approx(expected["unsteered"].tolist(), rel=1e-4)


def test_promising_more_tokens_never_lowers_a_score(model: TransformerBridge, generator: Generator):
    vectors = 30 * isotropic(1, 4, 32, generator)[0]
    one, twenty, all_ = (output_scores(model, 1, vectors, TEXTS, top) for top in (1, 20, 8192))
    for name in ("score", "unsteered"):
        assert (one[name] <= twenty[name] * (1 + 1e-4)).all() and (twenty[name] <= all_[name] * (1 + 1e-4)).all()
    most = [_probabilities(model, text, 0, None).max().item() for text in TEXTS]
    assert all_["unsteered"].tolist() == pytest.approx([sum(most) / len(TEXTS)] * 4, rel=1e-4)


def test_what_the_model_says_anyway_scores_as_much_without_the_vector(sure: TransformerBridge):
    """A hook stands for all that makes the model say it."""
    says = ("blocks.2.mlp.hook_out", lambda out, hook: out + 1000 * _row(sure))
    with sure.hooks(fwd_hooks=[says]):
        found = output_scores(sure, 1, _row(sure)[None], TEXTS, top=1)
    assert found["unsteered"][0] > 0.9
    assert found["score"][0] == pytest.approx(found["unsteered"][0], rel=0.01)


@pytest.mark.parametrize("emotion", ["afraid", "happy"])
def test_input_scores_are_activations_at_the_key_word_minus_those_at_its_place_without_it(
    model_with_saes: TransformerBridge, emotion: str
):
    sae, acts = load_sae(model_with_saes, 2), []
    for kind in ("key word", "matched"):
        at_word = []
        for row in key_words(kind, "find", emotion).itertuples():
            upto = re.match(rf".*\b{row.word}\b", row.sentence)[0]  # a model reads from left to right
            at_word.append(every_token(model_with_saes, [upto], [2])[-1, 0])
        acts.append(sae.encode(torch.stack(at_word)))
    found, expected = input_scores(model_with_saes, sae, emotion), acts[0].mean(0) - acts[1].mean(0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert found.shape == (64,) and found.min() < 0 < found.max()
    best = top(acts[0], 5, acts[1])  # the candidates of the notebook on SAE features
    assert found.topk(5).indices.tolist() == best["feature"].tolist()
    assert found.topk(5).values.tolist() == pytest.approx(best["activation"].tolist(), rel=1e-3)


def test_input_scores_use_find_sentences_of_the_emotion_alone(
    model_with_saes: TransformerBridge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What the rows of another split, kind or emotion hold makes no difference."""
    sae, table = load_sae(model_with_saes, 2), key_words()
    before = input_scores(model_with_saes, sae, "afraid")
    used = table["kind"].isin(["key word", "matched"]) & table["split"].eq("find") & table["emotion"].eq("afraid")
    (tmp_path / "prompts").mkdir()
    monkeypatch.setattr(prompts, "DATA", tmp_path)
    table[used].to_csv(tmp_path / "prompts" / "key_words.csv", index=False)
    assert torch.equal(input_scores(model_with_saes, sae, "afraid"), before)


def _row(model: TransformerBridge) -> Tensor:
    """The unit vector that raises one token most."""
    row = model.original_model.get_output_embeddings().weight[SAID].float()
    return normalize(row - model.cfg.centred * row.mean(), dim=0)


def _promised(hf: torch.nn.Module, vector: Tensor, top: int) -> list[int]:
    """The tokens that the final norm and unembedding raise most, beyond what they make of nothing."""
    norm = next(part for name, part in hf.named_modules() if name.endswith(("ln_f", "final_layer_norm", "model.norm")))
    with torch.no_grad():
        raised = (norm(vector) - norm(torch.zeros_like(vector))) @ hf.get_output_embeddings().weight.T
    return raised.argsort(descending=True)[:top].tolist()


def _plain_score(model: TransformerBridge, text: str, depth: int, vector: Tensor | None, promised: list[int]) -> float:
    """Equation 2 of Arad et al. 2025: the best rank, from 0, and the greatest probability, of the promised tokens."""
    probability = _probabilities(model, text, depth, vector)
    ranks = probability.argsort(descending=True).tolist()
    best = min(ranks.index(token) for token in promised)
    return (1 - best / len(ranks)) * max(probability[token].item() for token in promised)


def _probabilities(model: TransformerBridge, text: str, depth: int, vector: Tensor | None) -> Tensor:
    """Of the token after one text, read alone with the vector added to all its tokens but position 0."""
    (ids,) = prompt_ids(model, [text])

    def change(resid: Tensor, hook) -> Tensor:
        return torch.cat([resid[:, :1], resid[:, 1:] + vector], 1)

    hooks = [] if vector is None else [(site(model, depth), change)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model.original_model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)


def test_gain_of_choosing_by_one_score_over_another(generator: Generator):
    effect = list(range(40))
    table = pd.DataFrame({"effect": effect, "good": effect, "bad": effect[::-1]}).astype(float)
    value, low, high = gain(table, "good", "bad", "effect", 3, generator)
    assert value == 38 - 1
    assert 25 < low < value
    assert low < high < 39
    assert gain(table, "good", "good", "effect", 3, generator) == (0, 0, 0)
