"""Files that are either the old version or the new one, never half of either; and tables read from CSV."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile

import pandas as pd
from filelock import FileLock

REFUSED = (EDQUOT, EFBIG, EIO, ENOSPC)  # what a disk says that takes no more


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    After an error or Ctrl-C the old file stands as it was and the temporary one is gone; a process that is killed
    leaves it, hidden by a dot in front. Raises OSError naming the folder when nothing can be written there, and when
    the disk takes no more.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix, delete=False) as made:
            temporary = Path(made.name)
    except OSError as error:
        raise OSError(_unwritable(path, error)) from error
    try:
        temporary.chmod(0o644)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise OSError(
            f"the disk refuses to write {path.name} into {path.parent}: {os.strerror(error.errno)}. Make room and run "
            "it again: what stood there is as it was."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Of all processes that are to change `path`, one is inside the block, and the others wait for it.

    Leaves an empty hidden file beside `path`: without it a process could wait for another file than the next one.
    """
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(_unwritable(path, error)) from error
    try:
        yield
    finally:
        lock.release()


def utf8(path: Path) -> str:
    """The text of a file, without a byte order mark; ValueError naming the file and the line that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error


def csv_rows(path: Path, columns: Sequence[str], numbers: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of a CSV file, every cell as the text that stands in it ("NA" too), those of `numbers` as numbers.

    Lines may end in any way and the file may begin with a byte order mark. Raises ValueError that names the file, and
    line and column where there are some, for what is no CSV in UTF-8, a file without rows, one of `columns` that is
    missing or has a blank cell, and a number that is none.
    """
    lines = csv.reader(StringIO(utf8(path), newline=""), strict=True)
    rows, ends = [], []
    try:
        for row in filter(None, lines):
            rows.append(row)
            ends.append(lines.line_num)
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {lines.line_num}: not CSV ({error})") from error
    head, *rows = rows or [[]]
    if twice := [name for name in head if head.count(name) > 1]:
        raise ValueError(f"{path.name} has the column {twice[0]!r} twice")
    needs_columns(head, columns, path.name)
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    for row, end in zip(rows, ends[1:]):
        where = f"{path.name}, line {end}"  # where the row ends: a quoted cell may hold several lines
        if len(row) != len(head):
            raise ValueError(
                f"{where}: {len(row)} cells, but the columns are {', '.join(head)}: put a cell with commas in quotes"
            )
        for name, cell in zip(head, row):
            if name in columns and not cell.strip():
                raise ValueError(f"{where}: nothing in the column {name!r}")
            if name in numbers and not _is_number(cell):
                raise ValueError(f"{where}: {cell!r} in the column {name!r} is no number")
    table = pd.DataFrame(rows, columns=head, dtype="str")
    return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})


def needs_columns(there: Sequence[str], columns: Sequence[str], name: str) -> None:
    """Raises ValueError for the first of `columns` that is not there."""
    for column in columns:
        if column not in there:
            has = ", ".join(there) or "none"
            raise ValueError(f"{name} lacks the column {column!r}. It needs {', '.join(columns)}; it has {has}.")


def _is_number(cell: str) -> bool:
    try:
        return bool(float(cell) == float(cell))
    except ValueError:
        return False


def _unwritable(path: Path, error: OSError) -> str:
    return f"cannot write {path.name} into {path.parent}: {error.strerror}. Is the folder read-only?"
