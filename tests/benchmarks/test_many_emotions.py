"""What extraction by generation and its bootstrap cost, against the usual loops: `make bench`."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from test_reading import folder, medians, model  # noqa: F401, fixtures
from transformer_lens.model_bridge import TransformerBridge

from helpers.decoding import bootstrapped, one_against_rest, read_by
from helpers.emotions import names, openings
from helpers.extraction import told, while_writing
from helpers.prompts import tokens

TOKENS, DRAWS = 24, 50


def times_faster(benchmark, together: Callable[[], object], usual_loop: Callable[[], object]) -> float:
    """How often `together` is done while the usual loop is done once."""
    seconds = medians({"together": together, "loop": usual_loop})
    faster = seconds["loop"] / seconds["together"]
    benchmark.extra_info |= {"against_loop": faster}
    benchmark.pedantic(together, rounds=1)
    return faster


def test_stories_written_and_read_together(benchmark, model: TransformerBridge) -> None:  # noqa: F811
    """At least 3 times as fast as writing each story by itself and reading it with everything cached."""
    table = openings().head(24)
    texts, seeds = table["text"].tolist(), table["seed"].tolist()

    def together() -> None:
        while_writing(model, told(model, texts, TOKENS, seeds))

    @torch.no_grad()
    def usual_loop() -> None:
        read = tokens(model, texts)
        for row, length in zip(read.ids, read.length):
            ids = row[None, :length]
            written = model.original_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=True, pad_token_id=0
            )
            model.run_with_cache(written)

    faster = times_faster(benchmark, together, usual_loop)
    print(f"\nwriting and reading 24 stories of {TOKENS} tokens: {faster:.1f} x faster than one at a time")
    assert faster >= 3


def test_bootstrap_that_refits_every_vector(benchmark) -> None:
    """At least 10 times as fast as a loop over draws and emotions with scikit-learn's AUROC, and the same numbers."""
    emotions, generator = len(names()), torch.Generator().manual_seed(0)
    train, test = torch.randn(2, 10, emotions, 768, generator=generator)
    design = bootstrapped(10, 10, emotions, generator, DRAWS)

    def together() -> torch.Tensor:
        return one_against_rest(read_by(train, test, design))

    def usual_loop() -> np.ndarray:
        found = np.empty((1 + DRAWS, emotions))
        label = np.tile(np.arange(emotions), 10)
        for draw, (fit, picks) in enumerate(zip(design.fit, design.picks)):
            means = fit @ train.flatten(0, 1)
            vectors = means - means.mean(0)
            texts = test[picks].flatten(0, 1)
            for emotion in range(emotions):
                along = texts @ vectors[emotion] / vectors[emotion].norm()
                found[draw, emotion] = roc_auc_score(label == emotion, along.numpy())
        return found

    np.testing.assert_allclose(together().numpy(), usual_loop(), atol=1e-5)
    faster = times_faster(benchmark, together, usual_loop)
    print(f"\n{DRAWS} draws that refit 24 vectors and score 240 texts: {faster:.0f} x faster than a loop")
    assert faster >= 10
