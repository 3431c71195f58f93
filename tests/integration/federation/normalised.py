"""Training script for tests with a layer of batch normalisation that is large enough to be compressed.

The features' scales are orders of magnitude apart and differ between clients; so do the statistics. Each client writes
the statistics that it submitted.
"""

import torch

import isthmus


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    client = isthmus.context().client
    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(512), torch.nn.Linear(512, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)
    )
    for rnd in isthmus.rounds(model):
        generator = torch.Generator().manual_seed(100 * client + rnd.number)
        scales = torch.logspace(-2, 2, 512).roll(100 * rnd.number + client)
        optimizer = rnd.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
        for _ in range(20):
            inputs = torch.randn(32, 512, generator=generator) * scales
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        torch.save(model.state_dict(), f"sent-{client}-{rnd.number}.pt")
        rnd.submit(num_examples=100)


if __name__ == "__main__":
    main()
