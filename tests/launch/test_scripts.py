"""Launch scripts really run: with stubs of what they start, and against a Ray head on loopback."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINT = '#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\nexit ${CODE:-0}\n'


def stub(folder: Path, name: str, text: str = PRINT) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_local_hands_recipes_and_overrides_to_longtail(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    script = shutil.copy(ROOT / "launch" / "local.sh", tmp_path / "launch")
    stub(tmp_path / "bin", "longtail")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    words = ("a b.yaml", "recipes/c.yaml", "training.steps=5")
    done = run(script, *words, PATH=path, CODE="75")
    assert done.stdout.splitlines() == [str(tmp_path), "run", *words]
    assert done.returncode == 75

    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stub(tmp_path / ".venv" / "bin", "longtail", "#!/bin/sh\necho the environment of the checkout")
    assert "the environment of the checkout" in run(script, "a.yaml", PATH=path).stdout


RAY = """#!/usr/bin/env bash
cat > {folder}/call <<< "$*"
while [ "$1" != --working-dir ]; do shift; done
cp -r "$2" {folder}/uploaded
"""


def test_submit_uploads_code_and_recipes_and_quotes_arguments(tmp_path: Path) -> None:
    stub(tmp_path, "ray", RAY.format(folder=tmp_path))
    recipe = tmp_path / "one recipe.yaml"
    recipe.write_text("name: one\n")
    storage = tmp_path / "shared storage"
    storage.mkdir()
    path = f"{tmp_path}:{os.environ['PATH']}"
    # A copy: where the checkout has an environment of its own, the script takes Ray from there.
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "pipeline", checkout / "pipeline")
    (checkout / "launch").mkdir()
    submit = shutil.copy(ROOT / "launch" / "submit.sh", checkout / "launch")
    done = run(
        submit,
        "--no-wait",
        recipe,
        "name=a $HOME `b`",
        PATH=path,
        STORAGE=str(storage),
        VERB="show",
    )
    assert done.returncode == 0, done.stderr
    call = (tmp_path / "call").read_text().split()
    assert call[:4] == ["job", "submit", "--address", "http://127.0.0.1:8265"]
    assert call[-4:] == ["--no-wait", "--", "bash", "start.sh"]
    uploaded = tmp_path / "uploaded"
    assert (uploaded / "recipes" / "1_one recipe.yaml").read_text() == "name: one\n"
    assert (uploaded / "pipeline" / "cli.py").is_file()
    assert not list(uploaded.rglob("__pycache__"))
    assert sum(file.stat().st_size for file in uploaded.rglob("*") if file.is_file()) < 5e6

    stub(tmp_path, "python")  # What the uploaded script starts.
    started = subprocess.run(
        ["bash", "start.sh"], cwd=uploaded, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert started == [
        str(storage), "-P", "-m", "pipeline", "show",
        f"{uploaded}/recipes/1_one recipe.yaml", "name=a $HOME `b`",
    ]  # fmt: skip


@pytest.mark.parametrize("storage", ["", "runs"])
def test_submit_refuses_storage_that_nodes_would_not_share(tmp_path: Path, storage: str) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.touch()
    done = run(ROOT / "launch" / "submit.sh", recipe, STORAGE=storage)
    assert done.returncode == 78 and "absolute path" in done.stderr
    done = run(ROOT / "launch" / "submit.sh", tmp_path / "two.yaml", STORAGE="/storage")
    assert done.returncode == 78 and "no recipe at" in done.stderr


def test_submit_says_which_options_take_a_value(tmp_path: Path) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.touch()
    option = ("--runtime-env-json", "{}")
    done = run(ROOT / "launch" / "submit.sh", *option, recipe, STORAGE="/storage")
    assert done.returncode == 78 and "no recipe at {}" in done.stderr
    assert "--entrypoint-memory take one" in done.stderr and "--option=VALUE" in done.stderr


SLURM = {
    "scontrol": """case "$*" in
  "show hostnames"*) echo node1 ;;
  requeue*) echo requeued $2 >> $LOG ;;
esac""",
    "srun": """echo "srun $*" >> $LOG
while [ "$1" != bash ]; do shift; done
exec "$@"
""",
    "ray": """echo "ray $*" >> $LOG
port=$(printf '%s\\n' "$@" | sed -n 's/^--port=//p')
touch $(printf '%s\\n' "$@" | sed -n 's/^--temp-dir=//p')
exec python -c "
import signal, socket, sys
server = socket.create_server(('127.0.0.1', int(sys.argv[1])))
signal.pause()" $port""",
    "python": """if [ "$1" = - ]; then exit 0; fi
exec {python} "$@"
""",
    "longtail": """echo "longtail $*" >> $LOG
trap 'exit 75' TERM INT
if [ -n "${WAIT:-}" ]; then echo running >> $LOG; sleep 60 > /dev/null 2>&1 & wait; fi
exit ${CODE:-0}""",
}


@pytest.fixture()
def slurm(tmp_path: Path) -> Path:
    """Stubs of Slurm, Ray and longtail on a path, that write what they are asked to `log`."""
    for name, text in SLURM.items():
        stub(tmp_path, name, "#!/usr/bin/env bash\n" + text.replace("{python}", sys.executable))
    return tmp_path


