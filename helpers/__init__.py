"""Shared code of the notebooks: small modules named after what comes back.

From the bottom up: `config`, `files`, `nodes` (YAML) and `stats`; `hub` (downloads), `models`, `prompts` and
`emotions`; `activations`; `directions`; `separation` (how well a direction tells pairs apart). Of steering:
`steering` (methods), `passes` (forward passes that share what they can), `continuations` (what a model says next),
`texts` (numbers about it), `cells` (finished work on disk), `sweeps`, `doses` (strengths that disturb equally),
`regimes` (what became of a text), `shapes` (hills in a dose-response), `scripts` (leaks into another script). Of many
emotions: `extraction` (by reading and by writing), `geometry` (vectors and their shape), `decoding` (what they read),
`findings` (the same numbers for a model and its nulls), `curves` (over depth), `agreement` (of reading and steering).
Of SAEs: `saes` (loading them), `features` (what they do on text), `output_features` (which of them steer),
`specificity` (what they fire for), `similarity` (across depths). Of conversations: `scenarios` (files of them),
`readouts` (what a state reads as), `recordings`, `effects` (statistics of a conversation), `turns` (what turns and
tokens read as), `backbone` (a subspace of a few emotions), `patching` (one run's activations in another's place),
`tracing` (of one word). Of many models: `across` (what is measured on each, and how much they differ) and `workers`
(where that runs). On top `claims`, `plots` and `feature_plots`, `geometry_plots`, `steering_plots`, `scan_plots`,
`across_plots`; `widgets` and `markup`; the `playground` with its `answers` and `panels`; the commands `scan`, `fetch`
and `compare`. A module imports only from those below it.
"""
