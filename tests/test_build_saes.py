"""The SAE build script: one call makes what sae-lens loads, stops change nothing, and its measures measure."""

import importlib
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.config import DATA
from helpers.models import load_model
from helpers.saes import decoder_rows, load_sae

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(DATA / "bookworm")  # the script stands beside build.py and imports from it
    build_saes = importlib.import_module("build_saes")

STEPS = 20
TINY = build_saes.Settings(
    d_sae=64, k=4, tokens=STEPS * 32, batch=32, warm_up=3, dead_after=2, buffer=4, compile=False
)  # a buffer is four windows of 63 tokens, seven batches
WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs"),
    pytest.mark.filterwarnings("ignore:The SAE at depth"),  # it explains little after twenty steps
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty short passages."""
    rng = random.Random(0)
    words = ["dog", "river", "ran", "quietly", "over", "the", "hill", "and", "a", "cold", "wind", "came", "to", "house"]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "book.txt").write_text("\n<|endoftext|>\n".join(" ".join(rng.choices(words, k=50)) for _ in range(80)))
    return folder


@pytest.fixture
def copied(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny GPT-2's folder, to be given SAEs."""
    return Path(shutil.copytree(model_folder("gpt2"), tmp_path / "model"))


@pytest.fixture(scope="module")
def built(model_folder, corpus, tmp_path_factory) -> Path:
    """A copy of the tiny GPT-2's folder with SAEs from one uninterrupted call."""
    folder = tmp_path_factory.mktemp("built")
    model_dir = Path(shutil.copytree(model_folder("gpt2"), folder / "model"))
    build_saes.build(corpus, model_dir, TINY, folder / "work")
    return model_dir


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> "build_saes.Run":
    """Ten windows of random tokens, one in twelve of them `<|endoftext|>`."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, model.cfg.d_vocab, (10, model.cfg.n_ctx - 1), np.uint16)
    ids[rng.random(ids.shape) < 1 / 12] = model.tokenizer.bos_token_id
    return build_saes.Run(model, ids, tmp_path_factory.mktemp("run"), TINY)


def files_of(model_dir: Path) -> list[Path]:
    names = [*(f"blocks.{depth}.hook_resid_pre" for depth in range(3)), "blocks.2.hook_resid_post"]
    return [model_dir / "saes" / name / "sae_weights.safetensors" for name in names]


def evaluation_of(model_dir: Path) -> dict:
    return json.loads((model_dir / "saes" / "evaluation.json").read_text(encoding="utf-8"))


def read_whole(model, ids: np.ndarray) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The windows behind `<|endoftext|>`, which is token 0, and all that the bridge itself caches of them."""
    assert model.tokenizer.bos_token_id == 0
    read = torch.from_numpy(np.pad(ids.astype(np.int64), ((0, 0), (1, 0))))
    return read, model.run_with_cache(read, prepend_bos=False)[1]


def saved(folder: Path, model, weights: Callable[[str], dict[str, torch.Tensor]]) -> Path:
    """A folder with a standard (ReLU) SAE for every depth; what `weights` leaves out is zero."""
    for name in build_saes.hook_points(model):
        sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
        given = {key: torch.zeros_like(weight) for key, weight in sae.state_dict().items()} | weights(name)
        sae.load_state_dict(given)
        sae.save_model(folder / name)
    return folder


def both_ways(name: str) -> dict[str, torch.Tensor]:
    """One feature for each direction of each dimension: the output is the input."""
    eye = torch.eye(32)
    return {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye])}


def test_one_call_writes_an_sae_for_every_depth(built):
    folders = sorted(path.name for path in (built / "saes").iterdir() if path.is_dir())
    assert folders == sorted(path.parent.name for path in files_of(built))
    for file in files_of(built):
        config = json.loads((file.parent / "cfg.json").read_text(encoding="utf-8"))
        assert config["metadata"]["hook_name"] == file.parent.name
        assert config["metadata"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
        assert (config["architecture"], config["k"], config["d_sae"], config["dtype"]) == ("topk", 4, 64, "float16")
        assert config["normalize_activations"] == "none"
        weights = load_file(file)
        assert weights.keys() == WEIGHTS
        assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in weights.values())


def test_what_was_built_loads(built):
    model = load_model(str(built))
    for depth, file in enumerate(files_of(built)):
        ours, theirs = load_sae(model, depth), SAE.load_from_disk(file.parent, dtype="float32")
        acts = build_saes.stream(model, np.full((1, 20), 300))[file.parent.name]
        assert torch.equal(ours(acts), theirs(acts)) and ours(acts).shape == acts.shape
        assert torch.equal(decoder_rows(model, depth), load_file(file)["W_dec"].float())


def test_the_evaluation_belongs_to_the_weights(built):
    measured = evaluation_of(built)
    assert measured["weights_sha256"] == build_saes.sha256(*files_of(built))
    assert [row["depth"] for row in measured["depths"]] == [0, 1, 2, 3]
    assert [row["hook_point"] for row in measured["depths"]] == [file.parent.name for file in files_of(built)]
    assert [row["l0"] for row in measured["depths"]] == [TINY.k] * 4
    assert all(0 < row["explained_variance"] < 1 for row in measured["depths"])
    assert json.loads((built / "saes" / "training.json").read_text(encoding="utf-8"))["k"] == TINY.k


