"""NVFlare client without training; runs in NVFlare's environment.

The first site appends the arrival time of each model, in seconds, to the file given as its argument.
"""

import sys
import time
from pathlib import Path

import nvflare.client as flare

flare.init()
first = flare.get_site_name() == "site-1"
while flare.is_running():
    model = flare.receive()
    if first:
        with Path(sys.argv[1]).open("a") as file:
            file.write(f"{time.time()}\n")
    flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.0}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
