"""Files that are written whole or not at all."""

import pytest

from v05.files import replacing


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "new" / "file.json"
    with replacing(path) as scratch:
        scratch.write_text("first")
        assert not path.exists()

    def torn():
        with replacing(path) as scratch:
            scratch.write_text("sec")
            raise KeyError

    with pytest.raises(KeyError):
        torn()
    assert path.read_text() == "first"
    with replacing(path) as scratch:
        scratch.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]
