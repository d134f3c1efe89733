"""What is refused, and with which message; what looks odd and works. One row of a table is one thing that a user does.

After every refusal the files are as they were, nothing is half-written, no hook hangs on the model, and it says what it
said before.
"""

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from helpers import claims, hub, playground, plots, recordings, scan, scenarios
from helpers.across import comparison
from helpers.activations import at_positions, every_token, residual_norms, residuals, token_projections
from helpers.cells import kept
from helpers.config import DATA, ROOT
from helpers.continuations import generated, log_odds, log_probs, side_by_side
from helpers.directions import logit_lens, mean_difference, projections
from helpers.doses import Meter
from helpers.features import pursuit
from helpers.files import csv_rows
from helpers.hub import Damaged
from helpers.models import load_model
from helpers.patching import ran
from helpers.playground import opened, parsed_pairs
from helpers.prompts import pairs, token_strings, tokens, word_positions
from helpers.regimes import reads
from helpers.saes import decoder_rows, load_sae
from helpers.stats import auroc, overlap, permutation_p
from helpers.steering import Ablate, Add, Clamp, Steer
from helpers.sweeps import Readers, sweep

TEXT = "The dog ran after me."
PROMPTS = pd.DataFrame({"prompt": ["dog"], "text": [TEXT]})
WIDTH = 32  # of the tiny models
ONES, NAN = torch.ones(1, WIDTH), torch.full((1, WIDTH), torch.nan)
INFINITE = ONES * torch.inf
HEAD = "pair,split,topic,emotional,neutral\n"
ROW = "dog,train,animals,The dog bit me.,The dog saw me.\n"
FILES = {"kept.csv": "claim,what\nmine,yours\n", "notes/kept.txt": "Nobody may touch this.\n"}
SCENARIO = """title: A walk
about: Two people walk.
references: [happy, afraid]
variants:
  - name: walk
    speakers: {Anna: user, Tom: assistant}
    turns:
      - Anna: "SAID"
      - Tom: "We walked home."
"""


@dataclass
class Here:
    """What a row of a table works with."""

    model: TransformerBridge
    path: Path
    half: TransformerBridge  # in float16, whose second block writes more than that holds
    load: Callable[[], TransformerBridge]  # a copy of the model, of which a row may break the files
    monkeypatch: pytest.MonkeyPatch

    def written(self, name: str, content: str | bytes) -> Path:
        """A file that the user brings."""
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def model_folder(self, **config: object) -> str:
        """A copy of the model's folder with changes of its configuration, and code that tells when it runs."""
        folder = Path(shutil.copytree(self.model.cfg.folder, self.path / "model"))
        told = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(told))
        (folder / "code.py").write_text(f"open({str(self.path / 'ran')!r}, 'w')")
        return str(folder)

    def pairs(self, content: str | bytes) -> pd.DataFrame:
        return pairs(self.written("mine.csv", content))

    def scenario(self, said: str = "It is late.", **changes: str) -> scenarios.Scenario:
        text = SCENARIO.replace("SAID", said)
        for old, new in changes.items():
            text = text.replace(old, new)
        return scenarios.load(self.written("walk.yaml", text))


@dataclass
class Refused:
    what: str
    do: Callable[[Here], object]
    message: str
    error: type[BaseException] = ValueError
    brings: tuple[str, ...] = field(default=("mine.csv", "walk.yaml", "model", "01_choices.csv"))  # the user's own


@pytest.fixture(scope="module")
def own(with_saes: Callable[..., TransformerBridge]) -> TransformerBridge:
    """A tiny GPT-2 with an SAE of 64 features at every depth."""
    return with_saes()


