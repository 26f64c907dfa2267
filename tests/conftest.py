"""Every test runs offline, silent towards vendors, on one thread a process, and neither sees nor touches what the user did.

A run rewrites dvc.lock, artifacts/, reports/ and runs/, and params.yaml is the user's own: tests run in a folder that has the
repository's code and params.yaml as committed, and with none of the variables that steer Prefect, Ray, DVC, git or ourselves.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STEERED = ("PREFECT_", "RAY_", "DVC_", "DIFFPRESS_", "GIT_", "OMP_", "MKL_", "OPENBLAS_", "KMP_")
KEPT = ("RAY_TMPDIR",)
HOME = Path(tempfile.mkdtemp(prefix="diffpress_tests_"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

for name in [name for name in os.environ if name.startswith(STEERED) and name not in KEPT]:
    del os.environ[name]
os.environ.update({
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_HOME": str(HOME / "prefect"),
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "true",
    "DVC_GLOBAL_CONFIG_DIR": str(HOME / "dvc"),
    "DVC_SYSTEM_CONFIG_DIR": str(HOME / "dvc"),
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    **{f"GIT_{who}_{what}": "tests" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # read when ray is first imported, by whichever test that is
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
})

import pytest  # noqa: E402

from tests.contract.reading import ROOT, committed  # noqa: E402

OWN = {"params.yaml", "dvc.lock", "reports", "artifacts", "runs", ".git", ".dvc", ".venv"}  # what a run or a user may change


@pytest.fixture(scope="session", autouse=True)
def a_folder_of_its_own():
    """The working directory: a DVC repository with the code linked and what a user may change as committed."""
    top = HOME / "repository"
    top.mkdir()
    subprocess.run(["git", "init", "-q", top], check=True)
    for path in ROOT.iterdir():
        if path.name not in OWN:
            (top / path.name).symlink_to(path)
    for name in ("params.yaml", ".dvc/config"):
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_text(committed(name))
    before = Path.cwd()
    os.chdir(top)
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def no_ray_is_left():
    """A Ray that a test started ends here: at the end of the process it would print what its workers died of in the drills."""
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
