"""Tokens of a script by hand, their probabilities against plain passes, and a direction that leaks into another script.

The tokenizer knows English, Chinese and Russian words, bits of letters and a word of two scripts. In the planted model
the Chinese words for "afraid" are read out along the English word's direction.
"""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Replace
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.activations import site
from helpers.continuations import prompt_ids
from helpers.directions import isotropic
from helpers.models import load_model
from helpers.scripts import SCRIPTS, first_tokens, leaks, masses, tokens_of_script
from helpers.steering import Ablate, Add, Steer, added

ENGLISH = ["afraid", "the", "dog", "was", "that", "he", "saw", "and", "house", "river"]
CHINESE = ["害怕", "恐惧", "快乐", "房子", "河"]
RUSSIAN = ["страх", "радость", "дом", "Ёлка"]
AFRAID, MIXED, RARE, SPECIAL = ["害怕", "恐惧"], "卡拉OK", "罕见词", ["<s>", "</s>"]
BARE = "美"  # never after a space
TEXTS = ["the dog saw that he was", "he was", "and the house and the river"]
PADDED = 5  # rows of the unembedding beyond the tokenizer


@pytest.fixture(scope="module")
def trilingual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, bool], TransformerBridge]:
    """A tiny random GPT-2 with tied or untied unembedding, with or without the plant."""

    def model(tied: bool, planted: bool) -> TransformerBridge:
        folder = tmp_path_factory.mktemp("trilingual")
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(folder)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        size = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": len(tokenizer) + PADDED}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = AutoConfig.for_model("gpt2", **size, **ends, tie_word_embeddings=tied)
            hf = AutoModelForCausalLM.from_config(config)
            rows = hf.get_output_embeddings().weight
            with torch.no_grad():
                for weight in hf.parameters():
                    if weight.ndim == 2:
                        weight.mul_(8)
                if planted:
                    chinese = [_id(tokenizer, before + word) for word in AFRAID for before in ("", " ")]
                    rows[chinese] = rows[_id(tokenizer, " afraid")] + 0.1 * rows[chinese]
        hf.save_pretrained(folder)
        return load_model(str(folder))

    return model


@pytest.fixture(scope="module")
def plain(trilingual: Callable) -> TransformerBridge:
    return trilingual(True, False)


def test_the_tokens_of_a_script_are_its_words_and_parts_of_them(plain: TransformerBridge):
    for words, script in ((ENGLISH, "LATIN"), (CHINESE, "CJK"), (RUSSIAN, "CYRILLIC")):
        found = tokens_of_script(plain, script).tolist()
        texts = {plain.tokenizer.decode([i]) for i in found}
        assert found == sorted(found) and len(texts) == len(found)
        assert {before + word for word in words for before in ("", " ")} <= texts
        if script != "LATIN":  # which has all letters of ASCII, too
            assert all(any(text.strip(" �") in word for word in [*words, BARE]) for text in texts)


def test_numbers_mixed_tokens_and_tokens_that_the_tokenizer_lacks_are_of_no_script(plain: TransformerBridge):
    assert not {*range(len(plain.tokenizer), plain.cfg.d_vocab)} & _of_any_script(plain)
    for text in (MIXED, " " + MIXED, "42", "!", " "):
        assert _id(plain.tokenizer, text) not in _of_any_script(plain)


def test_bits_of_letters_are_of_no_script(plain: TransformerBridge):
    """Also not where they stand beside a letter: a part of 拉 and OK are not a Latin word."""
    bits = {i: text for i in range(len(plain.tokenizer)) if "�" in (text := plain.tokenizer.decode([i]))}
    assert any(text.strip("� ") == "" for text in bits.values()) and any(text[1:] == "OK" for text in bits.values())
    assert [text for i, text in bits.items() if i in _of_any_script(plain)] == []