@pytest.fixture(scope="module")
def half(own: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> TransformerBridge:
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(own.cfg.folder, folder, ignore=shutil.ignore_patterns("saes"))
    hf = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in hf.transformer.h[:2]:
            block.mlp.c_proj.bias[3] = 6e4
    hf.save_pretrained(folder)
    return load_model(str(folder), dtype=torch.float16)


@pytest.fixture
def here(own: TransformerBridge, half: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    def load() -> TransformerBridge:
        return load_model(str(shutil.copytree(own.cfg.folder, tmp_path / "model")))

    return Here(own, tmp_path, half, load, monkeypatch)


def swept(here: Here, strength: float = 1.0, depth: int = 1, vectors: Tensor = ONES, **options: object) -> pd.DataFrame:
    """A sweep that keeps its runs in the user's folder."""
    return sweep(here.model, PROMPTS, {depth: {"mine": Add(vectors)}}, [strength], folder=here.path, **options)


def steered(strength: float = 1.0, depth: int = 1, draw: int = 0, vectors: Tensor = ONES) -> Steer:
    return Steer(Add(vectors), (depth,), torch.tensor([draw]), torch.tensor([strength]))


def unnamed(here: Here) -> TransformerBridge:
    """A model whose tokenizer has neither BOS nor EOS."""
    model = here.load()
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    return model


def folder_with(here: Here, name: str, content: bytes, weights: str | None = None) -> str:
    """The model's folder with this file, and its own weights under another name or gone."""
    folder = Path(shutil.copytree(here.model.cfg.folder, here.path / "model"))
    (folder / "model.safetensors").rename(folder / (weights or name))
    (folder / name).write_bytes(content)
    return str(folder)


def damaged_sae(here: Here) -> object:
    """The SAE of depth 1, of whose weights half is there."""
    model = here.load()
    weights = model.cfg.folder / "saes" / "blocks.1.hook_resid_pre" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return load_sae(model, 1)


def silent_hub(here: Here) -> TransformerBridge:
    """The hub takes the call and never answers."""
    listening = socket.create_server(("127.0.0.1", 0))
    here.monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
    here.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    here.monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here.path / "notes"))
    here.monkeypatch.setattr(hub, "PATIENCE", 0.1)
    here.monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with listening:
        return load_model("someone/model")


def chosen_by_another(here: Here, content: str) -> playground.Playground:
    """The playground where figures/<model>/ holds this choice of notebook 01."""
    here.monkeypatch.setattr(playground, "FIGURES", here.path.parent)
    here.model.cfg.model_name, before = here.path.name, here.model.cfg.model_name
    try:
        here.written("01_choices.csv", content)
        return opened(here.model)
    finally:
        here.model.cfg.model_name = before


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 200 bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def on_full_disk(do: Callable[[Here], object]) -> Callable[[Here], object]:
    def run(here: Here) -> object:
        with full_disk():
            return do(here)

    return run


def recorded_twice(here: Here) -> pd.DataFrame:
    claims.record(here.path / "notes", "toy", "A-zero-overlap", "holds", 1.0)
    before = (here.path / "notes" / "claims.csv").read_bytes()
    try:
        with full_disk():
            return claims.record(here.path / "notes", "toy", "A-zero-overlap", "partly", 0.5, note="long " * 100)
    finally:
        assert (here.path / "notes" / "claims.csv").read_bytes() == before
        (here.path / "notes" / "claims.csv").unlink()


def drawn(folder: Path) -> None:
    figure = plt.figure()
    try:
        plots.written(figure, pd.DataFrame({"value": range(500)}), folder / "kept", "toy")
    finally:
        plt.close(figure)


