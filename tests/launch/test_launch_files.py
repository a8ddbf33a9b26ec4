"""The files of launch/: scripts are bash and explain themselves, YAML fits what reads it."""

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.arguments import build_parser
from pipeline.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "submit.sh")
FILES = (*SCRIPTS, "rayjob.yaml", "cluster.yaml", "skypilot.yaml", "Dockerfile")
VALUES = {
    "NAME": "richsem",
    "IMAGE": "registry.example/longtail:0.1.0",
    "CLAIM": "longtail-storage",
    "WORKERS": "4",
    "GPUS": "8",
    "ARGUMENTS": "/opt/longtail/recipes/quickstart.yaml cluster.workers=4",
}
SCHEMA = json.loads((Path(__file__).parent / "rayjob_schema.json").read_text())


def header(name: str) -> str:
    lines = (LAUNCH / name).read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines[0].startswith("#!") else lines
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])


@pytest.mark.parametrize("name", FILES)
def test_each_says_how_it_is_used_with_recipes(name: str) -> None:
    assert "recipes/" in header(name) and name in header(name)
    named = set(re.findall(r"recipes/\w+\.yaml", header(name)))
    assert [recipe for recipe in named if not (ROOT / recipe).is_file()] == []


CHAIN = re.compile(r"(?:(?:/opt/longtail/)?recipes/\w+\.yaml ?)+(?:\w+(?:\.\w+)*=\w+ ?)*")


@pytest.mark.parametrize("name", [*(f"launch/{name}" for name in FILES), "docs/cluster.md"])
def test_every_chain_that_is_shown_is_one_that_a_recipe_allows(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    chains = [match[0].split() for match in CHAIN.finditer(text)]
    assert chains
    for words in chains:
        overrides = [word for word in words if "=" in word]
        for word in words:
            if "=" not in word:
                load_recipe(ROOT / word.removeprefix("/opt/longtail/"), overrides)


def run_bash(*words: str, stdin: str = "", **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *words], input=stdin, capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_and_refuse_to_do_nothing(name: str) -> None:
    path = str(LAUNCH / name)
    assert run_bash("-n", path).stderr == ""
    assert "set -euo pipefail" in (LAUNCH / name).read_text()
    done = run_bash(path)
    assert done.returncode == 78 and "RECIPE" in done.stderr.upper()


@pytest.mark.parametrize("name", FILES)
def test_nothing_listens_for_the_whole_world(name: str) -> None:
    assert "0.0.0.0" not in (LAUNCH / name).read_text()


@pytest.mark.parametrize("name", ["slurm.sbatch", "cluster.yaml", "skypilot.yaml"])
def test_every_head_is_started_with_a_token_and_without_an_open_dashboard(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "dashboard-host=127.0.0.1" in text or "include-dashboard=false" in text


def rayjob_documents(**changes: str) -> list[dict]:  # type: ignore[type-arg]
    text = (LAUNCH / "rayjob.yaml").read_text(encoding="utf-8")
    for name, value in (VALUES | changes).items():  # As `envsubst` does for the names it is given.
        text = text.replace(f"${{{name}}}", value)
    return list(yaml.safe_load_all(text))


def test_the_rayjob_fits_the_schema_of_kuberay() -> None:
    job, _ = rayjob_documents()
    jsonschema.validate(job, SCHEMA)
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [worker] = group["template"]["spec"]["containers"]
    assert group["replicas"] == 4 and worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    pods = (spec["rayClusterSpec"]["headGroupSpec"], group)
    for pod in (one["template"]["spec"] for one in pods):
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"storage": "/storage", "shm": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "shutdownAfterJobFinish", True),
        (("rayClusterSpec",), "auth", {"mode": "token"}),
        (("rayClusterSpec", "authOptions"), "mode", "tokens"),
        (("rayClusterSpec", "workerGroupSpecs", 0), "replicas", "4"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "img", "x"),
    ],
)
def test_the_schema_notices_mistakes(place: tuple[str | int, ...], key: str, value: object) -> None:
    job, _ = rayjob_documents()
    inner = job["spec"]
    for step in place:
        inner = inner[step]
    inner[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_only_the_jobs_own_pods_submitter_and_operator_reach_it() -> None:
    job, policy = rayjob_documents(NAME="one")
    cluster = job["spec"]["rayClusterSpec"]
    label = {"longtail": "one"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == label
    assert policy["spec"]["podSelector"]["matchLabels"] == label
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    among, others = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert [port["port"] for port in others["ports"]] == [8265]


def test_the_rayjobs_command_reaches_the_cluster_in_one_piece(tmp_path: Path) -> None:
    """KubeRay pastes it, as it is, into a line for the submitting pod's shell."""
    job, _ = rayjob_documents()
    submit = tmp_path / "submit"
    submit.write_text(f'#!/bin/sh\nshift\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    submit.chmod(0o755)
    line = f"{submit} -- {job['spec']['entrypoint']} ; true"
    assert run_bash("-ce", line).returncode == 0
    shell, option, command = (tmp_path / "words").read_text().splitlines()
    assert (shell, option) == ("bash", "-c") and command.startswith("cd /storage && ")
    words = command.partition("exec longtail ")[2].split()
    assert build_parser().parse_args(words).verb == "run" and len(words) == 3


def test_the_entry_point_of_skypilot_is_a_command_of_ours() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert 'longtail run "${words[@]}"' in task["run"]


def cluster_on(provider: str) -> dict:  # type: ignore[type-arg]
    text = (LAUNCH / "cluster.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    if provider == "gcp":
        block = text.partition("# On GCP:")[2].partition("\n#\n")[2]
        tree |= yaml.safe_load("\n".join(line[2:] for line in block.splitlines()))
    assert tree["provider"]["type"] == provider
    return tree  # type: ignore[no-any-return]


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_the_cluster_passes_rays_own_validator(provider: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster_on(provider)))
    wrong = cluster_on(provider)
    wrong["available_node_types"]["gpu"]["max_worker"] = 8
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(wrong))


def test_the_skypilot_task_has_what_its_script_reads() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) <= {
        "name", "workdir", "num_nodes", "resources", "volumes", "envs", "secrets", "setup", "run",
    }  # fmt: skip
    for script in (task["setup"], task["run"]):
        assert run_bash("-n", stdin=script).stderr == ""
    given = {*task["envs"], *task["secrets"], "PATH", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"}
    read = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", task["run"]))
    assert {name for name in read if not name.startswith("SKYPILOT_")} <= given | {"PWD"}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


def test_the_image_is_made_of_files_that_exist() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and [name for name in copied if not (ROOT / name).exists()] == []
    extras = re.search(r"'\.\[(\S+)\]'", "\n".join(lines))
    declared = (ROOT / "pyproject.toml").read_text()
    assert extras is not None
    assert all(re.search(rf"^{name} = \[", declared, re.M) for name in extras[1].split(","))
    assert any(line == "USER longtail" for line in lines)
