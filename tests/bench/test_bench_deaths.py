"""Each kind of process of a run dies once, or is stopped for half a minute, or the clock jumps: the same bytes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.bench import deaths
from tests.bench.deaths import KINDS, Death, measure_death, stop_for_a_while

pytestmark = pytest.mark.timeout(1200)

# Counted from 1970, the time of this machine is an hour later or earlier in every other second.
JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static int (*real)(clockid_t, struct timespec *);
int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += now->tv_sec % 2 ? 3600 : -3600;
    return result;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *out, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@pytest.fixture(scope="module")
def run_on_ray(tmp_path_factory: pytest.TempPathFactory):
    """Folder, seconds and tables of an undisturbed run."""
    folder = tmp_path_factory.mktemp("deaths")
    deaths.write_inputs(folder, "fake", 8)
    with deaths.adopting_orphans():
        yield folder, *deaths.undisturbed(folder, True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "engine core"])
def test_a_run_of_which_a_process_was_killed_goes_on_to_the_same_bytes(run_on_ray, kind: str):
    """It ends well by itself, or with one message of the cause and the command that resumes; nothing stays."""
    folder, seconds, expected = run_on_ray
    death: Death = measure_death(folder, kind, 0.6, seconds, expected)
    assert death.same
    assert death.left == 0
    if kind == "driver":
        assert death.code == 128 + 9
    else:
        assert death.code in (0, 2)
        log = (folder / "log").read_text()
        assert "Traceback" not in log
        assert (death.code == 0) == ("resume with: " not in log)


@pytest.mark.parametrize("kind", ["driver", "worker", "GCS"])
def test_a_process_that_is_stopped_for_half_a_minute_is_waited_for(run_on_ray, kind: str):
    folder, seconds, expected = run_on_ray
    death = measure_death(folder, kind, 0.4, seconds, expected, stop_for_a_while)
    assert (death.code, death.left, death.same) == (0, 0, True)


@pytest.mark.parametrize("on_ray", [False, True])
def test_a_clock_that_jumps_changes_nothing(run_on_ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_ray: bool):
    if not shutil.which("cc"):
        pytest.skip("no C compiler, by which the clock is replaced")
    (tmp_path / "clock.c").write_text(JUMPING_CLOCK)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "clock.so"), str(tmp_path / "clock.c"), "-ldl"]
    subprocess.run(command, check=True)
    monkeypatch.setitem(os.environ, "LD_PRELOAD", str(tmp_path / "clock.so"))
    folder, _, expected = run_on_ray
    process = deaths.start(folder, tmp_path / "store", on_ray)
    assert process.wait(600) == 0
    assert deaths.digests(tmp_path / "store") == expected


def test_a_run_whose_engine_was_killed_says_so_and_goes_on_to_the_same_bytes(tmp_path: Path):
    """vLLM's engine core in a process of its own, as on a GPU."""
    deaths.write_inputs(tmp_path, "vllm", 4)
    with deaths.adopting_orphans():
        seconds, expected = deaths.undisturbed(tmp_path, False)
        death = measure_death(tmp_path, "engine core", 0.8, seconds, expected)
    assert (death.code, death.left, death.same) == (2, 0, True)
    assert "resume with: " in death.message
