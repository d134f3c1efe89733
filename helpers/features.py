"""What SAE features do on text: which fire at a word, how often, in which passages; and directions written as features.

An activation is what the SAE's encoder gives: how much of its decoder row a feature adds, in the units of the residual
stream where rows have length 1. A feature fires where its activation is not zero. `sae` comes from `saes.load_sae`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import at_positions, every_token, progress, site
from helpers.directions import unit
from helpers.prompts import token_strings, tokens, word_positions
from helpers.saes import checked_features
from helpers.stats import finite

TOKENS_AT_ONCE = 2048  # encoded together: so many rows of d_sae numbers exist at a time
TEXTS_AT_ONCE = 32


@torch.no_grad()
def encoded(sae, acts: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_sae"]:
    """The activation of every feature, on the CPU."""
    rows = acts.reshape(-1, acts.shape[-1]).split(TOKENS_AT_ONCE)
    return torch.cat([sae.encode(part.to(sae.W_dec.device)).cpu() for part in rows]).reshape(*acts.shape[:-1], -1)


def depth_of(model: TransformerBridge, sae) -> int:
    """The depth at which the SAE reads."""
    names = [site(model, depth) for depth in range(model.cfg.n_layers + 1)]
    return names.index(sae.cfg.metadata.hook_name)


def at_words(model: TransformerBridge, sae, table: pd.DataFrame) -> Float[Tensor, "prompt d_sae"]:
    """Every feature's activation at the last token of each row's `word` in its `sentence`; nothing else is encoded."""
    positions = word_positions(model, table["sentence"].tolist(), table["word"].tolist())
    return encoded(sae, at_positions(model, table["sentence"].tolist(), positions, [depth_of(model, sae)])[:, 0])


def strongest(model: TransformerBridge, sae, texts: Sequence[str]) -> Float[Tensor, "prompt d_sae"]:
    """Every feature's largest activation over the tokens of each text, position 0 left out."""
    depth, found = depth_of(model, sae), []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        acts = encoded(sae, every_token(model, part, [depth])[:, 0])
        found += [one.amax(0) for one in acts.split((tokens(model, part).length - 1).tolist())]
    return torch.stack(found)


def token_activations(model: TransformerBridge, sae, text: str, features: Sequence[int] | None = None) -> pd.DataFrame:
    """One row per token but position 0 and feature: pos, token, feature, activation.

    Of these features; without them, of every feature that fires, strongest first at each token.
    """
    acts = encoded(sae, every_token(model, [text], [depth_of(model, sae)])[:, 0])
    words = token_strings(model, text)[1:]
    rows = []
    for pos, (word, here) in enumerate(zip(words, acts), 1):
        which = here.argsort(descending=True)[: int((here != 0).sum())] if features is None else features
        chosen = checked_features([int(feature) for feature in which], len(here), depth_of(model, sae))
        rows += [(pos, word, feature, here[feature].item()) for feature in chosen]
    return pd.DataFrame(rows, columns=["pos", "token", "feature", "activation"])


def around_words(
    model: TransformerBridge, sae, table: pd.DataFrame, features: Sequence[int], before: int = 3, after: int = 5
) -> pd.DataFrame:
    """Activations at tokens near each row's `word`: id, offset (0 at its last token), feature, activation."""
    positions = word_positions(model, table["sentence"].tolist(), table["word"].tolist())
    rows = []
    for row, position in zip(table.itertuples(), positions.tolist()):
        near = token_activations(model, sae, row.sentence, features)
        rows.append(near.assign(id=row.id, offset=near["pos"] - position))
    found = pd.concat(rows, ignore_index=True)
    return found[found["offset"].between(-before, after)][["id", "offset", "feature", "activation"]]


def top(
    acts: Float[Tensor, "prompt d_sae"], count: int, minus: Float[Tensor, "other d_sae"] | None = None
) -> pd.DataFrame:
    """The features with the highest mean activation: rank, feature, activation, fires (share of the prompts).

    With `minus`, the mean over those other prompts is taken off first. Features without a positive mean are left out.
    """
    mean = acts.mean(0) if minus is None else acts.mean(0) - minus.mean(0)
    best = mean.topk(min(count, len(mean))).indices
    best = best[mean[best] > 0]
    rows = [(rank, int(f), mean[f].item(), (acts[:, f] > 0).float().mean().item()) for rank, f in enumerate(best, 1)]
    return pd.DataFrame(rows, columns=["rank", "feature", "activation", "fires"])


