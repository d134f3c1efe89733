"""Shared code of the notebooks: small modules named after what comes back.

From the bottom up: `config`, `files` and `stats`; `models` and `prompts`; `activations`; `directions` and `steering`;
`separation` (how well a direction tells pairs apart) and `continuations` (what a model says next); `sweeps`; `saes`
(loading them), `features` (what they do on text), `specificity` (what they fire for) and `similarity` (across depths);
on top `claims`, `plots`, `feature_plots` and `widgets`. A module imports only from those below it.
"""
