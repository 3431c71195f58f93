"""The part of a model that is shared, and its names."""

from collections.abc import Callable

import pytest
import torch

import isthmus
from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.errors import FederationError
from isthmus.client.state.shared_state import Parameters, SharedState, unwrapped
from isthmus.tensors import specs_of
from isthmus_contracts.pb.federation_pb2 import TensorSpec


class LowRank(torch.nn.Module):
    """Frozen linear layer with a trainable low-rank change, as in LoRA."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_a = torch.nn.Parameter(torch.randn(rank, inputs))
        self.lora_b = torch.nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(values) + values @ self.lora_a.T @ self.lora_b.T
        return result


def build() -> torch.nn.Sequential:
    return torch.nn.Sequential(LowRank(3, 4), torch.nn.BatchNorm1d(4).requires_grad_(False), LowRank(4, 1))


ADAPTERS = ["0.lora_a", "0.lora_b", "2.lora_a", "2.lora_b"]


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("trainable", ADAPTERS),
        (["*.lora_?"], ADAPTERS),
        (["2.*", "0.lora_a"], ["0.lora_a", "2.lora_a", "2.lora_b", "2.base.weight", "2.base.bias"]),
        (lambda name: name.endswith("running_mean"), ["1.running_mean"]),
    ],
)
def test_what_is_chosen_travels_in_the_models_order(parameters: Parameters, names: list[str]) -> None:
    assert list(SharedState(build(), parameters).live()) == names


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["*.lora_?", "lora"], "'lora' matches none of the model's tensors: 0.lora_a, 0.lora_b, 0.base.weight"),
        ("lora*", r"must be \"trainable\", a list of patterns or a function, not 'lora\*'"),
        ([], "an empty list"),
        (lambda name: False, "chose none of the model's tensors"),
    ],
)
def test_a_selection_of_nothing_is_an_error(parameters: Parameters, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(isthmus.rounds(build(), parameters=parameters)))


def test_a_frozen_model_has_nothing_trainable() -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        SharedState(build().requires_grad_(False), "trainable")


def test_only_what_is_chosen_is_loaded() -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = SharedState(model, "trainable")
    shared.load({name: torch.full_like(tensor, 7.0) for name, tensor in shared.live().items()})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, torch.full_like(tensor, 7.0) if name in ADAPTERS else before[name])


class Tensors:
    """Model that is not a module."""

    def __init__(self) -> None:
        self.tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def load_state_dict(self, state: dict[str, torch.Tensor], /) -> None:
        assert list(state) == ["a", "b"]
        self.tensors = state


def test_a_model_that_is_no_module_keeps_the_rest() -> None:
    model = Tensors()
    SharedState(model, ["a"]).load({"a": torch.ones(2)})
    assert [tensor.sum().item() for tensor in model.tensors.values()] == [2.0, 0.0]
    with pytest.raises(ValueError, match=r"needs a torch\.nn\.Module, not a Tensors"):
        SharedState(model, "trainable")


@pytest.mark.parametrize("spoil", [lambda state: state.popitem(), lambda state: state.update(x=torch.ones(1))])
def test_other_tensors_than_those_chosen_do_not_fit(spoil: Callable[[dict[str, torch.Tensor]], object]) -> None:
    shared = SharedState(build(), "trainable")
    state = dict(shared.live())
    spoil(state)
    with pytest.raises(FederationError, match="the global model does not fit this script's model"):
        shared.load(state)


def test_wrappers_leave_no_trace_in_the_names() -> None:
    plain = torch.nn.Linear(2, 2)
    compiled = torch.compile(torch.nn.DataParallel(plain))
    assert list(compiled.state_dict()) != list(plain.state_dict())
    assert unwrapped(compiled) is plain


def test_a_sharded_model_is_refused() -> None:
    class FSDPModule(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"sharded \(FSDP\)"):
        SharedState(FSDPModule(1, 1))


def test_the_proximal_term_leaves_alone_what_does_not_travel() -> None:
    model = build().requires_grad_(True)
    term = ProximalTerm(1.0, SharedState(model, ["0.*"]).names())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    term.attach(optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    moved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = moved[name] - 1 if name.startswith("0.") else moved[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_a_name_is_found_after_the_model_has_moved() -> None:
    model = torch.nn.Linear(2, 2)
    names = SharedState(model).names()
    model.double()
    assert [names.find(parameter) for parameter in model.parameters()] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE"),  # torchrun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE"),  # mpirun
        ({"ISTHMUS_STEP": "", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
        ({"ISTHMUS_STEP": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_processes_of_a_launcher_without_a_group_get_an_error(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
    for variable, value in {"ISTHMUS_ENDPOINT": "localhost:1", "ISTHMUS_POOL": "pool", **environment}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(FederationError, match=rf"one of {name}=2 processes: call torch\.distributed\.init_process_gr"):
        next(iter(isthmus.rounds(torch.nn.Linear(1, 1))))


@pytest.mark.parametrize(
    "environment",
    [
        {"ISTHMUS_STEP": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},  # each task is a client
        {"ISTHMUS_STEP": "", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},  # not started by a bridge
    ],
)
def test_steps_that_hold_single_processes_are_in_order(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for variable, value in {"ISTHMUS_ENDPOINT": "localhost:1", "ISTHMUS_POOL": "pool", **environment}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(Exception, match="ISTHMUS_TLS_DIR"):  # it then tries to connect
        next(iter(isthmus.rounds(torch.nn.Linear(1, 1))))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec(name="weight", dtype="F32", shape=[1 << 40], size=1 << 42), r"weight has shape \[1099511627776\]"),
        (TensorSpec(name="\x1b[2Jx\n", dtype="F32", shape=[2]), r"model: \[2Jx has shape \[2\], and is missing here"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_takes_memory(spec: TensorSpec, message: str) -> None:
    shared = SharedState(torch.nn.Linear(2, 2))
    shared.require_fitting(specs_of(shared.live()))
    with pytest.raises(FederationError, match=message):
        shared.require_fitting([spec])
    SharedState(Tensors()).require_fitting([spec])  # this kind of model may load any tensors
