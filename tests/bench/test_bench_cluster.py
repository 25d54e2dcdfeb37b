"""A node, the driver and the head die in one run on three nodes: its tables are those of an undisturbed run."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.store.store import Store
from tests.heads import free_ports
from tests.pipeline.execution.test_run import digests, without
from tests.runs import RECIPES, ROOT, local, plan_of

NODE: dict[str, Any] = dict(
    num_cpus=1, include_dashboard=False, node_ip_address="127.0.0.1", object_store_memory=80_000_000
)
DETECT_DEATHS_FAST = dict(health_check_initial_delay_ms=0, health_check_period_ms=500, health_check_failure_threshold=3)


@contextmanager
def cluster_of(nodes: int) -> Iterator[Cluster]:
    # A port for the dashboard too: without a dashboard Ray tries its default port, and leaks the socket
    gcs, agent, dashboard = free_ports(3)
    head: dict[str, Any] = dict(gcs_server_port=gcs, dashboard_agent_listen_port=agent, dashboard_port=dashboard)
    head["_system_config"] = DETECT_DEATHS_FAST
    cluster = Cluster(initialize_head=True, head_node_args=NODE | head)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def driver(cluster: Cluster, data_dir: Path, store: Store) -> Iterator[subprocess.Popen]:
    """Start `winnow run` in a process of its own, which is killed at the end if it has not ended."""
    command = [sys.executable, "-m", "jobs", "run", RECIPES / "rso.yaml", "--config", data_dir / "demo.yaml"]
    command += ["--set", "target=select", "--store", store.root, "--workers", "2", "--address", cluster.address]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def wait_for(find: Callable[[], Any], process: subprocess.Popen) -> Any:
    """Return what `find` finds, as soon as it does, while the process runs."""
    deadline = time.monotonic() + 120
    while not (result := find()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def busy_nodes(cluster: Cluster) -> list[Any]:
    """Return the nodes beside the head where a worker runs a task now: Ray puts its name into the process title."""
    nodes = []
    for node in cluster.worker_nodes:
        (raylet,) = node.all_processes["raylet"]
        for process in psutil.Process(raylet.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "ray::StageWorker.run_task" in " ".join(process.cmdline()):
                    nodes.append(node)
    return nodes


@pytest.mark.timeout(300)
def test_a_node_the_driver_and_the_head_die(data_dir, finished, tmp_path):
    """A node in `sample`, the driver in `reward`, then the head and with it the cluster; each time what was finished
    stays as it was, and what is missing is made: no row is lost, doubled or different."""
    plan = plan_of(data_dir, "target=select")
    store = without(finished, plan, "sample", tmp_path / "store")
    sample, reward = (local(store.folder(step).path) for step in plan.steps if step.name in ("sample", "reward"))

    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for folder in (sample, reward) for file in folder.glob("*.parquet")}

    with cluster_of(3) as cluster, driver(cluster, data_dir, store) as process:
        (victim, *_) = wait_for(lambda: busy_nodes(cluster), process)
        assert not (sample / "manifest.json").exists()
        cluster.remove_node(victim, allow_graceful=False)
        wait_for(lambda: [*reward.glob("part-*.json")], process)
        process.kill()
        process.wait()
        assert not (reward / "manifest.json").exists()
        assert "killed its worker" not in process.stdout.read()
        before = times()
    with cluster_of(1) as another, driver(another, data_dir, store) as process:
        assert process.wait(timeout=120) == 0, process.stdout.read()
    assert before
    assert times().items() >= before.items()
    assert digests(plan, store) == digests(plan, Store(finished))
