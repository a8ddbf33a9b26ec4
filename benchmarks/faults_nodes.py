"""A Ray cluster of a head and two nodes on this machine, for `faults.py`, of which one dies.

As a program it is the cluster, and does what lines on its standard input say; `Nodes` is how
others use it. Ray's nodes are started in the main thread, or they fail.
"""

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Self

PATIENCE_S = 300.0


class Nodes:
    """Two nodes of one CPU each, and a head without; they end with the block."""

    def __init__(self, log: Path) -> None:
        self.token = secrets.token_hex(32)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token},
                start_new_session=True,
            )
        self.address = self._answer()

    def lose(self) -> None:
        """SIGKILL to all processes of one node that training runs on."""
        self._ask("lose")

    def add(self) -> None:
        """One more node joins."""
        self._ask("add")

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
        raise AssertionError("the cluster of two nodes ended; see logs/nodes.log")


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    print(f"nodes: {cluster.address}", flush=True)
    for word in sys.stdin:
        if word.strip() == "lose":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        else:
            nodes.append(cluster.add_node(num_cpus=1))
        print(f"nodes: {word.strip()} done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
