"""Activations of an emotion from texts about it, by reading given ones or by writing them.

Comprehension reads a text that somebody else wrote. Generation has the model continue an opening that names the
emotion, and reads the tokens it wrote. What the model holds while it writes a token is what it holds when the finished
text is read again, since attention looks back only; so the texts are written first and read in one pass.
Both return means over some tokens, by the name of the read-out: "last token", "midpoint", "mean from 8", ...
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import token_weights, weighted_residuals
from helpers.continuations import generated
from helpers.prompts import Tokens, tokens

Readouts = dict[str, Float[Tensor, "text depth d_model"]]


@dataclass(frozen=True)
class Stories:
    """Openings with what a model wrote after them."""

    read: Tokens
    begins: Int[Tensor, "story"]  # position of the first written token
    written: list[list[int]]  # its ids, without the opening


def comprehended(model: TransformerBridge, texts: Sequence[str], cuts: Sequence[int] = ()) -> Readouts:
    """Texts read at "last token" (before the closing full stop), "final punctuation" and "mean".

    Each `cut` adds "last of n" and "mean of n": the same when the text stops after n tokens (or where it ends).
    """
    _check_cuts(cuts)
    read = tokens(model, texts)
    weights = {name: token_weights(read, name) for name in ("last token", "final punctuation", "mean")}
    for cut in cuts:
        end = (read.length - 1).clamp(max=cut)
        weights[f"last of {cut}"] = _span(read, end, end)
        weights[f"mean of {cut}"] = _span(read, torch.ones_like(end), end)
    return weighted_residuals(model, read, weights)


def told(model: TransformerBridge, openings: Sequence[str], n_tokens: int, seeds: Sequence[int]) -> Stories:
    """A story of `n_tokens` tokens after each opening, sampled at temperature 1 by the opening's own seed.

    Openings with the same seed use the same noise, and nothing depends on the batch. End-of-text cannot be drawn: every
    story has its full length.
    """
    written = generated(model, openings, n_tokens, seeds=seeds, min_tokens=n_tokens)
    before = tokens(model, openings)
    length = before.length + n_tokens
    ids = torch.full((len(openings), int(length.max())), int(before.ids[0, 0]), device=before.ids.device)
    for row, (start, story) in enumerate(zip(before.length.tolist(), written)):
        ids[row, :start] = before.ids[row, :start]
        ids[row, start : start + n_tokens] = torch.tensor(story)
    return Stories(_unpunctuated(ids, length), before.length, written)


def while_writing(
    model: TransformerBridge, stories: Stories, skip: Sequence[int] = (0,), cuts: Sequence[int] = ()
) -> Readouts:
    """The written tokens read at "midpoint", "last token", and "mean from k" for every k: all but the first k.

    Each `cut` adds "midpoint of n": that of a story which stops after n tokens.
    """
    n_tokens = stories.read.length - stories.begins
    _check_skip(skip, int(n_tokens.min()))
    _check_cuts(cuts)
    middle, end = stories.begins + n_tokens // 2, stories.read.length - 1
    weights = {"midpoint": _span(stories.read, middle, middle), "last token": _span(stories.read, end, end)}
    weights |= {f"mean from {k}": _span(stories.read, stories.begins + k, end) for k in skip}
    for cut in cuts:
        early = stories.begins + n_tokens.clamp(max=cut) // 2
        weights[f"midpoint of {cut}"] = _span(stories.read, early, early)
    return weighted_residuals(model, stories.read, weights)


def opening_alone(model: TransformerBridge, openings: Sequence[str]) -> Readouts:
    """The openings themselves, at "opening": their last token, which has read the emotion's name and nothing since."""
    read = tokens(model, openings)
    return weighted_residuals(model, read, {"opening": _span(read, read.length - 1, read.length - 1)})


def reread(
    model: TransformerBridge, stories: Stories, skip: Sequence[int] = (0,), cuts: Sequence[int] = ()
) -> Readouts:
    """What was written, read again without its opening: what is left when the emotion's name is gone.

    Named like `while_writing`.
    """
    first = int(stories.read.ids[0, 0])
    ids = torch.tensor([[first, *story] for story in stories.written], device=stories.read.ids.device)
    length = torch.full((len(ids),), ids.shape[1], device=ids.device)
    alone = Stories(_unpunctuated(ids, length), torch.ones_like(length), stories.written)
    return while_writing(model, alone, skip, cuts)


def _unpunctuated(ids: Int[Tensor, "text pos"], length: Int[Tensor, "text"]) -> Tokens:
    return Tokens(ids, length, length - 1, torch.full_like(length, -1))


def _check_skip(skip: Sequence[int], n_tokens: int) -> None:
    if wrong := [k for k in skip if not 0 <= k < n_tokens]:
        raise ValueError(f"cannot leave out the first {wrong[0]} of {n_tokens} written tokens: nothing would be left")


def _check_cuts(cuts: Sequence[int]) -> None:
    if wrong := [cut for cut in cuts if cut < 1]:
        raise ValueError(f"cannot read the first {wrong[0]} tokens of a text: at least one is needed")


def _span(read: Tokens, first: Int[Tensor, "text"], last: Int[Tensor, "text"]) -> Float[Tensor, "text pos"]:
    """Equal weights from each text's `first` position to its `last` one."""
    position = torch.arange(read.ids.shape[1], device=read.ids.device)
    inside = ((position >= first[:, None]) & (position <= last[:, None])).float()
    return inside / inside.sum(-1, keepdim=True)
