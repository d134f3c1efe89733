"""What the residual stream holds, at every depth, in one batched pass that stops where it has read enough.

Depth l is what enters block l (`blocks.l.hook_resid_pre`); depth n_layers is what leaves the last block. Texts are
padded on the right, where causal attention never looks, so a result does not depend on the texts beside it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Literal
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from helpers.prompts import Tokens, sides, token_strings, tokens
from helpers.stats import finite

Position = Literal["last token", "mean", "final punctuation"]
POSITIONS: tuple[Position, ...] = ("last token", "mean", "final punctuation")
BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}  # what fits the caches of a CPU; what fills a GPU
HOOK_POINTS: WeakKeyDictionary = WeakKeyDictionary()  # names by model: the bridge gathers them anew at every access


def site(model: TransformerBridge, depth: int) -> str:
    """The hook point of a depth. Raises ValueError for a depth that the model does not have."""
    n_layers = model.cfg.n_layers
    if not 0 <= depth <= n_layers:
        raise ValueError(f"depth {depth} is out of range: {model.cfg.model_name} has depths 0 to {n_layers}")
    return checked_site(
        model, f"blocks.{depth}.hook_resid_pre" if depth < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"
    )


def checked_site(model: TransformerBridge, name: str) -> str:
    """`name`, if the model has such a hook point; ValueError otherwise (the bridge itself would ignore it)."""
    if name not in HOOK_POINTS.get(model, ()):
        HOOK_POINTS[model] = frozenset(model.hook_dict)
    if name not in HOOK_POINTS[model]:
        raise ValueError(f"{model.cfg.model_name} has no hook point {name!r}: see model.hook_dict")
    return name


def residuals(
    model: TransformerBridge,
    texts: Sequence[str],
    positions: Sequence[Position] = POSITIONS,
    batch_tokens: int | None = None,
) -> dict[str, Float[Tensor, "prompt depth d_model"]]:
    """The residual stream of every text at every depth, by position, in float32 on the CPU.

    "last token" is the last one before the closing punctuation, "mean" the mean over all real tokens but position 0,
    "final punctuation" the closing full stop (ValueError for a text without one). One pass serves all of them.
    """
    read = tokens(model, texts)
    return weighted_residuals(model, read, {each: token_weights(read, each) for each in positions}, batch_tokens)


def weighted_residuals(
    model: TransformerBridge,
    read: Tokens,
    weights: Mapping[Hashable, Float[Tensor, "prompt pos"]],
    batch_tokens: int | None = None,
) -> dict[Hashable, Float[Tensor, "prompt depth d_model"]]:
    """The residual stream at every depth averaged over tokens by each of these weights, in float32 on the CPU.

    Each row of a weight adds up to one and gives nothing to padding. One pass serves all of them.
    """
    shape = (len(read.ids), model.cfg.n_layers + 1, model.cfg.d_model)
    found = {name: torch.empty(shape) for name in weights}

    def keep(depth: int, rows: Int[Tensor, "row"], resid: Float[Tensor, "row pos d_model"]) -> None:
        for name, weight in weights.items():
            here = weight[rows, : resid.shape[1]].to(resid.device)
            found[name][rows, depth] = (here[:, None] @ resid.float())[:, 0].cpu()

    _read_stream(model, read, keep, batch_tokens)
    for acts in found.values():
        if not acts.isfinite().all():
            texts = [model.tokenizer.decode(ids[1:length]) for ids, length in zip(read.ids, read.length)]
            check_finite(acts.isfinite().all(-1), texts)
    return found


def pair_residuals(
    model: TransformerBridge, table: pd.DataFrame, positions: Sequence[Position] = POSITIONS
) -> dict[str, Float[Tensor, "side pair depth d_model"]]:
    """`residuals` of a table of pairs: the emotional side first, then the neutral one, pairs in the table's order."""
    found = residuals(model, sides(table), positions)
    return {position: acts.unflatten(0, (2, len(table))) for position, acts in found.items()}


def token_residuals(model: TransformerBridge, text: str) -> Float[Tensor, "pos depth d_model"]:
    """The residual stream of one text at every token, position 0 included, in float32 on the CPU."""
    read = tokens(model, [text])
    found = torch.empty(int(read.length[0]), model.cfg.n_layers + 1, model.cfg.d_model)

    def keep(depth: int, rows: Int[Tensor, "row"], resid: Float[Tensor, "row pos d_model"]) -> None:
        found[:, depth] = resid[0].float().cpu()

    _read_stream(model, read, keep)
    check_finite(found.isfinite().all(-1).all(0)[None], [text])
    return found


def every_token(
    model: TransformerBridge, texts: Sequence[str], depths: Sequence[int] | None = None
) -> Float[Tensor, "token depth d_model"]:
    """The residual stream at every token of every text but position 0, text after text, in float32 on the CPU.

    At the given depths (all without); the pass stops at the last of them.
    """
    read = tokens(model, texts)
    depths = list(range(model.cfg.n_layers + 1) if depths is None else depths)
    found = torch.empty(int((read.length - 1).sum()), len(depths), model.cfg.d_model)
    first = (read.length - 1).cumsum(0).cpu() - (read.length - 1).cpu()  # of each text's tokens

    def keep(depth: int, rows: Int[Tensor, "row"], resid: Float[Tensor, "row pos d_model"]) -> None:
        for row, here in zip(rows.tolist(), resid.float().cpu()):
            count = int(read.length[row]) - 1
            for column in (i for i, other in enumerate(depths) if other == depth):
                found[first[row] : first[row] + count, column] = here[1 : count + 1]

    _read_stream(model, read, keep, depths=depths)
    fine = found.isfinite().all(-1).split((read.length - 1).tolist())
    check_finite(torch.stack([each.all(0) for each in fine]), texts)
    return found