def test_evaluate_measures_the_same_again(built, corpus, monkeypatch):
    before = (built / "saes" / "evaluation.json").read_bytes()
    (built / "saes" / "evaluation.json").unlink()
    monkeypatch.setattr(sys, "argv", ["build_saes.py", str(corpus), str(built), "--evaluate"])
    build_saes.main()
    assert (built / "saes" / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize("ending", ["ctrl-c", "crash", "ctrl-c while measuring"])
def test_a_build_that_was_stopped_ends_in_the_same_weights(built, corpus, copied, tmp_path, monkeypatch, ending):
    drawn, unless = [], build_saes.unless

    def counted(interrupted, items):
        for item in unless(interrupted, items):
            drawn.append(item)
            if len(drawn) == 14 and ending == "ctrl-c":
                signal.raise_signal(signal.SIGINT)
            elif len(drawn) == 14 and ending == "crash":
                raise OSError("the power went")
            yield item

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_saes, "unless", counted)
    with monkeypatch.context() as patch:
        if ending == "ctrl-c while measuring":
            patch.setattr(build_saes, "write_evaluation", stopped)
        with pytest.raises(OSError if ending == "crash" else KeyboardInterrupt):
            build_saes.build(corpus, copied, TINY, tmp_path / "work")
    assert not (copied / "saes").exists()
    before = len(drawn)
    build_saes.build(corpus, copied, TINY, tmp_path / "work")
    # Ctrl-C lets the step end and loses none; a crash loses those behind the last tenth
    assert len(drawn) - before == {"ctrl-c": STEPS - 14, "crash": STEPS - 13, "ctrl-c while measuring": 0}[ending]
    for one, two in zip(files_of(built), files_of(copied)):
        whole, resumed = load_file(one), load_file(two)
        assert all(torch.equal(whole[key], resumed[key]) for key in WEIGHTS), one.parent.name
        assert (one.parent / "cfg.json").read_bytes() == (two.parent / "cfg.json").read_bytes()
    assert evaluation_of(copied) == evaluation_of(built)


def test_a_work_folder_for_something_else_is_refused(built, corpus, copied, tmp_path):
    work = built.parent / "work"
    with pytest.raises(ValueError, match="work holds a build with other settings: name another with --work"):
        build_saes.build(corpus, copied, replace(TINY, seed=1), work)
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "more.txt").write_text("Another passage.")
    with pytest.raises(ValueError, match="other settings"):
        build_saes.build(tmp_path / "corpus", copied, TINY, work)
    assert not (copied / "saes").exists()


