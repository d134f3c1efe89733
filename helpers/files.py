"""Files that are either the old version or the new one, never half of either."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    After an error or Ctrl-C the old file stands as it was and the temporary one is gone.
    Raises OSError naming the folder when nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix, delete=False) as made:
            temporary = Path(made.name)
    except OSError as error:
        raise OSError(
            f"cannot write {path.name} into {path.parent}: {error.strerror}. Is the folder read-only?"
        ) from error
    try:
        temporary.chmod(0o644)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
