"""Training script for tests: every round adds one to every weight.

FAIL names a client that raises in round 2, DIVERGE one whose weights are infinite from then on; METRIC is the name
of the reported metric.
"""

import os

import torch

import isthmus

context = isthmus.context()
model = torch.nn.Linear(3, 2)
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)

metric = os.environ.get("METRIC", "accuracy")
for rnd in isthmus.rounds(model, evaluate=lambda: {metric: float(model.bias.detach()[0])}):
    if os.environ.get("FAIL") == str(context.client) and rnd.number >= 2:
        raise ValueError(f"client {context.client} has had enough")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
            if os.environ.get("DIVERGE") == str(context.client) and rnd.number >= 2:
                parameter.fill_(float("inf"))
    rnd.submit(num_examples=context.client + 1, loss=1 / rnd.number)