def sbatch(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    taken = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), *words],
        env={
            **taken,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "LOG": str(folder / "log"),
            "SLURM_JOB_ID": str(secrets.randbelow(900)),
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_CPUS_ON_NODE": "2",
            "SLURM_PROCID": "0",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Bash cannot trap what was ignored when it began, as it is below a `command &` of a script.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def lines(folder: Path, word: str) -> list[str]:
    log = folder / "log"
    text = log.read_text() if log.exists() else ""
    return [line for line in text.splitlines() if line.startswith(word)]


@pytest.mark.parametrize("code", ["0", "78"])
def test_a_job_runs_the_chain_on_its_ray_and_ends_with_its_code(slurm: Path, code: str) -> None:
    job = sbatch(slurm, "a.yaml", "b.yaml", "seed=1", CODE=code, SLURM_GPUS_ON_NODE="4")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == int(code), said
    [ran] = lines(slurm, "longtail")
    port = ran.partition("cluster.address=127.0.0.1:")[2].split()[0]
    assert ran == (
        f"longtail run a.yaml b.yaml seed=1 cluster.address=127.0.0.1:{port} cluster.workers=4"
    )
    [step], [head] = lines(slurm, "srun"), lines(slurm, "ray")
    assert "--overlap --nodes=1 --ntasks=1 --nodelist=node1" in step
    assert "--head" in head and f"--port={port}" in head and "--dashboard-host=127.0.0.1" in head
    assert lines(slurm, "requeued") == []
    temporary = head.partition("--temp-dir=")[2].split()[0]
    assert re.fullmatch(r"/tmp/lt_\d+_head0", temporary) and not Path(temporary).exists()
    assert not [*slurm.rglob("token"), *slurm.rglob("stop_*")]


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_job_that_is_asked_to_stop_saves_and_only_sigterm_requeues(
    slurm: Path, number: signal.Signals, requeued: int
) -> None:
    job = sbatch(slurm, "a.yaml", "cluster.workers=2", WAIT="yes", SLURM_GPUS_ON_NODE="4")
    deadline = time.monotonic() + 60
    while not lines(slurm, "running"):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    [token] = slurm.rglob("token")
    assert token.stat().st_mode & 0o077 == 0 and len(token.read_text()) == 64
    assert "cluster.workers=4" not in lines(slurm, "longtail")[0]
    job.send_signal(number)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 75, said
    assert len(lines(slurm, "requeued")) == requeued


def test_a_head_that_does_not_come_up_ends_the_job(slurm: Path) -> None:
    stub(slurm, "srun", "#!/bin/sh\nexit 1\n")
    job = sbatch(slurm, "a.yaml")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 70 and "head ended on node1" in said
    assert lines(slurm, "longtail") == []


@pytest.fixture()
def head() -> Iterator[dict[str, str]]:
    """A Ray head on loopback; what a client needs in its environment."""
    folder = tempfile.mkdtemp(prefix="lt_head_")  # Paths of sockets hold 107 characters.
    # The agent's port, too: with Ray's own another cluster on this machine leaves none to run jobs.
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for free in (one, two, three):
            free.bind(("127.0.0.1", 0))
        port, dashboard, agent = (free.getsockname()[1] for free in (one, two, three))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would put the machine's address in the place of 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # `ray job stop` would give a job three seconds to save.
        "RAY_JOB_STOP_WAIT_TIME_S": "300",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words = (
        "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        "--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder}",
    )  # fmt: skip
    process = subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", dashboard)):
            assert time.monotonic() < deadline and process.poll() is None, "no job server"
            time.sleep(0.5)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_submitted_job_trains_stops_and_goes_on_on_the_cluster_it_was_submitted_to(
    tmp_path: Path, head: dict[str, str]
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    submit, recipe = (
        ROOT / "launch" / "submit.sh",
        ROOT / "tests" / "recipes" / "tiny_pretrain.yaml",
    )
    command = (recipe, "training.steps=40", "cluster.workers=1")
    given = head | {"STORAGE": str(storage)}
    deadline = time.monotonic() + 120
    while True:
        done = run(submit, "--no-wait", "--submission-id", "first", *command, **given)
        # The head's job server listens before the agent is there that starts jobs.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr

    metrics = storage / "runs" / "tiny_pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.exists() or metrics.read_text().count('"event": "step"') < 2:
        assert time.monotonic() < deadline, run("ray", "job", "logs", "first", **head).stdout
        time.sleep(0.2)
    stopped = run("ray", "job", "stop", "first", **head)
    said = run("ray", "job", "logs", "first", **head).stdout
    assert "was stopped" in stopped.stdout + stopped.stderr, stopped
    assert re.search(r"stopped after step \d+ of 40 and saved", said), said

    again = run(submit, *command, **given)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "shards of objects365: 20 images" in said and "going on from" in again.stdout
    steps = [line for line in metrics.read_text().splitlines() if '"event": "step"' in line]
    assert len(steps) == 40, "each step once"

    stranger = given | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = run(submit, *command, **stranger)
    assert refused.returncode != 0 and "uthenticat" in refused.stdout + refused.stderr
