"""Prefect over DVC: when and where stages run. Nothing below `tasks/` imports this package."""

import os

# Read by the libraries at import, so they are set before any of them is imported.
ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 by default: a first start on two busy cores takes longer
    "PREFECT_SERVER_API_KEEPALIVE_TIMEOUT": "1",  # 5 by default: for so long a run's own server does not end
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
