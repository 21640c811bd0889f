"""Print non-blank, non-comment lines of code per room, tests apart."""

import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMENT = {".py": "#", ".pyi": "#", ".sh": "#", ".txt": "#"}
KINDS = {".py", ".pyi", ".cpp", ".h", ".inl", ".cu", ".cuh"}


def count(path: Path) -> int:
    mark = COMMENT.get(path.suffix, "//")
    lines = (line.strip() for line in path.read_text().splitlines())
    return sum(bool(line) and not line.startswith(mark) for line in lines)


def main() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    rooms: Counter[str] = Counter()
    for name in listed:
        path = Path(name)
        if path.suffix in KINDS and (ROOT / path).exists():
            parts = path.parts
            room = "/".join(parts[:2]) if parts[0] in ("csrc", "pygpt") else parts[0]
            rooms[room] += count(ROOT / path)
    for group, title in (("pygpt", "Python"), ("csrc", "C++ and CUDA")):
        members = {room: n for room, n in rooms.items() if room.split("/")[0] == group}
        print(f"{title}: {sum(members.values())}")
        for room, n in sorted(members.items()):
            print(f"  {n:6d}  {room}")
    rest = {room: n for room, n in rooms.items() if room.split("/")[0] not in ("pygpt", "csrc")}
    print("Beside them")
    for room, n in sorted(rest.items()):
        print(f"  {n:6d}  {room}")


if __name__ == "__main__":
    main()