@dataclass(frozen=True)
class OnPassages:
    """What features did on passages of text: how often each fires, and the activations of a few at every token."""

    texts: list[str]
    features: list[int]
    frequency: Float[Tensor, "d_sae"]  # share of tokens on which each feature of the SAE fires
    acts: Float[Tensor, "token chosen"]  # of `features`, text after text, position 0 left out
    first: list[int]  # the row of `acts` at which each text begins, and the end

    def strongest(self, feature: int, count: int = 5) -> pd.DataFrame:
        """The passages in which the feature fires most: rank, passage, pos (of the strongest token), activation."""
        acts = self.acts[:, self.features.index(feature)]
        peaks = [acts[start:end].max(0) for start, end in zip(self.first, self.first[1:])]
        order = sorted(range(len(peaks)), key=lambda i: -peaks[i].values.item())[:count]
        rows = [(rank, i, 1 + int(peaks[i].indices), peaks[i].values.item()) for rank, i in enumerate(order, 1)]
        table = pd.DataFrame(rows, columns=["rank", "passage", "pos", "activation"])
        return table[table["activation"] > 0].reset_index(drop=True)


def on_passages(
    model: TransformerBridge,
    sae,
    texts: Sequence[str],
    features: Sequence[int],
    stream: Float[Tensor, "token d_model"] | None = None,
) -> OnPassages:
    """The SAE over whole passages, a few at a time; of all activations only those of `features` are kept.

    `stream` is the texts' `every_token` at the SAE's depth, where one pass has read it for several SAEs.
    """
    depth = depth_of(model, sae)
    features = checked_features(features, sae.cfg.d_sae, depth)
    first = [0, *(tokens(model, texts).length - 1).cumsum(0).tolist()]
    if stream is not None and len(stream) != first[-1]:
        raise ValueError(f"the stream has {len(stream)} tokens, but the texts have {first[-1]}")
    fired, kept = torch.zeros(sae.cfg.d_sae), []
    with progress(len(texts), "text", "encoding") as bar:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[start : start + TEXTS_AT_ONCE]
            read = slice(first[start], first[start + len(part)])
            here = every_token(model, part, [depth])[:, 0] if stream is None else stream[read]
            for rows in here.split(TOKENS_AT_ONCE):
                acts = encoded(sae, rows)
                fired += (acts != 0).sum(0)
                kept.append(acts[:, features])
            bar.update(len(part))
    acts = torch.cat(kept)
    return OnPassages(list(texts), features, fired / len(acts), acts, first)


def pursuit(
    targets: dict[str, Float[Tensor, "d_model"]], rows: Float[Tensor, "d_sae d_model"], steps: int
) -> pd.DataFrame:
    """Each target as a sum of few decoder rows, one more at every step: target, step, feature, coefficient, explained.

    Orthogonal matching pursuit (Pati et al. 1993): the row most aligned with what is left is added, with either sign,
    and all coefficients are fitted anew. `explained` is the share of the squared norm; `coefficient`, for rows of
    length 1, that of the last step. A target of which nothing is left takes no further steps.
    """
    dictionary, found = unit(rows).double(), []
    with progress(len(targets), "direction", "matching pursuit") as bar:
        for name, target in targets.items():
            target, chosen, explained = finite(target, f"the numbers of {name!r}").double(), [], []
            left = target
            while len(chosen) < steps and left.norm() > 1e-6 * target.norm():
                chosen.append(int((dictionary @ left).abs().argmax()))
                coefficients = torch.linalg.lstsq(dictionary[chosen].T, target[:, None]).solution
                left = target - dictionary[chosen].T @ coefficients[:, 0]
                explained.append(1 - (left.norm() / target.norm()).square().item())
            last = coefficients[:, 0].tolist() if chosen else []
            found += [(name, step, *row) for step, row in enumerate(zip(chosen, last, explained), 1)]
            bar.update()
    return pd.DataFrame(found, columns=["target", "step", "feature", "coefficient", "explained"])
