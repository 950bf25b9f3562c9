"""What a shell offers at <TAB>, asked of a real one."""

import subprocess
import sys
from pathlib import Path

import launch
import pytest

from running.command_line import main

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_main_py
printf '%s\\n' "${COMPREPLY[@]}"
"""
OFFERS = {
    "": ["fit", "validate", "test", "predict", "runs", "report", "profile", "export", "tour"],
    "fit --trainer.max_e": ["--trainer.max_epochs"],
    "fit --model LitS": ["LitSlimmable", "LitSlimmableExits", "LitStochasticDepth"],
    "fit --data Dig": ["DigitsDataModule"],
    "fit -c experiments/q": ["experiments/quickstart.yaml"],
    "predict --im": ["--images"],
    "predict --ckpt": ["--ckpt_path"],
    "export --format ": ["onnx", "torch"],
    "export --run exp": ["experiments"],
    "report exp": ["experiments"],
}


def test_a_shell_completes_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    for words, offered in OFFERS.items():
        command = ["bash", "-c", ASK, "ask", script, "main.py", *words.split(" ")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=launch.ROOT)
        assert not set(offered) - set(done.stdout.split()), (words, done)
        assert not done.stderr
    assert main(["completion", "zsh"]) == 0
    assert "#compdef main.py" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install -e '.[completion]'" in capsys.readouterr().err
