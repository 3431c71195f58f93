"""A client of NVFlare that trains nothing; runs in NVFlare's own environment.

The first site appends the time of each model's arrival, in seconds, to the file that its argument names.
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
