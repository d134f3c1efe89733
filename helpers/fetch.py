"""Downloads what the notebooks need of a model, before the first of them runs: `make fetch MODEL=...`.

For a machine without a network, run it on one that has one and shares the Hugging Face cache. Whatever is there already
is checked and left alone.
"""

import os
import sys

from helpers import saes
from helpers.models import model_folder, source


def fetch(name: str | None = None) -> None:
    """A model, by `models.source`'s name for it, and its SAEs. Raises what `models.source` and `hub.snapshot` raise."""
    where = source(name)
    model_folder(where)
    saes.fetch(where.slug)


def main() -> None:
    """Every model that MODELS names; without it the one that MODEL names."""
    for name in os.environ.get("MODELS", "").split() or [None]:
        try:
            fetch(name)
        except (OSError, ValueError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
