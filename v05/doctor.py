"""`v05 doctor`: lists the parts of v05 that work on this machine, tests them against the specification, and says what to install.

It needs only the base install, in which it is the only command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from packaging.requirements import Requirement

import v05
from v05 import _core, reference
from v05.integrations.hosts import HOSTS
from v05.machine import cache_root, usable_cores
from v05.methods import METHODS
from v05.ops import fused_advantage

FOR_DEVELOPERS = ("dev", "docs")  # extras that users do not need
TOLERANCE = 1e-9  # largest difference that passes, in reward units; all paths compute in float64
LABEL_WIDTH = 18

Record = dict[str, Any]


def main(arguments: list[str]) -> int:
    """`v05 doctor` for installs without the command line's packages. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="v05 doctor", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to this file")
    return run(parser.parse_args(arguments).json)


def run(json_file: Path | None = None) -> int:
    """Print the findings, write them to `json_file` if given, and return the exit status: 1 if a self-check fails."""
    findings = examine()
    print("\n".join(text(findings)))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(findings, indent=2) + "\n")
    return 0 if all(check["ok"] for check in findings["self_check"]) else 1


def examine() -> Record:
    """All findings, as values that JSON can represent."""
    extras = [extra for extra in _extras() if extra["name"] not in FOR_DEVELOPERS]
    paths = _paths()
    return {
        "versions": {"v05": v05.__version__, "python": platform.python_version()}
        | {name: _installed(name) for name in ("numpy", "torch", "triton")},
        "devices": _devices(),
        "core": _core.build_info()
        | {"threads": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "cores": usable_cores()},
        "paths": paths,
        "self_check": [_self_check(path["device"], path["backend"]) for path in paths if path["active"] and path["backend"]],
        "extras": extras,
        "hosts": [{"name": host.name, "installed": _installed(host.name), "tested": host.release} for host in HOSTS.values()],
        "cache": _cache(),
        "install": [f"pip install 'v05[{extra['name']}]'" for extra in extras if extra["missing"]],
    }


def text(findings: Record) -> Iterator[str]:
    """The findings as lines for a person."""
    yield "versions"
    for name, version in findings["versions"].items():
        yield _line(name, version or "not installed")
    yield "devices"
    for device in findings["devices"]:
        yield _line(device["name"], device["detail"])
    core = findings["core"]
    yield "C++ core"
    yield _line("built with", f"{core['compiler']} {core['flags']}")
    yield _line("instruction set", core["instruction_set"])
    yield _line(
        "threads",
        f"{core['threads']} of {core['cores']} cores" + ("" if core["openmp"] else "; built without OpenMP, so one is used"),
    )
    yield "code paths"
    for path in findings["paths"]:
        yield _line(path["name"], ("active" if path["active"] else "not active") + f"; {path['detail']}")
    yield "self-check against v05.reference"
    for check in findings["self_check"]:
        found = (
            f"{check['cases']} cases, largest difference {check['difference']:.1e}" if check["error"] is None else check["error"]
        )
        yield _line(check["path"], ("passed; " if check["ok"] else "FAILED; ") + found)
    yield "extras"
    for extra in findings["extras"]:
        yield _line(extra["name"], "complete" if not extra["missing"] else "missing " + ", ".join(extra["missing"]))
    yield "trainers"
    for host in findings["hosts"]:
        yield _line(host["name"], f"{host['installed'] or 'not installed'}; tested with {host['tested']}")
    cache = findings["cache"]
    yield "cache"
    yield _line(cache["path"], f"{cache['bytes'] / 1e6:.1f} MB" if cache["exists"] else "does not exist yet")
    if findings["install"]:
        yield "to install the rest"
        yield from (f"  {line}" for line in findings["install"])


