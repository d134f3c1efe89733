"""Rebuild bookworm, a small GPT-2, or one of its siblings of another architecture, from a folder of text.

    python data/bookworm/build.py CORPUS_DIR OUT_DIR                  # 27.5 M tokens, as the shipped weights saw
    python data/bookworm/build.py CORPUS_DIR OUT_DIR --minutes 20     # or a budget of training time
    python data/bookworm/build.py CORPUS_DIR OUT_DIR --sibling llama  # a smaller model of a family, same tokenizer
    python data/bookworm/build.py CORPUS_DIR --evaluate MODEL_DIR     # measure a finished folder: evaluation.json

CORPUS_DIR holds .txt or .txt.xz files (passages separated by a line `<|endoftext|>`, otherwise cut about every 6,000
characters) and, if you like, .tsv or .tsv.xz files of short comments in a column `text`.

The sparse autoencoders of a finished folder are trained by build_saes.py, beside this file.

The steps are tokenizer, tokens, train, export, evaluate. Each leaves its result in the work folder and is skipped when
it is there. Ctrl-C loses nothing, a crash at most three minutes: the same command goes on, and ends, on a CPU with the
same number of threads, in the very weights that an uninterrupted run of the same `--tokens` gives. On CUDA the last
digits may differ from run to run.

Choices that mattered: bfloat16 autocast (5 times the float32 rate on CPUs with AVX-512 bf16), torch.compile (1.6
times), Muon for the block matrices and AdamW for the rest, warm-up / constant / linear decay over the last 35 % of the
budget, every window opened by `<|endoftext|>` so that BOS means at inference what it meant in training.
"""

import argparse
import hashlib
import json
import lzma
import math
import platform
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from threading import Event

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils import logging

from helpers.files import replacing

EOT = "<|endoftext|>"
ASCII_MARKS = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-"})
NAMES = ["Sam", "Anna", "Tom", "Maria", "Jack", "Lily", "Ben", "Emma", "Leo", "Ruth"]
PROMPTS = ["She was standing at the edge of the roof, and", "The dog came running up the path", "I am so happy that"]
CHECKPOINT_SECONDS = 180
FAMILIES = ("gpt2", "llama", "qwen3", "gemma2", "mistral")
SIBLING = {"layers": 7, "d_model": 128, "heads": 4, "tokens": 16_000_000}
VALIDATION_STEPS = 100  # steps between two looks at the validation loss, each on at most 64 windows


