"""Names that share memory: detection, transfer, loading and corrections."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.client.corrections.base import Correction
from isthmus.client.corrections.feddyn import DynamicRegularizer
from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.corrections.scaffold import ControlVariates
from isthmus.client.errors import FederationError
from isthmus.client.state.parameter_names import ParameterNames
from isthmus.client.state.shared_state import SharedState
from isthmus.client.state.tied_tensors import overlap, views_in
from isthmus.tensors import State, snapshot, specs_of
from isthmus.views import View, difference, expanded, from_text, invalid_views, to_text

W = torch.arange(200.0).reshape(10, 20)
IMAGE = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)


def round_trip(state: State) -> tuple[View, ...]:
    """Return the views in a state after a round trip of the shared tensors has restored it."""
    views = views_in(state)
    own = {view.name for view in views}
    received = expanded(snapshot({name: tensor for name, tensor in state.items() if name not in own}), views)
    assert received.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(received[name], tensor), name
    return views


@pytest.mark.parametrize(
    ("state", "views"),
    [
        ({"b": W, "a": W}, [("b", "a", 0, (10, 20), (20, 1))]),
        ({"enc": W, "dec": W.t()}, [("dec", "enc", 0, (20, 10), (1, 20))]),
        ({"w": W, "q": W[2:4]}, [("q", "w", 40, (2, 20), (20, 1))]),
        ({"w": W, "column": W[:, 3]}, [("column", "w", 3, (10,), (20,))]),
        ({"flat": W.view(-1), "w": W}, [("w", "flat", 0, (10, 20), (20, 1))]),
        ({"a": IMAGE, "b": IMAGE}, [("b", "a", 0, (4, 3, 5, 5), (75, 25, 5, 1))]),
        ({"a": IMAGE, "b": IMAGE[1:2]}, [("b", "a", 75, (1, 3, 5, 5), (1, 25, 5, 1))]),
        ({"left": W[:, :5], "right": W[:, 5:]}, []),
        ({"first": W[:5], "second": W[5:], "none": W[:0]}, []),
        ({"a": W, "b": W.clone(), "n": torch.tensor(1)}, []),
        ({"a": torch.ones(()).expand(3)}, []),
    ],
)
def test_views_are_found_and_restored(state: State, views: list[tuple[object, ...]]) -> None:
    found = round_trip(state)
    assert [(view.name, view.of, view.offset, view.shape, view.stride) for view in found] == views
    assert from_text(to_text(found)) == found
    assert tuple(View.from_message(view.message()) for view in found) == found
    travelling = {name: tensor for name, tensor in state.items() if name not in {view.name for view in found}}
    assert invalid_views(found, specs_of(travelling)) is None


@given(st.data())
@settings(max_examples=300)
def test_any_slice_or_transposition_is_restored(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    whole = torch.randn(shape)
    view = whole
    for _ in range(data.draw(st.integers(1, 4))):
        dim = data.draw(st.integers(0, view.dim() - 1))
        match data.draw(st.sampled_from(["transpose", "narrow", "select", "flatten", "step"])):
            case "transpose":
                view = view.transpose(dim, 0)
            case "narrow":
                start = data.draw(st.integers(0, view.shape[dim] - 1))
                view = view.narrow(dim, start, data.draw(st.integers(1, view.shape[dim] - start)))
            case "select" if view.dim() > 1:
                view = view.select(dim, 0)
            case "flatten" if view.is_contiguous():
                view = view.view(-1)
            case "step":
                view = view[::2]
    assert len(round_trip({"whole": whole, "view": view})) == 1


@pytest.mark.parametrize(
    ("left", "right"), [(W[:6], W[4:]), (W.view(-1)[:100], W.view(-1)[::2]), (W[0], W[0].view(torch.int32))]
)
def test_other_overlaps_are_refused_in_one_line(left: torch.Tensor, right: torch.Tensor) -> None:
    assert overlap(left, right)
    with pytest.raises(ValueError, match=r"^[ab] and [ab] share a part of their memory, and neither") as caught:
        views_in({"a": left, "b": right})
    assert "\n" not in str(caught.value)


class Tied(nn.Module):
    """Model with an embedding tied to its output weight, and a decoder tied to its transposed encoder."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.encode, self.decode = nn.Linear(4, 3), nn.Linear(3, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.wte.weight
            self.decode.weight = nn.Parameter(self.encode.weight.t())
        self.register_buffer("copy", self.encode.weight.detach())
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("same_mean", self.mean)


NAMES = ["copy", "decode.bias", "encode.bias", "head.weight", "mean"]
VIEWS = {"encode.weight": "copy", "decode.weight": "copy", "wte.weight": "head.weight", "same_mean": "mean"}


def test_of_what_shares_memory_one_tensor_travels() -> None:
    model = Tied()
    shared = SharedState(model)
    live = shared.live()
    assert sorted(live) == NAMES
    assert {view.name: view.of for view in shared.views()} == VIEWS
    # A buffer that shares memory with a parameter is trained.
    assert shared.buffers(live) == ["mean"]
    assert shared.frozen(live) == []
    model.wte.requires_grad_(requires_grad=False)
    assert shared.frozen(live) == ["head.weight"]
    received = {name: torch.randn(tensor.shape) for name, tensor in live.items()}
    shared.load(received)
    state = model.state_dict()
    assert torch.equal(state["wte.weight"], received["head.weight"])
    assert torch.equal(state["decode.weight"], received["copy"].t())
    assert model.head.weight is model.wte.weight
    assert model.decode.weight.data_ptr() == model.encode.weight.data_ptr()


