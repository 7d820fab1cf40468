"""A Ray cluster of several nodes on this machine, a node of which can be killed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

MEMORY = 80 * 2**20
"""Bytes of shared memory of a node, the least that Ray takes."""
HASTE = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 2}


def missing() -> str:
    """Why no Ray can be started here; empty where it can."""
    return "" if importlib.util.find_spec("ray") else "no Ray here: pip install ray"


class RayCluster:
    """A head without CPUs, and nodes of one CPU each."""

    def __init__(self, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": MEMORY, "_system_config": HASTE, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(nodes)]
        self._cluster.wait_for_nodes()
        self.address = str(self._cluster.address)

    def working(self) -> list[Any]:
        """Nodes that run a worker of nemo-bench."""
        return [node for node in self._nodes if any(map(_is_worker, _processes(node)))]

    def kill(self, node: Any) -> None:
        """Kills a node as a power cut does, with everything that it started."""
        processes = _processes(node)
        self._nodes.remove(node)
        for process in processes:
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        """Stops all nodes."""
        self._cluster.shutdown()


def _processes(node: Any) -> list[psutil.Process]:
    """The daemon of a node and all that it started."""
    (raylet,) = node.all_processes["raylet"]
    daemon = psutil.Process(raylet.process.pid)
    return [daemon, *daemon.children(recursive=True)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "nemo_bench" in process.cmdline()
    except psutil.Error:
        return False  # it ended


@contextmanager
def ray_cluster(nodes: int = 2) -> Iterator[RayCluster]:
    """Starts a cluster of a head and some nodes, and stops it."""
    cluster = RayCluster(nodes)
    try:
        yield cluster
    finally:
        cluster.stop()
