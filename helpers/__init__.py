"""Shared code of the notebooks: small modules named after what comes back.

From the bottom up: `config`, `files` and `stats`; `models` and `prompts`; `activations`; `directions` and `steering`;
`separation` (how well a direction tells pairs apart) and `continuations` (what a model says next); `sweeps`; on top
`claims`, `plots` and `widgets`. A module imports only from those below it.
"""
