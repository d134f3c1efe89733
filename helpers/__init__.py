"""Shared code of the notebooks: small modules named after what comes back.

From the bottom up: `config`, `files` and `stats`; `models`, `prompts` and `emotions`; `activations`; `directions` and
`steering`; `separation` (how well a direction tells pairs apart), `continuations` (what a model says next), `sweeps`.
Of many emotions: `extraction` (by reading and by writing), `geometry` (vectors and their shape), `decoding` (what they
read), `findings` (the same numbers for a model and its nulls), `curves` (over depth), `agreement` (of reading and
steering). Of SAEs: `saes` (loading them), `features` (what they do on text), `specificity` (what they fire for),
`similarity` (across depths). On top `claims`, `plots`, `feature_plots`, `geometry_plots` and `widgets`. A module
imports only from those below it.
"""