def test_saes_that_are_there_are_not_overwritten(built, corpus, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="saes is there already: move it away"):
        build_saes.build(corpus, built, TINY, tmp_path / "work")
    monkeypatch.setattr(sys, "argv", ["build_saes.py", str(corpus), str(built), "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match=r"build_saes\.py: .*saes is there already"):
        build_saes.main()
    assert not (tmp_path / "work").exists()


def test_a_corpus_too_small_to_measure_on_is_refused_before_training(copied, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "book.txt").write_text("\n<|endoftext|>\n".join(f"The dog ran {i}." for i in range(30)))
    with pytest.raises(ValueError, match="too small"):
        build_saes.build(tmp_path / "corpus", copied, TINY, tmp_path / "work")


def test_no_window_is_both_trained_on_and_measured(corpus, model_folder, model):
    train, held_out = build_saes.split_windows(corpus, model_folder("gpt2"), model.cfg.n_ctx)
    assert train.shape[1] == held_out.shape[1] == model.cfg.n_ctx - 1
    assert len(held_out) == (len(train) + len(held_out)) // 10 > 0
    assert not {window.tobytes() for window in train} & {window.tobytes() for window in held_out}


def test_batches_go_on_from_any_number(run):
    whole = list(
        islice(build_saes.batches(run, 0), 40)
    )  # ten windows are not quite three buffers: the second epoch begins in one
    for done in (1, 6, 7, 8, 15, 33):
        for one, other in zip(whole[done:], islice(build_saes.batches(run, done), 5)):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), done
    assert len({batch["blocks.1.hook_resid_pre"].numpy().tobytes() for batch in whole}) == len(whole)


def test_batches_hold_tokens_of_text_alone_and_each_once(run):
    """The last depth tells which token a row is, and the other depths must show the same one."""
    with build_saes.autocast("cpu"):
        read, cache = read_whole(run.model, run.ids[: TINY.buffer])
    known = {name: cache[name].flatten(0, 1).bfloat16().float() for name in build_saes.hook_points(run.model)}
    last, is_text = list(known)[-1], read.flatten() != 0
    assert len(known[last][is_text].unique(dim=0)) == is_text.sum() < read[:, 1:].numel()
    ready = int(is_text.sum()) // TINY.batch
    drawn = list(islice(build_saes.batches(run, 0), ready))
    rows = {name: torch.cat([batch[name] for batch in drawn]) for name in known}
    which = torch.cdist(rows[last], known[last]).argmin(1)
    assert len(which.unique()) == len(which) == ready * TINY.batch and is_text[which].all()
    assert all(torch.equal(rows[name], known[name][which]) for name in known)
    assert not torch.equal(which, which.sort().values)


def test_the_stream_is_that_of_every_depth_behind_position_0(run):
    read, cache = read_whole(run.model, run.ids[:3])
    is_text = read[:, 1:] != 0
    found = build_saes.stream(run.model, run.ids[:3])
    assert list(found) == build_saes.hook_points(run.model) and not is_text.all()
    for name, resid in found.items():
        torch.testing.assert_close(resid, cache[name][:, 1:][is_text])


def test_the_decoder_bias_starts_at_the_mean(run):
    settings = replace(TINY, d_sae=32)
    saes = build_saes.untrained(run.model, settings)
    cfg = SAETrainerConfig(total_training_samples=320, train_batch_size_samples=32, lr_end=1e-5)
    trainer = MultiSAETrainer(cfg, saes, {name: name for name in saes}, iter(()))
    generator = torch.Generator().manual_seed(0)
    planted = {name: 10 * torch.randn(32, generator=generator) for name in saes}
    sample = [
        {name: mean + torch.randn(64, 32, generator=generator) for name, mean in planted.items()} for _ in range(3)
    ]
    build_saes.start_at_the_mean(trainer, sample)
    for name, sae in saes.items():
        acts = torch.cat([batch[name] for batch in sample])
        scaler = trainer.trainers[name].activation_scaler
        assert scaler(acts).norm(dim=-1).mean().item() == pytest.approx(32**0.5, rel=1e-5)
        torch.testing.assert_close(sae.b_dec.data, scaler(acts).mean(0))
        assert torch.cosine_similarity(sae.b_dec.data, planted[name], 0) > 0.999


def test_losses_are_those_of_the_plain_model(run, model_folder):
    plain = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
    read = build_saes.with_first(run.model, run.ids[:3])
    with torch.no_grad():
        expected = torch.stack([plain(input_ids=row[None], labels=row[None]).loss for row in read])
    found = build_saes.losses(run.model, run.ids[:3], {})
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_replacing_the_stream_by_itself_changes_no_loss(run):
    as_it_is = build_saes.losses(run.model, run.ids, {})
    assert as_it_is.shape == (10,)
    for name in build_saes.hook_points(run.model):
        seen = []
        same = build_saes.losses(run.model, run.ids, {name: lambda resid: seen.append(resid.shape[1]) or resid})  # noqa: B023
        assert torch.equal(same, as_it_is) and seen == [run.ids.shape[1]]  # position 0 is left alone
        zero = build_saes.losses(run.model, run.ids, {name: torch.zeros_like})
        assert ((zero - as_it_is).abs() > 0.01).all()
    assert torch.equal(build_saes.losses(run.model, run.ids, {}), as_it_is)  # no hook is left behind


def test_a_perfect_sae_recovers_everything(run, tmp_path):
    for row in build_saes.evaluation(run.model, run.ids, saved(tmp_path, run.model, both_ways)):
        assert row["explained_variance"] == pytest.approx(1, abs=1e-5)
        assert row["loss_recovered"] == pytest.approx(1, abs=1e-4)
        assert row["loss_replaced"] == pytest.approx(row["loss"], abs=1e-4)
        assert row["l0"] == pytest.approx(32, abs=0.01)  # one of each dimension's two features
        assert row["dead"] == 0


def test_an_sae_that_knows_the_mean_alone_explains_nothing(run, tmp_path):
    means = {name: resid.mean(0) for name, resid in build_saes.stream(run.model, run.ids).items()}
    for row in build_saes.evaluation(
        run.model, run.ids, saved(tmp_path, run.model, lambda name: {"b_dec": means[name]})
    ):
        assert row["explained_variance"] == pytest.approx(0, abs=1e-5)
        assert (row["l0"], row["dead"]) == (0, 1)


def test_an_sae_that_writes_zeros_recovers_no_loss(run, tmp_path):
    for row in build_saes.evaluation(run.model, run.ids, saved(tmp_path, run.model, lambda name: {})):
        assert row["loss_replaced"] == row["loss_zero"] != row["loss"]
        assert row["loss_recovered"] == 0
        assert row["explained_variance"] <= 1e-5


def test_the_card_quotes_an_evaluation_of_the_shipped_saes():
    shipped = DATA / "bookworm"
    measured = json.loads((shipped / "saes" / "evaluation.json").read_text(encoding="utf-8"))
    weights = [shipped / "saes" / row["hook_point"] / "sae_weights.safetensors" for row in measured["depths"]]
    assert measured["weights_sha256"] == build_saes.sha256(*weights)
    card = (shipped / "README.md").read_text(encoding="utf-8")
    assert f"{measured['tokens']:,} tokens" in card
    for row in measured["depths"]:
        numbers = f"{row['explained_variance']:.3f} | {row['l0']:.1f} | {row['dead']:.1%} | {row['loss_recovered']:.3f}"
        assert f"| {row['depth']} | {numbers} |" in card
