"""What was said since a session file was written."""

import pytest

from mlx_qwen35.session import Session, load_session, newer
from tests.seeing_model import seeing_model, some_media


@pytest.fixture
def kept(tmp_path):
    model, _ = seeing_model()
    session = Session(model)
    session.notes = {"exchanges": ["old"]}
    session.save(tmp_path / "kept")
    return model, session, tmp_path / "kept"


def test_notes_alone_are_newer_until_all_is_written(kept):
    model, session, file = kept
    whole = file.read_bytes()
    picture = some_media("image", 4, 4)
    session.notes = {"exchanges": ["new", picture]}
    session.save_notes(file)
    assert file.read_bytes() == whole
    told = load_session(file, model).notes["exchanges"]
    assert told[0] == "new" and told[1].key == picture.key
    session.notes = "newest"
    session.save(file)
    assert load_session(file, model).notes == "newest" and [*file.parent.iterdir()] == [file]


def test_notes_of_another_file_say_nothing(kept):
    model, session, file = kept
    session.notes = "new"
    session.save_notes(file)
    beside = newer._beside(file)
    left = beside.read_bytes()
    session.notes = "newest"
    session.save(file)
    beside.write_bytes(left)  # it was killed before it could delete them
    assert load_session(file, model).notes == "newest"


def test_damaged_notes_say_nothing(kept):
    model, session, file = kept
    session.notes = "new"
    session.save_notes(file)
    beside = newer._beside(file)
    text = bytearray(beside.read_bytes())
    text[-40] ^= 1
    beside.write_bytes(text)
    assert load_session(file, model).notes == {"exchanges": ["old"]}


def test_a_link_has_them_where_its_file_is(kept, tmp_path):
    model, session, file = kept
    (tmp_path / "there").mkdir()
    link = tmp_path / "there" / "link"
    link.symlink_to(file)
    session.notes = "new"
    session.save_notes(link)
    assert load_session(file, model).notes == load_session(link, model).notes == "new"
