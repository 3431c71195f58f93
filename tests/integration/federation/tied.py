"""Training script for tests with tied weights. UNTIED: this client's are not tied.

Each client writes its names, and its initial weights of each round.
"""

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import isthmus

WORDS, WIDTH = 100, 16


class Model(nn.Module):
    """Language model with an embedding tied to its output layer, and a decoder tied to its transposed encoder."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.encode, self.decode = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        if tied:
            self.head.weight = self.wte.weight
            self.decode.weight = nn.Parameter(self.encode.weight.t())

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.decode(self.encode(self.wte(words)).tanh()))
        return logits


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    client = isthmus.context().client
    model = Model(tied="UNTIED" not in os.environ)
    generator = torch.Generator().manual_seed(client)
    words = torch.randint(0, WORDS, (256,), generator=generator)
    for rnd in isthmus.rounds(model):
        assert "UNTIED" in os.environ or model.head.weight is model.wte.weight
        torch.save(model.state_dict(), f"began-{client}-{rnd.number}.pt")
        while rnd.number >= int(os.environ.get("HOLD", "1000000")) and not Path("go").exists():
            rnd.should_stop  # noqa: B018
        optimizer = rnd.wrap(torch.optim.SGD(model.parameters(), lr=0.5))
        for batch in words.split(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(batch), (batch * 7 + 3) % WORDS).backward()
            optimizer.step()
        rnd.submit(num_examples=len(words))


if __name__ == "__main__":
    main()
