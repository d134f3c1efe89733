"""What a strength does to neutral text, and the strength that does as much: doses.

A dose is the KL divergence from the unsteered to the steered model's prediction of the next token, in nats, mean over
all tokens of neutral texts. Two methods are compared at equal dose, since a coefficient means something else for each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import progress, tokens_at_once
from helpers.continuations import batches_of, prompt_ids
from helpers.passes import left_padded, pointed, prefilled
from helpers.steering import Method, Steer, steered
from helpers.sweeps import Methods

SMALLEST, GRID, CLOSE = 0.01, 5, 0.03  # of the cap; points from there to the cap; relative error of a dose


@dataclass(frozen=True)
class Meter:
    """Neutral texts and what the unsteered model predicts after each of their tokens."""

    model: TransformerBridge
    ids: list[list[int]]
    unsteered: list[Float[Tensor, "... vocab"]]  # log probabilities, by text, position 0 left out

    @classmethod
    def on(cls, model: TransformerBridge, texts: Sequence[str]) -> "Meter":
        ids = prompt_ids(model, texts)
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        _predict(model, ids, range(len(ids)), None, found.__setitem__)
        if any(each.isnan().any() for each in found):
            raise ValueError("the model overflows without steering: load it in float32")
        return cls(model, ids, found)

    def effects(
        self, depth: int, method: Method, draw: Int[Tensor, "run"], strength: Float[Tensor, "run"]
    ) -> tuple[Float[Tensor, "run"], Float[Tensor, "run"]]:
        """The dose of each run, and how much it raises the text's own negative log likelihood, nats per token.

        Raises ValueError for a strength at which the model overflows.
        """
        count, tokens = len(self.ids), sum(len(ids) - 1 for ids in self.ids)
        kl, loss = torch.zeros(len(draw)), torch.zeros(len(draw))

        def keep(row: int, after: Tensor) -> None:
            run, text = divmod(row, count)
            fewer = self.unsteered[text] - after
            kl[run] += (self.unsteered[text].exp() * fewer).sum().cpu()
            said = torch.tensor(self.ids[text][2:], device=after.device)[:, None]
            loss[run] += fewer[:-1].gather(-1, said).sum().cpu()

        of_texts = [each.repeat_interleave(count) for each in (draw, strength)]
        steer = Steer(method, (depth,), *of_texts, "prompt")
        _predict(self.model, self.ids, [*range(count)] * len(draw), steer, keep)
        if not (kl + loss).isfinite().all():
            how = steer.of(int((~(kl + loss).isfinite()).nonzero()[0, 0]) * count)
            raise ValueError(f"the model overflows with {how}: stay nearer to 0, or load the model in float32")
        return kl / tokens, loss / (tokens - count)

    def strengths(
        self, depth: int, method: Method, doses: Sequence[float], cap: float = 2.0, sign: int = 1
    ) -> Float[Tensor, "draw dose"]:
        """The strength of each draw that causes each dose, within 3 %; NaN if none up to `cap` does.

        A grid of strengths finds between which two the dose is first reached; bisection does the rest, at the strength
        that a power law through both ends gives, or at their middle when that does not come nearer. Negative strengths
        with a `sign` of -1.
        """
        if not all(0 < each < torch.inf for each in (*doses, cap)):
            raise ValueError(f"doses and the cap must be above 0 and finite, got {list(doses)} and {cap}")
        grid = cap * torch.logspace(torch.tensor(SMALLEST).log10(), 0, GRID)
        shape = (len(method), len(doses))
        draw, wanted = torch.arange(len(method))[:, None].expand(shape), torch.tensor(list(doses)).expand(shape)

        def dose_of(draw: Tensor, strength: Tensor) -> Tensor:
            return self.effects(depth, method, draw, sign * strength)[0]

        on_grid = torch.full((len(method), GRID), torch.inf)  # stays so beyond a point with all the doses
        short = torch.arange(len(method))
        for point, strength in enumerate(grid):
            if len(short):
                on_grid[short, point] = dose_of(short, strength.expand(len(short)))
                short = short[on_grid[short, point] < max(doses)]
        enough = on_grid[:, None] >= wanted[..., None]
        reached, first = enough.any(-1), enough.int().argmax(-1)
        high, high_dose = grid[first], on_grid.gather(1, first)
        low, low_dose = grid[(first - 1).clamp(min=0)], on_grid.gather(1, (first - 1).clamp(min=0))
        low[first == 0], low_dose[first == 0] = high[first == 0] / 1e3, high_dose[first == 0] / 1e6  # about quadratic
        guessed = first == 0
        best, error = high.clone(), high_dose / wanted - 1
        for turn in range(40):  # far more than a usual scale needs
            open_ = reached & (error > CLOSE)
            if not open_.any():
                break
            known = low_dose.clamp(min=1e-12)  # rounding may leave less than nothing
            share = ((wanted / known).log() / (high_dose / known).log()).clamp(0.02, 0.98)
            middle = low * (high / low) ** (share if turn % 3 < 2 else 0.5)
            found = torch.zeros(shape)
            found[open_] = dose_of(draw[open_], middle[open_])
            over = open_ & (found >= wanted)
            under = open_ & (found < wanted)
            high[over], high_dose[over] = middle[over], found[over]
            guessed &= ~under
            lower = over & guessed  # the guess may lie above the answer
            low[lower], low_dose[lower] = middle[lower] / 1e3, found[lower] / 1e6
            low[under], low_dose[under] = middle[under], found[under]
            best[open_], error[open_] = middle[open_], (found / wanted - 1).abs()[open_]
        return sign * best.where(reached & (error <= CLOSE), torch.nan)

    def equal(self, methods: Methods, doses: Sequence[float], caps: Mapping[str, float] | None = None) -> pd.DataFrame:
        """The strength at which every draw of every method causes each dose: depth, method, draw, dose, strength.

        The table that `sweeps.sweep` takes; the strength is missing where a dose is not reached at the method's cap
        (2 without one of its own).
        """
        rows = []
        for depth, here in methods.items():
            for name, method in here.items():
                found = self.strengths(depth, method, doses, (caps or {}).get(name, 2.0)).tolist()
                rows += [
                    (depth, name, draw, dose, strength)
                    for draw, strengths in enumerate(found)
                    for dose, strength in zip(doses, strengths)
                ]
        return pd.DataFrame(rows, columns=["depth", "method", "draw", "dose", "strength"])


@torch.no_grad()
def _predict(
    model: TransformerBridge,
    ids: list[list[int]],
    texts: Sequence[int],
    steer: Steer | None,
    keep: Callable[[int, Tensor], None],
) -> None:
    """Call `keep(row, log probabilities after each token but position 0)` for every row, which reads one text."""
    before = [ids[text] for text in texts]
    length = torch.tensor([len(each) for each in before])
    with steered(model, steer) as steering, progress(len(texts), "text", "dosing") as bar:
        for rows in batches_of(before, length, tokens_at_once(model)):
            batch = left_padded(model, [before[row] for row in rows], 0)
            pointed(model, steering, steer, rows, batch)
            logits = prefilled(model, batch, steering, steer, batch.width)[1].float()
            for row, here in zip(rows.tolist(), logits):
                keep(row, here[1 - len(before[row]) :].log_softmax(-1))
            bar.update(len(rows))
