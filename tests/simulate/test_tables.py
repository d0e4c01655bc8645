"""Files of every dialect are read. An unreadable line is named with its number."""

import json

import pytest

from v05.simulate.outcomes import read_outcomes


def cells(path):
    """(model, question, successes, trials) of every cell."""
    read = read_outcomes(path)
    return [tuple(map(int, cell)) for cell in zip(read.model, read.question, read.successes, read.trials, strict=True)]


HEADER, CELLS = "model,question,successes,trials", [(0, 0, 1, 2), (1, 0, 2, 2)]


@pytest.mark.parametrize(
    "text",
    [
        "model;question;successes;trials\na;q;1;2\nb;q;2;2\n",
        "model\tquestion\tsuccesses\ttrials\na\tq\t1\t2\nb\tq\t2\t2\n",
        "model|question|successes|trials\na|q|1|2\nb|q|2|2\n",
        "model:question:successes:trials\na:q:1:2\nb:q:2:2\n",
        "model   question successes trials\na       q        1         2\nb       q        2         2\n",
        "Model,QUESTION,Successes,Trials\na,q,1,2\nb,q,2,2\n",
        " model , question ,successes , trials\na , q ,1 , 2\nb, q, 2, 2\n",
        "\ufeffmodel,question,successes,trials\r\na,q,1,2\r\nb,q,2,2\r\n",
        "sep=;\nmodel;question;successes;trials\na;q;1;2\nb;q;2;2\n",
        '\n"model";"question";"successes";"trials"\n"a";"q";"1,0";"2,0"\n\n"b";"q";"2,0";"2,0"\n',
        "model,question,successes,trials,,,\na,q,1,2,,,\nb,q,2,2,,,\n",
        "model\rquestion\rsuccesses".replace("\r", ",") + ",trials\ra,q,1,2\rb,q,2,2\r",
        "model;a,b;c,d;question;e,f;successes;trials\na;;;q;;1;2\nb;;;q;;2;2\n",
    ],
    ids=[
        "semicolon",
        "tab",
        "bar",
        "colon",
        "spaces",
        "capitals",
        "outer spaces",
        "mark",
        "sep",
        "comma",
        "empty",
        "returns",
        "names",
    ],
)
def test_csv_of_every_dialect(tmp_path, text):
    (tmp_path / "outcomes.csv").write_text(text, newline="")
    assert cells(tmp_path / "outcomes.csv") == CELLS
    assert cells(tmp_path) == CELLS


def test_a_decimal_comma_is_not_a_separator_of_thousands(tmp_path):
    file = tmp_path / "outcomes.csv"
    file.write_text("model;question;successes;trials;guess\na;q;1;2;0,250\n")
    assert read_outcomes(file, "Guess").priors == pytest.approx([0.25])
    file.write_text("model;question;successes;trials\na;q;1;1,000\n")
    with pytest.raises(ValueError, match=r"line 2: 'a,q,1,1,000' lacks successes, trials as numbers"):
        read_outcomes(file)


def test_a_csv_of_rollouts(tmp_path):
    (tmp_path / "table.csv").write_text(
        '"","Step","Prompt","Completion","Right"\n"0","1","2+2?","4","True"\n"1","1","2+2?","5","False"\n'
    )
    assert cells(tmp_path / "table.csv") == [(0, 0, 1, 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", HEADER.encode("utf-16"), r"a\.csv is UTF-16; convert the file to UTF-8"),
        ("a.jsonl", '{"input": "é"}'.encode("utf-16"), r"a\.jsonl is UTF-16; convert the file to UTF-8"),
        (
            "1.jsonl",
            b'{"input": "q", "output": "o", "score": 1}\n{"input": "q", "outp',
            r"1\.jsonl, line 2: .*give one JSON object",
        ),
        ("1.jsonl", b'{"input": "q", "output": "o", "score": "good"}\n', r"1\.jsonl, line 1: 'q,o,good' lacks score as numbers"),
        ("1.jsonl", b'{"input": "q", "output": "o", "score": 1}\n{"epoch": 1}\n', r"line 2: '1' lacks input, output; repair"),
        (
            "traces.jsonl",
            b'{"task": {}, "traces": [1]}\n',
            r"traces\.jsonl, line 1: '\{\},\[1\]' lacks traces, task as in episodes of prime-rl",
        ),
        (
            "a.csv",
            HEADER.encode("utf-16-le"),
            r"a\.csv is not text, or UTF-16 without a byte order mark; convert the file to UTF-8",
        ),
        ("a.csv", b"\x1b[2Jmodel,x\n", r"it has '\\x1b\[2jmodel', x\. "),
        ("1.pt", b"PK\x03\x04", r"1\.pt is compressed or a pickle"),
        ("a.json", b'[{"input": "q"}]', r"a\.json holds a JSON array; write one object per line"),
        ("a.csv", b"model,Model,question,successes,trials\n", r"a\.csv has two columns model; leave one out"),
        (
            "a.jsonl",
            b'{"loss": 1}\n',
            r"a\.jsonl has no column model, question, successes, trials; it has loss\. v05 simulate --help",
        ),
        ("a.csv", b"", r"a\.csv has no column .*; it has no header"),
        ("empty/.keep", b"", r"empty holds no finished run: .* no file with the ending \.csv, \.tsv, \.jsonl"),
        (
            "folder/a.jsonl",
            b'{"loss": 1}\n',
            r"folder holds no finished run: .*no log of rollouts either: .*a\.jsonl has no column",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_outcomes(tmp_path / name.split("/")[0])


def test_one_damaged_file_of_a_folder_is_named(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"{step}.jsonl").write_text(json.dumps({"input": "q", "output": "o", "score": 1, "step": step}) + "\n")
    (tmp_path / "2.jsonl").write_text((tmp_path / "2.jsonl").read_text() + '{"input"\n')
    with pytest.raises(ValueError, match=r"/2\.jsonl, line 2: "):
        read_outcomes(tmp_path)
