import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from tasks.core.memory import keep_freed_memory
{prepare}
def use():
    a, b = torch.ones(3_000_000), torch.ones(3_000_000)  # 12 MB each: two, as glibc learns from a single one
for _ in range(5):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    def faults(prepare):
        command = [sys.executable, "-c", FAULTS.format(prepare=prepare)]
        return int(subprocess.run(command, check=True, capture_output=True).stdout)

    assert faults("keep_freed_memory()") < 500
    assert faults("") > 10 * 500
