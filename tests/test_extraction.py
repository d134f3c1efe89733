"""Activations from texts that are read and from stories that the model writes, against plain passes over token ids."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import activations, continuations
from helpers.activations import residuals, site
from helpers.continuations import generated
from helpers.extraction import Stories, comprehended, opening_alone, reread, told, while_writing
from helpers.models import load_model

# In order of length. The second is longer than the tiny models' sliding window of 16 tokens.
OPENINGS = [
    "Nobody had ever seen Anna so happy. In the morning",
    "This is the story of a man who was very sad all through his voyage. He stood on the deck, and he",
    "This is the story of a man who was very, very, very, very sad all through his voyage. He stood on the deck, and",
]
SEEDS = [3, 4, 5]
TEXTS = ["He ran.", "I walked home along the quiet road, and sat down by the mill.", "The dog ran after me!"]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on every batch holds one text."""

    def switch() -> None:
        monkeypatch.setattr(continuations, "tokens_at_once", lambda model: 0)
        monkeypatch.setitem(activations.BATCH_TOKENS, "cpu", 1)

    return switch


@pytest.fixture
def own_model(model_folder: Callable[[str], Path]) -> TransformerBridge:
    """A tiny GPT-2 of one's own, to be changed."""
    return load_model(str(model_folder("gpt2")))


