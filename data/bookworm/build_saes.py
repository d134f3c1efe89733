"""Train bookworm's sparse autoencoders, one per depth of the residual stream, with one command.

    python data/bookworm/build_saes.py CORPUS_DIR MODEL_DIR              # train, measure, write MODEL_DIR/saes
    python data/bookworm/build_saes.py CORPUS_DIR MODEL_DIR --evaluate   # measure what MODEL_DIR/saes holds

CORPUS_DIR is the folder of text that build.py reads, MODEL_DIR the folder that it wrote. The result is in sae-lens'
disk format, float16, with evaluation.json beside it. Ctrl-C loses nothing, a crash a tenth of the training: the same
command goes on where it was.

The training is sae-lens' own (MultiSAETrainer: every depth from one forward pass); ours are the order of the
activations and a decoder bias that starts at their mean. Position 0 and end-of-text tokens are left out: their norm
is far above that of all others.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from threading import Event

import numpy as np
import torch
import torch.nn.functional as F
from build import autocast, encoded, interruption, sha256, split_corpus, text_files, windows, write_json
from jaxtyping import Float, Int
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from helpers.activations import site
from helpers.models import is_centred, load_model
from helpers.prompts import first_token

EVALUATION_WINDOWS = 4_000  # about a million tokens, which the SAEs never train on
LOSS_WINDOWS = 400  # those of them on which the cross-entropy is measured
AT_ONCE = 16  # windows per forward pass
SCALE_BATCHES = 32  # batches from which the activations' scale and mean are taken

Ids = Int[np.ndarray, "window pos"]
Stream = dict[str, Float[Tensor, "token d_model"]]  # by hook point, in the order of depth


@dataclass(frozen=True)
class Settings:
    """Everything that decides which SAEs come out."""

    d_sae: int = 2048
    k: int = 36  # features per token
    tokens: int = 6_000_000
    batch: int = 1024  # tokens per step: many small steps, so that features come alive early
    rate: float = 1e-3
    warm_up: int = 100  # steps
    decay: float = 0.4  # share of the steps
    dead_after: int = 500  # steps without firing, from which on sae-lens' auxiliary loss holds
    buffer: int = 512  # windows whose tokens are shuffled together
    compile: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One build: the model, the text that its SAEs train on, where to work, with which settings."""

    model: TransformerBridge
    ids: Ids
    work: Path
    settings: Settings

    @property
    def device(self) -> str:
        return torch.device(self.model.cfg.device).type


def hook_points(model: TransformerBridge) -> list[str]:
    return [site(model, depth) for depth in range(model.cfg.n_layers + 1)]


def with_first(model: TransformerBridge, ids: Ids) -> Int[Tensor, "window 1+pos"]:
    """The windows behind the token that stands at position 0."""
    read = torch.from_numpy(ids.astype(np.int64)).to(model.cfg.device)
    return F.pad(read, (1, 0), value=first_token(model))


@torch.no_grad()
def stream(model: TransformerBridge, ids: Ids) -> Stream:
    """The residual stream at every depth and every token of text, windows one after the other."""
    read, found = with_first(model, ids), {}
    is_text = read[:, 1:] != first_token(model)

    def reader(name: str) -> Callable:
        def keep(resid: Tensor, hook) -> None:
            found[name] = resid[:, 1:][is_text]
            if len(found) == len(names):
                raise StopAtLayerException(resid)

        return keep

    names = hook_points(model)
    with model.hooks(fwd_hooks=[(name, reader(name)) for name in names]), suppress(StopAtLayerException):
        model.original_model(input_ids=read, use_cache=False)
    return found


def batches(run: Run, done: int) -> Iterator[Stream]:
    """Training batches from number `done` on, without end.

    A batch depends on the settings and its number alone, so training can go on from any of them.
    """
    settings, size = run.settings, run.settings.batch
    refill = 0
    while True:
        rows = np.arange(refill * settings.buffer, (refill + 1) * settings.buffer) % len(run.ids)
        ready = int((run.ids[rows] != first_token(run.model)).sum()) // size  # batches in these windows
        if done < ready:
            parts = []
            for start in range(0, len(rows), AT_ONCE):
                with autocast(run.device):
                    acts = stream(run.model, run.ids[rows[start : start + AT_ONCE]])
                parts.append({name: resid.bfloat16() for name, resid in acts.items()})
            shuffle = torch.Generator().manual_seed(settings.seed + refill)
            count = sum(len(next(iter(part.values()))) for part in parts)
            order = torch.randperm(count, generator=shuffle).to(run.model.cfg.device)
            mixed = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
            for start in range(done * size, ready * size, size):
                yield {name: acts[start : start + size].float() for name, acts in mixed.items()}
        refill, done = refill + 1, max(0, done - ready)


def unless(interrupted: Event, items: Iterator) -> Iterator:
    for item in items:
        if interrupted.is_set():
            raise KeyboardInterrupt
        yield item


