"""What a compressed model needs to run, without the pipeline: this folder travels inside packages."""

import sys

# OpenVINO reports its import and every conversion over the network, and no setting turns that off; where the reporter cannot be
# imported it takes its own stand-in, which reports nothing. (Its thread could also be caught holding an import lock by a fork.)
sys.modules.setdefault("openvino_telemetry", None)
