#!/bin/sh
# diffusers 0.42.1, DDIMScheduler(timestep_spacing="trailing"), valid numbers of inference steps out of 1,000.
#
# Expected (a guess): set_timesteps(N) gives N timesteps between 0 and 999, and step() goes from each to the next of them.
# Seen: 1. for 62 values of N (61, 103, 121 ...) the list has N + 1 entries, the last of them timestep -1: the float division in
#          np.arange(1000, 0, -1000 / N) falls just short of 0. The network is then asked at -1, and the noise level that is
#          looked up for it is alphas_cumprod[-1], that of the noisiest timestep.
#       2. step() goes to t - 1000 // N whatever the list says: with N = 350 the list goes from 999 to 996, and the state that is
#          handed to the network as one of timestep 996 has the noise level of 997. It adds up: every third step is one behind.
# Exits 1 if either changes.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "diffusers==0.42.1" "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'END'
import sys

import torch
from diffusers import DDIMScheduler

scheduler = DDIMScheduler(timestep_spacing="trailing", prediction_type="sample")
long = []
for n in range(1, 1001):
    scheduler.set_timesteps(n)
    if len(scheduler.timesteps) != n:
        long.append((n, len(scheduler.timesteps), int(scheduler.timesteps[-1])))
print(f"lists with an entry too many: {len(long)}, the first ones (asked, given, last timestep): {long[:3]}")

scheduler.set_timesteps(350)
first, second = scheduler.timesteps[:2].tolist()
sigma = (1 - scheduler.alphas_cumprod.double()).sqrt()
# of an image that is 0 everywhere, all of the state is noise: the step multiplies it by sigma after / sigma before
state = scheduler.step(torch.zeros(1, 1, 1, 1).double(), first, torch.ones(1, 1, 1, 1).double()).prev_sample.item()
reached = int((sigma / sigma[first] - state).abs().argmin())
print(f"350 steps: the list goes from {first} to {second}, step() to {reached}")
sys.exit(0 if len(long) == 62 and long[0] == (61, 62, -1) and (first, second, reached) == (999, 996, 997) else 1)
END