REFUSED = {
    "texts": [
        Refused("no text at all", lambda x: tokens(x.model, []), "there are no texts to read"),
        Refused("one text instead of a list", lambda x: tokens(x.model, TEXT), "a list of texts", TypeError),
        Refused("an empty text", lambda x: residuals(x.model, [TEXT, ""]), r"text 1 is empty \(''\): give at least"),
        Refused("a prompt of spaces", lambda x: generated(x.model, [" \n\t"], 3), r"text 0 is empty \(' \\n\\t'\)"),
        Refused("a text of wide spaces", lambda x: token_strings(x.model, "\u3000\xa0"), "text 0 is empty"),
        Refused("half an emoji", lambda x: residuals(x.model, ["a \ud83d"]), r"text 0 holds half a character .* at 2"),
        Refused(
            "a text longer than the context",
            lambda x: residuals(x.model, [TEXT, "word " * 10_000]),
            r"text 1 has \d+ tokens .* reads at most 64: shorten it",
        ),
        Refused(
            "a prompt and a continuation longer than the context",
            lambda x: generated(x.model, [TEXT], 60),
            r"prompt 0 \(\d+ tokens\) and its continuation \(60\) do not fit the 64 tokens",
        ),
        Refused(
            "a word that is not there",
            lambda x: word_positions(x.model, [TEXT], ["cat"]),
            "the word 'cat' occurs 0 times, not once",
        ),
        Refused("an empty continuation", lambda x: log_odds(x.model, [TEXT], [""], [" b"]), "a continuation is empty"),
        Refused(
            "half an emoji as a continuation",
            lambda x: log_odds(x.model, [TEXT], [" a"], ["\ude42"]),
            "a continuation holds half a character",
        ),
        Refused(
            "a token that the model lacks",
            lambda x: log_probs(x.model, [TEXT], [[[8192]]]),
            "there is no token 8192: .* has 0 to 8191",
        ),
        Refused("half an emoji in the playground", lambda x: opened(x.model).read("\ud83d"), "the text holds half a"),
        Refused(
            "half an emoji in a typed talk", lambda x: scenarios.typed("A: \ud83d", ["happy", "sad"]), "line 1 hol"
        ),
        Refused("a pair without a separator", lambda x: parsed_pairs("a | b\nc d"), "line 2 has 0 separators, not one"),
    ],
    "depths": [
        Refused("too deep a projection", lambda x: token_projections(x.model, TEXT, 4, ONES[0]), "depth 4 is out of"),
        Refused("a depth below 0", lambda x: token_projections(x.model, TEXT, -1, ONES[0]), "depth -1 is out of ra"),
        Refused("too deep a read-out", lambda x: reads(x.model, [TEXT], 9, ONES), "depth 9 is out of .*depths 0 to 3"),
        Refused("a negative read-out", lambda x: reads(x.model, [TEXT], -1, ONES), "depth -1 is out of range"),
        Refused("too deep a reading", lambda x: every_token(x.model, [TEXT], [4]), "depth 4 is out of range"),
        Refused(
            "a position beyond the text",
            lambda x: at_positions(x.model, [TEXT], torch.tensor([40])),
            r"positions \[40\] lie outside of texts with \[\d+\] tokens",
        ),
        Refused("too deep a sweep", lambda x: swept(x, depth=12), "depth 12 is out of range: .* has depths 0 to 3"),
        Refused(
            "too deep a steering",
            lambda x: side_by_side(x.model, TEXT, 12, ONES[0], 3),
            "depth 12 is out of range: .* has depths 0 to 3",
        ),
        Refused("too deep a dose", lambda x: Meter.on(x.model, [TEXT]).strengths(9, Add(ONES), [0.1]), "depth 9 is ou"),
        Refused("too deep a lens", lambda x: logit_lens(x.model, ONES, [1]), "directions for depths 0 to 0"),
        Refused("too deep an SAE", lambda x: load_sae(x.model, 7), "depth 7 is out of range"),
        Refused("a feature that the SAE lacks", lambda x: decoder_rows(x.model, 1, [64]), "0 to 63", IndexError),
        Refused(
            "reading below the steering",
            lambda x: swept(x, depth=2, readers=Readers(["mine"], {1: ONES})),
            "steering at depth 2 does not reach depth 1",
        ),
    ],
    "numbers that are none": [
        Refused("NaN in a vector to add", lambda x: swept(x, vectors=NAN), "the steering vectors hold NaN or infinity"),
        Refused("infinity in a vector to add", lambda x: swept(x, vectors=INFINITE), "hold NaN or infinity"),
        Refused("NaN in a vector to see", lambda x: side_by_side(x.model, TEXT, 1, NAN[0], 3), "hold NaN or infinity"),
        Refused("NaN in a direction to ablate", lambda x: Ablate(NAN), "non-finite vector has no direction"),
        Refused("NaN in a place to ablate to", lambda x: Ablate(ONES, NAN[:, 0]), "places to ablate to hold NaN"),
        Refused("nothing to ablate", lambda x: Ablate(0 * ONES), "a zero .* vector has no direction"),
        Refused(
            "NaN to clamp to", lambda x: Clamp(load_sae(x.model, 1), [3], float("nan")), "feature to nan: give a n"
        ),
        Refused(
            "a draw that is not there", lambda x: steered(draw=1), r"draws \[1\] are asked for, but the method has 1"
        ),
        Refused("a strength of NaN", lambda x: steered(float("nan")), "the strengths of steering hold NaN"),
        Refused("a sweep over NaN", lambda x: swept(x, float("nan")), "a strength is nan: give numbers"),
        Refused("a sweep over infinity", lambda x: swept(x, float("-inf")), "a strength is -inf: give numbers"),
        Refused("a dose of NaN", lambda x: Meter.on(x.model, [TEXT]).strengths(1, Add(ONES), [float("nan")]), "finite"),
        Refused(
            "an infinite cap",
            lambda x: Meter.on(x.model, [TEXT]).strengths(1, Add(ONES), [0.1], cap=float("inf")),
            r"above 0 and finite, got \[0.1\] and inf",
        ),
        Refused(
            "vectors of another model",
            lambda x: swept(x, vectors=torch.ones(1, 768)),
            "vectors of 768 numbers do not fit .*, d_model 32",
        ),
        Refused("NaN in a vector that reads", lambda x: Readers(["mine"], {2: NAN}), "reading vectors at depth 2 hold"),
        Refused(
            "NaN in a vector that reads texts", lambda x: reads(x.model, [TEXT], 1, NAN), "reading vectors hold NaN"
        ),
        Refused("NaN in a direction", lambda x: projections(torch.ones(2, 1, WIDTH), NAN), "the directions hold NaN"),
        Refused("NaN in a token's direction", lambda x: token_projections(x.model, TEXT, 1, NAN[0]), "hold NaN"),
        Refused("NaN under the lens", lambda x: logit_lens(x.model, NAN, [0]), "vectors to unembed hold NaN"),
        Refused("NaN to take apart", lambda x: pursuit({"mine": NAN[0]}, ONES, 1), "the numbers of 'mine' hold NaN"),
        Refused("NaN in a group", lambda x: mean_difference(NAN, ONES), "non-finite activations"),
        Refused(
            "two groups that are the same", lambda x: mean_difference(ONES, ONES), "are the two groups of texts id"
        ),
        Refused("an AUROC of NaN", lambda x: auroc(NAN[0], ONES[0]), "points to compare hold NaN"),
        Refused("an overlap with NaN", lambda x: overlap(ONES[0], NAN[0]), "points to compare hold NaN"),
        Refused(
            "a verdict on NaN",
            lambda x: claims.record(x.path, "toy", "A-zero-overlap", "holds", float("nan")),
            "is not finite; leave it out",
        ),
    ],
    "numbers too large": [
        Refused(
            "a stream beyond float16",
            lambda x: residuals(x.half, [TEXT]),
            r"non-finite activation at depth 2 of text 0 \('The dog.*load the model in float32",
        ),
        Refused("norms beyond float16", lambda x: residual_norms(x.half, [TEXT]), "non-finite activation at depth 2"),
        Refused("patching beyond float16", lambda x: ran(x.half, [TEXT], []), "non-finite activation at depth 2 of"),
        Refused(
            "a conversation beyond float16",
            lambda x: recordings.recorded(x.half, x.scenario()),
            r"non-finite activation at token \d+ \(turn 1 of 'walk'\): load the model in float32",
        ),
        Refused(
            "scores beyond float16",
            lambda x: log_odds(x.half, [TEXT], [" a"], [" b"]),
            r"non-finite logits after prompt 0 \('The dog .*\) without steering: load the model in float32",
        ),
        Refused("a text beyond float16", lambda x: generated(x.half, [TEXT], 3), "non-finite logits after prompt 0"),
        Refused("doses beyond float16", lambda x: Meter.on(x.half, [TEXT]), "overflows without steering: load it"),
        Refused(
            "a sweep that overflows",
            lambda x: swept(x, 3e38),
            r"non-finite logits after prompt 0 .* with a strength of 3e\+38 at depth 1: stay nearer to 0",
            brings=("*.parquet",),  # the unsteered runs are good
        ),
        Refused(
            "a text that overflows",
            lambda x: generated(x.model, [TEXT], 3, steered(3e38)),
            r"with a strength of 3e\+38 at depth 1: stay nearer to 0",
        ),
        Refused(
            "a dose that overflows",
            lambda x: Meter.on(x.model, [TEXT]).effects(1, Add(ONES), torch.tensor([0]), torch.tensor([3e38])),
            r"overflows with a strength of 3e\+38 at depth 1",
        ),
        Refused(
            "an overflow while playing", lambda x: opened(x.model).steer(TEXT, strength=1e39), "overflows: stay ne"
        ),
    ],
    "tables": [
        Refused(
            "a missing cell",
            lambda x: x.pairs(HEAD + ROW + "cat,train,pets,,A cat.\n"),
            "mine.csv, line 3: nothing in the column 'emotional'",
        ),
        Refused("a cell of spaces", lambda x: x.pairs(HEAD + ROW + "cat, ,pets,a,b\n"), "line 3: .* column 'split'"),
        Refused(
            "a missing cell under CRLF, a mark and a cell of two lines",
            lambda x: x.pairs("\ufeff" + HEAD.replace("\n", "\r\n") + 'a,b,c,"d\r\nd",e\r\n\r\na,b,c,d,""\r\n'),
            "mine.csv, line 5: nothing in the column 'neutral'",
        ),
        Refused("a comma too many", lambda x: x.pairs(HEAD + ROW + "a,b,c,d,e,f\n"), "line 3: 6 cells, .*in quotes"),
        Refused("a comma too few", lambda x: x.pairs(HEAD + "a,b,c,d\n"), "mine.csv, line 2: 4 cells, but the columns"),
        Refused("an open quote", lambda x: x.pairs(HEAD + ROW + 'a,b,c,"d,e\n'), r"line 3: not CSV \(unexpected end"),
        Refused("a quote within", lambda x: x.pairs(HEAD + 'a,b,c,"d" e,f\n'), "mine.csv, line 2: not CSV"),
        Refused("another encoding", lambda x: x.pairs((HEAD + "a,b,c,d,é\n").encode("latin-1")), "line 2: not UTF-8"),
        Refused(
            "semicolons", lambda x: x.pairs(HEAD.replace(",", ";")), "lacks the column 'pair'. It needs pair, split"
        ),
        Refused("a column twice", lambda x: x.pairs("pair,pair\na,b\n"), "mine.csv has the column 'pair' twice"),
        Refused("an empty file", lambda x: x.pairs(""), "lacks the column 'pair'. .* it has none"),
        Refused("no rows", lambda x: x.pairs(HEAD), "mine.csv has no rows"),
        Refused("the same pair twice", lambda x: x.pairs(HEAD + ROW + ROW), "the pair 'dog' comes twice"),
        Refused("a file that is not there", lambda x: pairs(x.path / "no.csv"), "no.csv", FileNotFoundError),
        Refused(
            "a number that is none",
            lambda x: csv_rows(x.written("mine.csv", "depth\n1\nnan\n"), ["depth"], ["depth"]),
            "mine.csv, line 3: 'nan' in the column 'depth' is no number",
        ),
        Refused(
            "a choice without a position",
            lambda x: chosen_by_another(x, "model,depth\ntoy,1\n"),
            "01_choices.csv lacks the column 'position'",
        ),
        Refused(
            "claims of another model",
            lambda x: claims.recorded(x.written("mine.csv", "").parent / "of_another", "toy"),
            "claims.csv has rows of the model 'other', not 'toy': it belongs into another folder",
            brings=("mine.csv", "claims.csv"),
        ),
        Refused(
            "a claim that nobody made", lambda x: claims.record(x.path, "toy", "A-zero", "holds"), "has no claim 'A"
        ),
    ],
    "scenarios": [
        Refused("a turn of spaces", lambda x: x.scenario("  "), r"walk.yaml, line 8: Anna's turn is empty"),
        Refused(
            "half an emoji in a turn", lambda x: x.scenario(r"\ud83d"), "line 8: Anna's turn holds half a character"
        ),
        Refused("a turn that is no text", lambda x: x.scenario(**{'"SAID"': "SAID", '"It is late."': "3"}), "line 8: "),
        Refused(
            "a turn that would run a program",
            lambda x: x.scenario(**{'"It is late."': '!!python/object/apply:os.system ["touch ran"]'}),
            "line 8: Anna's turn must be a text in double quotes, got something with the tag .*os.system",
        ),
        Refused(
            "an unknown emotion", lambda x: x.scenario(afraid="afrad"), "line 3: .*'afrad' is unknown. Did you mean"
        ),
        Refused(
            "a conversation longer than the context",
            lambda x: recordings.recorded(x.model, x.scenario("word " * 100)),
            r"walk.yaml, line 8: 'walk' has \d+ tokens .* reads at most 64",
        ),
    ],
    "models": [
        Refused(
            "a tokenizer without BOS and EOS", lambda x: tokens(unnamed(x), [TEXT]), "has neither BOS nor EOS to put"
        ),
        Refused(
            "pickled weights",
            lambda x: load_model(folder_with(x, "pytorch_model.bin", b"pickled")),
            "holds no safetensors weights. Pickled weights are not read: convert them",
        ),
        Refused(
            "pickled weights beside others of another name",
            lambda x: load_model(folder_with(x, "pytorch_model.bin", b"pickled", "adapter.safetensors")),
            "Pickled weights are not read: convert them",
        ),
        Refused(
            "an index of weights that are pickled",
            lambda x: load_model(folder_with(x, "model.safetensors.index.json", b'{"weight_map": {"w": "w.bin"}}')),
            "Pickled weights are not read: convert them",
        ),
        Refused(
            "weights that are cut off",
            lambda x: load_model(folder_with(x, "model.safetensors", b"cut off")),
            r"model\.safetensors is damaged \(",
            Damaged,
        ),
        Refused(
            "an index of which a part is missing",
            lambda x: load_model(
                folder_with(x, "model.safetensors.index.json", b'{"weight_map": {"w": "2.safetensors"}}')
            ),
            r"lacks 2\.safetensors, a part of the weights that its index names",
        ),
        Refused(
            "an unknown device",
            lambda x: load_model(str(x.model.cfg.folder), device="gpu"),
            "Unknown device 'gpu': give 'cuda', 'cpu', or auto or balanced",
        ),
        Refused(
            "one model twice in a comparison",
            lambda x: comparison({"MODELS": "gpt2 gpt2-small"}),
            "MODELS names 'gpt2-small' twice: gpt2, gpt2-small",
        ),
        Refused(
            "an unknown model", lambda x: load_model("gpt2-smal"), "Unknown model 'gpt2-smal'. Did you mean 'gpt2-sm"
        ),
        Refused(
            "a folder that is not there", lambda x: load_model("./no"), "no model folder './no'", FileNotFoundError
        ),
        Refused(
            "a hub out of reach", lambda x: load_model("someone/model"), "'someone--model' cannot be loaded", OSError
        ),
        Refused(
            "a hub that does not answer",
            silent_hub,
            "Model 'someone--model' cannot be loaded: .*Check the name and the connection.*or work offline",
            OSError,
        ),
        Refused(
            "a model that brings code",
            lambda x: load_model(x.model_folder(auto_map={"AutoConfig": "code.Config"}, model_type="mine")),
            "brings code of its own for 'mine' models, .*No code that comes with a model is run",
        ),
        Refused(
            "a configuration that is none",
            lambda x: load_model(folder_with(x, "config.json", b"{")),
            "config.json is damaged .*: fetch or save the model again",
        ),
        Refused("a damaged SAE", damaged_sae, "is damaged or not an SAE of sae-lens .*: delete it and fetch"),
    ],
    "disks": [
        Refused(
            "a scan by a model of too short a context",
            lambda x: scan.scan(x.model, x.scenario(), x.path / "scans"),
            r"neutral.yaml, line \d+: .* reads at most 64",
        ),
        Refused(
            "runs into a file",
            lambda x: sweep(x.model, PROMPTS, {1: {"a": Add(ONES)}}, [1.0], folder=x.path / "kept.csv"),
            "cannot write .*parquet into .*kept.csv.*Is the folder read-only",
            OSError,
        ),
        Refused(
            "a record into a file",
            lambda x: claims.record(x.path / "kept.csv", "toy", "A-zero-overlap", "holds", 1.0),
            "cannot write claims.csv into .*kept.csv",
            OSError,
        ),
        Refused(
            "a full disk under runs",
            on_full_disk(swept),
            "the disk refuses to write .*.parquet into .*Make room",
            OSError,
        ),
        Refused(
            "a full disk under a table",
            on_full_disk(lambda x: kept(x.path, "cell", lambda: pd.DataFrame({"text": ["x" * 1000]}))),
            "the disk refuses to write cell.parquet into .*: File too large. Make room",
            OSError,
        ),
        Refused("a full disk under a figure", on_full_disk(lambda x: drawn(x.path)), "refuses to write kept.", OSError),
        Refused("a full disk under claims", recorded_twice, "refuses to write claims.csv .*is as it was", OSError),
    ],
}
ROWS = [pytest.param(row, id=f"{kind}: {row.what}") for kind, rows in REFUSED.items() for row in rows]