@dataclass(frozen=True)
class Settings:
    """Everything that decides which model comes out. Of `tokens` and `minutes`, the budget, exactly one is set."""

    family: str = "gpt2"
    layers: int = 8
    d_model: int = 256
    heads: int = 4
    context: int = 256  # tokens
    vocabulary: int = 8192  # unless a tokenizer is given
    batch: int = 32  # windows of `context` tokens per step
    rate: float = 3e-3
    warm_up: int = 100  # steps
    decay: float = 0.35  # share of the budget
    tokens: int | None = 27_500_000
    minutes: float | None = None  # of training, added up over resumes
    compile: bool = True
    seed: int = 0
    snapshots: tuple[int, ...] = ()  # tokens after which the weights are kept, for a look at how the model came about

    def __post_init__(self):
        if (self.tokens is None) == (self.minutes is None) or (self.tokens or self.minutes or 0) <= 0:
            raise ValueError("the budget is a positive number of tokens or of minutes")

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget used up after `step` steps and `seconds` of training."""
        return step * self.batch * self.context / self.tokens if self.tokens else seconds / 60 / self.minutes


@dataclass(frozen=True)
class Run:
    """One build: where it reads, where it works, with which settings."""

    corpus: Path
    work: Path
    settings: Settings
    tokenizer: Path | None = None  # a tokenizer.json to use in place of one trained on the corpus

    def read(self, name: str) -> dict:
        return json.loads((self.work / name).read_text(encoding="utf-8"))


def write_json(path: Path, content: dict | list) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def text_files(corpus: Path) -> list[Path]:
    """The text files of the folder in a fixed order; ValueError when there is none."""
    files = sorted(p for p in corpus.rglob("*") if re.search(r"\.(txt|tsv)(\.xz)?$", p.name))
    if not files:
        raise ValueError(f"no text in {corpus}: it needs .txt, .txt.xz, .tsv or .tsv.xz files")
    return files


def content(path: Path) -> str:
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            return file.read().strip()
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def passages_of(text: str) -> list[str]:
    """Cut at the lines `<|endoftext|>`, or, where there is none, at line ends about every 6,000 characters."""
    marked = re.split(rf"^{re.escape(EOT)}$", text, flags=re.MULTILINE)
    pieces = marked if len(marked) > 1 else re.findall(r".{1,6000}(?:\n|$)|.{1,6000}", text, re.DOTALL)
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def comments_of(table: str, rng: random.Random) -> list[str]:
    """The column `text` of a tab-separated table in plain characters, its masks filled; [] without such a column."""
    header, *rows = [line.split("\t") for line in table.splitlines()] or [[]]
    comments = []
    for row in rows if "text" in header else []:
        text = row[header.index("text")].translate(ASCII_MARKS).replace("[RELIGION]", "Christian")
        text = re.sub(r"\[NAME\]", lambda _: rng.choice(NAMES), text)
        text = re.sub(r"\s+", " ", "".join(c for c in text if ord(c) < 0x250)).strip()
        if len(text) > 10:
            comments.append(text)
    return comments


def split_corpus(corpus: Path) -> tuple[list[str], list[str]]:
    """Held-out and training passages. The split rests on the corpus alone, so models of any seed compare.

    400 passages, or a tenth where there are fewer than 4,000, are held out. Comments count twice, for they are short;
    no copy of a held-out text stays in training.
    """
    rng = random.Random(0)
    texts, comments = [], []
    for path in text_files(corpus):
        if ".tsv" in path.suffixes:
            comments += comments_of(content(path), rng)
        else:
            texts += passages_of(content(path))
    texts += 2 * comments
    rng.shuffle(texts)
    held_out = texts[: min(400, len(texts) // 10)]
    if not held_out:
        raise ValueError(f"{corpus} holds {len(texts)} passages: at least 10 are needed to hold one out")
    known = set(held_out)
    return held_out, [text for text in texts if text not in known]


def encoded(texts: list[str], tokenizer: Tokenizer, progress: bool = False) -> np.ndarray:
    """All texts as one row of token ids, `<|endoftext|>` before each."""
    bos, kind = tokenizer.token_to_id(EOT), np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    rows = []
    for start in tqdm(range(0, len(texts), 256), "tokens", unit="x256 texts", disable=not progress):
        rows += [np.array([bos, *e.ids], kind) for e in tokenizer.encode_batch_fast(texts[start : start + 256])]
    return np.concatenate(rows)


def windows(ids: np.ndarray, context: int) -> np.ndarray:
    """The ids as [window, context], the incomplete last window dropped; ValueError when there is none."""
    if len(ids) < context:
        raise ValueError(f"the corpus is too small: {len(ids)} tokens do not fill one window of {context}")
    return ids[: len(ids) // context * context].reshape(-1, context)


def write_tokenizer(run: Run) -> None:
    """tokenizer.json: byte-level BPE with GPT-2's conventions, from about 70 M characters of the training passages."""
    if run.tokenizer:
        tokenizer = Tokenizer.from_file(str(run.tokenizer))
        if tokenizer.token_to_id(EOT) is None:
            raise ValueError(f"{run.tokenizer} has no token {EOT}, which opens every window")
    else:
        texts = split_corpus(run.corpus)[1]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        size, alphabet = run.settings.vocabulary, pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOT], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(texts[:: math.ceil(sum(map(len, texts)) / 70e6)], trainer)
    with replacing(run.work / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))