def at_positions(
    model: TransformerBridge,
    texts: Sequence[str],
    positions: Int[Tensor, "prompt"],
    depths: Sequence[int] | None = None,
) -> Float[Tensor, "prompt depth d_model"]:
    """The residual stream of each text at one position of its own (see `prompts.word_positions`), float32, CPU."""
    read = tokens(model, texts)
    if not ((positions > 0) & (positions < read.length.cpu())).all():
        raise ValueError(f"positions {positions.tolist()} lie outside of texts with {read.length.tolist()} tokens")
    depths = list(range(model.cfg.n_layers + 1) if depths is None else depths)
    found = torch.empty(len(texts), len(depths), model.cfg.d_model)

    def keep(depth: int, rows: Int[Tensor, "row"], resid: Float[Tensor, "row pos d_model"]) -> None:
        for column in (i for i, other in enumerate(depths) if other == depth):
            found[rows, column] = resid[range(len(rows)), positions[rows]].float().cpu()

    _read_stream(model, read, keep, depths=depths)
    check_finite(found.isfinite().all(-1), texts)
    return found


def token_projections(
    model: TransformerBridge, text: str, depth: int, direction: Float[Tensor, "d_model"]
) -> pd.DataFrame:
    """One row per token but position 0: sentence, pos, token, projection (residual-stream units) on the direction."""
    site(model, depth)  # refuses what the model lacks
    along = token_residuals(model, text)[1:, depth] @ finite(direction, "the numbers of the direction")
    read = token_strings(model, text)[1:]
    return pd.DataFrame({"sentence": text, "pos": range(1, len(read) + 1), "token": read, "projection": along})


def residual_norms(model: TransformerBridge, texts: Sequence[str]) -> Float[Tensor, "depth"]:
    """Median norm of the residual stream at every depth over all tokens of the texts but position 0.

    On a fixed neutral set this is the unit of steering strength.
    """
    read = tokens(model, texts)
    norms = torch.full((model.cfg.n_layers + 1, *read.ids.shape), torch.nan)

    def keep(depth: int, rows: Int[Tensor, "row"], resid: Float[Tensor, "row pos d_model"]) -> None:
        norms[depth, rows, : resid.shape[1]] = resid.float().norm(dim=-1).cpu()

    _read_stream(model, read, keep)
    inside = read.real.cpu()
    inside[:, 0] = False
    check_finite((norms.isfinite() | ~inside).all(-1).T, texts)
    return norms[:, inside].median(-1).values


def batches(length: Int[Tensor, "row"], batch_tokens: int) -> list[Int[Tensor, "batch"]]:
    """Rows grouped by similar length, so that no padded batch has more than `batch_tokens` tokens (or has one row)."""
    order = length.cpu().argsort(stable=True)
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        full = end < len(order) and int(length[order[end]]) * (end + 1 - start) > batch_tokens
        if full or end == len(order):
            groups.append(order[start:end])
            start = end
    return groups


def tokens_at_once(model: TransformerBridge) -> int:
    """How many tokens one batch holds on the model's device."""
    return BATCH_TOKENS[torch.device(model.cfg.device).type]


def progress(total: int, unit: str, what: str) -> tqdm:
    """A bar with an estimate of the time left; it shows only once the work has taken two seconds."""
    return tqdm(total=total, unit=unit, desc=what, delay=2, leave=False)


@torch.no_grad()
def _read_stream(
    model: TransformerBridge,
    read: Tokens,
    keep: Callable[[int, Tensor, Tensor], None],
    batch_tokens: int | None = None,
    depths: Sequence[int] | None = None,
) -> None:
    """Call `keep(depth, rows, residual stream)` for every depth (or these) and batch; nothing behind the last runs."""
    depths = range(model.cfg.n_layers + 1) if depths is None else depths
    rows = torch.empty(0)

    def reader(depth: int) -> Callable:
        def at_depth(resid: Tensor, hook) -> None:
            keep(depth, rows, resid)
            if depth == max(depths):
                raise StopAtLayerException(resid)

        return at_depth

    hooks = [(site(model, depth), reader(depth)) for depth in depths]
    with model.hooks(fwd_hooks=hooks), progress(len(read.length), "text", "reading") as bar:
        for rows in batches(read.length, batch_tokens or tokens_at_once(model)):
            with suppress(StopAtLayerException):
                model.original_model(input_ids=read.rows(rows.to(read.ids.device)).ids, use_cache=False)
            bar.update(len(rows))


def check_finite(fine: Bool[Tensor, "prompt depth"], texts: Sequence[str]) -> None:
    """ValueError that names the first text with a non-finite activation, and which of the depths read it is.

    The text may be one padded beside the culprit: attention gives padding a weight of 0, and 0 * NaN is NaN.
    """
    if not fine.all():
        row, depth = (~fine).nonzero()[0].tolist()
        raise ValueError(
            f"non-finite activation at depth {depth} of text {row} ({texts[row][:60]!r}): load the model in float32"
        )


def token_weights(read: Tokens, position: Position) -> Float[Tensor, "prompt pos"]:
    """How much of each token a read-out takes: rows add up to one, position 0 and padding count nothing."""
    if position == "mean":
        inside = read.real.clone()
        inside[:, 0] = False
        return inside / inside.sum(-1, keepdim=True)
    where = {"last token": read.last, "final punctuation": read.stop}.get(position)
    if where is None:
        raise ValueError(f"unknown position {position!r}: choose from {', '.join(POSITIONS)}")
    if (where < 0).any():
        raise ValueError(f"text {int(where.argmin())} does not end in punctuation, so it has no {position!r}")
    return torch.nn.functional.one_hot(where, read.ids.shape[1]).float()