def _line(label: str, value: str) -> str:
    return f"  {label:<{LABEL_WIDTH}} {value}"


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[Record]:
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    devices = [
        {"name": "cpu", "detail": f"{models[0] if models else platform.machine()}, {platform.system()} {platform.machine()}"}
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"compute capability {properties.major}.{properties.minor}"
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
        devices.append({"name": f"cuda:{i}", "detail": detail})
    return devices


def _paths() -> list[Record]:
    """The ways to compute the op. `device` and `backend` are the arguments with which the self-check selects them."""
    triton = util.find_spec("triton") is not None
    cuda = torch.cuda.is_available()
    interpreted = triton and os.environ.get("TRITON_INTERPRET") == "1"
    if not triton:
        why = "triton is not installed; on Linux x86_64: pip install triton"
    else:
        why = "CUDA tensors" if cuda else "torch finds no GPU, or was built without CUDA"
    keys = ("CPU", "CUDA", "Meta")
    registered = [key for key in keys if torch._C._dispatch_has_kernel_for_dispatch_key("v05::fused_advantage", key)]
    return [
        {"name": "C++", "active": True, "detail": "CPU tensors", "device": "cpu", "backend": "cpp"},
        {"name": "Triton", "active": triton and cuda, "detail": why, "device": "cuda", "backend": "triton"},
        {
            "name": "Triton interpreter",
            "active": interpreted,
            "detail": "CPU tensors with backend='triton'" + ("" if interpreted else "; for tests, set TRITON_INTERPRET=1"),
            "device": "cpu",
            "backend": "triton",
        },
        {
            "name": "torch.compile",
            "active": len(registered) == len(keys),
            "detail": f"v05::fused_advantage is registered for {', '.join(registered) or 'nothing'}",
            "device": None,
            "backend": None,
        },
    ]


def _self_check(device: str, backend: Literal["cpp", "triton"]) -> Record:
    """Compare every method on one batch, with and without leave-one-out, with the specification. The three layouts take turns.

    A path that raises an exception has failed.
    """
    rng = np.random.default_rng(0)
    sizes = np.array([4, 1, 0, 7, 2, 5])
    rewards = rng.integers(0, 2, sizes.sum()).astype(float)
    prior = np.append(rng.random(len(sizes) - 1), np.nan)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    lengths = rng.integers(0, 6, len(rewards))
    energy = rng.random(len(rewards))
    mask = np.arange(6) < lengths[:, None]

    def on_device(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    def ends(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(lengths)])

    layouts: list[tuple[Record, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = [
        ({}, lambda advantages: advantages),
        ({"response_mask": on_device(mask)}, lambda advantages: advantages[:, None] * mask),
        (
            {"cu_seqlens": on_device(ends(lengths)), "out": torch.empty(lengths.sum(), dtype=torch.float64, device=device)},
            lambda advantages: advantages.repeat(lengths),
        ),
    ]
    cases = list(zip(itertools.product(METHODS, (False, True)), itertools.cycle(layouts)))
    difference, error = 0.0, None
    try:
        for (method, leave_one_out), (layout, laid_out) in cases:
            rule: Record = {"method": method, "leave_one_out": leave_one_out}
            weights = None if METHODS[method].weight is None else energy
            advantages, statistics = reference.advantages(rewards, ids, prior, num_groups=len(sizes), energy=weights, **rule)
            out = fused_advantage(
                on_device(rewards),
                on_device(prior),
                energy=None if weights is None else on_device(weights),
                group_offsets=on_device(ends(sizes)),
                dtype=torch.float64,
                backend=backend,
                **rule,
                **layout,
            )
            assert out.stats is not None
            baselines = np.array([group.baseline for group in statistics])
            for seen, right in ((out.advantages, laid_out(advantages)), (out.stats.baseline, baselines)):
                apart = np.where(
                    np.isnan(right), 0.0, np.abs(seen.cpu().numpy() - right)
                )  # the specification is NaN for a group without rollouts or prior
                difference = max(difference, float(np.nan_to_num(apart, nan=np.inf).max()))
    except Exception as raised:  # any error is a finding, and must not end the report
        error = f"{type(raised).__name__}: {raised}"
    return {
        "path": f"{backend} on {device}",
        "ok": error is None and difference <= TOLERANCE,
        "cases": len(cases),
        "difference": difference,
        "error": error,
    }


def _extras() -> list[Record]:
    """The extras of v05, each with its requirements that are not met here."""
    requirements = [Requirement(line) for line in metadata.requires("v05") or []]

    def missing(extra: str) -> Iterator[str]:
        for requirement in requirements:
            if (
                requirement.marker is None
                or not requirement.marker.evaluate({"extra": extra})
                or requirement.marker.evaluate({"extra": ""})
            ):
                continue
            if requirement.name == "v05":
                for inner in requirement.extras:
                    yield from missing(inner)
            else:
                installed = _installed(requirement.name)
                if installed is None:
                    yield f"{requirement.name}{requirement.specifier}"
                elif not requirement.specifier.contains(installed, prereleases=True):
                    yield f"{requirement.name}{requirement.specifier} (installed: {installed})"

    names = metadata.metadata("v05").get_all("Provides-Extra") or []
    return [{"name": name, "missing": list(dict.fromkeys(missing(name)))} for name in names]


def _cache() -> Record:
    root = cache_root()
    files = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    return {"path": str(root), "exists": root.is_dir(), "bytes": sum(path.stat().st_size for path in files)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
