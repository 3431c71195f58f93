"""The aggregator learns the sum and no update, with all that it receives, and with the help of colluding clients."""

import hashlib

import pytest
import torch

from isthmus.secure_aggregation.client.instance import Instance
from isthmus.secure_aggregation.parameters import ClientId, Phase, point
from isthmus.secure_aggregation.primitives.keys import KEY_BYTES, agree, pair_mask, self_mask_key
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.primitives.shamir import ShamirError, combine
from isthmus.tensors import State
from isthmus_contracts import secure_sums

from .secure_federation import Client, Federation, equal

ELEMENTS = 20_000
# Six standard deviations above the mean of chi-square with 255 degrees of freedom: once in 10^8 tests.
MOST_CHI_SQUARE = 255 + 6 * (2 * 255) ** 0.5


def chi_square(tensor: torch.Tensor) -> float:
    """Return the chi-square statistic of a tensor's bytes against a uniform distribution."""
    counts = torch.bincount(torch.frombuffer(bytearray(tensor.numpy().tobytes()), dtype=torch.uint8).long(),
                            minlength=256).double()  # fmt: skip
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


def instance_of(client: Client) -> Instance:
    instance = client.protocol._instance
    assert instance is not None
    return instance


def collected(clients: int, change: State | None = None, seed: int = 1) -> Federation:
    """Return a federation whose updates are at the server, not opened yet.

    ``change`` is added to the first client's update and taken from the second's: the sum stays the same.
    """
    job = Federation.of(clients, seed)
    generator = torch.Generator().manual_seed(seed)
    for number, client in enumerate(job.clients.values()):
        client.update = {
            "w": torch.randint(-500, 500, (ELEMENTS,), dtype=torch.int32, generator=generator),
            "isthmus.scalars": torch.randint(-500, 500, (3,), dtype=torch.int64, generator=generator),
        }
        if change is not None and number < 2:
            for name, tensor in change.items():
                client.update[name] += tensor if number == 0 else -tensor
    job.begin()
    job.total = {name: torch.zeros_like(tensor) for name, tensor in client.update.items()}
    job.settle()
    return job


def record(job: Federation) -> bytes:
    """Return all bytes that the server received."""
    steps = b"".join(message.SerializeToString() for _, message in job.heard)
    updates = b"".join(tensor.numpy().tobytes() for client in job.clients.values()
                       for masked in client.pushed.values() for tensor in masked.values())  # fmt: skip
    return steps + updates


def test_masked_updates_look_the_same_whatever_a_client_sends() -> None:
    change = {"w": torch.full((ELEMENTS,), 100_000, dtype=torch.int32), "isthmus.scalars": torch.tensor([7, 8, 9])}
    plain, changed = collected(6), collected(6, change)
    for job in (plain, changed):
        job.collect()
        job.freeze()
        job.settle()
        assert job.server.phase is Phase.DONE
    assert equal(plain.opened(), changed.opened())
    first, second = ([client.pushed[1]["w"] for client in job.clients.values()] for job in (plain, changed))
    for client, before, after in zip(plain.clients.values(), first, second, strict=True):
        assert chi_square(client.update["w"]) > MOST_CHI_SQUARE  # the test tells updates from masks
        assert chi_square(before) < MOST_CHI_SQUARE
        assert chi_square(after) < MOST_CHI_SQUARE
        assert chi_square(after - before) < MOST_CHI_SQUARE
    # Neither do two clients' masked updates of one instance show anything together, nor all but one.
    assert chi_square(first[0] + first[1]) < MOST_CHI_SQUARE
    assert chi_square(first[0] - first[1]) < MOST_CHI_SQUARE
    assert chi_square(sum(first[1:], torch.zeros_like(first[0]))) < MOST_CHI_SQUARE
    # The lengths of all messages are the same, too.
    sizes = [
        sorted((who, message.WhichOneof("step") or "", message.ByteSize()) for who, message in job.heard)
        for job in (plain, changed)
    ]
    assert sizes[0] == sizes[1]


def test_the_server_receives_no_secret_in_clear() -> None:
    job = collected(5)
    secrets = {who: (instance_of(client)._keys.mask_secret_bytes, instance_of(client)._keys._share.private_bytes_raw(),
                     instance_of(client)._seed) for who, client in job.clients.items()}  # fmt: skip
    keys = [key for client in job.clients.values() for key, _ in instance_of(client).masks.keys]  # type: ignore[union-attr]
    job.collect()
    job.freeze()
    job.settle()
    assert job.server.phase is Phase.DONE
    heard = record(job)
    for each in (*(secret for three in secrets.values() for secret in three), *keys):
        assert len(each) == KEY_BYTES
        assert each not in heard
    # What the server recovers are the seeds of the self masks, of which it could know none before.
    found = job.server._answers.secrets.found.values()  # type: ignore[union-attr]
    assert sorted(found) == sorted(seed for _, _, seed in secrets.values())


