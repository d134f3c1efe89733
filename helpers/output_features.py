"""Which SAE features steer: those whose decoder rows raise tokens, whatever they fire on (Arad et al. 2025)."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.config import CFG
from helpers.continuations import log_probs
from helpers.directions import lens
from helpers.features import at_words
from helpers.passes import Batch
from helpers.prompts import key_words
from helpers.stats import bootstrap_picks, interval
from helpers.steering import added


def input_scores(model: TransformerBridge, sae, emotion: str) -> Float[Tensor, "d_sae"]:
    """How much more each feature fires at the emotion's key word than at its place in matched sentences without it.

    Mean activation over the `find` sentences of data/prompts/key_words.csv minus that over the matched ones.
    """
    acts, minus = (at_words(model, sae, key_words(kind, "find", emotion)) for kind in ("key word", "matched"))
    return acts.mean(0) - minus.mean(0)


def output_scores(
    model: TransformerBridge,
    depth: int,
    vectors: Float[Tensor, "feature d_model"],
    texts: Sequence[str],
    top: int = 20,
) -> pd.DataFrame:
    """How much each vector, added to the texts, brings forth the tokens that it promises: feature (its row), score.

    The promised tokens are the `top` that the logit lens of the vector raises most. After a text read with the vector
    added, the score is (1 - rank / vocabulary) * probability, of the best rank and probability among them (Arad et al.
    2025, eq. 2); the mean over texts. Near 0 for a vector that changes no prediction, at most 1. `unsteered` is the
    same without the vector.
    """
    promised = lens(model, vectors).topk(top).indices
    runs = [(feature, text) for feature in range(len(vectors)) for text in texts]
    feature = torch.tensor([number for number, _ in runs])
    scores = {}
    for name, steer in (("score", added(depth, vectors[feature])), ("unsteered", None)):
        found = torch.zeros(len(runs))

        def watch(rows: Tensor, batch: Batch, logits: Tensor, stream: dict[int, Tensor], found=found) -> None:
            found[rows] = _score(logits, promised[feature[rows]].to(logits.device)).cpu()

        log_probs(model, [text for _, text in runs], [], steer, watch=watch)
        scores[name] = found.view(len(vectors), len(texts)).mean(-1).tolist()
    return pd.DataFrame({"feature": range(len(vectors)), **scores})


def gain(
    table: pd.DataFrame, by: str, instead_of: str, effect: str, best: int, generator: Generator
) -> tuple[float, float, float]:
    """What choosing the `best` rows by one column gains in mean effect over choosing them by another, with an interval.

    Bootstrap over rows; every draw chooses anew, the earlier of equal rows first.
    """
    picks = torch.cat([torch.arange(len(table))[None], bootstrap_picks(CFG.bootstrap_draws, len(table), generator)])
    worth = torch.tensor(table[effect].to_numpy())[picks]

    def chosen(column: str) -> Float[Tensor, "draw"]:
        order = torch.tensor(table[column].to_numpy())[picks].sort(descending=True, stable=True).indices
        return worth.gather(1, order[:, :best]).mean(-1)

    gained = chosen(by) - chosen(instead_of)
    low, high = interval(gained[1:], CFG.confidence)
    return gained[0].item(), low.item(), high.item()


def _score(logits: Float[Tensor, "row vocab"], promised: Int[Tensor, "row top"]) -> Float[Tensor, "row"]:
    best = logits.gather(-1, promised).amax(-1, keepdim=True)
    rank = (logits > best).sum(-1)
    probability = logits.softmax(-1).gather(-1, promised).amax(-1)
    return (1 - rank / logits.shape[-1]) * probability
