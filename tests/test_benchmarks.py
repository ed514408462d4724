"""The benchmarks run and print their tables. No test here checks a speed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import (
    Cost,
    Failed,
    Work,
    compare_with_limit,
    measure_cost,
    print_works,
    run,
    run_together,
    take_turns,
)

ROOT = Path(__file__).parents[1]


def rows(printed: str) -> list[list[str]]:
    """Return the cells of all tables in the output."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in printed.splitlines() if line.startswith("|")
    ]


@pytest.mark.slow
def test_a_section_prints_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "start-up", "--directory", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^On \d{4}-\d\d-\d\d \d\d:\d\d UTC: .*, \d+ cores, \d+ GiB;$", printed, re.MULTILINE)
    assert re.search(r"^- skopeo (\d|is missing: `apt-get install skopeo`)", printed, re.MULTILINE)
    assert re.findall(r"^## .*", printed, re.MULTILINE) == ["## start-up"]
    columns, _, *works = rows(printed)
    assert columns[:3] == ["work", "runner", "median s"]
    assert {"--help", "--version", "exists benchmarks.example.org/real:1"} <= {work[0] for work in works}
    assert all(float(work[2]) > 0 and len(work) == len(columns) for work in works)
    (exists,) = [work for work in works if work[0].startswith("exists")]
    assert re.fullmatch(r"\d+\.\d\d times `import sqlalchemy, click` \(want ≤ 1\.3\)", exists[-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_unknown_section_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "--only", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "start-up" in done.stderr


def test_the_cost_of_a_process_does_not_include_its_parents_memory(tmp_path: Path) -> None:
    large = bytearray(100_000_000)
    code = f"open({str(tmp_path / 'written')!r}, 'wb').write(bytes(3_000_000))"
    small = run(sys.executable, "-S", "-c", code)
    assert small.peak < len(large) / 2
    assert 3_000_000 <= small.written < 4_000_000 or small.written == 0  # on a tmpfs, nothing is written to a disk


def test_commands_run_at_the_same_time(tmp_path: Path) -> None:
    # Each command waits until all of them have begun.
    code = """import os, sys, time
open(f"{sys.argv[1]}/{sys.argv[2]}", "w")
while len(os.listdir(sys.argv[1])) < 3:
    time.sleep(0.01)"""
    run_together([[sys.executable, "-S", "-c", code, str(tmp_path), name] for name in "abc"])


def test_a_work_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    limit = Work("limit", "nobody", lambda: Cost(1, 1, 2**20, 0))
    works = [
        limit,
        Work("fails", "somebody", lambda: run(sys.executable, "-c", "raise SystemExit('it cannot')")),
        Work("half as fast", "somebody", lambda: Cost(2, 1, 2**20, 0), beside=[compare_with_limit(limit, want=0.9)]),
    ]
    print_works(take_turns(works, 3))
    table = rows(capsys.readouterr().out)[2:]
    assert table[1][2].startswith("failed: ")
    assert table[2][2:4] == ["2.000", "2.000 to 2.000"]
    assert table[2][-1] == "0.50 of the limit (want ≥ 0.90)"
    assert [len(work.costs) for work in works] == [3, 0, 3]


def test_a_failed_command_reports_its_output_and_exit_code() -> None:
    with pytest.raises(Failed, match=r"it cannot[\s\S]*exit code 1"):
        run(sys.executable, "-c", "raise SystemExit('it cannot')")


def test_an_action_is_timed() -> None:
    assert measure_cost(lambda: sum(range(1_000_000))).cpu > 0