@pytest.mark.parametrize("row", ROWS)
def test_what_is_refused_says_so_and_loses_nothing(here: Here, row: Refused):
    (here.path / "of_another").mkdir()
    (here.path / "of_another" / "claims.csv").write_text(
        "claim,model,value,low,high,verdict,note\nA-zero-overlap,other,1,,,holds,\n"
    )
    said, before = says(here.model), files(here.path, row.brings)
    with pytest.raises(row.error, match=row.message):
        row.do(here)
    assert files(here.path, row.brings) == before
    assert not list(here.path.rglob(".*-*"))  # what was being written
    assert not [name for name, point in here.model.hook_dict.items() if point.fwd_hooks]
    assert torch.equal(says(here.model), said)


def says(model: TransformerBridge) -> Tensor:
    with torch.no_grad():
        return model.original_model(input_ids=tokens(model, [TEXT]).ids).logits


def files(folder: Path, but: tuple[str, ...]) -> dict[str, bytes]:
    """The content of every file in the folder but locks and what the user brought along."""
    there = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    mine = {path for pattern in but for path in [*folder.glob(pattern), *folder.glob(f"{pattern}/**/*")]}
    return {str(path.relative_to(folder)): path.read_bytes() for path in there if path not in mine}


def test_the_model_in_half_precision_is_fine_in_full(half: TransformerBridge):
    """So what the table refuses is the precision, not the model."""
    assert residuals(load_model(str(half.cfg.folder)), [TEXT])["mean"].isfinite().all()


