"""Problem files as people have them: other formats, other fields, answers that are too long."""

import json

import pytest

from engine.files import UserError
from engine.problems import ProblemFile, warn_of_long_answers

LINES = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(99)]
JSON_LINES = "a problem file is JSON Lines: one object per line, UTF-8"


@pytest.mark.parametrize(
    "content, complaint",
    [
        (json.dumps(LINES).encode(), f"{JSON_LINES}; this is a JSON array"),
        (b"question,answer\n1 + 1,2", f"{JSON_LINES}; this is a file that starts with 'ques"),
        (b"PAR1\x15\x04", f"{JSON_LINES}; this is Parquet"),
        (json.dumps(LINES[0]).encode("utf-16"), f"{JSON_LINES}; this is UTF-16"),
        (json.dumps(LINES[0], indent=1).encode(), JSON_LINES),
        (b'{"problem": 1, "solution": 1}', """['problem', 'solution'], not "question" and"""),
    ],
)
def test_other_formats_and_fields_are_named_beside_ours(content, complaint, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError) as error:
        ProblemFile(str(tmp_path / "file"))
    assert complaint in str(error.value)


def test_answers_too_long_for_a_completion_are_named_by_line(tmp_path, tiny, capsys):
    long = {"question": "?", "answer": "24 - 9 = 15\n#### 15", "split": "train"}
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, [LINES[0], *LINES, long])))
    file = ProblemFile(str(tmp_path / "long.jsonl"))
    for limit in (64, 16):
        assert not capsys.readouterr().out
        warn_of_long_answers(file, tiny[1], limit)
    warning = capsys.readouterr().out
    assert warning.startswith("warning: 1 of the first 8") and "--max_new_tokens 16" in warning
    assert r"/long.jsonl, line 101: '24 - 9 = 15\n#### 15'" in warning