def untrained(model: TransformerBridge, settings: Settings) -> dict[str, TopKTrainingSAE]:
    """One SAE per depth in sae-lens' own start, by hook point."""
    torch.manual_seed(settings.seed)
    saes = {}
    for name in hook_points(model):
        metadata = SAEMetadata(
            model_name=model.cfg.model_name.removeprefix("local--"), hook_name=name,
            prepend_bos=True, context_size=model.cfg.n_ctx,
            model_from_pretrained_kwargs={"center_writing_weights": is_centred(model)},
            exclude_special_tokens=True, training_tokens=settings.tokens,
        )  # fmt: skip
        cfg = TopKTrainingSAEConfig(
            d_in=model.cfg.d_model, d_sae=settings.d_sae, k=settings.k, device=str(model.cfg.device), metadata=metadata,
            normalize_activations="expected_average_only_in",  # a factor, folded into the weights at the end
        )  # fmt: skip
        saes[name] = TopKTrainingSAE(cfg)
        if settings.compile:
            saes[name].training_forward_pass = torch.compile(saes[name].training_forward_pass)
    return saes


@torch.no_grad()
def start_at_the_mean(trainer: MultiSAETrainer, sample: list[Stream]) -> None:
    """Let sae-lens take the activations' scale from the sample, and put their mean into the decoder bias.

    From a bias of zero, every feature first has to carry the mean, and more of them never come alive.
    """
    for name, one in trainer.trainers.items():
        acts = [batch[name] for batch in sample]
        one.activation_scaler.estimate_scaling_factor(one.sae.cfg.d_in, iter(acts), len(acts))
        one.sae.b_dec.copy_(one.activation_scaler(torch.cat(acts)).mean(0))


def trained(run: Run) -> dict[str, TopKTrainingSAE]:
    """All SAEs at the end of training, which goes on from the newest checkpoint in the work folder."""
    settings, checkpoints = run.settings, run.work / "checkpoints"
    steps = settings.tokens // settings.batch
    cfg = SAETrainerConfig(
        total_training_samples=steps * settings.batch, train_batch_size_samples=settings.batch,
        lr=settings.rate, lr_end=settings.rate,  # the rate at which the decay to zero begins
        lr_warm_up_steps=settings.warm_up, lr_decay_steps=int(steps * settings.decay),
        dead_feature_window=settings.dead_after,
        autocast=autocast(run.device)._enabled, device=run.device,
        n_checkpoints=9, checkpoint_path=str(checkpoints),
    )  # fmt: skip
    saes = untrained(run.model, settings)
    trainer = MultiSAETrainer(
        cfg, saes, {name: name for name in saes}, iter(()),
        save_checkpoint_fn=lambda checkpoint_path: (checkpoint_path / "complete").touch(),
    )  # fmt: skip
    done = max((int(path.parent.name) for path in checkpoints.glob("*/complete")), default=0)
    trainer.checkpoint_thresholds.append(cfg.total_training_samples - 1)  # so that a stop while measuring loses nothing
    if done:
        trainer.load_checkpoint(checkpoints / str(done))
        for one in (trainer, *trainer.trainers.values()):  # sae-lens' own checkpoints do not count their last step
            one.n_training_steps = done // settings.batch
        trainer.checkpoint_thresholds = [at for at in trainer.checkpoint_thresholds if at > done]
    else:
        start_at_the_mean(trainer, list(islice(batches(run, 0), SCALE_BATCHES)))
    with interruption() as interrupted:
        trainer.data_provider = unless(interrupted, batches(run, trainer.n_training_steps))
        try:
            return trainer.fit()
        except KeyboardInterrupt:  # comes between two steps
            trainer.save_checkpoint(str(trainer.n_training_samples))
            raise


@torch.no_grad()
def losses(model: TransformerBridge, ids: Ids, replaced: dict[str, Callable[[Tensor], Tensor]]) -> Float[Tensor, "row"]:
    """Mean cross-entropy of each window (nats per token) when functions replace the stream behind position 0."""

    def replacing(function: Callable) -> Callable:
        return lambda resid, hook: torch.cat([resid[:, :1], function(resid[:, 1:])], 1)

    found = []
    with model.hooks(fwd_hooks=[(name, replacing(function)) for name, function in replaced.items()]):
        for start in range(0, len(ids), AT_ONCE):
            read = with_first(model, ids[start : start + AT_ONCE])
            logits = model.original_model(input_ids=read, use_cache=False).logits[:, :-1].float()
            found.append(F.cross_entropy(logits.transpose(1, 2), read[:, 1:], reduction="none").mean(1).double())
    return torch.cat(found)