# What looks odd and works

ODD = {
    "emoji": "The 🐕 ran 🏃🏽‍♀️ after me 🙂🙃.",
    "right to left": "הכלב רץ אחרי، وركض الكلب.",
    "both ways": "He said \u202eدع\u202c and \u200fran\u200e.",
    "combining marks": "The e\u0301tude\u0323\u0307, n\u0303andu\u0301.",
    "Chinese": "狗在追我。",
    "quotes": "She said: \"No,\" and 'so' — \\ “it” «is».",
    "a byte order mark": "\ufeffThe dog ran.",
    "CRLF and tabs": "The dog\r\n\tran.\r",
    "a NUL": "The dog\x00ran.",
    "nothing to see": "\u200b\u200d\u2060",
    "what cannot be read": "The � ran.",
    "the end of text, spelled out": "The dog <|endoftext|> ran.",
    "markup": "<script>alert('1')</script> & <b>so</b>",
    "a long word": "Donaudampfschifffahrtsgesellschaft" * 2,
    "one character": "a",
    "spaces around it": "  The dog  ran.  ",
}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_an_odd_text_is_its_tokens_joined(model: TransformerBridge, text: str):
    assert "".join(token_strings(model, text)[1:]) == text


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_an_odd_text_reads_alone_as_it_does_among_others(any_model: TransformerBridge, text: str):
    alone = residuals(any_model, [text], ["mean", "last token"])
    together = residuals(any_model, [*ODD.values(), text], ["mean", "last token"])
    for position, acts in alone.items():
        assert acts.isfinite().all()
        torch.testing.assert_close(acts[0], together[position][-1], **CLOSE)


