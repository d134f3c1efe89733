"""`replacing`: the old version or the new one, and nothing beside it."""

from pathlib import Path

import pytest

from helpers.files import replacing


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("old")
    return path


def test_success_replaces_the_file_and_leaves_no_other(old: Path):
    with replacing(old) as temporary:
        temporary.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_missing_folders_are_made(tmp_path: Path):
    path = tmp_path / "figures" / "model" / "table.csv"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_the_temporary_path_lies_beside_the_file_with_its_suffix(old: Path):
    with replacing(old) as temporary:
        assert temporary != old
        assert (temporary.parent, temporary.suffix) == (old.parent, old.suffix)


def test_others_may_read_the_new_file(old: Path):
    with replacing(old) as temporary:
        temporary.write_text("new")
    assert old.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_the_old_file_and_nothing_else(old: Path, error: type[BaseException]):
    with pytest.raises(error), replacing(old) as temporary:
        temporary.write_text("half")
        raise error
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_an_interrupted_first_write_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "table.csv") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "model"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, below: str):
    (tmp_path / "figures").write_text("a file where the folder should be")
    folder = tmp_path / "figures" / below
    with pytest.raises(OSError, match=r"cannot write table\.csv into") as raised, replacing(folder / "table.csv"):
        pytest.fail("the block must not run")
    assert str(folder) in str(raised.value)
