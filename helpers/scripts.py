"""Tokens of another script, and how likely the model finds them: does steering in one language leak into another?"""

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.config import CFG
from helpers.continuations import log_probs
from helpers.passes import Batch
from helpers.stats import interval, mean_interval
from helpers.steering import Method, Steer

SCRIPTS = {"zh": "CJK", "ru": "CYRILLIC"}  # by language, as Unicode names of letters begin


def tokens_of_script(model: TransformerBridge, script: str) -> Int[Tensor, "id"]:
    """The ids of all tokens whose letters are of this script, which Unicode names begin with: CJK, CYRILLIC, LATIN."""
    vocabulary = model.tokenizer.batch_decode([[id_] for id_ in range(min(len(model.tokenizer), model.cfg.d_vocab))])
    special = set(model.tokenizer.all_special_ids)
    found = [i for i, text in enumerate(vocabulary) if i not in special and _is_of(text, script)]
    return torch.tensor(found, dtype=torch.long)


def first_tokens(model: TransformerBridge, words: Sequence[str], script: str) -> Int[Tensor, "id"]:
    """The ids with which the words begin, at the start of a text or after a space; bits of letters are left out."""
    starts = [
        model.tokenizer(before + word, add_special_tokens=False)["input_ids"][:2]
        for word in words
        for before in ("", " ")
    ]
    firsts = {next((i for i in ids if model.tokenizer.decode([i]).strip()), None) for ids in starts if ids}
    kept = sorted(i for i in firsts if i is not None and _is_of(model.tokenizer.decode([i]), script))
    return torch.tensor(kept, dtype=torch.long)


def masses(
    model: TransformerBridge,
    texts: Sequence[str],
    ids: Mapping[str, Int[Tensor, "..."]],
    steer: Steer | None = None,
) -> pd.DataFrame:
    """The probability that each text goes on with one of these tokens: one row per run, one column per set of ids."""
    found = {name: torch.zeros(len(texts), dtype=torch.double) for name in ids}

    def watch(rows: Tensor, batch: Batch, logits: Tensor, stream: dict[int, Tensor]) -> None:
        probability = logits.double().softmax(-1)
        for name, chosen in ids.items():
            found[name][rows] = probability[:, chosen.to(logits.device)].sum(-1).cpu()

    log_probs(model, texts, [], steer, watch=watch)
    return pd.DataFrame({name: mass.numpy() for name, mass in found.items()})


def leaks(
    model: TransformerBridge,
    texts: Sequence[str],
    ids: Mapping[str, Int[Tensor, "..."]],
    depth: int,
    methods: Mapping[str, Method],
    strengths: pd.DataFrame,
) -> pd.DataFrame:
    """How steering changes `masses`: tokens, dose, method, value, low, high; no rows where a set has no ids.

    `strengths` has the strength of every method and draw at each dose (see `doses.Meter.equal`). A method with one draw
    gets an interval over texts, one with several (random directions) the median and the quantiles over its draws.
    """
    if not all(map(len, ids.values())):
        return pd.DataFrame(columns=["tokens", "dose", "method", "value", "low", "high"])
    before, rows = masses(model, texts, ids), []
    for dose, at_dose in strengths[strengths["depth"] == depth].dropna(subset="strength").groupby("dose"):
        for name, method in methods.items():
            mine, changes = at_dose[at_dose["method"] == name], []
            for run in mine.itertuples():
                draw, strength = torch.full((len(texts),), run.draw), torch.full((len(texts),), run.strength)
                changes.append(masses(model, texts, ids, Steer(method, (depth,), draw, strength)) - before)
            for tokens in ids if changes else ():
                by_draw = torch.tensor(np.stack([change[tokens] for change in changes]))
                generator = torch.Generator().manual_seed(CFG.seed)
                if len(by_draw) == 1:
                    value, *ends = mean_interval(by_draw[0], generator, CFG.bootstrap_draws, CFG.confidence)
                else:
                    means = by_draw.mean(-1)
                    value, ends = means.quantile(0.5).item(), [end.item() for end in interval(means, CFG.confidence)]
                rows.append((tokens, dose, name, value, *ends))
    return pd.DataFrame(rows, columns=["tokens", "dose", "method", "value", "low", "high"])


def _is_of(text: str, script: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    whole = "\ufffd" not in text  # which stands for a part of a letter
    return whole and bool(letters) and all(unicodedata.name(letter, "").startswith(script) for letter in letters)