def test_odd_texts_score_and_are_continued_alone_as_among_others(model: TransformerBridge):
    texts = list(ODD.values())
    together = log_odds(model, texts, [" 🙂"] * len(texts), [" no"] * len(texts))
    alone = torch.cat([log_odds(model, [text], [" 🙂"], [" no"]) for text in texts])
    assert alone.isfinite().all()
    torch.testing.assert_close(together, alone, **CLOSE)
    assert generated(model, texts, 3) == [generated(model, [text], 3)[0] for text in texts]


@pytest.mark.parametrize("text", [ODD[name] for name in ("emoji", "right to left", "quotes", "markup")])
def test_an_odd_turn_is_recorded_as_it_stands(model: TransformerBridge, text: str):
    talk = scenarios.typed(f"Anna: {text}\nTom 🙂: Yes.", ["happy", "afraid"])
    [found] = recordings.recorded(model, talk)
    assert "".join(found.tokens["token"][1:]) == f"\nAnna: {text}\nTom 🙂: Yes."
    assert found.stream.isfinite().all()


@pytest.mark.parametrize("name", ["emoji", "right to left", "markup"])
def test_an_odd_text_is_shown_and_never_read_as_html(here: Here, name: str):
    reading = opened(here.model).read(ODD[name])
    assert "".join(reading.tokens) == ODD[name]
    assert reading.scores.isfinite().all()
    assert "<script>" not in reading._repr_html_()


