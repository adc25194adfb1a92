"""Bounds on files and JSON, and names in messages."""

import json
import os

import pytest

from deq_flax.untrusted.files import MAX_DEPTH, check_regular, listed, parse_json, read_bytes, read_json, shown


def test_only_ordinary_files_are_read_and_only_so_much(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert check_regular(tmp_path / "a") == 5 and read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bytes(tmp_path / "a", 4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "loop", tmp_path / "none"):
        with pytest.raises(OSError):
            read_bytes(path, 1 << 40)


def test_json_is_bounded_in_depth(tmp_path):
    for depth in (1, MAX_DEPTH - 1):
        nested = "[" * depth + "]" * depth
        assert parse_json(nested) == json.loads(nested)
    assert parse_json("[" + "[]," * 999 + "[]]") == [[]] * 1000
    for text in ("[" * 100 + "]" * 100, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "", "nul"):
        with pytest.raises(ValueError):
            parse_json(text)
    (tmp_path / "x.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, None]}


def test_names_in_messages_are_short_and_on_one_line():
    for name in ("a" * 10_000, "a\nerror: b", "\x1b[2J", "\ud800", 10**5000, [[]], None, 1.5, b"x" * 10_000, ("a",) * 10_000):
        assert len(shown(name)) <= 800 and shown(name).isprintable()
    assert (shown("w.é"), shown(7), shown(None), shown([1])) == ("w.é", "7", "None", "list")
    assert listed(range(7)) == "0, 1, 2, 3, 4, and 2 more"