class Copies(Tied):
    """Model that returns copies of its tensors, as wrappers do that gather them on the CPU."""

    def state_dict(self, *args: object, **kwargs: object) -> State:  # type: ignore[override]
        return {name: tensor.clone() for name, tensor in super().state_dict().items()}


def test_a_state_of_copies_is_known_by_the_module() -> None:
    assert {view.name: view.of for view in SharedState(Copies()).views()} == VIEWS


def test_partial_states_share_what_they_name() -> None:
    model = Tied()
    trainable = SharedState(model, "trainable").live()
    assert sorted(trainable) == ["decode.bias", "encode.bias", "encode.weight", "head.weight"]
    shared = SharedState(model, ["wte.*", "encode.*"])
    assert (sorted(shared.live()), shared.views()) == (["encode.bias", "encode.weight", "wte.weight"], ())
    shared.load({name: torch.ones_like(tensor) for name, tensor in shared.live().items()})
    assert bool((model.head.weight == 1).all() and (model.decode.weight == 1).all())


@pytest.mark.parametrize(("here", "there"), [(True, False), (False, True)])
def test_a_client_that_shares_otherwise_gets_an_error_of_one_line(here: bool, there: bool) -> None:
    own, other = SharedState(Tied(tied=here)), SharedState(Tied(tied=there))
    own.require(own.views())
    words = ("does", "does not") if here else ("does not", "does")
    with pytest.raises(FederationError) as caught:
        own.require(other.views())
    assert str(caught.value) == (
        f"the global model does not fit this script's model: decode.weight {words[0]} share memory with copy (tied"
        f" weights) at this client, and {words[1]} in the global model: build the model in the same way at all clients"
    )


def test_the_same_names_may_share_in_another_way() -> None:
    one, two = views_in({"w": W, "q": W[:2]}), views_in({"w": W, "q": W[2:4]})
    assert difference(one, two) == "q shares memory in another way than in the global model: with w, there with w"


@pytest.mark.parametrize(
    ("view", "problem"),
    [
        (View("w", "w", 0, (2,), (1,)), "w is announced twice"),
        (View("v", "u", 0, (2,), (1,)), "v is announced as a view of u, which does not exist"),
        (View("v", "w", 199, (2,), (1,)), "v is announced as a view of w, but does not lie within it"),
        (View("v", "w", 0, (201,), (0,)), "v is announced as a view of w, which does not fit its shape"),
        (View("v", "w", 0, (2, 2), (1,)), "v is announced as a view of w, which does not fit its shape"),
        (View("v", "w", 0, (2**40, 2**40), (0, 0)), "v is announced as a view of w, which does not fit its shape"),
    ],
)
def test_views_that_cannot_be(view: View, problem: str) -> None:
    assert invalid_views([view], specs_of({"w": W})) == problem


class Fused(nn.Module):
    """Model with parameters that are rows of one table, which is not used as a whole."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        table = torch.arange(12.0).reshape(6, 2) / 12
        if fused:
            self.register_buffer("table", table)
        self.q, self.k = nn.Parameter(table[:3]), nn.Parameter(table[3:])
        if not fused:
            self.q, self.k = nn.Parameter(table[:3].clone()), nn.Parameter(table[3:].clone())

    def forward(self) -> torch.Tensor:
        return (self.q.sin() @ self.k.t()).square().sum()


class Folded(nn.Module):
    """Return an encoder and its transposed decoder, as two parameters over the same values or as one."""

    def __init__(self, *, two: bool) -> None:
        super().__init__()
        self.enc = nn.Parameter(torch.arange(6.0).reshape(2, 3) / 6)
        if two:
            self.dec = nn.Parameter(self.enc.t())

    def forward(self) -> torch.Tensor:
        decoder = self.dec if hasattr(self, "dec") else self.enc.t()
        return (decoder @ self.enc.sin()).square().sum()


Make = Callable[[ParameterNames, State], Correction]
CORRECTIONS: dict[str, Make] = {
    "FedProx": lambda names, memory: ProximalTerm(0.5, names),
    "SCAFFOLD": lambda names, memory: ControlVariates(names, memory, {name: t * 0.3 for name, t in memory.items()}),
    "FedDyn": lambda names, memory: DynamicRegularizer(names, memory, 0.5),
}


def trained(model: nn.Module, make: Make) -> list[torch.Tensor]:
    """Return the parameters' values after some rounds of a correction with state."""
    shared, memory = SharedState(model), State()
    for _ in range(3):
        correction = make(shared.names(), memory)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        correction.attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
        memory = correction.updated_state() or {}
        assert memory.keys() <= shared.live().keys()
        correction.close()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("make", CORRECTIONS.values(), ids=CORRECTIONS.keys())
def test_corrections_of_parts_are_those_of_parameters_by_themselves(make: Make) -> None:
    fused = trained(Fused(fused=True), make)
    for part, alone in zip(fused, trained(Fused(fused=False), make), strict=True):
        torch.testing.assert_close(part, alone)


@pytest.mark.parametrize("make", CORRECTIONS.values(), ids=CORRECTIONS.keys())
def test_memory_under_two_parameters_gets_each_term_once(make: Make) -> None:
    enc, dec = trained(Folded(two=True), make)
    (alone,) = trained(Folded(two=False), make)
    torch.testing.assert_close(enc, alone)
    torch.testing.assert_close(dec, alone.t())
