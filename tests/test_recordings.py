"""Recordings turn by turn against one full pass of the plain model, what is written, what is refused, what is found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from conftest import seeded
from torch import Generator, Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from helpers.activations import site, token_residuals
from helpers.models import is_centred, load_model, uncentred
from helpers.prompts import first_token
from helpers.readouts import References, beyond_neutral, centred_cosine
from helpers.recordings import Recording, background, neutral_talk, recorded
from helpers.scenarios import STREAMS, TEMPLATE, Conversation, Scenario, Turn, calibration, chained, turn_ids

# Longer than the tiny models' sliding window of 16 tokens, as is its third turn; None: the model writes.
TALK = (
    "The mill is open.",
    None,
    "The dog ran after me down the lane, and all the way to the sea I did not look back.",
    None,
    "He ran.",
)
GIVEN = ("The mill is open.", "I walked home.", "Was it cold?")
SPEAKERS = (("Anna", "user"), ("Tom", "assistant"))
BEFORE_MLP = {  # a part that reads it
    "gpt2": "ln_2", "gpt_neox": None,
    "gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm",
}  # fmt: skip
ERRORS = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
PLANTED = " storm"
BLOCK, SIZE = 1, 6.0  # which block writes at that word, and how much


def talk_of(*texts: str | None, write: int = 6, name: str = "talk") -> Conversation:
    turns = [Turn(*SPEAKERS[i % 2], text, 0 if text else write, 10 + i) for i, text in enumerate(texts)]
    return Conversation(name, tuple(turns))


def of(*conversations: Conversation, positions: str = "every token", streams: tuple[str, ...] = STREAMS) -> Scenario:
    return Scenario("x", "x", "x", TEMPLATE, positions, streams, ("happy", "sad"), conversations, Path("a/walk.yaml"))


def recording(
    model: TransformerBridge, *texts: str | None, seed: int | None = None, write: int = 6, **how: object
) -> Recording:
    return recorded(model, of(talk_of(*texts, write=write), **how), seed)[0]


def family(model: TransformerBridge) -> str:
    return model.cfg.model_name.removeprefix("local--tiny-")


@cache
def hugging_face(folder: Path, **changed: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **changed).eval()


@torch.no_grad()
def full_pass(model: TransformerBridge, ids: Tensor, **changed: object) -> tuple[Tensor, Tensor]:
    """The plain model's states before every block and after the last, and before every MLP: token, depth, d_model."""
    hf = hugging_face(model.cfg.folder, **changed)
    parts, entering, before_mlp = dict(hf.base_model.named_children()), [], []
    norm = next(parts[name] for name in ("ln_f", "final_layer_norm", "norm") if name in parts)
    reader = BEFORE_MLP.get(family(model), "post_attention_layernorm")
    handles = [norm.register_forward_pre_hook(lambda part, args: entering.append(args[0]))]
    for block in next(part for part in parts.values() if isinstance(part, torch.nn.ModuleList) and len(part) == 3):
        if reader:
            keep = block.get_submodule(reader)
            handles.append(keep.register_forward_pre_hook(lambda part, args: before_mlp.append(args[0])))
        else:  # attention and MLP side by side
            handles.append(block.attention.register_forward_hook(lambda part, args, out: before_mlp.append(out[0])))
    states = hf(ids[None], output_hidden_states=True).hidden_states[:-1]
    for handle in handles:
        handle.remove()
    after_attention = torch.stack(before_mlp, 2)[0] + (0 if reader else torch.stack(states, 2)[0])
    found = torch.stack([*states, *entering], 2)[0], after_attention
    return tuple(each - each.mean(-1, keepdim=True) if is_centred(model) else each for each in found)


@torch.no_grad()
def continued(model: TransformerBridge, ids: list[int], most: int, noise: Generator | None = None) -> list[int]:
    """What the plain model writes after these tokens, without cache."""
    written: list[int] = []
    for _ in range(most):
        chance = hugging_face(model.cfg.folder)(torch.tensor([ids + written])).logits[0, -1].softmax(-1)
        id_ = int(chance.argmax()) if noise is None else int(torch.multinomial(chance, 1, generator=noise))
        if id_ == model.tokenizer.eos_token_id or "\n" in model.tokenizer.decode([id_]):
            break
        written.append(id_)
    return written


