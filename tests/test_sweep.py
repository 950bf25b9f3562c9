"""A W&B sweep: every run that an agent starts has a folder of its own and the id it was given."""

from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import yaml
from wandb import wandb_agent

SWEEP = yaml.safe_load((launch.ROOT / "experiments/sweep.yaml").read_text())
RATE = "model.init_args.optimizer.init_args.lr"
PROB = "model.init_args.final_survival_prob"
BRIEFLY = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=4",
    "--trainer.enable_progress_bar=false",
]


def what_agent_starts(
    run_id: str, values: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """Returns the command and the environment of a run, as W&B's own agent makes them."""
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **options: SimpleNamespace(**options))
    agent = wandb_agent.Agent(api=None, queue=None)
    agent._sweep_command = SWEEP["command"]
    parameters = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": run_id, "program": SWEEP["program"], "args": parameters})
    return agent._run_processes[run_id]


@pytest.mark.slow
def test_runs_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").symlink_to(launch.ROOT / "experiments")
    # The last two are named so that they are restored: the agent sets them.
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "abc",
        "WANDB_DIR": str(tmp_path),
        "WANDB_RUN_ID": "",
        "WANDB_SWEEP_PARAM_PATH": "",
    }.items():
        monkeypatch.setenv(name, value)
    runs = {"killed": {RATE: 0.05, PROB: 0.75}, "whole": {RATE: 1e-05, PROB: 1}}
    assert all(SWEEP["parameters"].keys() == values.keys() for values in runs.values())
    sweep_folder = tmp_path / "runs/stochastic_depth/quickstart/sweep-abc"
    for run_id, values in runs.items():
        folder = sweep_folder / run_id
        process = what_agent_starts(run_id, values, monkeypatch)
        assert process.command[:4] == ["/usr/bin/env", "python", "main.py", "fit"]
        args = [*process.command[3:], *BRIEFLY]
        environment = {key: process.env[key] for key in process.env if key.startswith("WANDB_")}
        if run_id == "killed":
            assert launch.kill_when((folder / "last.ckpt").exists, args, tmp_path, environment)
        status, output = launch.run(args, tmp_path, environment)
        assert status == 0, output
        assert ("Restoring states" in output) == (run_id == "killed")

        model = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
        assert model["final_survival_prob"] == values[PROB]
        assert model["optimizer"]["init_args"]["lr"] == values[RATE]
        assert (folder / "wandb_id").read_text() == run_id
        attempts = [path.name for path in (folder / "wandb").glob("offline-run-*")]
        assert len(attempts) == (2 if run_id == "killed" else 1)
        assert all(name.endswith(f"-{run_id}") for name in attempts)
    assert {path.name for path in sweep_folder.iterdir()} == runs.keys()