def ids_of(model: TransformerBridge, text: str) -> list[int]:
    return [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def watched(model: TransformerBridge, run: Callable[[], object]) -> list[Tensor]:
    """The residual stream [row, pos, depth, d_model] of every forward pass of a call."""
    passes: list[list[Tensor]] = []

    def at_depth(depth: int) -> Callable:
        def look(resid: Tensor, hook) -> None:
            if depth == 0:
                passes.append([])
            passes[-1].append(resid.clone())

        return look

    with torch.no_grad(), model.hooks(fwd_hooks=[(site(model, d), at_depth(d)) for d in range(model.cfg.n_layers + 1)]):
        run()
    return [torch.stack(each, 2) for each in passes]


def stream(model: TransformerBridge, ids: Sequence[int]) -> Tensor:
    """The residual stream [pos, depth, d_model] of one text's ids, without padding, batch or cache."""
    return watched(model, lambda: model.original_model(input_ids=torch.tensor([ids]), use_cache=False))[0][0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal within 1e-4 of the norm of each vector."""
    assert found.shape == expected.shape
    assert ((found - expected).norm(dim=-1) <= 1e-4 * expected.norm(dim=-1)).all()


def whole(model: TransformerBridge, stories: Stories) -> list[Tensor]:
    """The stream of every opening and story as one plain text."""
    return [stream(model, ids[:length].tolist()) for ids, length in zip(stories.read.ids, stories.read.length)]


# Stories


def test_a_story_is_the_same_alone_and_in_any_batch_and_order(any_model, alone):
    together = told(any_model, OPENINGS, 12, SEEDS).written
    assert told(any_model, OPENINGS[::-1], 12, SEEDS[::-1]).written[::-1] == together
    assert told(any_model, OPENINGS[1:] * 2, 12, SEEDS[1:] * 2).written == together[1:] * 2
    alone()
    assert told(any_model, OPENINGS, 12, SEEDS).written == together


def test_what_is_read_from_a_story_does_not_depend_on_the_others(any_model, alone):
    stories = told(any_model, OPENINGS, 9, SEEDS)
    readers = (while_writing, reread, lambda model, _: opening_alone(model, OPENINGS))
    together = [read(any_model, stories) for read in readers]
    alone()
    for read, expected in zip(readers, together):
        for name, found in read(any_model, stories).items():
            assert_close(found, expected[name])


def test_a_story_depends_on_its_seed_and_on_no_other_randomness(model):
    stories = told(model, [OPENINGS[0]] * 3, 12, [3, 4, 3]).written
    assert stories[0] == stories[2] != stories[1]
    torch.manual_seed(99)
    assert told(model, [OPENINGS[0]] * 3, 12, [3, 4, 3]).written == stories


def test_openings_with_one_seed_share_its_noise_at_temperature_1(model):
    """Each token is the likeliest once the seed's Gumbel noise is added, the same for both openings."""
    noise = torch.Generator().manual_seed(7)
    gumbel = -torch.rand(5, model.cfg.d_vocab, generator=noise).log().neg().log()
    for opening, story in zip(OPENINGS[:2], told(model, OPENINGS[:2], 5, [7, 7]).written):
        ids = ids_of(model, opening)
        for written, extra in zip(story, gumbel):
            with torch.no_grad():
                logits = model.original_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[model.tokenizer.eos_token_id] = -torch.inf
            assert written == int((logits + extra).argmax())
            ids.append(written)


def test_a_story_has_its_full_length_where_the_model_would_end_it(own_model):
    end = told(own_model, OPENINGS, 12, SEEDS).written[1][4]
    own_model.tokenizer.eos_token = own_model.tokenizer.convert_ids_to_tokens(end)
    assert len(generated(own_model, OPENINGS, 12, seeds=SEEDS)[1]) <= 4
    for story in told(own_model, OPENINGS, 12, SEEDS).written:
        assert len(story) == 12 and end not in story


def test_a_story_is_told_by_a_model_whose_tokenizer_has_no_end_of_text(model_folder, tmp_path):
    """The bridge gives it one beyond the vocabulary, which no model can draw."""
    folder = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "endless"))
    vocabulary = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(vocabulary.replace("<|endoftext|>", "<nothing>"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "!", "eos_token": None, "pad_token": None, "unk_token": None}
    named = {name: setting for name, setting in settings.items() if setting is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    model = load_model(str(folder))
    assert model.tokenizer.eos_token_id == model.cfg.d_vocab
    assert told(model, OPENINGS, 5, SEEDS).written == generated(model, OPENINGS, 5, seeds=SEEDS)


def test_stories_hold_opening_and_story_one_after_the_other(any_model):
    stories = told(any_model, OPENINGS, 7, SEEDS)
    rows = zip(OPENINGS, stories.written, stories.read.ids, stories.read.length.tolist(), stories.begins.tolist())
    for opening, story, ids, length, begins in rows:
        assert len(story) == 7
        assert ids[:length].tolist() == ids_of(any_model, opening) + story
        assert begins == length - 7 == len(ids_of(any_model, opening))
    assert stories.read.ids.shape[1] == stories.read.length.max()
    assert torch.equal(stories.read.last, stories.read.length - 1)
    assert (stories.read.stop == -1).all()


# While writing


def test_one_pass_reads_what_the_model_holds_while_it_decodes(any_model):
    """With left padding and a KV cache. A token is read in the step that draws the next one, so one more is drawn."""
    steps = watched(any_model, lambda: told(any_model, OPENINGS, 10, SEEDS))
    assert [step.shape[:2] for step in steps[1:]] == [(3, 1)] * 9  # one batch, in the openings' order; cached
    held = torch.cat(steps[1:], 1)
    found = while_writing(any_model, told(any_model, OPENINGS, 9, SEEDS), skip=[0, 3, 8], cuts=[5])
    assert_close(found["midpoint"], held[:, 4])
    assert_close(found["midpoint of 5"], held[:, 2])
    assert_close(found["last token"], held[:, 8])
    assert_close(found["mean from 0"], held.mean(1))
    assert_close(found["mean from 3"], held[:, 3:].mean(1))
    assert_close(found["mean from 8"], held[:, 8])
    assert_close(opening_alone(any_model, OPENINGS)["opening"], steps[0][:, -1])


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8])
def test_spans_average_exactly_the_tokens_they_name(any_model, n_tokens):
    stories = told(any_model, OPENINGS, n_tokens, SEEDS)
    skip = sorted({0, n_tokens // 2, n_tokens - 1})
    found = while_writing(any_model, stories, skip)
    assert list(found) == ["midpoint", "last token", *(f"mean from {k}" for k in skip)]
    for row, held in enumerate(whole(any_model, stories)):
        written = held[-n_tokens:]
        assert_close(found["midpoint"][row], written[n_tokens // 2])
        assert_close(found["last token"][row], written[-1])
        for k in skip:
            assert_close(found[f"mean from {k}"][row], written[k:].mean(0))


def test_a_cut_is_the_midpoint_of_a_story_that_stops_there(any_model):
    found = while_writing(any_model, told(any_model, OPENINGS, 11, SEEDS), cuts=[1, 2, 6, 11, 99])
    for cut in (1, 2, 6, 11):
        shorter = while_writing(any_model, told(any_model, OPENINGS, cut, SEEDS))
        assert_close(found[f"midpoint of {cut}"], shorter["midpoint"])
    assert torch.equal(found["midpoint of 99"], found["midpoint"])
    assert not torch.allclose(found["midpoint of 6"], found["midpoint"], rtol=1e-2)


def test_an_opening_alone_is_read_at_its_last_token_whatever_that_is(any_model):
    texts = [*OPENINGS, "Anna was so happy."]
    found = opening_alone(any_model, texts)
    assert list(found) == ["opening"]
    for acts, opening in zip(found["opening"], texts):
        assert_close(acts, stream(any_model, ids_of(any_model, opening))[-1])


# Read again


def test_reading_again_does_not_see_the_opening(any_model):
    stories = told(any_model, OPENINGS, 8, SEEDS)
    found = reread(any_model, stories, [0, 5], [6])
    for row, story in enumerate(stories.written):
        held = stream(any_model, [any_model.tokenizer.bos_token_id, *story])[1:]
        assert_close(found["midpoint"][row], held[4])
        assert_close(found["midpoint of 6"][row], held[3])
        assert_close(found["last token"][row], held[-1])
        assert_close(found["mean from 0"][row], held.mean(0))
        assert_close(found["mean from 5"][row], held[5:].mean(0))
    seen = while_writing(any_model, stories, [0, 5], [6])
    assert list(seen) == list(found)
    assert not any(torch.allclose(seen[name][:, -1], found[name][:, -1], rtol=1e-2) for name in found)


def test_the_same_story_after_another_opening_reads_the_same(model):
    stories, others = told(model, OPENINGS, 8, SEEDS), told(model, OPENINGS[::-1], 8, SEEDS)
    swapped = Stories(others.read, others.begins, stories.written)
    for name, found in reread(model, stories).items():
        assert torch.equal(found, reread(model, swapped)[name])


# Comprehension


def test_whole_texts_are_read_as_everywhere_else(any_model):
    found, expected = comprehended(any_model, TEXTS), residuals(any_model, TEXTS)
    assert list(found) == ["last token", "final punctuation", "mean"]
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_cut_reads_what_the_truncated_text_holds(any_model):
    found = comprehended(any_model, TEXTS, [1, 2, 5, 60])
    for row, text in enumerate(TEXTS):
        for cut in (1, 2, 5, 60):
            held = stream(any_model, ids_of(any_model, text)[: 1 + cut])[1:]
            assert_close(found[f"last of {cut}"][row], held[-1])
            assert_close(found[f"mean of {cut}"][row], held.mean(0))
    assert_close(found["mean of 60"], found["mean"])
    assert_close(found["last of 60"], found["final punctuation"])


# What is refused


@pytest.mark.parametrize("read", [while_writing, reread])
@pytest.mark.parametrize("skip", [6, 7, 50])
def test_leaving_out_all_that_was_written_is_refused(model, read, skip):
    stories = told(model, OPENINGS, 6, SEEDS)
    message = f"cannot leave out the first {skip} of 6 written tokens: nothing would be left"
    with pytest.raises(ValueError, match=message):
        read(model, stories, [0, skip])
    read(model, stories, [0, 5])


@pytest.mark.parametrize("read", [while_writing, reread])
def test_a_negative_number_of_tokens_to_leave_out_is_refused_by_its_name(model, read):
    """It would reach back into the opening."""
    with pytest.raises(ValueError, match="cannot leave out the first -1 of 6 written tokens"):
        read(model, told(model, OPENINGS, 6, SEEDS), [0, -1])


@pytest.mark.parametrize("cut", [0, -1])
def test_a_cut_that_leaves_no_token_is_refused(model, cut):
    """A mean over no tokens is NaN, and the last of them would be position 0 or a token of the opening."""
    with pytest.raises(ValueError, match=rf"{cut}\b"):
        comprehended(model, TEXTS, [cut])
    with pytest.raises(ValueError, match=rf"{cut}\b"):
        while_writing(model, told(model, OPENINGS, 6, SEEDS), cuts=[cut])


def test_opening_and_story_that_do_not_fit_the_context_are_refused(any_model):
    room = any_model.cfg.n_ctx - max(len(ids_of(any_model, opening)) for opening in OPENINGS)
    assert told(any_model, OPENINGS, room, SEEDS).read.ids.shape[1] == any_model.cfg.n_ctx
    with pytest.raises(ValueError, match=rf"prompt 2 .* and its continuation \({room + 1}\) do not fit the 64 tokens"):
        told(any_model, OPENINGS, room + 1, SEEDS)


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_opening_is_refused(model, empty):
    for refused in (lambda: told(model, ["He", empty], 4, [1, 2]), lambda: opening_alone(model, ["He", empty])):
        with pytest.raises(ValueError, match=r"text 1 is empty .*give at least one word"):
            refused()


def test_no_openings_no_tokens_and_a_wrong_number_of_seeds_are_refused(model):
    with pytest.raises(ValueError, match="there are no texts to read"):
        told(model, [], 4, [])
    with pytest.raises(ValueError, match="needs at least one token"):
        told(model, OPENINGS, 0, SEEDS)
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        told(model, OPENINGS, 4, SEEDS[:2])


def test_a_text_without_final_punctuation_is_refused(model):
    with pytest.raises(ValueError, match="text 1 does not end in punctuation"):
        comprehended(model, ["He ran.", "He ran"])


def test_non_finite_activations_are_refused(own_model):
    stories = told(own_model, OPENINGS, 4, SEEDS)
    with torch.no_grad():
        own_model.blocks[1].mlp.out.bias[0] = torch.nan
    for read in (
        lambda: comprehended(own_model, TEXTS, [2]),
        lambda: opening_alone(own_model, OPENINGS),
        lambda: while_writing(own_model, stories),
        lambda: reread(own_model, stories),
    ):
        with pytest.raises(ValueError, match="non-finite activation at depth 2"):
            read()
