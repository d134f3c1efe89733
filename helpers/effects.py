"""Published effects of a conversation, each as a statistic with an interval over conversations.

Of the "CT scan" of a chat model (Activation Lab 2026): joy bias, calm shock absorber, fading memory. There, each was
read off a single conversation.
"""

from math import nan

import torch
from jaxtyping import Bool, Float
from scipy.stats import ttest_1samp, ttest_ind
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from helpers.config import CFG
from helpers.stats import bootstrap_picks, interval

Value = tuple[float, float, float]  # with the ends of its interval


def bias(readouts: Float[Tensor, "conversation emotion"], emotion: int, generator: Generator) -> Value:
    """How much more one reference reads than the mean of the others, in SDs over these; interval over conversations.

    Zero where the others read alike. Raises ValueError for fewer than three references: one other has no spread.
    """
    if readouts.shape[-1] < 3:
        raise ValueError(f"a bias needs at least two other references to compare with, got {readouts.shape[-1] - 1}")
    others = [i for i in range(readouts.shape[-1]) if i != emotion]

    def of_means(means: Float[Tensor, "*draw emotion"]) -> Float[Tensor, "*draw"]:
        spread = means[..., others].std(-1)
        ahead = means[..., emotion] - means[..., others].mean(-1)
        floor = 1e-6 * means[..., others].abs().mean(-1)  # below it only rounding is left
        return ahead / spread.where(spread > floor, torch.inf)

    picks = bootstrap_picks(CFG.bootstrap_draws, len(readouts), generator)
    low, high = interval(of_means(readouts[picks].mean(1)), CFG.confidence)
    return of_means(readouts.mean(0)).item(), low.item(), high.item()


def gaps(
    readout: Float[Tensor, "conversation turn"], by_user: Bool[Tensor, "turn"]
) -> Float[Tensor, "conversation exchange"]:
    """What the assistant's turn reads minus what the user's turn right before it reads, exchange by exchange.

    Raises ValueError where nobody answers a user.
    """
    answers = [i for i in range(1, len(by_user)) if by_user[i - 1] and not by_user[i]]
    if not answers:
        raise ValueError("no turn of a user is followed by one of the assistant: there is no gap between them")
    return readout[:, answers] - readout[:, [i - 1 for i in answers]]


def growth(series: Float[Tensor, "conversation step"]) -> Float[Tensor, "conversation"]:
    """Mean of the last third of the steps minus mean of the first third (one step at least)."""
    third = max(1, series.shape[1] // 3)
    return series[:, -third:].mean(-1) - series[:, :third].mean(-1)


def to_opening(states: Float[Tensor, "conversation turn d_model"]) -> Float[Tensor, "conversation later"]:
    """Cosine of the state of every later turn with that of the first."""
    return cosine_similarity(states[:, :1], states[:, 1:], dim=-1)


def fall(similarity: Float[Tensor, "conversation later"]) -> Float[Tensor, "conversation"]:
    """Mean over the two turns after the opening minus mean over the last two: one of each speaker at either end."""
    return similarity[:, :2].mean(-1) - similarity[:, -2:].mean(-1)


def mean(values: Float[Tensor, "conversation"]) -> Value:
    """Mean and Student's interval over conversations (a bootstrap of so few is too narrow); NaN ends for one alone."""
    known = len(values) > 1
    ends = ttest_1samp(values.double().numpy(), 0).confidence_interval(CFG.confidence) if known else (nan, nan)
    return values.mean().item(), *map(float, ends)


def difference(ours: Float[Tensor, "conversation"], theirs: Float[Tensor, "*other"]) -> Value:
    """Difference of two means and Welch's interval, both sets varying by themselves; NaN ends for a single one."""
    known = min(len(ours), len(theirs)) > 1
    test = ttest_ind(ours.double().numpy(), theirs.double().numpy(), equal_var=False) if known else None
    ends = test.confidence_interval(CFG.confidence) if known else (nan, nan)
    return (ours.mean() - theirs.mean()).item(), *map(float, ends)
