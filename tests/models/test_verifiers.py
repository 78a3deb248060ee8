"""Verifiers score as documented, and a bad name is refused before anything is sampled."""

import pytest

from posttrain.errors import ConfigError
from posttrain.models.verifiers import find_verifier

ROW = {"prompt": "a ->", "completion": " b"}


def test_exact_match_ignores_surrounding_space_only():
    verify = find_verifier("exact_match")
    assert [verify("a ->", text, ROW) for text in (" b", "b\n", "b b", "B", "")] == [1, 1, 0, 0, 0]


def test_regex_matches_the_whole_completion():
    verify = find_verifier(r"regex:\d+")
    assert [verify("p", text, ROW) for text in ("12", " 12 ", "12a", "a12")] == [1, 1, 0, 0]


def test_a_users_function_is_imported(tmp_path, monkeypatch):
    (tmp_path / "mine_verifier.py").write_text(
        "def length(prompt, completion, row):\n    return len(completion)\ndef bad(p, c, r):\n    return 'x'\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_verifier("mine_verifier:length")("p", "abc", ROW) == 3.0
    with pytest.raises(ConfigError, match=r"returned 'x'; it must return a number"):
        find_verifier("mine_verifier:bad")("p", "abc", ROW)


@pytest.mark.parametrize("name", ["exact", "regex:(", "regex:", "no_such_module_here:f", "json:no_such_function", ":f"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(ConfigError, match="verifier"):
        find_verifier(name)