def test_what_no_text_is_made_of_is_of_no_script(plain: TransformerBridge):
    special = {plain.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    assert special.isdisjoint(tokens_of_script(plain, "LATIN").tolist())


def test_a_vocabulary_of_one_script_has_no_tokens_of_another(model: TransformerBridge):
    assert tokens_of_script(model, "CJK").tolist() == tokens_of_script(model, "HANGUL").tolist() == []
    assert len(tokens_of_script(model, "LATIN")) > 7000
    assert first_tokens(model, CHINESE, "CJK").tolist() == []  # bits of letters


def test_the_scripts_of_languages_are_names_that_unicode_has(plain: TransformerBridge):
    assert [len(tokens_of_script(plain, script)) > 3 for script in SCRIPTS.values()] == [True, True]


def test_first_tokens_are_those_of_the_words_with_and_without_a_space(plain: TransformerBridge):
    expected = sorted(_id(plain.tokenizer, before + word) for word in AFRAID for before in ("", " "))
    assert first_tokens(plain, AFRAID, "CJK").tolist() == expected
    assert first_tokens(plain, [*AFRAID, *AFRAID[::-1]], "CJK").tolist() == expected
    assert first_tokens(plain, ["страх", *AFRAID, "afraid"], "CJK").tolist() == expected
    assert first_tokens(plain, [MIXED], "CJK").tolist() == []
    assert first_tokens(plain, [], "CJK").tolist() == []


def test_of_a_word_in_several_tokens_the_first_counts(plain: TransformerBridge):
    ids = plain.tokenizer("домстрах", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1 and ids[0] == _id(plain.tokenizer, "дом")
    assert ids[0] in first_tokens(plain, ["домстрах"], "CYRILLIC")
    assert not set(ids[1:]) & set(first_tokens(plain, ["домстрах"], "CYRILLIC").tolist())
    assert plain.tokenizer.decode(plain.tokenizer(RARE, add_special_tokens=False)["input_ids"][:1]) == "�"
    assert first_tokens(plain, [RARE], "CJK").tolist() == []


def test_a_space_that_is_a_token_of_its_own_is_passed_over(plain: TransformerBridge, tmp_path: Path):
    """As Llama's tokenizer cuts many Chinese words, and GPT-2's those that it knows only without a space."""
    assert plain.tokenizer(" " + BARE, add_special_tokens=False)["input_ids"] == [
        _id(plain.tokenizer, t) for t in (" ", BARE)
    ]
    assert first_tokens(plain, [BARE], "CJK").tolist() == [_id(plain.tokenizer, BARE)]
    pieces = ["<s>", "</s>", "▁", "怕", "▁怕", "笑"]
    bare = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    bare.pre_tokenizer, bare.decoder = Metaspace(prepend_scheme="always"), Replace("▁", " ")
    PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    size = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 8, "vocab_size": len(pieces)}
    config = AutoConfig.for_model("gpt2", **size, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.tokenizer(["笑", "怕"], add_special_tokens=False)["input_ids"] == [[2, 5], [4]]
    assert model.tokenizer.decode([2]) == " "
    assert first_tokens(model, ["笑"], "CJK").tolist() == [5]
    assert first_tokens(model, ["笑", "怕"], "CJK").tolist() == [4, 5]
    assert tokens_of_script(model, "CJK").tolist() == [3, 4, 5]


@pytest.mark.parametrize("which", ["unsteered", "prompt", "generated", "both", "ablated"])
def test_masses_are_those_of_a_plain_softmax(any_model: TransformerBridge, which: str):
    vectors = 5 * isotropic(1, 3, 32, torch.Generator().manual_seed(1))[0]
    steer = None if which == "unsteered" else added(1, vectors, "both" if which == "ablated" else which)
    if which == "ablated":
        steer = Steer(Ablate(vectors), (1, 2), torch.arange(3), torch.ones(3))
    ids = {"few": torch.tensor([5, 4000, 77]), "none": torch.tensor([], dtype=torch.long), "all": torch.arange(8192)}
    found = masses(any_model, TEXTS, ids, steer)
    assert list(found) == ["few", "none", "all"]
    for row, text in enumerate(TEXTS):
        steered = _plain_probabilities(any_model, text, None if which == "generated" else steer, row)
        assert found["few"][row] == pytest.approx(steered[[5, 4000, 77]].sum().item(), rel=1e-3)
        moved = not steered.allclose(_plain_probabilities(any_model, text, None, row), rtol=1e-2)
        assert moved == (which not in ("unsteered", "generated"))
    assert found["none"].tolist() == [0, 0, 0]
    assert found["all"].tolist() == pytest.approx([1, 1, 1], abs=1e-9)


def test_the_masses_of_all_scripts_and_of_the_rest_add_up(plain: TransformerBridge):
    ids = {script: tokens_of_script(plain, script) for script in ("LATIN", "CJK", "CYRILLIC")}
    rest = set(range(plain.cfg.d_vocab)) - set(torch.cat([*ids.values()]).tolist())
    found = masses(plain, TEXTS, {**ids, "rest": torch.tensor(sorted(rest))})
    assert found.sum(axis=1).tolist() == pytest.approx([1, 1, 1])
    assert (found > 0).all(axis=None)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_planted_leak_is_found_in_these_tokens_and_their_script_and_nowhere_else(
    trilingual: Callable, tied: bool, depth: int
):
    table = _leak(trilingual(tied, True), depth)
    english, random = table[table["run"] == 0], table[table["run"] > 0]
    rises = english.drop(columns="run").mean()
    assert rises["afraid"] > 0.15
    assert rises["zh"] > 0.15 and rises["ru"] < 0.02 and rises["other zh"] < 0.02
    assert rises["zh"] == pytest.approx(rises["afraid"], rel=0.2)
    by_run = random.groupby("run").mean()
    assert by_run["afraid"].max() < rises["afraid"] / 3 and by_run["zh"].max() < rises["zh"] / 3


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_without_the_plant_nothing_leaks(trilingual: Callable, tied: bool, depth: int):
    """The same direction in the twin, whose Chinese words are read out along directions of their own."""
    table = _leak(trilingual(tied, False), depth)
    rises = table[table["run"] == 0].mean()
    assert rises[["afraid", "zh", "ru"]].max() < 0.05
    assert rises["word"] > 0.05  # the direction does what it does in English


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_leaks_finds_the_planted_one_above_random_directions(trilingual: Callable, tied: bool):
    found = {planted: _leaks(trilingual(tied, planted)) for planted in (True, False)}
    for table in found.values():
        assert list(table) == ["tokens", "dose", "method", "value", "low", "high"]
        at = list(table[["dose", "method", "tokens"]].itertuples(index=False, name=None))
        assert at == [(d, m, t) for d in (0.5, 1.5) for m in ("english", "random") for t in ("afraid", "zh", "ru")]
        assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    leak = found[True].set_index(["dose", "method", "tokens"])
    for tokens in ("afraid", "zh"):
        assert leak["low"][1.5, "english", tokens] > leak["high"][1.5, "random", tokens]
        assert leak["value"][1.5, "english", tokens] > leak["value"][0.5, "english", tokens]
    assert leak["value"][1.5, "english", "ru"] < 0.02
    assert found[False]["value"].max() < 0.05


def test_a_leak_is_the_mean_change_of_the_masses_and_of_several_draws_their_median(trilingual: Callable):
    model = trilingual(True, True)
    by_hand, found = _leak(model, 1), _leaks(model).set_index(["dose", "method", "tokens"])
    for tokens in ("afraid", "zh", "ru"):
        by_run = by_hand.groupby("run")[tokens].mean()
        assert found["value"][1.5, "english", tokens] == pytest.approx(by_run[0], rel=1e-4)
        draws = by_run[1:].quantile([0.5, 0.025, 0.975]).tolist()
        assert found.loc[(1.5, "random", tokens)].tolist() == pytest.approx(draws, rel=1e-4)
        texts, low, high = (
            by_hand.loc[by_hand["run"] == 0, tokens],
            *found.loc[(1.5, "english", tokens), ["low", "high"]],
        )
        assert texts.min() - 1e-6 <= low < high <= texts.max() + 1e-6


def test_where_a_strength_is_missing_the_others_tell(trilingual: Callable):
    """A draw that does not reach a dose is left out, and so is a method of which no draw does."""
    model = trilingual(True, True)
    whole = _leaks(model)
    missing = lambda table: (table["method"] == "english") & (table["dose"] == 1.5)  # noqa: E731
    found = _leaks(model, lambda plan: plan.assign(strength=plan["strength"].mask(missing(plan))))
    pd.testing.assert_frame_equal(found, whole[~missing(whole)].reset_index(drop=True))
    few = _leaks(model, lambda plan: plan.assign(strength=plan["strength"].mask(plan["draw"] > 4)))
    pd.testing.assert_frame_equal(few, _leaks(model, lambda plan: plan[plan["draw"] <= 4]))
    assert _leaks(model, lambda plan: plan.assign(strength=float("nan"))).empty


def test_strengths_of_another_depth_say_nothing_of_this_one(trilingual: Callable):
    model = trilingual(True, True)
    found = _leaks(model, lambda plan: pd.concat([plan, plan.assign(depth=2, strength=50.0)]))
    pd.testing.assert_frame_equal(found, _leaks(model))


def test_a_vocabulary_without_such_tokens_has_no_leaks(model: TransformerBridge):
    ids = {"zh": tokens_of_script(model, "CJK"), "the": torch.tensor([5])}
    plan = pd.DataFrame([(1, "x", 0, 0.5, 1.0)], columns=["depth", "method", "draw", "dose", "strength"])
    found = leaks(model, TEXTS, ids, 1, {"x": Add(torch.ones(1, 32))}, plan)
    assert found.empty and list(found) == ["tokens", "dose", "method", "value", "low", "high"]
    assert not leaks(model, TEXTS, {"the": ids["the"]}, 1, {"x": Add(torch.ones(1, 32))}, plan).empty


def _of_any_script(model: TransformerBridge) -> set[int]:
    return {i for script in ("LATIN", "CJK", "CYRILLIC") for i in tokens_of_script(model, script).tolist()}


def _leak(model: TransformerBridge, depth: int) -> pd.DataFrame:
    """How much the English direction (run 0) and twenty random ones of its length raise each set of tokens."""
    vectors = 12 * _vectors(model)
    afraid, script = first_tokens(model, AFRAID, "CJK"), tokens_of_script(model, "CJK")
    ids = {
        "word": torch.tensor([_id(model.tokenizer, " afraid")]),
        "afraid": afraid,
        "zh": script,
        "other zh": script[~torch.isin(script, afraid)],
        "ru": tokens_of_script(model, "CYRILLIC"),
    }
    steer = added(depth, vectors.repeat_interleave(len(TEXTS), 0))
    rise = masses(model, TEXTS * 21, ids, steer) - masses(model, TEXTS * 21, ids)
    return rise.assign(run=torch.arange(21).repeat_interleave(len(TEXTS)).tolist())


def _vectors(model: TransformerBridge) -> Tensor:
    """Unit vectors: the English word's, and twenty random ones."""
    word = model.original_model.get_output_embeddings().weight[_id(model.tokenizer, " afraid")].float()
    english = (word - word.mean())[None]
    return torch.cat([english / english.norm(), isotropic(1, 20, 32, torch.Generator().manual_seed(5))[0]])


def _leaks(model: TransformerBridge, change: Callable = lambda plan: plan) -> pd.DataFrame:
    """The same as a table of `leaks` at two doses; `change` may alter the strengths."""
    vectors = _vectors(model)
    methods = {"english": Add(vectors[:1]), "random": Add(vectors[1:])}
    rows = [
        (1, name, draw, dose, strength)
        for name, method in methods.items()
        for draw in range(len(method))
        for dose, strength in ((1.5, 12.0), (0.5, 4.0))
    ]
    plan = pd.DataFrame(rows, columns=["depth", "method", "draw", "dose", "strength"])
    ids = {
        "afraid": first_tokens(model, AFRAID, "CJK"),
        "zh": tokens_of_script(model, "CJK"),
        "ru": tokens_of_script(model, "CYRILLIC"),
    }
    return leaks(model, TEXTS, ids, 1, methods, change(plan))


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word above is one token, also after a space; `RARE` is not."""
    bare = Tokenizer(BPE())
    bare.pre_tokenizer, bare.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    words = [*ENGLISH, *CHINESE, *RUSSIAN, MIXED, "42"]
    trainer = BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [before + word for word in words for before in ("", " ")]
    bare.train_from_iterator([*texts, BARE] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def _id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    (found,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _plain_probabilities(model: TransformerBridge, text: str, steer: Steer | None, row: int) -> Tensor:
    """Of the token after one text, read alone."""
    (ids,) = prompt_ids(model, [text])

    def change(resid: Tensor, hook) -> Tensor:
        vector, after = steer.method.vectors[row], resid.clone()
        for position in range(1, len(ids)):
            share = resid[0, position] @ vector / (vector @ vector)
            after[0, position] += -share * vector if isinstance(steer.method, Ablate) else vector
        return after

    hooks = [(site(model, depth), change) for depth in (steer.depths if steer else ())]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model.original_model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
