"""What counts as a token or as a path of this machine, and what does not."""

import pytest

from modelopt_convert.commands.push.leaks import holds_token, local_path, strings_of

OWN = ("/srv/models/out", "/model", "/")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/home/me/x", "/home/me/x"),
        ("made in /root.", None),
        ("made in /root, by me", "/root"),
        ("`/tmp/build/out`", "/tmp/build/out"),
        ("see file:///mnt/data/x", "file:///mnt/data/x"),
        ("(/Users/me/Library)", "/Users/me/Library"),
        ('{"from":"/mnt/models/x"}', "/mnt/models/x"),
        ("C:\\Users\\me", "C:\\Users\\me"),
        ("in /srv/models/out, as built", "/srv/models/out"),
        ("/srv/models/out/config.json", "/srv/models/out"),
        ("https://example.com/home/me", None),
        ("https://huggingface.co/a/b/tree/main/tmp/x", None),
        ("the /model endpoint", None),
        ("either/or, and a/tmp/b", None),
        ("/homes/me, ./tmp/x, ~/tmp/x, /tmpfs", None),
        ("/srv/models/outer", None),
        ("transformer_blocks.*.attn.to_q", None),
        ("p(x) = f:\\mathbb{R}", None),
    ],
)
def test_local_paths(text: str, found: str | None) -> None:
    assert local_path(text, OWN) == found


@pytest.mark.parametrize(
    ("text", "token", "found"),
    [
        ("hf_" + "a" * 34, None, True),
        ("key=hf_" + "A1" * 17 + ";", None, True),
        ("hf_" + "a" * 20, None, False),
        ("hf_hub_download and hf_transfer", None, False),
        ("xhf_" + "a" * 34, None, False),
        ("a secret-of-mine b", "secret-of-mine", True),
        ("a test b", "test", False),
    ],
)
def test_tokens(text: str, token: str | None, found: bool) -> None:
    assert holds_token(text, token) is found


def test_every_string_of_a_document_is_looked_at() -> None:
    found = dict(strings_of({"a": {"b": ["x", {"c": "y"}, 1]}, "d": None, "e": "z"}))
    assert found == {"a.b[0]": "x", "a.b[1].c": "y", "e": "z"}