@torch.no_grad()
def evaluation(model: TransformerBridge, ids: Ids, folder: Path) -> list[dict]:
    """What each SAE in `folder` reaches on these windows, in float32, one row per depth.

    explained_variance: 1 - sum |x - x'|^2 / sum |x - mean|^2 over tokens. l0: features that fire per token. dead: share
    of features that never fire. loss_recovered: (zero - replaced) / (zero - model), cross-entropies with the stream
    behind position 0 set to zero, replaced by its reconstruction, and as it is.
    """
    names = hook_points(model)
    saes = {name: SAE.load_from_disk(folder / name, dtype="float32", device=str(model.cfg.device)) for name in names}
    d_sae = next(iter(saes.values())).cfg.d_sae
    fired = {name: torch.zeros(d_sae, device=model.cfg.device) for name in names}
    error, square = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    sums = {name: torch.zeros(model.cfg.d_model, dtype=torch.double, device=model.cfg.device) for name in names}
    count = 0
    for start in tqdm(range(0, len(ids), AT_ONCE), "measuring", unit=f"x{AT_ONCE} windows"):
        acts = stream(model, ids[start : start + AT_ONCE])
        count += len(acts[names[0]])
        for name, resid in acts.items():
            features = saes[name].encode(resid)
            error[name] += (resid - saes[name].decode(features)).pow(2).sum().item()
            square[name] += resid.pow(2).sum().item()
            sums[name] += resid.double().sum(0)
            fired[name] += (features != 0).sum(0)
    part = ids[:LOSS_WINDOWS]
    as_it_is = losses(model, part, {}).mean().item()
    rows = []
    for depth, name in enumerate(tqdm(names, "cross-entropy", unit="depth")):
        total = square[name] - (sums[name].pow(2).sum() / count).item()
        zero = losses(model, part, {name: torch.zeros_like}).mean().item()
        replaced = losses(model, part, {name: saes[name]}).mean().item()
        row = {
            "depth": depth, "hook_point": name,
            "explained_variance": 1 - error[name] / total, "l0": fired[name].sum().item() / count,
            "dead": (fired[name] == 0).double().mean().item(),
            "loss": as_it_is, "loss_replaced": replaced, "loss_zero": zero,
            "loss_recovered": (zero - replaced) / (zero - as_it_is),
        }  # fmt: skip
        rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def write_evaluation(model: TransformerBridge, ids: Ids, folder: Path) -> None:
    """`folder`/evaluation.json, with a checksum of the weights that were measured."""
    weights = [folder / name / "sae_weights.safetensors" for name in hook_points(model)]
    tokens = int((ids != first_token(model)).sum())
    measured = {"weights_sha256": sha256(*weights), "tokens": tokens, "depths": evaluation(model, ids, folder)}
    write_json(folder / "evaluation.json", measured)


def split_windows(corpus: Path, model_dir: Path, context: int) -> tuple[Ids, Ids]:
    """Windows to train on and `EVALUATION_WINDOWS` others (at most a tenth), in one random order of the corpus."""
    ids = encoded(split_corpus(corpus)[1], Tokenizer.from_file(str(model_dir / "tokenizer.json")), progress=True)
    whole = windows(ids, context - 1)
    order = np.random.default_rng(0).permutation(len(whole))
    kept = min(EVALUATION_WINDOWS, len(whole) // 10)
    if not kept:
        raise ValueError(f"{corpus} is too small: {len(whole)} windows of {context - 1} tokens, and 10 are needed")
    return whole[order[kept:]], whole[np.sort(order[:kept])]


def build(corpus: Path, model_dir: Path, settings: Settings, work: Path) -> None:
    """MODEL_DIR/saes, complete or not at all."""
    out, asked = model_dir / "saes", asdict(settings) | {"corpus": sha256(*text_files(corpus))}
    asked["model"] = sha256(model_dir / "model.safetensors")
    if out.exists():
        raise ValueError(f"{out} is there already: move it away to train again, or measure it with --evaluate")
    if (work / "run.json").exists() and json.loads((work / "run.json").read_text(encoding="utf-8")) != asked:
        raise ValueError(f"{work} holds a build with other settings: name another with --work, or delete it")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "run.json", asked)
    model = load_model(str(model_dir))
    train, held_out = split_windows(corpus, model_dir, model.cfg.n_ctx)
    made = work / "saes"
    shutil.rmtree(made, ignore_errors=True)
    for name, sae in trained(Run(model, train, work, settings)).items():
        sae.cfg.dtype, sae.cfg.device = "float16", "cpu"
        sae.half().save_inference_model(made / name)
    write_evaluation(model, held_out, made)
    write_json(made / "training.json", asked)
    beside = out.with_name("saes.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(made, beside)
    beside.rename(out)
    print(f"{out} is finished; {work} is no longer needed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS_DIR")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--evaluate", action="store_true", help="measure the SAEs that are there; train nothing")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: MODEL_DIR.saes.work)")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="to train on (default: %(default)s)")
    args = parser.parse_args()
    try:
        if args.evaluate:
            model = load_model(str(args.model))
            write_evaluation(model, split_windows(args.corpus, args.model, model.cfg.n_ctx)[1], args.model / "saes")
        else:
            work = args.work or args.model.with_name(args.model.name + ".saes.work")
            build(args.corpus, args.model, Settings(tokens=args.tokens), work)
    except KeyboardInterrupt:
        print("\nStopped. What was made is kept: the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"build_saes.py: {error}")


if __name__ == "__main__":
    main()