def attack(job: Federation, target: ClientId, colluders: list[ClientId], incarnation: int = 1) -> State:
    """Try to recover the target's update with all that the server and some clients know. Return the best guess.

    They pool their shares of the target's two secrets, and the masks that they share with it.
    """
    setup = job.server._setup
    number = setup.numbers[target]
    known = {setup.numbers[who]: instance_of(job.clients[who]) for who in colluders}
    needed = secure_sums.threshold(len(setup.holders(number)))
    guess = {name: tensor.clone() for name, tensor in job.clients[target].pushed[incarnation].items()}
    seed_shares = {point(each): instance._held[number].self_seed for each, instance in known.items()}
    mask_shares = {point(each): instance._held[number].mask_key for each, instance in known.items()}
    for who, message in job.heard:
        for share in message.unmask.shares:
            if share.entry == number and share.self_seed_share:
                seed_shares[point(setup.numbers[who])] = share.self_seed_share
            elif share.entry == number:
                mask_shares[point(setup.numbers[who])] = share.mask_key_share
    removals = []
    try:
        seed, _ = combine(seed_shares, needed, lambda _: True)
        removals.append((self_mask_key(seed, setup.terms.scope, number), -1))
    except ShamirError:
        pass
    pairs = {each: agree(instance._keys.mask_secret_bytes, setup.entries[number].mask_key)
             for each, instance in known.items()}  # fmt: skip
    try:
        secret, _ = combine(mask_shares, needed, lambda _: True)
        pairs = {peer: agree(secret, setup.entries[peer].mask_key) for peer in setup.neighbours[number]}
    except ShamirError:
        pass
    for peer, shared in pairs.items():
        key, sign = pair_mask(shared, setup.terms.scope, number, peer)
        removals.append((key, -sign))
    add_masks(guess, removals)
    return guess


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("clients", [5, 7, 34])
def test_colluding_clients_recover_an_update_from_the_threshold_on_only(clients: int, opened: bool) -> None:
    job = collected(clients)
    job.collect()
    target = min(job.clients)
    number = job.server._setup.numbers[target]
    holders = [job.server._setup.entries[each] for each in sorted(job.server._setup.neighbours[number])]
    others = [(entry.pool, entry.index) for entry in holders]
    threshold = secure_sums.threshold(len(others) + 1)
    keep = {who: instance_of(client) for who, client in job.clients.items()}
    if opened:
        job.freeze()
        job.pause_before("end")  # or the clients forget their secrets
        assert job.server.phase is Phase.DONE
    assert all(instance_of(job.clients[who]) is instance for who, instance in keep.items())
    for count in (0, 1, threshold - 1):
        guess = attack(job, target, others[:count])
        assert not equal(guess, job.clients[target].update)
        assert chi_square(guess["w"]) < MOST_CHI_SQUARE  # not even a part of it
    assert equal(attack(job, target, others[:threshold]), job.clients[target].update)


def test_an_update_that_comes_after_its_client_was_declared_gone_stays_hidden() -> None:
    """The server has the mask key of a dropout. Only the self mask hides an update that then arrives."""
    job = collected(6)
    late = max(job.clients)
    job.collect(sorted(job.clients.keys() - {late}))
    job.freeze()
    job.pause_before("end")
    assert job.server.phase is Phase.DONE
    number = job.server._setup.numbers[late]
    assert number in job.server._answers.secrets.found  # type: ignore[union-attr]
    job.clients[late].push()
    guess = attack(job, late, [])
    assert not equal(guess, job.clients[late].update)
    assert chi_square(guess["w"]) < MOST_CHI_SQUARE
    # Its seed would need the threshold's number of shares, all of which are with honest clients.
    threshold = secure_sums.threshold(len(job.clients))
    others = sorted(job.clients.keys() - {late})
    guess = attack(job, late, others[: threshold - 1])
    assert not equal(guess, job.clients[late].update)


def test_all_others_together_learn_no_more_than_the_sum_says() -> None:
    """The sum without the own updates is the rest: two honest clients hide each other."""
    job = collected(7)
    job.collect()
    honest = sorted(job.clients)[:2]
    colluders = sorted(job.clients)[2:6]  # below the threshold of 5
    rest = {"w": torch.zeros(ELEMENTS, dtype=torch.int32), "isthmus.scalars": torch.zeros(3, dtype=torch.int64)}
    for who in honest:
        guess = attack(job, who, colluders)
        assert chi_square(guess["w"]) < MOST_CHI_SQUARE
        for name, tensor in guess.items():
            rest[name] += tensor
    assert not equal(rest, {name: sum(job.clients[who].update[name] for who in honest) for name in rest})  # type: ignore[misc]


def test_no_secret_returns_in_a_later_instance() -> None:
    """One-time setups were broken by masks that can be predicted from earlier rounds (arXiv 2410.09676)."""
    seen: set[bytes] = set()
    job = collected(4)
    for _ in range(3):
        for client in job.clients.values():
            instance = instance_of(client)
            masks = instance.masks
            assert masks is not None
            fresh = [
                instance._keys.mask_secret_bytes, instance._keys._share.private_bytes_raw(),
                instance._seed, instance._nonce,
                *(hashlib.sha256(pair.self_seed + pair.mask_key).digest() for pair in instance._held.values()),
                masks.self_seed,
            ]  # fmt: skip
            assert not seen & set(fresh)
            seen |= set(fresh)
        pairs = {key for client in job.clients.values() for key, _ in instance_of(client).masks.pairwise}  # type: ignore[union-attr]
        assert not seen & pairs
        seen |= pairs
        job.begin()
        job.settle()


def test_a_client_forgets_its_secrets_at_the_end() -> None:
    job = collected(4)
    client = job.clients[min(job.clients)]
    instance = instance_of(client)
    secrets = [instance._seed, instance._nonce]
    mask_secret = instance._keys.mask_secret_bytes
    job.collect()
    job.freeze()
    job.settle()
    assert job.server.phase is Phase.DONE
    assert client.protocol.masks is None and client.protocol.begin is None
    assert instance._seed not in secrets and instance._nonce not in secrets
    assert instance._keys.mask_secret_bytes != mask_secret and not instance._held
