import torch
from helpers import activations as A, continuations as C, prompts as P, directions as D, models

T = [
    "The dog ran after me down the lane.",
    "I walked home along the quiet road, and at last I sat down by it.",
    "He fell!",
]


def test_all(any_model):
    m = any_model
    print(models.description(m))
    a = A.residuals(m, T)
    b = A.residuals(m, T[::-1], batch_tokens=1)
    for k in a:
        assert torch.allclose(a[k], b[k].flip(0), atol=1e-5), (a[k] - b[k].flip(0)).abs().max()
    v = torch.randn(3, m.cfg.d_model)
    for add in (None, C.Added(1, v), C.Added(m.cfg.n_layers, v)):
        g = C.generated(m, T, 12, add)
        g1 = [C.generated(m, [t], 12, add and C.Added(add.depth, v[i : i + 1]))[0] for i, t in enumerate(T)]
        g2 = C.generated(m, T, 12, add, use_cache=False)
        assert g == g1 == g2
        l = C.log_odds(m, T, [" ran away"] * 3, [" sat"] * 3, add)
        l1 = torch.cat(
            [
                C.log_odds(m, [t], [" ran away"], [" sat"], add and C.Added(add.depth, v[i : i + 1]))
                for i, t in enumerate(T)
            ]
        )
        assert torch.allclose(l, l1, atol=1e-4), (l, l1)
        # reference: full forward
        from helpers.steering import steered, steering_mask

        t = P.tokens(m, [T[0]])
        ids = torch.cat([t.ids, torch.tensor([m.tokenizer(" ran away", add_special_tokens=False)["input_ids"]])], 1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        ve = add.vectors[:1] if add else torch.zeros(1, m.cfg.d_model)
        with torch.no_grad(), steered(m, add.depth if add else 0, ve, mask):
            lp = m.original_model(input_ids=ids).logits.log_softmax(-1)
        n = t.ids.shape[1]
        ref = sum(lp[0, i - 1, ids[0, i]] for i in range(n, ids.shape[1]))
        got = C.log_probs(m, T[:1], [[" ran away"]], C.Added(add.depth, ve) if add else None)[0][0].sum()
        assert torch.allclose(ref, got, atol=1e-4), (ref, got)
    D.logit_lens(m, torch.nn.functional.normalize(torch.randn(m.cfg.n_layers + 1, m.cfg.d_model), dim=-1), [0, 2])
    w = models.words_only_twin
