"""The build script makes the same model however often it is stopped, and the shipped folder is what its card says."""

import importlib.util
import json
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "bookworm"
SPEC = importlib.util.spec_from_file_location("bookworm_build", SHIPPED / "build.py")
build = sys.modules["bookworm_build"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)

SIZES = {"layers": 2, "d_model": 32, "heads": 2, "context": 16, "vocabulary": 300, "batch": 8, "warm_up": 4}
TINY = build.Settings(**SIZES, tokens=24 * 8 * 16, compile=False)  # 24 steps


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short passages and five comments: less than one epoch of TINY."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["dog", "river", "ran", "quietly", "over", "the", "hill"], k=9)) for _ in range(40)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "book.txt").write_text(f"\n{build.EOT}\n".join(texts))
    comments = "".join(f"[NAME] wrote comment number {i}\t{i}\n" for i in range(5))
    (folder / "comments.tsv").write_text("text\tlabels\n" + comments)
    return folder


def weights(work: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state in full precision."""
    return load_file(work / "checkpoint.safetensors")


def test_one_call_makes_a_folder_that_transformers_loads(corpus, tmp_path, capsys):
    run = build.Run(corpus, tmp_path / "work", TINY)
    build.build(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    made = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert model.dtype == torch.float16 and model.config.vocab_size == len(tokenizer)
    assert tokenizer.bos_token_id == model.config.bos_token_id == 0
    assert made["tokens_seen"] == TINY.tokens and made["epochs"] > 1
    assert made["held_out"]["nats_per_token"] < 0.8 * torch.tensor(len(tokenizer)).log()  # it learned something
    build.build(run, tmp_path / "out")
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("family", build.FAMILIES)
def test_every_family_is_built_from_the_same_tokens(corpus, tmp_path, family):
    """And read back by the library's own classes, tokenizer included, as it was trained."""
    settings = replace(TINY, family=family, tokens=4 * 8 * 16, snapshots=(0, 200))
    run = build.Run(corpus, tmp_path / "work", settings, SHIPPED / "tokenizer.json")
    build.build(run, tmp_path / "out")
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.model_type == family and model.config.tie_word_embeddings
    text = 'She said: "Is it 1,234 miles?"  Yes\n'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == build.Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(text).ids
    early, later = (AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "snapshots" / at) for at in ("0", "200"))
    assert not torch.equal(early.get_input_embeddings().weight, later.get_input_embeddings().weight)
    first = build.untrained(settings, len(tokenizer), 0).half()
    assert all(torch.equal(one, other) for one, other in zip(early.state_dict().values(), first.state_dict().values()))


def test_siblings_are_small_and_have_about_as_many_weights():
    sizes = {f: build.Settings(**build.SIBLING, family=f) for f in build.FAMILIES}
    with torch.device("meta"):
        counts = {f: build.untrained(settings, 8192, 0).num_parameters() for f, settings in sizes.items()}
    assert max(counts.values()) <= 2.5e6 and max(counts.values()) < 1.02 * min(counts.values())


@pytest.mark.parametrize("asked", [["--tokens", "0"], ["--minutes", "0"], ["--tokens", "-5", "--sibling", "llama"]])
def test_a_budget_of_nothing_is_refused(corpus, tmp_path, monkeypatch, asked):
    for whole_process, setting in ((build.logging, "disable_progress_bar"), (torch, "use_deterministic_algorithms")):
        monkeypatch.setattr(whole_process, setting, lambda *_: None)
    monkeypatch.setattr("sys.argv", ["build.py", str(corpus), str(tmp_path / "out"), *asked])
    with pytest.raises((SystemExit, ValueError), match="the budget is a positive number of tokens or of minutes"):
        build.main()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("ending", ["ctrl-c", "crash"])
