"""Nothing is reported to anybody: what the libraries would send is turned off before they are imported."""

import subprocess
import sys

REPORTERS = """
import concurrent.futures, socket, sys
import tasks.runtime.graph
def refuse(*args, **kwargs):
    raise AssertionError(f"something calls home: {args}")
socket.socket.connect = socket.create_connection = concurrent.futures.ThreadPoolExecutor.submit = refuse
import openvino, torch
openvino.convert_model(torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2)), example_input=torch.ones(1, 2))
from openvino.tools.ovc import convert_impl
print(convert_impl.tm.__name__)
"""


def test_openvino_reports_neither_its_import_nor_a_conversion():
    found = subprocess.run([sys.executable, "-c", REPORTERS], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] == "openvino.tools.ovc.telemetry_stub"