def test_a_text_may_fill_the_context(model: TransformerBridge):
    text = "The" + " dog" * (model.cfg.n_ctx - 2)
    assert len(token_strings(model, text)) == model.cfg.n_ctx
    assert residuals(model, [text], ["mean"])["mean"].isfinite().all()


CELLS = ['The "dog", très près.', "狗 🐕\nran", "NA", " null ", "007", "1e5", "מי?", "a\rb", "c\r\nd", "#", "None"]
FORMS = {
    "as spreadsheets write it": {"lineterminator": "\r\n", "encoding": "utf-8-sig"},
    "everything in quotes": {"lineterminator": "\n", "encoding": "utf-8", "quoting": 1},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_cell_of_a_table_of_pairs_comes_back_as_it_was_written(tmp_path: Path, form: dict):
    rows = {"pair": [f"00{i}" for i in range(len(CELLS))], "split": "NA", "topic": "none", "emotional": CELLS}
    table = pd.DataFrame(rows).assign(neutral=[f"{cell}!" for cell in CELLS], more=range(len(CELLS)))
    table.to_csv(tmp_path / "mine.csv", index=False, **form)
    pd.testing.assert_frame_equal(pairs(tmp_path / "mine.csv"), table.astype("str"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blank_lines_in_a_table_are_left_out(tmp_path: Path, end: str):
    (tmp_path / "mine.csv").write_bytes(f"\n{HEAD}\n{ROW}\n\n".replace("\n", end).encode())
    assert len(pairs(tmp_path / "mine.csv")) == 1


def test_a_tokenizer_without_a_pad_token_reads_the_same(model: TransformerBridge, model_folder: Callable):
    bare = load_model(str(model_folder("gpt2")))
    bare.tokenizer.pad_token = None
    texts = [TEXT, "He ran.", "🙂"]
    for position, acts in residuals(bare, texts, ["mean"]).items():
        assert torch.equal(acts, residuals(model, texts, ["mean"])[position])
    assert generated(bare, texts, 3) == generated(model, texts, 3)


@pytest.mark.parametrize(
    ("content", "depth"),
    [
        ("model,depth,position\nMINE,1,mean\n", 1),
        ("model,depth,position\nanother,1,mean\n", 2),
        ("model,depth,position\nMINE,11,mean\n", 2),
        ("model,depth,position\nMINE,1,somewhere\n", 2),
        ("model,depth,position\nMINE,0.5,mean\n", 2),
    ],
)
def test_what_notebook_01_has_chosen_for_another_model_is_left_alone(here: Here, content: str, depth: int):
    play = chosen_by_another(here, content.replace("MINE", here.path.name))
    assert play.depth == depth
    assert ("is not for this model" in play.chosen_by) == (depth == 2)


def test_nothing_to_compare_with_is_no_evidence():
    null = torch.linspace(-1, 1, 99)
    assert permutation_p(torch.tensor(2.0), null) == 0.01
    assert permutation_p(torch.tensor(torch.nan), null) == 1
    assert permutation_p(torch.tensor(2.0), null * torch.nan) == 1


# Two runs at once, runs that are killed, and data that nobody writes

AT_ONCE = """
import sys, time
from pathlib import Path
from helpers import claims
folder, which = Path(sys.argv[1]), int(sys.argv[2])
mine = claims.published().claim[which:16:2]
(folder / f"ready-{which}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.001)
for claim in mine:
    claims.record(folder, "toy", claim, "holds", 1.0)
"""


def test_two_runs_that_record_at_once_lose_nothing(tmp_path: Path):
    runs = [subprocess.Popen([sys.executable, "-c", AT_ONCE, str(tmp_path), str(i)], cwd=ROOT) for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert set(claims.recorded(tmp_path).claim) == set(claims.published().claim[:16])
    assert not list(tmp_path.glob(".*-*"))


def test_two_runs_at_once_on_the_same_cell_both_get_it_and_leave_it_whole(tmp_path: Path):
    together, table = Barrier(2, timeout=60), pd.DataFrame({"text": ["x" * 1000] * 1000})

    def made() -> pd.DataFrame:
        together.wait()  # neither has found the cell
        return table

    with ThreadPoolExecutor(2) as runs:
        found = [run.result() for run in [runs.submit(kept, tmp_path, "cell", made) for _ in range(2)]]
    for each in (*found, kept(tmp_path, "cell", lambda: pytest.fail("the cell was not whole"))):
        pd.testing.assert_frame_equal(each, table)
    assert [path.name for path in tmp_path.iterdir()] == ["cell.parquet"]


KILLED = """
import sys, time
from pathlib import Path
from helpers.files import alone, replacing
path = Path(sys.argv[1])
with alone(path), replacing(path) as temporary:
    temporary.write_text("half a fi")
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_leaves_the_old_file_and_nothing_that_anyone_reads_or_waits_for(tmp_path: Path):
    claims.record(tmp_path, "toy", "A-zero-overlap", "holds", 1.0)
    path = tmp_path / "claims.csv"
    before = path.read_bytes()
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert run.stdout.readline() == "written\n"
    run.kill()
    run.wait()
    assert path.read_bytes() == before
    [left] = tmp_path.glob(".*.csv")
    ignored = ROOT / "figures" / "bookworm" / left.name, ROOT / "figures" / "bookworm" / ".claims.csv.lock"
    asked = subprocess.run(["git", "check-ignore", *map(str, ignored)], cwd=ROOT, capture_output=True, text=True)
    assert asked.stdout.split() == [str(each) for each in ignored]
    claims.record(tmp_path, "toy", "A-d-by-layer", "holds", 1.0)
    assert claims.recorded(tmp_path).claim.tolist() == ["A-d-by-layer", "A-zero-overlap"]


def test_nothing_writes_into_data(tmp_path: Path):
    """A read-only data folder is enough: neither a file nor a folder in it changes."""
    before = {path: path.stat().st_mtime_ns for path in [DATA, *DATA.rglob("*")]}
    model = load_model()
    load_sae(model, 1)
    decoder_rows(model, 2, [1])
    table = pairs("fear_calm", "test").head(2)
    residuals(model, table["neutral"].tolist())
    recordings.recorded(model, scenarios.load("argument"))
    sweep(model, PROMPTS, {1: {"mine": Add(torch.ones(1, 256))}}, [1.0], folder=tmp_path)
    claims.table()
    assert {path: path.stat().st_mtime_ns for path in [DATA, *DATA.rglob("*")]} == before