def test_a_build_that_was_stopped_ends_in_the_same_weights(corpus, tmp_path, monkeypatch, ending):
    build.build(build.Run(corpus, tmp_path / "whole", TINY), tmp_path / "one")
    stopped, rate = build.Run(corpus, tmp_path / "stopped", TINY), build.learning_rate

    def learning_rate(settings, step, spent):
        if step == 13 and ending == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        elif step == 13:
            raise OSError("the power went")
        return rate(settings, step, spent)

    with monkeypatch.context() as patch:
        patch.setattr(build, "learning_rate", learning_rate)
        patch.setattr(build, "CHECKPOINT_SECONDS", -1 if ending == "crash" else 180)  # -1: after every step
        with pytest.raises(KeyboardInterrupt if ending == "ctrl-c" else OSError):
            build.build(stopped, tmp_path / "two")
    with safe_open(tmp_path / "stopped" / "checkpoint.safetensors", "pt") as file:  # Ctrl-C lets the step end
        assert file.metadata()["step"] == ("14" if ending == "ctrl-c" else "13")
    assert not (tmp_path / "two").exists()
    build.build(stopped, tmp_path / "two")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == resumed.keys() and any(key.startswith("optimizer/1/") for key in whole)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert build.sha256(tmp_path / "one" / "model.safetensors") == build.sha256(tmp_path / "two" / "model.safetensors")


def test_a_work_folder_for_something_else_is_refused(corpus, tmp_path):
    build.build(build.Run(corpus, tmp_path / "work", TINY), tmp_path / "first")
    with pytest.raises(ValueError, match=r"other settings: seed \(there 0, asked 1\).*--work"):
        build.build(build.Run(corpus, tmp_path / "work", replace(TINY, seed=1)), tmp_path / "out")
    (corpus / "more.txt").write_text("Another passage.")
    with pytest.raises(ValueError, match="other settings: corpus"):
        build.build(build.Run(corpus, tmp_path / "work", TINY), tmp_path / "out")


def test_an_output_folder_that_holds_something_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="name a new folder"):
        build.build(build.Run(corpus, tmp_path / "work", TINY), corpus)


def test_a_corpus_without_enough_text_is_refused(tmp_path):
    run = build.Run(tmp_path / "corpus", tmp_path / "work", TINY)
    run.corpus.mkdir()
    (run.corpus / "notes.md").write_text("not read")
    with pytest.raises(ValueError, match=r"no text in .*corpus: it needs \.txt"):
        build.build(run, tmp_path / "out")
    (run.corpus / "short.txt").write_text("One passage.")
    with pytest.raises(ValueError, match="at least 10"):
        build.build(run, tmp_path / "out")
    (run.corpus / "broken.txt.xz").write_bytes(b"not xz")
    with pytest.raises(ValueError, match=r"broken\.txt\.xz cannot be read"):
        build.build(run, tmp_path / "out")


def test_no_copy_of_a_held_out_text_is_trained_on(corpus):
    (corpus / "book.txt").unlink()
    held_out, trained_on = build.split_corpus(corpus)  # one of five comments, each there twice
    assert len(held_out) == 1 and len(trained_on) == 8 and not set(held_out) & set(trained_on)
    assert "[NAME]" not in "".join(trained_on)


def test_text_without_marks_is_cut_at_line_ends():
    text = "\n".join(f"line {i} " + 90 * "x" for i in range(200))
    pieces = build.passages_of(text)
    assert "\n".join(pieces) == text and all(5800 < len(piece) <= 6000 for piece in pieces[:-1])
    assert build.passages_of(f"{build.EOT}\none\n{build.EOT}\ntwo") == ["one", "two"]


def test_the_card_quotes_an_evaluation_of_the_shipped_weights():
    measured = json.loads((SHIPPED / "evaluation.json").read_text(encoding="utf-8"))
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert measured["weights_sha256"] == build.sha256(SHIPPED / "model.safetensors")
    assert f"{measured['nats_per_token']:.2f} nats per token" in card
    assert f"{measured['bits_per_character']:.2f} bits per character" in card
    assert all(s["prompt"] + s["continuation"] in card for s in measured["samples"])


def test_the_shipped_folder_stays_below_40_mb():
    files = [path for path in SHIPPED.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert SHIPPED / "model.safetensors" in files
    assert sum(path.stat().st_size for path in files) < 40e6
