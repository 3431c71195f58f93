"""Training script for tests whose first layer is frozen until the round that UNFREEZE names."""

import os

import torch

import isthmus


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 1))
    model[0].requires_grad_(False)
    inputs, targets = torch.randn(16, 300), torch.randn(16, 1)
    for rnd in isthmus.rounds(model):
        if rnd.number == int(os.environ.get("UNFREEZE", "0")):
            model[0].requires_grad_(True)
        optimizer = rnd.wrap(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01))
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        rnd.submit(num_examples=16)


if __name__ == "__main__":
    main()
