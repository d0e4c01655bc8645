"""Files from users are read, or refused with a message that names them. Files are written completely or not at all."""

import codecs
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from v05.files import content_digest, read_object, read_objects, read_text, replacing


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\xff\xfe{"a"', "line 2 is UTF-16; convert the file to UTF-8"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', "line 2 is not UTF-8"),
        (b'{"a": 1}\n[1]\n', r"line 2 holds no JSON object but '\[1\]'"),
        (b'{"a": 1}\n{"a": \n', "line 2: Expecting value"),
        (b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n", "line 2: Exceeds the limit"),
        (b'{"a": 1}\n{"a": "\\ud800"}\n', "line 2: .*surrogates not allowed"),
        (b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"\n", "line 2: .*recursion"),
    ],
    ids=["utf-16", "latin-1", "list", "torn", "digits", "surrogate", "nested"],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        list(read_objects(path))


def test_lines_that_mean_plain_json_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": "\\ud83d\\ude00"}\r\n\n{"a": "\xc3\xa9"}\n{"a": 3')
    assert list(read_objects(path, growing=True)) == [(1, {"a": "\N{GRINNING FACE}"}), (3, {"a": "é"})]
    with pytest.raises(ValueError, match="line 4"):
        list(read_objects(path))


def test_one_object_and_its_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert read_text(path) == '{"a": 1}'
    assert read_object(path) == {"a": 1}
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object"):
        read_object(path)
    path.write_bytes(b"\n\n\xe9")
    with pytest.raises(ValueError, match=r"config\.json, line 3 is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_replaced_file_is_as_readable_as_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        with replacing(tmp_path / "arrays") as scratch:
            save_file({"a": np.zeros(3)}, scratch)
    finally:
        os.umask(before)
    assert (tmp_path / "arrays").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_one_content_has_one_digest(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text("a\n")
    other.write_text("a\n")
    assert content_digest(one) == content_digest(other)
    other.write_text("b\n")
    assert content_digest(one) != content_digest(other)
    assert content_digest(tmp_path / "absent") is None


def test_a_model_folder_is_its_model_files(tmp_path):
    digests = []
    for name in ("one", "moved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        digests.append(content_digest(tmp_path / name))
    assert digests[0] == digests[1]
    (tmp_path / "one" / "README.md").write_text("notes")
    assert content_digest(tmp_path / "one") == digests[0]
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages }}")
    assert content_digest(tmp_path / "one") != digests[0]
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"changed")
    assert content_digest(tmp_path / "moved") != digests[0]
