"""A Slurm of two nodes on this machine runs launch/slurm.sbatch, preempts it twice, and compares.

    python tests/launch/one_machine_slurm.py [--install] [--keep FOLDER]

Needs root, and Debian's slurmctld, slurmd, slurm-client, munge, iproute2 (`--install` gets them).
Everything runs in a network namespace of its own that has nothing but a loopback interface, so
nothing outside can reach it, and it can reach nothing. A chain of two tiny recipes is submitted; it
is requeued in its first stage by `scontrol requeue` (no warning), in its second by its time limit
(`--signal`: save, exit 75, requeue), and has to end with weights and step losses equal to those of
the same chain run without Slurm and without a disturbance.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "unshare")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2")
NODES = ("node1", "node2")
INSIDE = "LONGTAIL_SLURM_TRIAL"
"""Set in the process that runs inside the network namespace."""
STEPS = {"tiny_pretrain": 9, "tiny": 150}
SAVED_EVERY = {"tiny_pretrain": 3, "tiny": 25}
PATIENCE_S = 1800.0
LOOPBACK = ("127.0.0.1:", "[::ffff:127.0.0.1]:", "[::1]:")

CONFIGURATION = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17100
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as its credential is valid, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=30
ReturnToService=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17101 CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17102 CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """munge, slurmctld and a slurmd for each node, with all they write under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        host = socket.gethostname().partition(".")[0]
        self._configuration = folder / "slurm.conf"
        self._configuration.write_text(CONFIGURATION.format(host=host, folder=folder))
        os.environ["SLURM_CONF"] = str(self._configuration)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(256))
        key.chmod(0o600)
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *files)
        wait_until(lambda: (self.folder / "munge.socket").exists(), 20, "munge answers")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        wait_until(lambda: say("sinfo", "-h", "-o", "%T") == "idle", 30, "both nodes are idle")

    def stop(self) -> None:
        say("scancel", "--full", "--user=root", check=False)
        deadline = time.monotonic() + 60
        while say("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(timeout=30)

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("ab") as log:
            self._daemons.append(subprocess.Popen(words, stdout=log, stderr=log))


def say(*words: str, check: bool = True) -> str:
    """What a command prints."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S', time.gmtime())} trial] {text}", flush=True)


def write_recipes(folder: Path) -> list[Path]:
    """The tiny chain of the tests, long enough to be interrupted."""
    paths = []
    for name, steps in STEPS.items():
        tree = yaml.safe_load((ROOT / "tests" / "recipes" / f"{name}.yaml").read_text())
        tree["training"] |= {"steps": steps, "checkpoint_every": SAVED_EVERY[name]}
        tree["evaluation"] = {"every": 0}
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree))
    return paths


def steps_of(folder: Path, name: str) -> list[int]:
    """Steps that a run has logged."""
    path = folder / "runs" / name / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line).get("step", 0) for line in lines if line.endswith("\n")]


def job_field(job: str, field: str) -> str:
    words = say("scontrol", "show", "job", job, "-o").split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{field}="))


def trial(folder: Path) -> None:
    work = folder / "work"
    work.mkdir()
    shim = folder / "bin" / "longtail"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    shim.chmod(0o755)
    os.environ |= {
        "PATH": f"{shim.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OBJECT_STORE_MEGABYTES": "150",
    }
    os.chdir(work)
    recipes = [str(path) for path in write_recipes(work)]
    slurm = Slurm(folder)
    try:
        slurm.start()
        note(f"{say('sbatch', '--version')}; {say('sinfo', '-h', '-o', '%D nodes: %N, %T')}")
        preempt_twice(work, recipes)
        show_listeners("Slurm's daemons, after the job")
    finally:
        slurm.stop()
    note("the same chain without Slurm and without a disturbance")
    done = subprocess.run(
        ["longtail", "run", *recipes, f"output={work}/undisturbed"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compare(work, recipes)


def preempt_twice(work: Path, recipes: list[str]) -> None:
    command = [
        "sbatch", "--parsable", "--cpus-per-task=1", "--time=60", "--signal=B:TERM@90",
        str(ROOT / "launch" / "slurm.sbatch"), *recipes,
    ]  # fmt: skip
    note(" ".join([*command[:5], "launch/slurm.sbatch", *(Path(one).name for one in recipes)]))
    job = say(*command)
    log = work / f"slurm-{job}.out"
    first, second = STEPS
    try:
        await_step(work, job, first, SAVED_EVERY[first] + 1)
        show_listeners("everything that listens, in mid-training")
        note(f"scontrol requeue {job}: no warning, no time to save")
        say("scontrol", "requeue", job)
        await_restart(job, 1)

        await_step(work, job, second, 2)
        run_time = job_field(job, "RunTime")
        minutes = int(run_time.split(":")[1]) + 2  # The signal is due, and leaves a minute.
        note(f"the time limit becomes {minutes} minutes, of which {run_time} are used")
        say("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        await_restart(job, 2)
        say("scontrol", "update", f"JobId={job}", "TimeLimit=60")

        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: job_field(job, "JobState") in ended, PATIENCE_S, "the job ends")
        state, restarts = job_field(job, "JobState"), job_field(job, "Restarts")
        note(f"job {job}: {state} after {restarts} restarts, exit {job_field(job, 'ExitCode')}")
        text = log.read_text()
        assert state == "COMPLETED" and restarts == "2", (state, restarts)
        assert "stopped after step" in text and "back into the queue" in text
        leftovers = [*Path("/tmp").glob(f"lt_{job}_*"), *(work / "runs/slurm" / job).glob("token")]
        assert not leftovers, leftovers
    finally:
        print(log.read_text() if log.exists() else "no output yet", flush=True)


def await_step(work: Path, job: str, name: str, step: int) -> None:
    def reached() -> bool:
        state = job_field(job, "JobState")
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), state
        return max(steps_of(work, name), default=0) >= step

    wait_until(reached, PATIENCE_S, f"step {step} of {name}")
    note(f"{name} has done step {max(steps_of(work, name))} of {STEPS[name]}")


def await_restart(job: str, number: int) -> None:
    wait_until(lambda: int(job_field(job, "Restarts")) == number, 300, "Slurm requeued the job")
    note(f"job {job} is back in the queue, restart {number}")


def show_listeners(title: str) -> None:
    """Anything that listens elsewhere than on loopback fails the trial, but for torch's TCPStore,
    by which training workers find each other: it takes all interfaces and offers no choice."""
    lines = say("ss", "-Hltnp").splitlines()
    others = [line for line in lines if not line.split()[3].startswith(LOOPBACK)]
    note(f"{title}: {len(lines)} sockets, {len(lines) - len(others)} of them on loopback")
    assert all("RayTrainWo" in line for line in others) and len(others) < 2, "\n".join(others)


def compare(work: Path, recipes: list[str]) -> None:
    from tiny_world import assert_same_end

    from pipeline.recipe_file import load_recipe

    for path in recipes:
        ours = load_recipe(path, [f"output={work}/runs"])
        undisturbed = load_recipe(path, [f"output={work}/undisturbed"])
        assert_same_end(ours, undisturbed)
        note(f"{ours.name}: weights, optimizer moments and losses of all steps are bitwise equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--install", action="store_true", help="get what is missing by apt-get")
    parser.add_argument("--keep", type=Path, help="an empty folder for all files, kept")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if os.geteuid() != 0:
        sys.exit("needs root: Slurm's daemons, a network namespace")
    if arguments.install:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, check=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; run again with --install")
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    # An address that leads nowhere: names are not looked up where there is none but loopback's.
    subprocess.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        trial(arguments.keep.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="slurm_trial_") as folder:
        trial(Path(folder))


if __name__ == "__main__":
    main()