def write_tokens(run: Run) -> None:
    """train.npy, held_out.json and, last, corpus.json with the sizes."""
    held_out, texts = split_corpus(run.corpus)
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    ids = encoded(texts, tokenizer, progress=True)
    for part in (ids, encoded(held_out, tokenizer)):
        windows(part, run.settings.context)  # refuses a corpus that is too small
    with replacing(run.work / "train.npy") as temporary:
        np.save(temporary, ids)
    write_json(run.work / "held_out.json", held_out)
    sizes = {"passages": len(texts), "characters": sum(map(len, texts)), "tokens": len(ids)}
    write_json(run.work / "corpus.json", {**sizes, "held_out_passages": len(held_out)})


def configuration(settings: Settings, vocabulary: int, bos: int) -> PreTrainedConfig:
    """The family's configuration. Widths within the blocks are such that all families come to about as many weights."""
    special = {"vocab_size": vocabulary, "bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos}
    if settings.family == "gpt2":
        return GPT2Config(
            n_layer=settings.layers, n_embd=settings.d_model, n_head=settings.heads, n_positions=settings.context,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **special,
        )  # fmt: skip
    head = settings.d_model // settings.heads
    shape = special | {
        "num_hidden_layers": settings.layers, "hidden_size": settings.d_model, "num_attention_heads": settings.heads,
        "max_position_embeddings": settings.context, "tie_word_embeddings": True, "head_dim": head,
    }  # fmt: skip
    if settings.family == "llama":
        return LlamaConfig(num_key_value_heads=settings.heads, intermediate_size=43 * settings.d_model // 16, **shape)
    shape |= {"num_key_value_heads": settings.heads // 2, "intermediate_size": 3 * settings.d_model}
    if settings.family == "qwen3":
        return Qwen3Config(**shape)
    shape |= {"sliding_window": settings.context // 2}
    if settings.family == "mistral":
        return MistralConfig(**shape)
    return Gemma2Config(query_pre_attn_scalar=head, **shape)


def untrained(settings: Settings, vocabulary: int, bos: int) -> PreTrainedModel:
    """The model before training. No dropout: training draws no random number after this one seed."""
    torch.manual_seed(settings.seed)
    return AutoModelForCausalLM.from_config(configuration(settings, vocabulary, bos))


def optimizers_of(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for embeddings, unembedding, biases and norms."""
    lookups = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [model.get_output_embeddings()]
    lookup = {id(p) for m in lookups for p in m.parameters()}
    inner, rest = [], []
    for p in model.parameters():
        (inner if p.ndim == 2 and id(p) not in lookup else rest).append(p)
    muon = torch.optim.Muon(inner, lr=rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def save_checkpoint(path: Path, model: nn.Module, optimizers: list, step: int, seconds: float) -> None:
    """Weights, optimizer state, step and seconds in one file, so that they can never disagree.

    The step alone says how far the data order is (see `batch_rows`), and no random state is in use.
    """
    tensors = {f"model/{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{j}/{name}": value.contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "seconds": repr(seconds)})


def restored(path: Path, model: nn.Module, optimizers: list) -> tuple[int, float]:
    """Put a checkpoint back in place; its step and its seconds of training, (0, 0) when there is no checkpoint."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(f"model/{name}"))
        for i, optimizer in enumerate(optimizers):
            state = {}
            for key in (key for key in file.keys() if key.startswith(f"optimizer/{i}/")):  # noqa: SIM118
                state.setdefault(int(key.split("/")[2]), {})[key.split("/")[3]] = file.get_tensor(key)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])


@lru_cache(2)
def window_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_rows(step: int, count: int, settings: Settings) -> list[int]:
    """Which of `count` windows this step reads: every epoch is a new permutation, drawn from seed and epoch alone."""
    places = (divmod(step * settings.batch + i, count) for i in range(settings.batch))
    return [int(window_order(settings.seed, epoch, count)[i]) for epoch, i in places]


def learning_rate(settings: Settings, step: int, spent: float) -> float:
    return settings.rate * min(1, (step + 1) / settings.warm_up) * min(1, max(0.02, (1 - spent) / settings.decay))


def autocast(device: str) -> torch.autocast:
    """bfloat16 where the hardware computes in it, float32 elsewhere."""
    cpu = torch.cpu.get_capabilities()
    able = torch.cuda.is_bf16_supported() if device == "cuda" else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.autocast(device, torch.bfloat16, enabled=bool(able))


def inputs_and_targets(ids: np.ndarray, bos: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows shifted right behind `bos`, and the windows."""
    y = torch.from_numpy(ids.astype(np.int64)).to(device)
    return torch.cat([torch.full_like(y[:, :1], bos), y[:, :-1]], 1), y


def window_losses(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each window, in nats per token."""
    logits = model(input_ids=x).logits.float().flatten(0, 1)
    return F.cross_entropy(logits, y.flatten(), reduction="none").view_as(y).mean(1)


@torch.no_grad()
def held_out_losses(model: nn.Module, ids: np.ndarray, bos: int) -> torch.Tensor:
    batches = (inputs_and_targets(ids[i : i + 8], bos, model.device) for i in range(0, len(ids), 8))
    return torch.cat([window_losses(model, x, y).double().cpu() for x, y in batches])


def compiled(function: Callable, *example) -> Callable:
    """torch.compile's version of `function` where that works, otherwise `function` itself and a line that says so."""
    try:
        fast = torch.compile(function)
        fast(*example).mean().backward()
        return fast
    except Exception as error:  # whatever a missing compiler or an unsupported platform raises
        tqdm.write(f"torch.compile does not work here ({type(error).__name__}): training goes on, slower, without it")
        return function


@contextmanager
def interruption() -> Iterator[Event]:
    """An event that Ctrl-C sets, so that a step is never cut in half; a second Ctrl-C stops at once."""
    event, before = Event(), signal.getsignal(signal.SIGINT)

    def note(*_):
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def write_weights(run: Run) -> None:
    """checkpoint.safetensors and snapshots/ as it goes and, last, trained.json."""
    settings, checkpoint = run.settings, run.work / "checkpoint.safetensors"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    bos = tokenizer.token_to_id(EOT)
    ids = windows(np.load(run.work / "train.npy", mmap_mode="r"), settings.context)
    held_out = windows(encoded(run.read("held_out.json"), tokenizer), settings.context)[:64]
    model = untrained(settings, tokenizer.get_vocab_size(), bos).to(device)
    optimizers = optimizers_of(model, settings.rate)
    step, seconds = restored(checkpoint, model, optimizers)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs_and_targets(ids[batch_rows(step, len(ids), settings)], bos, device)

    with autocast(device.type):
        losses_of = compiled(window_losses, model, *batch(step)) if settings.compile else window_losses
    model.zero_grad()
    at_once = settings.batch * settings.context
    due = {math.ceil(tokens / at_once) * at_once: tokens for tokens in settings.snapshots}
    if 0 in due and step == 0:
        export(run, model, run.work / "snapshots" / "0")
    total, unit = (settings.tokens, "token") if settings.tokens else (60 * settings.minutes, "s")
    saved, start = time.monotonic(), time.monotonic() - seconds
    bar = tqdm(total=total, initial=total * settings.spent(step, seconds), desc="train", unit=unit, unit_scale=True)
    with bar, interruption() as interrupted:
        while (spent := settings.spent(step, seconds)) < 1:
            rate = learning_rate(settings, step, spent)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            with autocast(device.type):  # left after every step: inside it, casts of the weights are kept
                loss = losses_of(model, *batch(step)).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, seconds = step + 1, time.monotonic() - start
            bar.update(total * min(1, settings.spent(step, seconds)) - bar.n)
            if step % VALIDATION_STEPS == 0:
                with autocast(device.type):
                    validation = held_out_losses(model, held_out, bos).mean().item()
                bar.set_postfix_str(f"loss {loss.item():.3f}, validation {validation:.3f} nats per token")
            if (seen := step * at_once) in due:
                export(run, model, run.work / "snapshots" / str(due[seen]))
            if interrupted.is_set() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, model, optimizers, step, seconds)
                saved = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
    save_checkpoint(checkpoint, model, optimizers, step, seconds)
    seen = step * at_once
    cpu = f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, threads: {torch.get_num_threads()}"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    speed = {"seconds": round(seconds), "tokens_per_second": round(seen / seconds), "hardware": hardware}
    write_json(run.work / "trained.json", {"tokens_seen": seen, "epochs": round(seen / ids.size, 4), **speed})


def write_folder(run: Run) -> None:
    """model/ from the last checkpoint."""
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    model = untrained(run.settings, tokenizer.get_vocab_size(), tokenizer.token_to_id(EOT))
    restored(run.work / "checkpoint.safetensors", model, [])
    export(run, model, run.work / "model")


def export(run: Run, model: PreTrainedModel, folder: Path) -> None:
    """Weights in float16, configuration, tokenizer, in Hugging Face format; the folder is there once it is complete."""
    tokenizer = Tokenizer.from_file(str(run.work / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), EOT)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=run.settings.context, **special)
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    deepcopy(model).cpu().half().save_pretrained(making)
    fast.save_pretrained(making)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


@torch.no_grad()
def continuation(model: nn.Module, ids: list[int], length: int, temperature: float, seed: int) -> list[int]:
    """`length` further tokens: the likeliest each time at temperature 0, else drawn from a generator with that seed."""
    generator, ids = torch.Generator().manual_seed(seed), list(ids)
    for _ in range(length):
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu()
        drawn = torch.multinomial((logits / (temperature or 1)).softmax(-1), 1, generator=generator)
        ids.append(int(drawn if temperature else logits.argmax()))
    return ids[-length:]


def evaluation(folder: Path, held_out: list[str]) -> dict:
    """What the model in `folder` scores on the held-out passages, in float32, and what it writes.

    Nats per token over windows of the whole context, each opened by BOS, so the mean counts tokens with little context.
    Bits per character spread the same cost, `<|endoftext|>` included, over the characters of the passages.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} holds no finished model: {name} is missing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, ids = tokenizer.token_to_id(EOT), encoded(held_out, tokenizer)
    context, characters = model.config.max_position_embeddings, sum(map(len, held_out))
    losses = held_out_losses(model, windows(ids, context), bos)
    nats = losses.mean().item()
    samples = []
    for prompt in PROMPTS:
        for temperature, seed in ((0, 0), (0.8, 0), (0.8, 1)):
            start = [bos, *tokenizer.encode(prompt).ids]
            text = tokenizer.decode(continuation(model, start, min(50, context - len(start)), temperature, seed))
            samples.append({"prompt": prompt, "temperature": temperature, "seed": seed, "continuation": text})
    return {
        "weights_sha256": sha256(folder / "model.safetensors"),
        "held_out": {"passages": len(held_out), "characters": characters, "tokens": len(ids)},
        "nats_per_token": round(nats, 4),
        "standard_error": round((losses.std() / len(losses) ** 0.5).item(), 4),  # over windows
        "bits_per_character": round(nats * len(ids) / characters / math.log(2), 4),
        "samples": samples,
    }


def write_evaluation(run: Run) -> None:
    """model/evaluation.json and, last, model/training.json with settings, sizes, loss and speed."""
    measured = evaluation(run.work / "model", run.read("held_out.json"))
    write_json(run.work / "model" / "evaluation.json", measured)
    scores = {key: measured[key] for key in ("nats_per_token", "bits_per_character")}
    corpus = run.read("corpus.json") | {"sha256": run.read("run.json")["corpus"]}
    made = {"settings": asdict(run.settings), "corpus": corpus, **run.read("trained.json"), "held_out": scores}
    write_json(run.work / "model" / "training.json", made | {"date": date.today().isoformat()})


# name, what is there once it is done, what does it; a step reads only what the steps before it left
STEPS: list[tuple[str, str, Callable[[Run], None]]] = [
    ("tokenizer", "tokenizer.json", write_tokenizer),
    ("tokens", "corpus.json", write_tokens),
    ("train", "trained.json", write_weights),
    ("export", "model", write_folder),
    ("evaluate", "model/training.json", write_evaluation),
]


def claim_work_folder(run: Run) -> None:
    """Write down what this work folder is for; ValueError when something was made in it with other settings."""
    asked = json.loads(json.dumps(asdict(run.settings))) | {"corpus": sha256(*text_files(run.corpus))}
    asked["tokenizer"] = sha256(run.tokenizer) if run.tokenizer else None
    if not (run.work / "tokenizer.json").exists():  # the first result
        return write_json(run.work / "run.json", asked)
    found = run.read("run.json")
    differing = [key for key in asked if found.get(key) != asked[key]]
    if differing:
        what = ", ".join(f"{key} (there {str(found.get(key))[:12]}, asked {str(asked[key])[:12]})" for key in differing)
        way_out = "Go back to those, name another work folder with --work, or delete this one"
        raise ValueError(f"{run.work} holds a build with other settings: {what}. {way_out}.")


def build(run: Run, out: Path) -> None:
    """All steps that are not done yet, then `out`, complete or not at all."""
    record, finished = out / "training.json", run.work / "model" / "training.json"
    if record.exists() and finished.exists() and record.read_bytes() == finished.read_bytes():
        claim_work_folder(run)
        return print(f"{out} is finished already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something already: name a new folder")
    claim_work_folder(run)
    for name, result, step in STEPS:
        done = (run.work / result).exists()
        print(f"{name}: {'there already' if done else '...'}", flush=True)
        if not done:
            step(run)
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(run.work / "model", beside)
    if out.exists():
        out.rmdir()  # empty, as seen above
    beside.rename(out)
    print(f"{out} is finished; {run.work} is no longer needed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS_DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("out", type=Path, nargs="?", metavar="OUT_DIR")
    what.add_argument("--evaluate", type=Path, metavar="MODEL_DIR", help="measure this folder; train nothing")
    parser.add_argument("--work", type=Path, help="folder for the steps' results (default: OUT_DIR.work)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use as it is")
    parser.add_argument("--sibling", choices=FAMILIES, help="a smaller model of this family, with bookworm's tokenizer")
    parser.add_argument("--snapshots", type=int, nargs="+", default=[], metavar="TOKENS", help="keep the weights then")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    budget = parser.add_mutually_exclusive_group()
    default = f"{Settings.tokens:,}; of a sibling {SIBLING['tokens']:,}"
    budget.add_argument("--tokens", type=int, help=f"to train on (default: {default})")
    budget.add_argument("--minutes", type=float, help="of training")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # on a CPU, compiled code would add up gradients in whatever order its threads finish
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    try:
        if args.evaluate:
            measured = evaluation(args.evaluate, split_corpus(args.corpus)[0])
            write_json(args.evaluate / "evaluation.json", measured)
            print(json.dumps(measured, indent=1, ensure_ascii=False))
        else:
            sizes = SIBLING | {"family": args.sibling} if args.sibling else {}
            if args.minutes is not None or args.tokens is not None:
                sizes |= {"tokens": args.tokens, "minutes": args.minutes}
            settings = Settings(**sizes, seed=args.seed, snapshots=tuple(args.snapshots))
            tokenizer = args.tokenizer or (Path(__file__).with_name("tokenizer.json") if args.sibling else None)
            work = args.work or args.out.with_name(args.out.name + ".work")
            build(Run(args.corpus, work, settings, tokenizer), args.out)
    except KeyboardInterrupt:
        print("\nStopped. What was made is kept: the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"build.py: {error}")


if __name__ == "__main__":
    main()
