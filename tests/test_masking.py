"""Secrets of a configuration: masked wherever a run writes, and nothing else is."""

import hashlib
from pathlib import Path

import pytest
import yaml

from running.error_file import ErrorFile
from running.folder import check_trained
from running.masking import masked, masked_words


def test_arguments_that_only_sound_like_secrets_stay() -> None:
    """Another `class_token` is another network."""
    tree = {"class_token": "mean", "cls_token": "max", "num_tokens": "4", "token_dim": ["8"]}
    words = ["--net.class_token=mean", "--net.cls_token", "max", "--net={num_tokens: 4}"]
    assert masked(tree) == tree
    assert masked_words(words) == words


def test_secrets_differ_behind_their_masks() -> None:
    """Yet one text has one mask, whether it was masked before or not."""
    one, other = (masked({"a": {"token": ["hush", text]}}) for text in ("hush", "shh"))
    assert one["a"]["token"][0] == one["a"]["token"][1] == other["a"]["token"][0]
    assert other["a"]["token"][1] not in (one["a"]["token"][1], "shh")
    digest = hashlib.sha256(b"shh").hexdigest()[:8]
    assert other["a"]["token"][1] == f"*** (sha256 {digest})"
    assert masked(other) == other


def test_a_secret_in_a_value_that_is_yaml() -> None:
    words = [
        "--x.init_args={'password': 's3cret', 'width': 4}",
        "--x",
        '[{"api_keys": ["s3cret"]}]',
    ]
    shown = masked_words(words)
    assert "s3cret" not in str(shown)
    content = yaml.safe_load(shown[0].partition("=")[2])
    assert content == masked({"password": "s3cret", "width": 4})
    assert shown[1] == "--x"


def test_a_secret_of_a_file_is_not_in_the_traceback(tmp_path: Path) -> None:
    """Nor one in a mapping on the command line; a text that any word may hold is left alone."""
    file = tmp_path / "a.yaml"
    file.write_text("data: {init_args: {token: of-the-file, passwd: e}}")
    errors = ErrorFile(["fit", "-c", str(file), "--x={'password': 'of-the-command'}"])
    file.unlink()
    errors.folder = tmp_path
    text = errors.keep(ValueError("neither of-the-file nor of-the-command")).read_text()
    assert "of-the-" not in text
    assert "ValueError: neither *** (sha256 " in text


def test_a_folder_of_before_secrets_were_masked_goes_on(tmp_path: Path) -> None:
    config = {"model": {"token": "hush-1"}, "checkpoint": {"mode": "max"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    check_trained(tmp_path, masked(config), lambda same: same)
    other = {**config, "model": {"token": "hush-2"}}
    with pytest.raises(ValueError, match=r"model\.token is") as caught:
        check_trained(tmp_path, masked(other), lambda same: same)
    assert "hush" not in str(caught.value)
