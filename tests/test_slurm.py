"""On a real scheduler: whatever stops a job, the job ends as if nothing had stopped it.

    pytest -m cluster

It takes Debian's packages slurm-wlm and munge and the rights of root, and fails without them.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launch
import methods
import pytest
import yaml
from slurm_testbed import Cluster
from test_resume import assert_same_run

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

LENGTH = {"max_epochs": 40, "limit_train_batches": 20, "log_every_n_steps": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


class Experiment:
    """An experiment in a folder of its own, as a job of the cluster."""

    def __init__(self, cluster: Cluster, folder: Path, trainer: dict[str, Any] | None = None):
        folder.mkdir(exist_ok=True)
        self.cluster = cluster
        self.folder = folder
        self.run = folder / "run"
        config = methods.config("stochastic_depth")
        config["checkpoint"] = {"select": "last", "every_n_steps": 50}
        config["trainer"] |= LENGTH | (trainer or {})
        (folder / "experiment.yaml").write_text(yaml.safe_dump(config))

    def arguments(self) -> list[str]:
        return ["-c", str(self.folder / "experiment.yaml"), "--run_dir", str(self.run)]

    def run_undisturbed(self, *arguments: str) -> None:
        """Runs to the end without SLURM."""
        status, output = launch.run(["fit", *self.arguments(), *arguments], self.folder)
        assert status == 0, output

    def num_rows(self) -> int:
        history = self.run / "metrics.csv"
        return history.read_text().count("\n") if history.exists() else 0

    def wait_for_progress(self, job: int | str, restarts: int) -> None:
        """Waits until that attempt of a job trains."""
        attempt = str(restarts)

        def is_running() -> bool:
            state = self.cluster.show(job)
            assert state["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), self.cluster.logs()
            return state["JobState"] == "RUNNING" and state["Restarts"] == attempt

        self.cluster.wait_until(is_running, f"attempt {attempt} of job {job}")
        attempts = self.run / "attempts.yaml"
        self.cluster.wait_until(
            lambda: attempts.exists() and attempts.read_text().count("- started") > restarts,
            f"the start of attempt {attempt}",
        )
        time.sleep(1)  # the history is cut to the checkpoint
        seen = self.num_rows()
        self.cluster.wait_until(lambda: self.num_rows() > seen, f"progress of attempt {attempt}")

    def finish(self, job: int | str, restarts: int) -> None:
        """Waits for the end of a job, and asserts how it ended."""
        state = self.cluster.finish(job)
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), self.cluster.logs()
        assert int(state["Restarts"]) == restarts
        assert not list(self.folder.rglob("hpc_ckpt*"))


def warn(cluster: Cluster, job: int | str) -> None:
    """Sends the signal that comes before the time limit and before a preemption."""
    cluster.ask("scancel", "--signal=USR1", str(job))


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    experiment = Experiment(cluster, tmp_path_factory.mktemp("whole") / "experiment")
    experiment.run_undisturbed()
    return experiment


def clean(run: Path) -> None:
    """Removes what may differ: who was warned has saved more often, and folders have names."""
    for name in ("previous.ckpt", "config.yaml"):
        (run / name).unlink(missing_ok=True)


def assert_same(one: Experiment, other: Experiment) -> None:
    for experiment in (one, other):
        clean(experiment.run)
    assert_same_run(one.folder, other.folder)


def assert_one_wandb_run(experiment: Experiment, attempts: int) -> None:
    identity = (experiment.run / "wandb_id").read_text()
    folders = list((experiment.run / "wandb").glob("offline-run-*"))
    assert len(folders) == attempts
    assert all(path.name.endswith(f"-{identity}") for path in folders)


def test_job_warned_three_times(cluster: Cluster, whole: Experiment, tmp_path: Path) -> None:
    experiment = Experiment(cluster, tmp_path / "experiment")
    job = cluster.submit(*experiment.arguments(), "--wandb.mode=offline")
    for restarts in range(3):
        experiment.wait_for_progress(job, restarts)
        warn(cluster, job)
    experiment.finish(job, restarts=3)
    assert_same(whole, experiment)
    assert_one_wandb_run(experiment, attempts=4)


def test_job_requeued_by_an_administrator(
    cluster: Cluster, whole: Experiment, tmp_path: Path
) -> None:
    """`scontrol requeue` comes with SIGTERM and, ten seconds later, SIGKILL."""
    experiment = Experiment(cluster, tmp_path / "experiment")
    job = cluster.submit(*experiment.arguments(), "--wandb.mode=offline")
    experiment.wait_for_progress(job, 0)
    cluster.ask("scontrol", "requeue", str(job))
    experiment.finish(job, restarts=1)
    assert "saved after a signal" in cluster.output(job)
    assert_same(whole, experiment)
    assert_one_wandb_run(experiment, attempts=2)


def test_job_preempted(cluster: Cluster, whole: Experiment, tmp_path: Path) -> None:
    """A job of a partition with priority comes with SIGTERM and a minute's grace."""
    experiment = Experiment(cluster, tmp_path / "experiment")
    job = cluster.submit(*experiment.arguments(), "--wandb.mode=offline")
    experiment.wait_for_progress(job, 0)
    urgent = cluster.ask(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
        *(f"--output={cluster.folder}/urgent.out", "--wrap=sleep 5"),
    )
    assert cluster.finish(urgent)["JobState"] == "COMPLETED"
    experiment.finish(job, restarts=1)
    assert "saved after a signal" in cluster.output(job)
    assert_same(whole, experiment)
    assert_one_wandb_run(experiment, attempts=2)


