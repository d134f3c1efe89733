"""Shared code of the notebooks: small modules named after what comes back.

From the bottom up: `config` and `files`; `models` and `prompts`; `activations`; `directions`; `steering`;
beside them `stats`; on top `claims` and `plots`. A module imports only from those below it.
"""
