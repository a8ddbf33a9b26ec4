"""A Ray cluster of several nodes on this machine, as a process that obeys lines on its input.

`add` starts a node of one CPU, `lose` kills the newest node without warning, `drain` announces that
the newest node will be taken away. Each is answered by a line; the first line is the address.
"""

import sys
import time

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from pipeline.cluster import connection

PREEMPTION = 2
"""`DRAIN_NODE_REASON_PREEMPTION` of Ray's autoscaler.proto."""


def main() -> None:
    # Ray listens on loopback alone; see there.
    connection._stay_on_loopback(True)
    local = {"node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**local, "num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, **local) for _ in range(2)]
    answer(cluster.address)
    for line in sys.stdin:
        if line.strip() == "add":
            nodes.append(cluster.add_node(num_cpus=1, **local))
        elif line.strip() == "lose":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif line.strip() == "drain":
            deadline_ms = int(time.time() * 1000) + 600_000
            accepted, reason = GcsClient(cluster.address).drain_node(
                nodes[-1].node_id, PREEMPTION, "a test", deadline_ms
            )
            assert accepted, reason
        answer(line.strip())
    cluster.shutdown()


def answer(text: str) -> None:
    print(f"answer {text}", flush=True)


if __name__ == "__main__":
    assert not ray.is_initialized()
    main()