def by_hand(
    model: TransformerBridge, conversation: Conversation, noise: Generator | None = None
) -> tuple[list[int], list[str]]:
    """Ids and texts of a conversation in which the plain model writes, turn after turn."""
    ids, texts = [], []
    for given, turn in zip(turn_ids(model, of(conversation), conversation), conversation.turns):
        written = [] if turn.text else continued(model, ids + given, turn.write, noise)
        ids += given + written
        texts.append(turn.text or model.tokenizer.decode(written).strip())
    return ids, texts


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal within 1e-5 of the norm of each vector."""
    assert found.shape == expected.shape
    assert ((found - expected).norm(dim=-1) <= 1e-5 * expected.norm(dim=-1)).all()


def assert_same(found: Recording, expected: Recording) -> None:
    assert found.conversation == expected.conversation and found.tokens.equals(expected.tokens)
    for name in ("stream", "attention", "ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def hooks(model: TransformerBridge) -> int:
    """How many hooks of any kind hang on any part of the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")
    return sum(len(getattr(part, kind, ())) for part in model.modules() for kind in kinds)


@contextmanager
def counted() -> Iterator[list]:
    """Every call of any part of any model."""
    calls: list = []
    handle = register_module_forward_pre_hook(lambda part, args: calls.append(part))
    try:
        yield calls
    finally:
        handle.remove()


@pytest.fixture
def fresh(model_folder: Callable[[str], Path]) -> TransformerBridge:
    """A tiny GPT-2 of one's own, to be broken."""
    return load_model(str(model_folder("gpt2")))


