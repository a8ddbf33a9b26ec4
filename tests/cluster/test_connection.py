"""Joining a cluster and starting one: faults have names, and only loopback is listened on."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from processes import descendants
from tiny_world import ENVIRONMENT

from pipeline.cluster import connection
from pipeline.cluster.connection import start_ray
from pipeline.errors import LongtailError, RecipeError
from pipeline.recipe import Cluster

BUSY = "The current node timed out during startup. This could happen because ..."


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `ray.init` is called with, in place of calling it; restores what a start sets."""
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **arguments: taken.append(arguments))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "PATIENCE_S", 0.0)
    monkeypatch.setattr(connection, "_watch_over_ray", lambda _started: None)
    monkeypatch.setattr(connection.ray_constants, "ENABLE_RAY_CLUSTER", True)
    for name in ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
    return taken


def fail_first(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[dict[str, Any]]:
    """`ray.init` raises these in turn, after it has started a process, then works."""
    taken: list[dict[str, Any]] = []

    def init(**arguments: Any) -> None:
        taken.append(arguments)
        if len(taken) <= len(errors):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60) # half started"])
            raise errors[len(taken) - 1]

    monkeypatch.setattr(ray, "init", init)
    return taken


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_without_an_address_ray_is_started_here_whatever_else_runs_on_the_machine(
    calls: list[dict[str, Any]],
) -> None:
    start_ray(Cluster(workers=3, cpus_per_worker=2, object_store_megabytes=300))
    [call] = calls
    assert call["address"] == "local" and call["num_cpus"] >= 6
    assert call["object_store_memory"] == 300 * 2**20
    assert call["_node_ip_address"] == "127.0.0.1"
    assert connection.ray_constants.ENABLE_RAY_CLUSTER is False
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


@pytest.mark.parametrize("by", ["recipe", "environment"])
def test_an_address_is_joined_and_decides_over_nothing_else(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        if by == "environment":
            monkeypatch.setenv("RAY_ADDRESS", address)
        start_ray(Cluster(address=address if by == "recipe" else None))
    [call] = calls
    assert call["address"] == address
    assert not {"num_cpus", "object_store_memory", "_node_ip_address"} & set(call)


def test_on_a_cluster_of_machines_ray_finds_its_own_address(calls: list[dict[str, Any]]) -> None:
    start_ray(Cluster(address="auto"))
    assert calls[0]["address"] == "auto"
    assert connection.ray_constants.ENABLE_RAY_CLUSTER is True


def test_where_nobody_answers_the_address_is_named(calls: list[dict[str, Any]]) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(RecipeError, match=f"no Ray cluster answers at {address}.*RAY_ADDRESS"):
        start_ray(Cluster(address=address))
    with pytest.raises(RecipeError, match="HOST:PORT"):
        start_ray(Cluster(address="ray://head:10001"))
    assert calls == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ray.exceptions.AuthenticationError("no token was found"), "RAY_AUTH_TOKEN_PATH"),
        (ConnectionError("Failed to connect to Ray cluster at h:1"), "compare its token"),
        (RuntimeError("Version mismatch: The cluster was started with"), "Version mismatch"),
    ],
)
def test_a_cluster_that_does_not_let_us_in_is_named(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    fail_first(monkeypatch, error)
    with pytest.raises(RecipeError, match=advice):
        start_ray(Cluster(address="auto"))


def test_a_start_that_timed_out_is_tried_again_and_leaves_nothing(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = fail_first(monkeypatch, Exception(BUSY), Exception(BUSY))
    start_ray(Cluster())
    assert len(tried) == 3
    assert caplog.text.count("Ray did not start: The current node timed out") == 2
    assert descendants(os.getpid(), "half started") == []


def test_ray_that_does_not_start_is_one_paragraph(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail_first(monkeypatch, *[Exception(BUSY)] * 3)
    with pytest.raises(LongtailError, match=r"3 of 3 attempts\): The current node timed out"):
        start_ray(Cluster())
    assert len(tried) == 3
    tried = fail_first(monkeypatch, ValueError("/dev/shm is too small"))
    with pytest.raises(LongtailError, match=r"1 of 3 attempts\): /dev/shm is too small.*200 MB"):
        start_ray(Cluster())
    assert len(tried) == 1


JOIN = """
from pipeline.cluster import start_ray, stop_ray
from pipeline.errors import RecipeError
from pipeline.recipe import Cluster

try:
    start_ray(Cluster(workers=1))
except RecipeError as error:
    print("refused:", error)
else:
    print("joined")
    stop_ray()
"""


@pytest.mark.slow
def test_a_real_cluster_is_joined_with_its_token_only(tmp_path: Path) -> None:
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    port, token = free_port(), secrets.token_hex(32)
    folder = tempfile.mkdtemp(prefix="lt_head_")  # Paths of sockets hold 107 characters.
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    words = (
        "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--include-dashboard=false", "--num-cpus=1",
        "--object-store-memory=100000000", f"--temp-dir={folder}",
    )  # fmt: skip
    head = subprocess.Popen(
        [sys.executable, *words], env={**ENVIRONMENT, **settings}, stdout=subprocess.DEVNULL
    )
    address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    try:
        said = {
            name: subprocess.run(
                [sys.executable, str(script)],
                env={**ENVIRONMENT, "HOME": str(tmp_path), **address, **more},
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            ).stdout
            for name, more in {
                "right": {"RAY_AUTH_TOKEN": token},
                "wrong": {"RAY_AUTH_TOKEN": secrets.token_hex(32)},
                "none": {},
            }.items()
        }
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
    assert said["right"] == "joined\n"
    assert "cannot be joined" in said["wrong"] and "compare its token" in said["wrong"]
    assert "not joined without a token" in said["none"]
