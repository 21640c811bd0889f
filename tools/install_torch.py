"""Install the smallest PyTorch that works here, saying first how large it is.

Run with the Python of the environment to install into: `python tools/install_torch.py`.
Without an NVIDIA GPU that is PyTorch's CPU build where its index can be reached, otherwise the
version that the tests were run with. `TORCH=...` (anything pip accepts) overrides the choice.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from importlib import metadata
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MINIMUM = (2, 10)


def installed() -> str | None:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    major, minor = version.split(".")[:2]
    return version if (int(major), int(minor)) >= MINIMUM else None


def has_nvidia_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()  # the latter: WSL


def reachable(url: str) -> bool:
    """Whether `url` answers within seconds: a process is ended in time, a name lookup is not."""
    probe = [sys.executable, "-c", f"import urllib.request as r; r.urlopen({url!r}, timeout=3)"]
    try:
        return not subprocess.run(probe, capture_output=True, timeout=4, check=False).returncode
    except subprocess.TimeoutExpired:
        return False


def pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def megabytes(requirement: str, index: list[str]) -> int | None:
    """Size of all that pip would fetch, or None where it cannot be told beforehand."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        arguments = [
            "install",
            "--quiet",
            "--dry-run",
            "--report",
            str(report),
            requirement,
            *index,
        ]
        done = subprocess.run(pip(*arguments), capture_output=True, check=False)
        if done.returncode or not report.exists():
            return None
        items = json.loads(report.read_text())["install"]
    total = 0
    for url in (item["download_info"]["url"] for item in items):
        try:
            if url.startswith("file:"):
                total += Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).stat().st_size
                continue
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=5) as response:
                total += int(response.headers.get("Content-Length", 0))
        except OSError:
            return None
    return total // 2**20


def main() -> int:
    if (wanted := os.environ.get("TORCH")) is None and (version := installed()):
        print(f"torch {version} is installed")
        return 0
    tested = next(
        line.strip()
        for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    index: list[str] = []
    if wanted:
        requirement, why = wanted, "TORCH is set"
    elif has_nvidia_gpu():
        requirement, why = tested, "an NVIDIA GPU is here"
    elif platform.system() == "Linux" and reachable(f"{CPU_INDEX}/torch/"):
        requirement, why = tested, "no NVIDIA GPU: the CPU build"
        index = ["--index-url", CPU_INDEX]
    else:
        requirement, why = tested, "the tested version"
    size = megabytes(requirement, index)
    print(f"installing {requirement} ({why}), {f'about {size} MB' if size else 'size unknown'}")
    sys.stdout.flush()
    return subprocess.run(pip("install", "--quiet", requirement, *index), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
