"""Tokens of another script, and how likely the model finds them: does steering in one language leak into another?"""

import unicodedata
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.config import CFG
from helpers.continuations import log_probs
from helpers.passes import Batch
from helpers.prompts import vocabulary
from helpers.steering import Method, Steer
from helpers.sweeps import over_prompts

SCRIPTS = {"zh": "CJK", "ru": "CYRILLIC"}  # by language, as Unicode names of letters begin


def tokens_of_script(model: TransformerBridge, script: str) -> Int[Tensor, "id"]:
    """The ids of all tokens whose letters are of this script, which Unicode names begin with: CJK, CYRILLIC, LATIN."""
    texts = model.tokenizer.batch_decode([[id_] for id_ in range(vocabulary(model))])
    special = set(model.tokenizer.all_special_ids)
    found = [i for i, text in enumerate(texts) if i not in special and _is_of(text, script)]
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

    `strengths` has the strength of every method and draw at each dose (see `doses.Meter.equal`). Intervals are those of
    `sweeps.over_prompts`.
    """
    planned = strengths[(strengths["depth"] == depth) & strengths["method"].isin(list(methods))]
    planned = planned.dropna(subset="strength").sort_values("dose", kind="stable")
    if planned.empty or not all(map(len, ids.values())):
        return pd.DataFrame(columns=["tokens", "dose", "method", "value", "low", "high"])
    before, runs = masses(model, texts, ids), []
    for run in planned.itertuples():
        each = torch.full((len(texts),), run.draw), torch.full((len(texts),), float(run.strength))
        change = masses(model, texts, ids, Steer(methods[run.method], (depth,), *each)) - before
        named = change.assign(dose=run.dose, method=run.method, draw=run.draw, prompt=range(len(texts)))
        runs.append(named.melt(["dose", "method", "draw", "prompt"], var_name="tokens"))
    by, generator = ["tokens", "dose", "method"], torch.Generator()
    return pd.concat(
        [
            over_prompts(part, "value", generator.manual_seed(CFG.seed), by)
            for _, part in pd.concat(runs).groupby(["dose", "method", "tokens"], sort=False)
        ],
        ignore_index=True,
    )


def _is_of(text: str, script: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    whole = "\ufffd" not in text  # which stands for a part of a letter
    return whole and bool(letters) and all(unicodedata.name(letter, "").startswith(script) for letter in letters)