@pytest.fixture(scope="module")
def silent(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Loads a tiny GPT-2 whose blocks write nothing and whose positions are alike, after an edit of its weights."""

    def load(edit: Callable[[PreTrainedModel], None]) -> TransformerBridge:
        hf = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
        with torch.no_grad():
            for part in (part for block in hf.transformer.h for part in (block.attn.c_proj, block.mlp.c_proj)):
                part.weight.zero_()
                part.bias.zero_()
            hf.transformer.wpe.weight.zero_()
            edit(hf)
        folder = tmp_path_factory.mktemp("silent") / "tiny-gpt2"
        hf.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((model_folder("gpt2") / file).read_bytes())
        return load_model(str(folder))

    return load


def id_of(tokenizer: PreTrainedTokenizerBase, piece: str) -> int:
    [id_] = tokenizer(piece, add_special_tokens=False)["input_ids"]
    return id_


@pytest.fixture(scope="module")
def saying(silent: Callable, model: TransformerBridge) -> Callable[..., TransformerBridge]:
    """A model in which one piece of text follows on another, as these pieces do."""

    def load(*pieces: str) -> TransformerBridge:
        def follow(hf: PreTrainedModel) -> None:
            hf.config.tie_word_embeddings = False
            hf.lm_head.weight = torch.nn.Parameter(torch.zeros_like(hf.lm_head.weight))
            for before, after in pairwise(id_of(model.tokenizer, piece) for piece in pieces):
                hf.lm_head.weight[after] += hf.transformer.ln_f(hf.transformer.wte.weight[before])

        return silent(follow)

    return load


# What is recorded


def test_turn_by_turn_is_one_full_pass(any_model):
    """Every depth, and the stream after attention; turns that are given and turns that are written, token by token."""
    found = recording(any_model, *TALK)
    assert len(found.ids) > 2 * 16 and len(found.ids) > len([*chain(*turn_ids_of(any_model, *TALK))])
    stream, attention = full_pass(any_model, found.ids)
    assert_close(found.stream, stream)
    assert_close(found.attention, attention)
    assert found.stream.dtype == torch.float32 and not found.stream.requires_grad


def test_given_turns_are_one_pass_and_every_token_is_read_once(model):
    widths, block = [], model.original_model.transformer.h[0]
    handle = block.register_forward_pre_hook(lambda part, args: widths.append(args[0].shape[1]))
    try:
        given, talk = recording(model, *GIVEN), recording(model, *TALK)
    finally:
        handle.remove()
    assert widths[0] == len(given.ids) and sum(widths[1:]) == len(talk.ids)


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_beyond_its_window_a_model_reads_less_than_everything(model_folder, name):
    """Or the equality above says nothing about sliding windows."""
    sliding = load_model(str(model_folder(name)))
    found = recording(sliding, *TALK).stream
    stream, _ = full_pass(sliding, recording(sliding, *TALK).ids, sliding_window=64)
    assert_close(found[:16], stream[:16])
    assert ((found[20:, 3] - stream[20:, 3]).norm(dim=-1) > 1e-3 * stream[20:, 3].norm(dim=-1)).all()


def test_the_ids_are_the_turns_one_behind_the_other(any_model):
    found = recording(any_model, *GIVEN)
    assert found.ids.tolist() == [*chain(*turn_ids_of(any_model, *GIVEN))]
    assert found.ids[0] == first_token(any_model)
    text = "".join(f"\n{speaker}: {said}" for (speaker, _), said in zip(SPEAKERS + SPEAKERS, GIVEN))
    assert_close(found.stream, token_residuals(any_model, text))


def turn_ids_of(model: TransformerBridge, *texts: str | None) -> list[list[int]]:
    return turn_ids(model, of(talk_of(*texts)), talk_of(*texts))


def test_the_tables_say_which_token_and_turn_a_row_is(model):
    found = recording(model, "He ran.", "Stop!")
    rows = found.tokens[["pos", "turn", "speaker", "role", "ends"]].to_numpy().tolist()
    first, second = turn_ids_of(model, "He ran.", "Stop!")
    last, end = len(first) - 1, len(first) + len(second) - 1
    assert rows[0] == [0, 1, "Anna", "user", False] and rows[last] == [last, 1, "Anna", "user", True]
    assert rows[last + 1] == [last + 1, 2, "Tom", "assistant", False]
    assert rows[-1] == [end, 2, "Tom", "assistant", True]
    assert found.tokens["pos"].tolist() == [*range(end + 1)] and found.tokens["ends"].sum() == 2
    assert found.tokens["token"].tolist() == [model.tokenizer.decode([id_]) for id_ in first + second]
    assert found.turns.to_numpy().tolist() == [
        [1, "Anna", "user", "He ran.", last],
        [2, "Tom", "assistant", "Stop!", end],
    ]


@pytest.mark.parametrize("texts", [GIVEN, TALK], ids=["given", "written"])
def test_ends_of_turns_are_rows_of_every_token(any_model, texts):
    every, ends = (recording(any_model, *texts, positions=at) for at in ("every token", "end of turn"))
    rows = every.tokens.index[every.tokens["ends"]].tolist()
    assert rows == [*every.tokens.groupby("turn")["pos"].max()] and len(rows) == len(texts)
    assert torch.equal(ends.stream, every.stream[rows]) and torch.equal(ends.attention, every.attention[rows])
    assert ends.tokens.equals(every.tokens.iloc[rows].reset_index(drop=True))
    assert ends.turns.equals(every.turns)
    assert torch.equal(ends.ids, every.ids)


def test_the_stream_after_attention_is_left_out_where_it_is_not_asked_for(model):
    bare, both = (recording(model, *TALK, streams=streams) for streams in (("after mlp",), STREAMS))
    assert bare.attention is None
    assert both.attention.shape == (len(both.ids), 3, 32)
    assert torch.equal(bare.stream, both.stream)
    assert recording(model, *TALK, streams=("after mlp",), positions="end of turn").attention is None


def test_at_turns_takes_the_last_token_or_the_mean_without_position_0(model):
    found = recording(model, *TALK)
    ends, means = found.at_turns(), found.at_turns("mean of turn")
    assert torch.equal(ends, found.at_turns("end of turn"))
    start = 0
    for i, end in enumerate(found.turns["pos"]):
        assert torch.equal(ends[i], found.stream[end])
        assert torch.allclose(means[i], found.stream[max(start, 1) : end + 1].sum(0) / (end + 1 - max(start, 1)))
        start = end + 1
    assert len(ends) == len(means) == len(TALK)


def test_ends_alone_have_no_mean(model):
    found = recording(model, *GIVEN, positions="end of turn")
    assert torch.equal(found.at_turns(), found.stream)
    with pytest.raises(ValueError, match="only the end of every turn was recorded: there is no mean over its tokens"):
        found.at_turns("mean of turn")


# One recording after another


def test_a_recording_does_not_depend_on_the_ones_before_it(any_model):
    """Nor does it write into them."""
    talks = talk_of(*TALK), talk_of(*GIVEN, name="other")
    alone = [recorded(any_model, of(talk))[0] for talk in talks]
    kept = alone[0].stream.clone()
    for found, i in zip(recorded(any_model, of(*talks[::-1])), (1, 0), strict=True):
        assert_same(found, alone[i])
    assert torch.equal(alone[0].stream, kept)


def test_no_hook_stays(any_model):
    ids = torch.tensor([[0, 5, 900, 17]])
    logits = any_model(ids)  # the bridge puts up hooks of its own in the first pass
    before = hooks(any_model)
    recording(any_model, *TALK)
    assert hooks(any_model) == before
    assert torch.equal(any_model(ids), logits)


def test_a_hook_of_the_caller_is_read_and_stays(model):
    shift = torch.linspace(-1, 1, model.cfg.d_model)
    plain = recording(model, *GIVEN)
    with model.hooks(fwd_hooks=[(site(model, 0), lambda resid, hook: resid + shift)]):
        for _ in range(2):
            assert_close(recording(model, *GIVEN).stream[:, 0], plain.stream[:, 0] + shift)
    assert_same(recording(model, *GIVEN), plain)


@ERRORS
@pytest.mark.parametrize("passes", [0, 4])
def test_no_hook_stays_after_an_error(model, error, passes):
    """In the first turn, and while the model writes the second."""

    def fail(part: torch.nn.Module, args: tuple) -> None:
        calls.append(part)
        if len(calls) > passes:
            raise error("stop")

    expected, calls = recording(model, *TALK), []
    before = hooks(model)
    handle = model.original_model.transformer.h[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(error, match="stop"):
            recording(model, *TALK)
    finally:
        handle.remove()
    assert len(calls) == passes + 1
    assert hooks(model) == before
    assert_same(recording(model, *TALK), expected)


# Turns that the model writes


def test_a_written_turn_is_plain_greedy_decoding(any_model):
    found = recording(any_model, *TALK)
    ids, texts = by_hand(any_model, talk_of(*TALK))
    assert found.ids.tolist() == ids
    assert found.turns["text"].tolist() == texts
    assert all(texts) and texts[1] != texts[3]


def test_a_sampled_turn_is_plain_sampling_with_that_seed(any_model):
    found = recording(any_model, *TALK, seed=3)
    ids, texts = by_hand(any_model, talk_of(*TALK), seeded(3))
    assert found.ids.tolist() == ids
    assert found.turns["text"].tolist() == texts


def test_sampled_turns_depend_on_the_seed_alone(model):
    """Not on what was drawn elsewhere, nor on the conversations before; and nothing is drawn elsewhere."""
    talks = talk_of(*TALK), talk_of(*GIVEN[:2], None, name="other")
    [first, other] = recorded(model, of(*talks), seed=7)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for again, expected in zip(recorded(model, of(*talks[::-1]), seed=7), (other, first)):
        assert_same(again, expected)
    assert torch.equal(torch.get_rng_state(), state)
    written = {tuple(recording(model, *TALK, seed=seed).turns["text"]) for seed in (None, *range(5))}
    assert len(written) == 6


@pytest.mark.parametrize(
    ("pieces", "write", "said"),
    [
        ((":", " the", " dog", " ran", "\n", " home"), 9, " the dog ran"),
        ((":", " the", " dog", " ran", "<|endoftext|>", " home"), 9, " the dog ran"),
        ((":", " the", " dog", " ran", " home", "\n"), 3, " the dog ran"),
        ((":", " the", " dog", "\n"), 2, " the dog"),
        ((":", "\n"), 9, ""),
    ],
    ids=["new line", "end of text", "all that it may write", "all of it and a new line", "nothing"],
)
def test_a_turn_ends_with_its_line_the_text_or_what_may_be_written(saying, pieces, write, said):
    """What ends it is not read, and the next turn comes right behind."""
    speaking = saying(*pieces)
    found = recording(speaking, "He ran.", None, "Stop!", write=write)
    assert found.turns["text"].tolist() == ["He ran.", said.strip(), "Stop!"]
    assert speaking.tokenizer.decode(found.ids[1:]) == f"\nAnna: He ran.\nTom:{said}\nAnna: Stop!"
    assert "".join(found.tokens.query("turn == 2")["token"]) == f"\nTom:{said}"
    assert len(found.stream) == len(found.ids) == len(found.tokens)


def test_what_ends_a_turn_is_in_bookworms_words_one_token(model):
    """So a turn cut before it loses nothing else."""
    pieces = model.tokenizer.batch_decode([[id_] for id_ in range(model.cfg.d_vocab)])
    assert [piece for piece in pieces if "\n" in piece] == ["\n"]


# What is refused


def test_a_conversation_that_is_too_long_is_refused_before_anything_runs(any_model):
    long = talk_of("so" + " so" * 70, "Stop!", name="too long")
    scenario = of(talk_of(*GIVEN), long)
    with counted() as calls:
        with pytest.raises(ValueError, match=r"walk.yaml, line 10: 'too long' has .* is turn 1 .Anna, line 10"):
            recorded(any_model, scenario)
        assert calls == []
        recorded(any_model, of(talk_of(*GIVEN)))
        assert calls  # or the count says nothing


def test_what_may_be_written_counts_before_anything_runs(model):
    room = model.cfg.n_ctx - sum(len(ids) for ids in turn_ids_of(model, "He ran.", None))
    with counted() as calls, pytest.raises(ValueError, match=f"'talk' has {model.cfg.n_ctx + 1} tokens .* is turn 2"):
        recorded(model, of(talk_of("He ran.", None, write=room + 1)))
    assert calls == []
    found = recorded(model, of(talk_of("He ran.", None, write=room)))[0]
    assert len(found.ids) <= model.cfg.n_ctx


@pytest.mark.parametrize(("wrong", "positions"), [(torch.nan, "every token"), (torch.inf, "end of turn")])
def test_an_activation_that_is_not_finite_is_named(fresh, wrong, positions):
    """By the token that it comes from, not by the first that attends to it."""
    at = recording(fresh, *GIVEN).tokens.query("token == ' walked'")["pos"].item()
    with torch.no_grad():
        fresh.embed.weight[id_of(fresh.tokenizer, " walked")] = wrong
    match = rf"non-finite activation at token {at} \(turn 2 of 'talk'\): load the model in float32"
    with pytest.raises(ValueError, match=match):
        recording(fresh, *GIVEN, positions=positions)
    recording(fresh, *GIVEN[:1], positions=positions)


@pytest.mark.parametrize("seed", [None, 0])
def test_an_activation_that_is_not_finite_is_named_where_the_model_writes(fresh, seed):
    with torch.no_grad():
        fresh.embed.weight[id_of(fresh.tokenizer, " open")] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite activation at token \d+ \(turn 1 of 'talk'\)"):
        recording(fresh, *TALK, seed=seed)


# Neutral background


def test_a_background_is_every_state_of_the_chained_calibration(model):
    held = recorded(model, chained(model, calibration(), 1024))
    for position in ("token", "end of turn", "mean of turn"):
        found, every = background(neutral_talk(model), position), position == "token"
        states = [each.stream[1:] if every else each.at_turns(position) for each in held]
        at = [range(1, len(each.ids)) if every else each.turns["pos"] for each in held]
        assert torch.equal(found.states, torch.cat(states))
        assert found.position.tolist() == [*chain(*at)]


def test_a_background_covers_the_context_and_begins_with_every_conversation_once(model):
    """Each time as many whole turns as the context holds."""
    own = calibration().conversations
    longest = max(len(ids) for talk in own for ids in turn_ids(model, calibration(), talk)) - 1
    for most in (1024, 40):
        limit = min(most, model.cfg.n_ctx)
        at = background(neutral_talk(model, most), "token").position
        begins = (at == 1).nonzero()[:, 0].tolist()
        parts = [part.tolist() for part in at.tensor_split(begins[1:])]
        assert len(parts) == len(own)
        for part in parts:
            assert part == [*range(1, len(part) + 1)]
            assert limit - longest < 1 + len(part) <= limit


# A planted emotion


def directions() -> Tensor:
    """Orthonormal vectors without mean: three emotions', and one that is no emotion's."""
    drawn = torch.cat([torch.ones(32, 1), torch.randn(32, 4, generator=seeded(0))], 1)
    return torch.linalg.qr(drawn).Q.T[1:]


def references() -> References:
    centroids = directions()[:3, None].repeat(1, 4, 1)
    return References(("happy", "sad", "calm"), centroids, torch.zeros(4, 32))


@pytest.fixture(scope="module")
def planted(silent: Callable, model: TransformerBridge) -> Callable[[float], TransformerBridge]:
    """A model whose block 1 adds so much of "happy", and a mean of 2, at one word; all that it reads drifts to "happy".

    The MLP's first two units differ by one wherever the word stands, and not elsewhere.
    """
    happy, _, _, key = directions()

    @cache
    def load(size: float) -> TransformerBridge:
        def plant(hf: PreTrainedModel) -> None:
            hf.transformer.wte.weight[id_of(model.tokenizer, PLANTED)] = key
            hf.transformer.wpe.weight += 0.1 * torch.arange(64).log1p()[:, None] * happy
            mlp = hf.transformer.h[BLOCK].mlp
            mlp.c_fc.weight[:, :2] = 100 * key[:, None] / 32**0.5
            mlp.c_fc.bias[:2] = torch.tensor([-80.0, -81.0])
            mlp.c_proj.weight[:2] = torch.stack([size * happy + 2, -size * happy - 2]) * (size > 0)

        return silent(plant)

    return load


HOLDS = ("The mill is open.", "Was it cold?", f"I saw it, and it was no{PLANTED}", "It was late.", "I walked home.")


def test_loading_takes_the_mean_from_what_is_planted(planted):
    """The stream is centred for LayerNorm models: every state has mean 0, and a planted vector loses its own."""
    with_word, without = planted(SIZE), planted(0)
    happy = directions()[0]
    for loaded, expected in ((lambda m: m, SIZE * happy), (uncentred, SIZE * happy + 2)):
        states, bare = (recording(loaded(each), *HOLDS) for each in (with_word, without))
        word = (states.tokens["token"] == PLANTED).to_numpy()
        written = torch.zeros(len(word), 4, 32)
        written[word.nonzero()[0], BLOCK + 1 :] = expected
        assert word.sum() == 1
        torch.testing.assert_close(states.stream - bare.stream, written, atol=1e-5, rtol=0)
        assert (states.stream.mean(-1).abs().max() < 1e-6) == is_centred(loaded(with_word))
        torch.testing.assert_close(states.attention, states.stream[:, :-1], atol=1e-5, rtol=0)


def found_at(readout: Tensor, threshold: float) -> list[tuple[int, ...]]:
    """State, emotion and depth of everything above a threshold."""
    return [tuple(place) for place in (readout > threshold).nonzero().tolist()]


@pytest.mark.parametrize("position", ["token", "end of turn", "mean of turn"])
def test_a_planted_emotion_is_found_where_it_is_and_nowhere_else(planted, position):
    """At its word or turn, from the block on that writes it, as itself."""
    here, without = planted(SIZE), planted(0)
    neutral = background(neutral_talk(here), position)
    assert not any(PLANTED in turn.text for talk in calibration().conversations for turn in talk.turns)
    for model, size in ((here, SIZE), (without, 0)):
        held = recording(model, *HOLDS)
        if position == "token":
            states, at = held.stream[1:], held.tokens["pos"][1:]
            place = held.tokens["token"].tolist().index(PLANTED) - 1
        else:
            states, at, place = held.at_turns(position), held.turns["pos"], 2
        expected = [(place, 0, depth) for depth in (BLOCK + 1, BLOCK + 2)] if size else []
        values = beyond_neutral(states, torch.tensor(at.to_numpy()), references(), neutral)
        assert found_at(values, 8) == expected
        if position == "mean of turn":  # one word among a dozen: more than in any other turn, not most of the state
            values = centred_cosine(states, references())[:, :1]
            assert not size or values[place, 0, BLOCK + 1 :].min() > 0.1 + values[:, 0, 0].max()
        else:
            assert found_at(centred_cosine(states, references()), 0.8) == expected


def test_how_much_is_read_grows_with_what_is_planted(planted):
    """Twice as much reads twice as far from the same model without it."""
    readings = []
    for size in (0, SIZE, 2 * SIZE):
        model = planted(size)
        held = recording(model, *HOLDS)
        at = torch.tensor(held.turns["pos"].to_numpy())
        neutral = background(neutral_talk(model), "mean of turn")
        readings.append(beyond_neutral(held.at_turns("mean of turn"), at, references(), neutral)[2, 0])
    none, once, twice = readings
    torch.testing.assert_close(twice - none, 2 * (once - none), atol=1e-2, rtol=1e-4)
    assert torch.equal(once[: BLOCK + 1], none[: BLOCK + 1])
    assert (once - none)[BLOCK + 1 :].min() > 5
