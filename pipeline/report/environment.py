"""The machine and the versions that a run was made with."""

from collections.abc import Mapping

from pipeline.report.elements import count, facts, folded, section
from pipeline.report.run_data import RunData

_PACKAGES = ("torch", "deepspeed", "ray", "timm", "open_clip_torch", "webdataset", "numpy")
"""Those that decide what a run computes; every other one is folded away."""


def environment_section(run: RunData) -> str:
    """environment.json: machine, then the packages that matter, then all the others."""
    found = run.environment
    if not found:
        return ""
    devices = found.get("devices")
    names = [str(name) for name in devices] if isinstance(devices, list) else []
    kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    machine = [
        ("Python", str(found.get("python", "unknown"))),
        ("platform", str(found.get("platform", "unknown"))),
        ("processors", count(found.get("processors"))),
        ("workers (world size)", count(found.get("world_size"))),
        ("GPUs", ", ".join(kinds) or "none"),
        ("deformable attention", str(found.get("deformable_attention", "unknown"))),
    ]
    packages = found.get("packages")
    versions = (
        {str(name): str(version) for name, version in packages.items()}
        if isinstance(packages, Mapping)
        else {}
    )
    spelled = {_plain(name): version for name, version in versions.items()}
    known = [(name, spelled[_plain(name)]) for name in _PACKAGES if _plain(name) in spelled]
    return section("Environment", facts(machine), facts(known), _others(versions))


def _plain(name: str) -> str:
    """Package names are the same with any of the three separators, in any case."""
    return name.lower().replace("-", "_").replace(".", "_")


def _others(versions: Mapping[str, str]) -> str:
    matter = {_plain(name) for name in _PACKAGES}
    pairs = [(name, version) for name, version in versions.items() if _plain(name) not in matter]
    if not pairs:
        return ""
    body = facts(sorted(pairs, key=lambda pair: pair[0].lower()))
    return folded(f"Other packages ({len(pairs):,})", f'<div class="packages">{body}</div>')
