"""Steering sweeps: which runs there are, what is measured in each, what is kept, what is said of them together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import cells, continuations, sweeps
from helpers.activations import site
from helpers.config import CFG
from helpers.continuations import generated, log_odds, log_probs
from helpers.directions import unit
from helpers.models import load_model
from helpers.saes import load_sae
from helpers.steering import Ablate, Add, Clamp, Method, Steer
from helpers.sweeps import Readers, Writing, over_prompts, shifted, sweep
from helpers.texts import distinct_ngrams, judgement_words, longest_loop, perplexity, word_kinds

DILEMMAS = pd.DataFrame(
    {
        "prompt": ["purse", "letter", "storm"],
        "text": ["He found a purse and chose to", "She opened the letter, then", "They saw the storm, and so they"],
        "act": [" return it", " told him", " turned back at once"],
        "refrain": [" keep it for himself", " said nothing", " went on"],
    }
)
STRENGTHS = [-0.5, 0, 2]
Sweep = Callable[..., pd.DataFrame]
RUN = ["method", "depth", "draw", "strength", "prompt", "sample"]
WORDS = {"article": {"the", "a", "an"}, "negation": ["no", "not"]}
WRITING = Writing(n_tokens=5, samples=(0, 2), kinds=WORDS)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def own(with_saes: Callable[..., TransformerBridge]) -> TransformerBridge:
    """A tiny GPT-2 with an SAE at every depth."""
    return with_saes()


@pytest.fixture(scope="module")
def methods(own: TransformerBridge) -> dict[int, dict[str, Method]]:
    """Every kind of method, at two depths; "fear" stands at both."""
    made = Generator().manual_seed(1)
    fear, noise, away = (torch.randn(rows, own.cfg.d_model, generator=made) for rows in (1, 2, 1))
    return {
        1: {"fear": Add(3 * unit(fear)), "random": Add(3 * unit(noise)), "ablated": Ablate(away, torch.ones(1))},
        2: {"fear": Add(3 * unit(fear)), "clamped": Clamp(load_sae(own, 2), [40, 3], to=4.0)},
    }


@pytest.fixture(scope="module")
def readers(own: TransformerBridge) -> Readers:
    made = Generator().manual_seed(2)
    return Readers(["afraid", "calm"], {depth: torch.randn(2, own.cfg.d_model, generator=made) for depth in (2, 3)})


@pytest.fixture(scope="module", params=["prompt", "generated", "both", "onwards"])
def how(request: pytest.FixtureRequest) -> dict:
    """Which tokens are steered, and whether at later depths too."""
    return {"which": "both", "onwards": True} if request.param == "onwards" else {"which": request.param}


@pytest.fixture(scope="module")
def runs(own: TransformerBridge, methods: dict[int, dict[str, Method]], readers: Readers, how: dict) -> pd.DataFrame:
    """A sweep that measures everything there is."""
    return sweep(own, DILEMMAS, methods, STRENGTHS, readers=readers, writing=WRITING, **how)


@pytest.fixture
def small(model: TransformerBridge) -> Sweep:
    """A small sweep with everything on: any of its options may be replaced."""
    made = Generator().manual_seed(3)
    options = {
        "model": model,
        "prompts": DILEMMAS,
        "methods": {
            1: {"fear": Add(torch.randn(1, 32, generator=made)), "random": Add(torch.randn(2, 32, generator=made))}
        },
        "strengths": [0, 1, 2],
        "readers": Readers(["afraid"], {2: torch.randn(1, 32, generator=made)}),
        "writing": Writing(3, (0, 1), WORDS),
    }
    return lambda **other: sweep(**{**options, **other})


def test_strength_0_stands_first_and_once_for_all_methods(runs: pd.DataFrame):
    pairs = [(prompt, sample) for prompt in DILEMMAS["prompt"] for sample in (0, 2)]
    expected = [("none", None, 0, 0.0, *pair) for pair in pairs]
    for depth, name, draw in (
        (1, "fear", 0), (1, "random", 0), (1, "random", 1), (1, "ablated", 0),
        (2, "fear", 0), (2, "clamped", 0), (2, "clamped", 1),
    ):  # fmt: skip
        expected += [(name, depth, draw, strength, *pair) for strength in (-0.5, 2.0) for pair in pairs]
    found = runs[RUN].astype({"depth": object}).itertuples(index=False, name=None)
    assert [tuple(None if each is pd.NA else each for each in row) for row in found] == expected
    assert runs.index.tolist() == list(range(len(expected)))
    assert runs["depth"].dtype == "Int64"


def test_the_columns_are_those_of_what_was_asked_for(runs: pd.DataFrame, model: TransformerBridge):
    read = ["afraid at 2", "calm at 2", "afraid at 3", "calm at 3"]
    wrote = ["text", "distinct", "loop", "perplexity", "article", "negation"]
    assert set(runs) == {*RUN, "kl", "log_odds", *read, *wrote}
    assert list(runs)[:6] == RUN
    assert not runs.drop(columns="depth").isna().any(axis=None)
    bare = sweep(model, DILEMMAS[["prompt", "text"]], {1: {"fear": Add(torch.ones(1, 32))}}, [1])
    assert list(bare) == [*RUN, "kl"]
    assert bare["sample"].eq(0).all()


def test_strength_0_is_run_even_when_it_is_not_asked_for_and_others_once(small: Sweep):
    asked = small(strengths=[1, 0, 2])
    for strengths in ([1, 2], [1.0, 2, 1, 0, -0.0]):
        assert_frame_equal(small(strengths=strengths), asked)
    assert small(strengths=[0])["method"].unique().tolist() == ["none"]


def test_log_odds_kl_and_readers_are_those_of_a_plain_steered_pass(
    own: TransformerBridge, methods: dict, readers: Readers, runs: pd.DataFrame, how: dict
):
    asked = DILEMMAS.set_index("prompt")
    before = {prompt: _plain(own, text)[0] for prompt, text in asked["text"].items()}
    for run in runs.to_dict("records"):
        row = asked.loc[run["prompt"]]
        after, stream = _plain(own, row["text"], run, methods, how)
        by_hand = (before[run["prompt"]].exp() * (before[run["prompt"]] - after)).sum()
        assert run["kl"] == pytest.approx(by_hand.item(), abs=1e-4)
        for depth, vectors in readers.vectors.items():
            for name, vector in zip(readers.names, vectors):
                projections = [(here @ vector).item() for here in stream[depth][1:]]  # of all tokens but position 0
                assert run[f"{name} at {depth}"] == pytest.approx(np.mean(projections), abs=1e-3, rel=1e-4)
        steer = _steer(own, run, methods, how)
        alone = log_odds(own, [row["text"]], [row["act"]], [row["refrain"]], steer)
        assert run["log_odds"] == pytest.approx(alone.item(), abs=1e-3)


def test_a_prompt_that_is_not_steered_has_no_kl_and_reads_as_before(runs: pd.DataFrame, how: dict):
    steered = runs["method"] != "none"
    assert (runs["kl"][~steered] == 0).all()
    for value in ("afraid at 2", "calm at 3"):
        same = np.isclose(shifted(runs, value)["shift"], 0, atol=1e-5)
        assert same[~steered].all() and same[steered].all() == (how["which"] == "generated")
    if how["which"] == "generated":
        np.testing.assert_allclose(runs["kl"], 0, atol=1e-5)
        assert shifted(runs, "log_odds")["shift"][steered].abs().gt(1e-3).any()  # of several tokens
    else:
        assert runs["kl"][steered].gt(1e-4).all()


def test_every_text_is_written_and_scored_as_by_hand(
    own: TransformerBridge, methods: dict, runs: pd.DataFrame, how: dict
):
    asked = DILEMMAS["text"].set_axis(DILEMMAS["prompt"])
    for run in runs.to_dict("records"):
        said = [asked[run["prompt"]]]
        seed = 1000 * asked.index.get_loc(run["prompt"]) + run["sample"] + CFG.seed if run["sample"] else None
        ids = generated(own, said, 5, _steer(own, run, methods, how), [seed])[0]
        text = own.tokenizer.decode(ids)
        assert run["text"] == text
        assert run["distinct"] == distinct_ngrams(ids)
        assert run["loop"] == longest_loop(ids)
        assert run["perplexity"] == pytest.approx(perplexity(log_probs(own, said, [[ids]])[0][0]), rel=1e-3)
        counted = word_kinds([text], WORDS).loc[0]
        assert [run[kind] for kind in WORDS] == counted.tolist()
    assert runs["text"].nunique() > 2 * len(DILEMMAS)


def test_the_tokens_that_are_steered_make_a_difference(own: TransformerBridge, methods: dict, readers: Readers):
    """Otherwise the sweeps above could not tell them apart."""
    found = [sweep(own, DILEMMAS, methods, [2], each, None, WRITING) for each in ("prompt", "generated", "both")]
    texts = [each["text"][each["method"] != "none"].tolist() for each in found]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_a_sweep_does_not_depend_on_the_size_of_its_batches_or_pieces(
    own: TransformerBridge,
    methods: dict,
    readers: Readers,
    runs: pd.DataFrame,
    how: dict,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sweeps, "RUNS", 1)
    assert_frame_equal(sweep(own, DILEMMAS, methods, STRENGTHS, readers=readers, writing=WRITING, **how), runs, **CLOSE)
    monkeypatch.setattr(continuations, "tokens_at_once", lambda model: 1)
    assert_frame_equal(sweep(own, DILEMMAS, methods, STRENGTHS, readers=readers, writing=WRITING, **how), runs, **CLOSE)


def test_a_run_does_not_depend_on_the_other_methods_depths_and_strengths(
    own: TransformerBridge, methods: dict, readers: Readers, runs: pd.DataFrame, how: dict
):
    for depth, name in ((1, "random"), (2, "clamped"), (2, "fear")):
        alone = sweep(
            own, DILEMMAS, {depth: {name: methods[depth][name]}}, [2], readers=readers, writing=WRITING, **how
        )
        among = (runs["method"] == "none") | (
            runs["method"].eq(name) & runs["depth"].eq(depth) & runs["strength"].eq(2)
        )
        assert_frame_equal(alone, runs[among].reset_index(drop=True), **CLOSE)


def test_a_sample_has_the_same_noise_at_every_strength_depth_and_method(model: TransformerBridge):
    still = {"a": Add(torch.ones(1, 32)), "b": Add(-torch.ones(2, 32))}
    runs = sweep(model, DILEMMAS, {1: still, 3: still}, [-1e-9, 1e-9], writing=Writing(6, (0, 1, 5)))
    assert len(runs) == (1 + 2 * 2 * 3) * 3 * 3
    assert (runs.groupby(["prompt", "sample"])["text"].nunique() == 1).all()
    assert (runs.groupby("prompt")["text"].nunique() == 3).all()
    one = sweep(model, DILEMMAS, {1: still}, [0], writing=Writing(6, (5,)))
    assert one["text"].tolist() == runs["text"][runs["sample"] == 5][:3].tolist()


def test_prompts_of_the_same_text_have_noise_of_their_own(model: TransformerBridge):
    alike = pd.DataFrame({"prompt": ["a", "b"], "text": DILEMMAS["text"][0]})
    runs = sweep(model, alike, {1: {"fear": Add(torch.ones(1, 32))}}, [0], writing=Writing(6, (0, 1)))
    assert runs["text"][0] == runs["text"][2]  # greedy
    assert runs["text"][1] != runs["text"][3]


def test_a_planted_word_is_written_counted_and_looped(model: TransformerBridge):
    (word,) = model.tokenizer(" not", add_special_tokens=False)["input_ids"]
    direction = Add(unit(model.original_model.get_output_embeddings().weight[word][None].detach()))
    runs = sweep(model, DILEMMAS, {3: {"not": direction}}, [1000], writing=Writing(6, (0,), judgement_words()))
    planted = runs.query("strength == 1000")
    assert (planted["text"] == " not" * 6).all()
    assert (planted["negation"] == 100).all()
    assert (planted[["hedging", "direct_action"]] == 0).all(axis=None)
    assert (planted["distinct"] == 1 / 4).all()
    assert (planted["loop"] == 6).all()


def test_a_text_that_ends_at_once_still_has_its_scores(model: TransformerBridge):
    end = model.original_model.get_output_embeddings().weight[model.tokenizer.eos_token_id].detach()
    runs = sweep(model, DILEMMAS, {3: {"end": Add(unit(end[None]))}}, [1000], writing=Writing(5, (0,), WORDS))
    ended = runs.query("strength == 1000")
    assert (ended["text"] == "").all()
    assert (ended["distinct"] == 1).all()
    assert (ended["loop"] == 0).all()
    scores = log_probs(model, DILEMMAS["text"].tolist(), [[[model.tokenizer.eos_token_id]] * 3])[0]
    np.testing.assert_allclose(ended["perplexity"], [perplexity(each) for each in scores], rtol=1e-4)
    assert (ended[list(WORDS)] == 0).all(axis=None)


def test_an_ablated_direction_reads_as_nothing_at_strength_1(model: TransformerBridge, generator: Generator):
    vector = torch.randn(1, 32, generator=generator)
    found = sweep(model, DILEMMAS, {2: {"ablated": Ablate(vector)}}, [1], readers=Readers(["it"], {2: vector}))
    ablated = found["method"] == "ablated"
    np.testing.assert_allclose(found["it at 2"][ablated], 0, atol=1e-4)
    assert found["it at 2"][~ablated].abs().gt(1e-2).all()


@pytest.mark.parametrize("writing", [None, WRITING])
def test_an_interrupted_sweep_leaves_no_hook_behind(model: TransformerBridge, small: Sweep, writing: Writing | None):
    before = small(writing=writing)
    passes = []

    def third_time(resid: Tensor, hook) -> None:
        passes.append(hook)
        if len(passes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[(site(model, 2), third_time)]):
        small(writing=writing)
    assert len(passes) == 3
    assert not [name for name, point in model.hook_dict.items() if point.fwd_hooks]
    assert_frame_equal(small(writing=writing), before, check_exact=True)


def test_an_identical_sweep_is_read_back_without_running_the_model(
    own: TransformerBridge, methods: dict, readers: Readers, tmp_path: Path
):
    options = own, DILEMMAS, methods, STRENGTHS, "both", readers, WRITING
    plain, first = sweep(*options), sweep(*options, folder=tmp_path)
    with _unable(own):
        again = sweep(*options, folder=tmp_path)
    for other in (first, again):
        assert_frame_equal(other, plain, check_exact=True)
        assert (other.dtypes == plain.dtypes).all()
    assert len(list(tmp_path.iterdir())) == 1 + 5


def test_a_larger_sweep_reads_what_a_smaller_one_kept(
    model: TransformerBridge, small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fear, random = Add(torch.ones(1, 32)), Add(torch.eye(32)[:2])
    small(methods={1: {"fear": fear}}, folder=tmp_path)
    done = _written(monkeypatch)
    larger = {1: {"random": random, "fear": fear}, 2: {"fear": fear}}
    grown = small(methods=larger, folder=tmp_path)
    assert len(done) == 2  # the runs of strength 0 and those of fear at depth 1 stand there already
    assert_frame_equal(grown, small(methods=larger), check_exact=True)
    with _unable(model):
        assert_frame_equal(small(methods={2: {"fear": fear}}, folder=tmp_path), _at_depth_2(grown), check_exact=True)


def test_an_interrupted_sweep_goes_on_where_it_was(small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweeps, "RUNS", 2 * len(DILEMMAS) * 2)  # two draws or strengths in a cell
    whole = small()
    done = _written(monkeypatch, stop=3)
    with pytest.raises(KeyboardInterrupt):
        small(folder=tmp_path)
    assert len(done) == 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".parquet"] * 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    done = _written(monkeypatch)
    assert_frame_equal(small(folder=tmp_path), whole, check_exact=True)
    assert len(done) == 2  # of four cells
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_sweep_interrupted_in_the_middle_of_a_file_leaves_no_half_of_it(
    small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = pd.DataFrame.to_parquet

    def stopped(table: pd.DataFrame, path: Path, **options: object) -> None:
        write(table, path, **options)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pd.DataFrame, "to_parquet", stopped)
        small(folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert_frame_equal(small(folder=tmp_path), small(), check_exact=True)


CHANGES = {
    "vector": {"methods": {1: {"fear": Add(torch.ones(1, 32))}}},
    "method": {"methods": {1: {"fear": Ablate(torch.ones(1, 32))}}},
    "depth": {"methods": {2: {"fear": Add(torch.ones(1, 32))}}},
    "strength": {"strengths": [0, 1, 2.5]},
    "prompt": {"prompts": DILEMMAS.replace("He found a purse and chose to", "He found a purse and wanted to")},
    "act": {"prompts": DILEMMAS.replace(" return it", " keep it")},
    "name of a prompt": {"prompts": DILEMMAS.replace("purse", "wallet")},
    "no refrain": {"prompts": DILEMMAS.drop(columns="refrain")},
    "order of prompts": {"prompts": DILEMMAS[::-1]},
    "which": {"which": "prompt"},
    "onwards": {"onwards": True},
    "no readers": {"readers": None},
    "readers": {"readers": Readers(["afraid"], {2: torch.ones(1, 32)})},
    "names of readers": {"readers": Readers(["afraid", "calm"], {2: torch.ones(2, 32)})},
    "depth of readers": {"readers": Readers(["afraid"], {3: torch.ones(1, 32)})},
    "no writing": {"writing": None},
    "tokens": {"writing": Writing(4, (0, 1), WORDS)},
    "samples": {"writing": Writing(3, (0, 2), WORDS)},
    "words": {"writing": Writing(3, (0, 1), {**WORDS, "article": {"the"}})},
    "kinds": {"writing": Writing(3, (0, 1), {"article": WORDS["article"]})},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_sweep_reads_no_stale_cell(small: Sweep, tmp_path: Path, what: str):
    before, files = small(folder=tmp_path), set(tmp_path.iterdir())
    fresh = small(**CHANGES[what])
    assert_frame_equal(small(**CHANGES[what], folder=tmp_path), fresh, check_exact=True)
    assert files < set(tmp_path.iterdir())
    assert what == "words" or not fresh.equals(before)  # words that a random model does not write
    assert_frame_equal(small(folder=tmp_path), before, check_exact=True)


@pytest.mark.parametrize("number", [0, 5, -1])
def test_a_changed_weight_reads_no_stale_cell(model: TransformerBridge, small: Sweep, tmp_path: Path, number: int):
    before = small(folder=tmp_path)
    weight = list(model.original_model.parameters())[number].data
    kept = weight.clone()
    try:
        weight.add_(torch.randn(weight.shape, generator=Generator().manual_seed(0)))
        fresh = small()
        assert_frame_equal(small(folder=tmp_path), fresh, check_exact=True)
    finally:
        weight.copy_(kept)
    assert not fresh.equals(before)
    assert_frame_equal(small(folder=tmp_path), before, check_exact=True)


def test_changed_code_and_libraries_read_no_stale_cell(small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(folder=tmp_path)
    done = _written(monkeypatch)
    small(folder=tmp_path)
    assert len(done) == 0
    with monkeypatch.context() as patch:
        patch.setattr(cells, "version", lambda library: "0.0")
        small(folder=tmp_path)
    assert len(done) == 3
    with monkeypatch.context() as patch:
        patch.setattr(cells, "SOURCES", (*cells.SOURCES, "files"))
        small(folder=tmp_path)
    assert len(done) == 6


def test_another_seed_of_the_samples_reads_no_stale_cell(small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = small(folder=tmp_path)
    monkeypatch.setattr(sweeps, "CFG", replace(CFG, seed=1))
    fresh = small()
    assert not fresh["text"].equals(before["text"])
    assert_frame_equal(small(folder=tmp_path), fresh, check_exact=True)


def test_another_tokenizer_reads_no_stale_cell(small: Sweep, model_folder: Callable[[str], Path], tmp_path: Path):
    own = load_model(str(model_folder("gpt2")))  # one of its own, to be given another end of text
    before = small(model=own, folder=tmp_path)
    (first, *_) = generated(own, DILEMMAS["text"].tolist(), 3)
    own.tokenizer.eos_token = own.tokenizer.convert_ids_to_tokens(first[1])
    fresh = small(model=own)
    assert not fresh["text"].equals(before["text"])
    assert_frame_equal(small(model=own, folder=tmp_path), fresh, check_exact=True)


def test_a_damaged_or_renamed_file_is_made_anew(small: Sweep, tmp_path: Path):
    before = small(folder=tmp_path)
    one, other, third = tmp_path.iterdir()
    one.write_bytes(one.read_bytes()[: one.stat().st_size // 2])
    other.unlink()
    third.rename(other)
    assert_frame_equal(small(folder=tmp_path), before, check_exact=True)
    assert sorted(tmp_path.iterdir()) == sorted([one, other, third])


def test_a_folder_that_cannot_be_written_is_named(small: Sweep, tmp_path: Path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write \w+\.parquet into") as raised:
        small(folder=tmp_path / "runs")
    assert str(tmp_path / "runs") in str(raised.value)


# Strengths of each draw's own


@pytest.fixture
def plan() -> pd.DataFrame:
    """Strengths for the methods of `dosed`, with what they stand for; some are missing, some are of no method here."""
    rows = [
        (1, "fear", 0, 0.5, 1.0), (1, "fear", 0, 0.1, 0.25), (1, "random", 1, 0.5, 2.0), (1, "random", 0, 0.5, np.nan),
        (1, "random", 0, 0.1, -0.5), (2, "fear", 0, 0.5, 1.0), (2, "fear", 0, 0.1, np.nan), (3, "fear", 0, 0.1, 9.0),
        (2, "gone", 0, 0.1, 9.0), (2, "random", 0, 0.5, np.nan),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["depth", "method", "draw", "dose", "strength"]).assign(note="as planned")


@pytest.fixture
def dosed(small: Sweep) -> Sweep:
    made = Generator().manual_seed(4)
    fear, random = Add(torch.randn(1, 32, generator=made)), Add(torch.randn(2, 32, generator=made))
    methods = {1: {"fear": fear, "random": random}, 2: {"random": random, "fear": fear}}
    return lambda **other: small(**{"methods": methods, **other})


def test_every_run_of_a_table_of_strengths_has_the_draw_strength_and_dose_of_its_row(dosed: Sweep, plan: pd.DataFrame):
    runs = dosed(strengths=plan)
    assert list(runs)[:6] == RUN and list(runs)[-2:] == ["dose", "note"]
    pairs = [(prompt, sample) for prompt in DILEMMAS["prompt"] for sample in (0, 1)]
    expected = [
        (name, depth, draw, strength, *pair, dose)
        for depth, name, draw, strength, dose in (
            (1, "fear", 0, 1.0, 0.5), (1, "fear", 0, 0.25, 0.1), (1, "random", 1, 2.0, 0.5),
            (1, "random", 0, -0.5, 0.1), (2, "fear", 0, 1.0, 0.5),
        )
        for pair in pairs
    ]  # fmt: skip
    steered = runs[runs["method"] != "none"]
    assert list(steered[[*RUN, "dose"]].itertuples(index=False, name=None)) == expected
    assert steered["note"].eq("as planned").all()
    none = runs[runs["method"] == "none"]
    assert len(none) == len(pairs) and none.index.tolist() == list(range(len(pairs)))
    assert none[["depth", "dose", "note"]].isna().all(axis=None) and none["strength"].eq(0).all()
    assert runs["depth"].dtype == "Int64"


def test_runs_of_a_table_are_those_of_a_plain_sweep_at_the_same_strengths(dosed: Sweep, plan: pd.DataFrame):
    runs = dosed(strengths=plan)
    plain = dosed(strengths=[1.0, 0.25, 2.0, -0.5])
    both = runs.drop(columns=["dose", "note"]).merge(plain, "left", RUN, suffixes=("", " plain"))
    assert len(both) == len(runs)
    for column in set(plain) - set(RUN):
        expected = both[f"{column} plain"].rename(column)
        pd.testing.assert_series_equal(both[column], expected, **({} if column == "text" else CLOSE))
    assert runs["text"].nunique() > len(DILEMMAS) * 2


def test_a_table_without_further_columns_adds_none(dosed: Sweep, plan: pd.DataFrame):
    runs = dosed(strengths=plan[["strength", "draw", "method", "depth"]])
    assert_frame_equal(runs, dosed(strengths=plan).drop(columns=["dose", "note"]))


def test_two_doses_that_take_the_same_strength_have_a_run_each(dosed: Sweep):
    rows = [(1, "fear", 0, 0.1, 1.0), (1, "fear", 0, 0.2, 1.0)]
    runs = dosed(strengths=pd.DataFrame(rows, columns=["depth", "method", "draw", "dose", "strength"]))
    steered = runs[runs["method"] == "fear"]
    assert steered.groupby(["dose", "prompt", "sample"]).size().tolist() == [1] * (2 * len(DILEMMAS) * 2)


def test_a_sweep_of_a_table_depends_neither_on_the_size_of_its_pieces_nor_on_the_order_of_its_rows(
    dosed: Sweep, plan: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
):
    runs, turned = dosed(strengths=plan), dosed(strengths=plan[::-1]).sort_values(RUN, ignore_index=True)
    assert_frame_equal(turned, runs.sort_values(RUN, ignore_index=True), **CLOSE)
    monkeypatch.setattr(sweeps, "RUNS", 1)
    assert_frame_equal(dosed(strengths=plan), runs, **CLOSE)


def test_an_interrupted_sweep_of_a_table_goes_on_where_it_was(
    model: TransformerBridge, dosed: Sweep, plan: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = dosed(strengths=plan)
    with monkeypatch.context() as patch:
        _written(patch, stop=3)
        with pytest.raises(KeyboardInterrupt):
            dosed(strengths=plan, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    done = _written(monkeypatch)
    assert_frame_equal(dosed(strengths=plan, folder=tmp_path), whole, check_exact=True)
    assert len(done) == 2  # of four cells
    with _unable(model):
        assert_frame_equal(dosed(strengths=plan, folder=tmp_path), whole, check_exact=True)
        renamed = dosed(strengths=plan.assign(dose=2 * plan["dose"]), folder=tmp_path)  # what a dose is called
    assert_frame_equal(renamed, whole.assign(dose=2 * whole["dose"]), check_exact=True)


@pytest.mark.parametrize(("column", "value"), [("strength", 0.75), ("draw", 1), ("depth", 2)])
def test_a_changed_table_reads_no_stale_cell(
    dosed: Sweep, plan: pd.DataFrame, tmp_path: Path, column: str, value: float
):
    dosed(strengths=plan, folder=tmp_path)
    changed = plan[plan["method"] == "random"].copy()
    changed.loc[changed["strength"] == -0.5, column] = value
    fresh = dosed(strengths=changed)
    assert value in fresh.loc[fresh["method"] == "random", column].tolist()
    assert_frame_equal(dosed(strengths=changed, folder=tmp_path), fresh, check_exact=True)


def test_a_table_of_which_no_strength_is_left_gives_the_unsteered_runs_and_an_empty_one_is_refused(
    dosed: Sweep, plan: pd.DataFrame
):
    assert dosed(strengths=plan.assign(strength=np.nan))["method"].unique().tolist() == ["none"]
    with pytest.raises(ValueError, match="one strength"):
        dosed(strengths=plan[:0])


def test_without_folder_nothing_is_kept_and_any_method_will_do(
    model: TransformerBridge, small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Twice:
        def __len__(self) -> int:
            return 1

        def difference(self, resid: Tensor, draw: Tensor) -> Tensor:
            return resid

    monkeypatch.chdir(tmp_path)
    assert len(small(methods={1: {"twice": Twice()}})) == 3 * 3 * 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="cannot tell whether a Twice has changed"):
        small(methods={1: {"twice": Twice()}}, folder=tmp_path)


def test_a_sweep_without_depth_method_draw_or_strength_is_refused(small: Sweep):
    fear = {"fear": Add(torch.ones(1, 32))}
    for wrong in ({"methods": {}}, {"methods": {1: fear, 2: {}}}, {"strengths": []}):
        with pytest.raises(ValueError, match="at least one depth, a method at each, and one strength"):
            small(**wrong)
    with pytest.raises(ValueError, match="at least one draw of every method"):
        small(methods={1: {**fear, "random": Add(torch.ones(0, 32))}})


def test_a_sweep_without_prompts_or_samples_is_refused(small: Sweep):
    with pytest.raises(ValueError, match="prompt"):
        small(prompts=DILEMMAS[:0])
    with pytest.raises(ValueError, match="sample"):
        small(writing=Writing(3, ()))


def test_the_name_of_strength_0_is_refused_for_a_method(small: Sweep):
    with pytest.raises(ValueError, match='the name "none" belongs to strength 0: give the method another one'):
        small(methods={1: {"fear": Add(torch.ones(1, 32))}, 2: {"none": Add(torch.ones(1, 32))}})


def test_two_prompts_of_one_name_are_refused(small: Sweep):
    with pytest.raises(ValueError, match="two prompts have the name 'purse'"):
        small(prompts=DILEMMAS.replace("storm", "purse"))


def test_a_depth_that_is_not_there_or_cannot_be_read_is_refused(small: Sweep):
    with pytest.raises(ValueError, match="depth 4 is out of range"):
        small(methods={4: {"fear": Add(torch.ones(1, 32))}}, readers=None)
    with pytest.raises(ValueError, match="steering at depth 3 does not reach depth 2: read at or above it"):
        small(methods={3: {"fear": Add(torch.ones(1, 32))}})


def test_the_shift_is_counted_from_the_same_prompt_and_sample_at_strength_0(runs: pd.DataFrame):
    for value in ("log_odds", "perplexity", "afraid at 3"):
        found = shifted(runs, value)
        zero = runs[runs["strength"] == 0].set_index(["prompt", "sample"])[value].to_dict()
        by_hand = [run[value] - zero[run["prompt"], run["sample"]] for run in runs.to_dict("records")]
        np.testing.assert_allclose(found["shift"], by_hand)
        assert (found["shift"][found["strength"] == 0] == 0).all()
        assert_frame_equal(found.drop(columns="shift"), runs)


def test_shifted_keeps_samples_apart():
    runs = pd.DataFrame(
        [("none", None, 0, 0.0, "a", 0, 1.0), ("none", None, 0, 0.0, "a", 1, 10.0), ("x", 1, 0, 1.0, "a", 1, 12.0)],
        columns=[*RUN, "value"],
    )
    assert shifted(runs, "value")["shift"].tolist() == [0, 0, 2]
    assert "shift" not in runs


def test_shifted_needs_a_strength_0():
    with pytest.raises(ValueError, match="no strength 0 to compare with"):
        shifted(_runs({"x": [[2.0]]}), "value")


def test_one_draw_gets_the_mean_and_a_bootstrap_interval_over_prompts(generator: Generator):
    values = torch.randn(60, generator=generator).tolist()
    found = over_prompts(_runs({"fear": [values]}), "value", generator)
    assert list(found) == ["method", "strength", "value", "low", "high"]
    error = np.std(values) / np.sqrt(60)
    assert found["value"].item() == pytest.approx(np.mean(values), abs=1e-6)
    assert found["low"].item() == pytest.approx(np.mean(values) - 1.96 * error, abs=error / 4)
    assert found["high"].item() == pytest.approx(np.mean(values) + 1.96 * error, abs=error / 4)


def test_many_draws_get_their_median_and_quantiles(generator: Generator):
    draws = [[draw - 10.0, draw + 10.0] for draw in range(41)]  # means over two prompts: 0 to 40
    draws[40] = [990.0, 1010.0]
    found = over_prompts(_runs({"random": draws}), "value", generator)
    assert found[["value", "low", "high"]].to_numpy().tolist() == [[20, 1, 39]]


def test_samples_of_a_prompt_are_averaged_before_prompts_are_compared(generator: Generator):
    runs = pd.DataFrame(
        [("fear", 1, 0, 1.0, "a", 0, 0.0), ("fear", 1, 0, 1.0, "a", 1, 4.0), ("fear", 1, 0, 1.0, "b", 0, 2.0)],
        columns=[*RUN, "value"],
    )
    found = over_prompts(runs, "value", generator)
    assert found[["value", "low", "high"]].to_numpy().tolist() == [[2, 2, 2]]


def test_methods_and_strengths_are_summarised_apart(generator: Generator):
    runs = pd.concat([_runs({"fear": [[1.0, 1.0]], "none": [[0.0, 0.0]]}), _runs({"fear": [[3.0, 3.0]]}, strength=2.0)])
    found = over_prompts(runs, "value", generator).set_index(["method", "strength"])["value"]
    assert found.to_dict() == {("fear", 1.0): 1, ("none", 1.0): 0, ("fear", 2.0): 3}


def test_depths_are_summarised_apart_where_that_is_asked_for(generator: Generator):
    runs = pd.concat(
        [
            _runs({"none": [[0.0, 1.0]]}, strength=0.0, depth=None),
            _runs({"fear": [[1.0, 1.0]], "random": [[5.0, 5.0], [7.0, 7.0], [6.0, 6.0]]}, depth=2),
            _runs({"fear": [[4.0, 4.0]]}, depth=1),
        ],
        ignore_index=True,
    )
    found = over_prompts(runs, "value", generator, by=("method", "depth", "strength"))
    assert list(found) == ["method", "depth", "strength", "value", "low", "high"]
    assert found["value"].tolist() == [0.5, 1, 6, 4]
    assert found["method"].tolist() == ["none", "fear", "random", "fear"]
    assert found["depth"].isna().tolist() == [True, False, False, False]
    assert found["depth"].dropna().tolist() == [2, 2, 1]
    assert found["low"][2] < 6 < found["high"][2]
    together = over_prompts(runs, "value", generator).set_index("method")["value"]
    assert together.to_dict() == {"none": 0.5, "fear": 2.5, "random": 6}


def test_a_single_column_summarises_what_the_sweep_gives(runs: pd.DataFrame, generator: Generator):
    found = over_prompts(runs, "kl", generator, by=("depth",))
    assert list(found) == ["depth", "value", "low", "high"]
    means = runs.groupby(["depth", "draw"], dropna=False)["kl"].mean()
    assert found["value"][0] == 0
    for row in found[1:].itertuples():
        assert row.value == pytest.approx(means.loc[row.depth].quantile(0.5), rel=1e-4, abs=1e-7)


def test_the_interval_has_the_confidence_that_is_set(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    draws = [[float(draw)] for draw in range(41)]
    monkeypatch.setattr(sweeps, "CFG", replace(CFG, confidence=0.5))
    found = over_prompts(_runs({"random": draws}), "value", generator)
    assert found[["low", "value", "high"]].to_numpy().tolist() == [[10, 20, 30]]


def _runs(values: dict[str, list[list[float]]], strength: float = 1.0, depth: int | None = 1) -> pd.DataFrame:
    """One run per method, draw and prompt, in that nesting."""
    rows = [
        (method, depth, number, strength, f"prompt {prompt}", 0, value)
        for method, draws in values.items()
        for number, draw in enumerate(draws)
        for prompt, value in enumerate(draw)
    ]
    return pd.DataFrame(rows, columns=[*RUN, "value"]).astype({"depth": "Int64"})


def _at_depth_2(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[(runs["method"] == "none") | (runs["depth"] == 2)].reset_index(drop=True)


def _depths(model: TransformerBridge, run: dict, onwards: bool = False) -> tuple[int, ...]:
    return tuple(range(run["depth"], model.cfg.n_layers + 1)) if onwards else (run["depth"],)


def _steer(model: TransformerBridge, run: dict, methods: dict, how: dict) -> Steer | None:
    """How one run of the table is steered."""
    if run["method"] == "none":
        return None
    draw, strength = torch.tensor([run["draw"]]), torch.tensor([run["strength"]])
    depths = _depths(model, run, how.get("onwards", False))
    return Steer(methods[run["depth"]][run["method"]], depths, draw, strength, how["which"])


def _plain(
    model: TransformerBridge, text: str, run: dict | None = None, methods: dict | None = None, how: dict | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Log probabilities of the next token and the stream at every depth: one text, no batch, cache or padding."""
    stream, hooks = {}, []

    def change(resid: Tensor, hook) -> Tensor:
        method = methods[run["depth"]][run["method"]]
        more = run["strength"] * method.difference(resid, torch.tensor([run["draw"]]))
        return torch.cat([resid[:, :1], (resid + more)[:, 1:]], 1)

    def keeping(depth: int) -> Callable:
        def keep(resid: Tensor, hook) -> None:
            stream[depth] = resid[0]

        return keep

    if run and run["method"] != "none" and how["which"] != "generated":
        hooks += [(site(model, depth), change) for depth in _depths(model, run, how.get("onwards", False))]
    hooks += [(site(model, depth), keeping(depth)) for depth in range(model.cfg.n_layers + 1)]
    ids = [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model.original_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits.log_softmax(-1), stream


@contextmanager
def _unable(model: TransformerBridge) -> Iterator[None]:
    """A model that cannot be run, for the duration."""

    def stop(*_: object) -> None:
        pytest.fail("the model was to be left alone")

    hook = model.original_model.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def _written(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[int]:
    """A list that grows with every cell whose texts are written; the one of this number is interrupted."""
    written, done = sweeps.written, []

    def counted(*options: object) -> pd.DataFrame:
        done.append(len(done))
        if len(done) == stop:
            raise KeyboardInterrupt
        return written(*options)

    monkeypatch.setattr(sweeps, "written", counted)
    return done


def test_what_a_vector_carries_along_itself_is_taken_off(model: TransformerBridge, generator: Generator):
    vectors, reader = torch.randn(2, 32, generator=generator), torch.randn(3, 32, generator=generator)
    readers = sweeps.Readers(["a", "b", "c"], {1: reader, 3: reader})
    runs = sweeps.sweep(model, DILEMMAS, {1: {"x": Add(vectors)}}, [1], readers=readers)
    at_once = sweeps.beyond_carried(runs, readers, vectors, 1)  # nothing has answered yet
    torch.testing.assert_close(at_once, torch.zeros(2, 3), atol=1e-4, rtol=0)
    assert sweeps.beyond_carried(runs, readers, vectors, 3).abs().max() > 0.01
