import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from tasks.core.memory import keep_freed_memory
{prepare}
def use():
    a, b = torch.ones(3_000_000), torch.ones(3_000_000)  # 12 MB each
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
        first = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what glibc starts with; by itself it learns, now and then
        return int(subprocess.run(command, env=first, check=True, capture_output=True).stdout)

    kept, handed_back = faults("keep_freed_memory()"), faults("")
    assert kept < handed_back / 10 and handed_back > 20 * 2 * 1000, "now and then one block of 40 is asked for anew"
