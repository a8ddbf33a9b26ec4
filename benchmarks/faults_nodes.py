"""A Ray cluster of a head and two nodes on this machine, whose nodes die, join and are taken away.

As a program it is the cluster, and does what lines on its standard input say; `Nodes` is how
`faults.py` and the tests use it. Ray's nodes are started in the main thread, or they fail.
"""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

PATIENCE_S = 300.0
PREEMPTION = 2
"""`DRAIN_NODE_REASON_PREEMPTION` of Ray's autoscaler.proto."""


class Nodes:
    """Two nodes of one CPU each, and a head without; they end with the block.

    `environment` is what a driver needs to join them at `address`, as this process had to.
    """

    def __init__(self, log: Path) -> None:
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                # The last is Ray's switch for listening on the address that it is given.
                env={**os.environ, **self.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
                start_new_session=True,
            )
        self.pid, self.address = self._process.pid, self._answer()

    def lose(self) -> None:
        """SIGKILL to all processes of the newest node."""
        self._ask("lose")

    def add(self) -> None:
        """One more node joins."""
        self._ask("add")

    def drain(self) -> None:
        """Announce that the newest node will be taken away, in ten minutes."""
        self._ask("drain")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE_S)

    def _ask(self, word: str) -> None:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("nodes: "):
                return line.removeprefix("nodes: ").strip()
        raise AssertionError("the cluster of two nodes ended; its log says why")


def main() -> None:
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    from pipeline.cluster import connection

    # Ray listens on loopback alone; see there.
    connection._stay_on_loopback(True)
    local = {"node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**local, "num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, **local) for _ in range(2)]
    print(f"nodes: {cluster.address}", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "lose":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif word == "add":
            nodes.append(cluster.add_node(num_cpus=1, **local))
        elif word == "drain":
            deadline_ms = int(time.time() * 1000) + 600_000
            accepted, reason = GcsClient(cluster.address).drain_node(
                nodes[-1].node_id, PREEMPTION, "a trial", deadline_ms
            )
            assert accepted, reason
        print(f"nodes: {word}", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
