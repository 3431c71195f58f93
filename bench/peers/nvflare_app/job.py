"""Rounds of FedAvg without training, for NVFlare; runs in NVFlare's environment.

``python job.py CLIENTS PARAMETERS ROUNDS TIMES``.
"""

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import poc_env

# Time to wait for the server before submitting the job; on a busy machine three seconds are too short.
poc_env.SERVICE_START_TIMEOUT = 30
clients, parameters, rounds = map(int, sys.argv[1:4])
checkpoint = Path.cwd() / "initial.npy"
np.save(checkpoint, np.zeros(parameters, dtype=np.float32))
recipe = NumpyFedAvgRecipe(
    name="noop", initial_ckpt=str(checkpoint), min_clients=clients, num_rounds=rounds,
    train_script=str(Path(__file__).with_name("client.py")), train_args=sys.argv[4],
)  # fmt: skip
environment = poc_env.PocEnv(num_clients=clients, extra={"login_timeout": 120})
try:
    run = recipe.execute(environment)
    print(run.get_status(), run.get_result())
finally:
    environment.stop(clean_up=True)