def test_job_whose_node_fails(cluster: Cluster, whole: Experiment, tmp_path: Path) -> None:
    experiment = Experiment(cluster, tmp_path / "experiment")
    job = cluster.submit(*experiment.arguments(), "--wandb.mode=disabled")
    experiment.wait_for_progress(job, 0)
    node = cluster.show(job)["NodeList"]
    cluster.kill_node(node, job)
    try:
        experiment.finish(job, restarts=1)
    finally:
        cluster.start_node(node)
    assert_same(whole, experiment)


def test_two_nodes_warned(cluster: Cluster, tmp_path: Path) -> None:
    """Twice the same job, warned or not."""
    strategy = "--trainer.strategy=ddp_find_unused_parameters_true"
    experiments = [Experiment(cluster, tmp_path / name) for name in ("undisturbed", "warned")]
    for restarts, experiment in enumerate(experiments):
        arguments = [*experiment.arguments(), strategy, "--wandb.mode=disabled"]
        job = cluster.submit(*arguments, options=("--nodes=2",))
        if restarts:
            experiment.wait_for_progress(job, 0)
            assert cluster.show(job)["NumNodes"] == "2"
            warn(cluster, job)
        experiment.finish(job, restarts)
    assert_same(*experiments)


def test_array_of_seeds(cluster: Cluster, tmp_path: Path) -> None:
    """Three seeds side by side, each in a folder of its own; one is warned."""
    experiment = Experiment(cluster, tmp_path / "experiment")
    array = cluster.submit(
        *("-c", str(experiment.folder / "experiment.yaml"), "--wandb.mode=disabled"),
        options=("--array=0-2", f"--chdir={experiment.folder}"),
    )
    runs = experiment.folder / "runs/stochastic_depth/experiment"
    # The last task is the one whose job has the number of the array.
    experiment.run = runs / "seed2"
    experiment.wait_for_progress(f"{array}_2", 0)
    warn(cluster, f"{array}_2")
    for seed in range(3):
        experiment.finish(f"{array}_{seed}", restarts=int(seed == 2))
        undisturbed = Experiment(cluster, tmp_path / f"seed{seed}")
        undisturbed.run_undisturbed(f"--seed_everything={seed}")
        job = tmp_path / f"job{seed}"
        job.mkdir()
        (job / "run").symlink_to(runs / f"seed{seed}")
        for run in (job / "run", undisturbed.run):
            clean(run)
        assert_same_run(job, undisturbed.folder)
