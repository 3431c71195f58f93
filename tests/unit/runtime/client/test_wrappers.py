"""Wrappers inside a model do not change its names; submodules named like wrappers' attributes keep their names."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import isthmus
from isthmus.client.state.shared_state import SharedState


class Block(torch.nn.Module):
    """Model whose submodules have the names of wrappers' attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(2, 2)
        self._orig_mod = torch.nn.LayerNorm(2)
        self._module = torch.nn.Linear(2, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._module(self._orig_mod(self.module(values)))
        return result


def build(normalises: bool = True) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block(), torch.nn.BatchNorm1d(2) if normalises else torch.nn.LayerNorm(2))


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def private(module: torch.nn.Module) -> torch.nn.Module:
    opacus = pytest.importorskip("opacus")
    wrapped: torch.nn.Module = opacus.GradSampleModule(module, strict=False)
    return wrapped


WRAPPERS = [
    compiled, torch.nn.DataParallel, checkpoint_wrapper, private,
    lambda module: compiled(torch.nn.DataParallel(module)),
    lambda module: checkpoint_wrapper(compiled(module)),
    lambda module: compiled(checkpoint_wrapper(module)),
]  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("where", ["outside", "block", "part", "everywhere"])
def test_clients_with_and_without_wrappers_fit_together(wrap: object, where: str) -> None:
    assert callable(wrap)
    plain, model = (build(wrap is not private) for _ in range(2))  # Opacus rejects batch norm
    if where in ("part", "everywhere"):
        model[0].module = wrap(model[0].module)
    if where in ("block", "everywhere"):
        model[1] = wrap(model[1])
    other = wrap(model) if where in ("outside", "everywhere") else model
    expected, shared = SharedState(plain), SharedState(other)
    assert list(shared.live()) == list(expected.live())
    assert shared.buffers(shared.live()) == expected.buffers(expected.live())
    names = shared.names()
    assert {names.find(each) for each in model.parameters()} == {name for name, _ in plain.named_parameters()}
    shared.load({name: torch.full_like(tensor, 3) for name, tensor in plain.state_dict().items()})
    assert all((tensor == 3).all() for tensor in model.state_dict().values())
    part = SharedState(other, ["1.module.*"])
    part.load({name: torch.full_like(tensor, 4) for name, tensor in part.live().items()})
    assert [name for name, tensor in shared.live().items() if (tensor == 4).all()] == [
        "1.module.weight", "1.module.bias"
    ]  # fmt: skip
    assert list(SharedState(other, "trainable").live()) == [name for name, _ in plain.named_parameters()]


def test_a_module_sees_the_version_of_its_state() -> None:
    class Versioned(torch.nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state: object, prefix: str, metadata: dict[str, int], *args: object) -> None:
            if metadata.get("version") != 2:
                raise ValueError(f"version {metadata.get('version')}")
            super()._load_from_state_dict(state, prefix, metadata, *args)  # type: ignore[arg-type]

    for model in (Versioned(2, 2), torch.nn.Sequential(compiled(Versioned(2, 2)))):
        for parameters in (None, "trainable"):
            shared = SharedState(model, parameters)
            shared.load({name: torch.zeros_like(tensor) for name, tensor in shared.live().items()})
            assert all(not tensor.any() for tensor in model.state_dict().values())


class Extra(torch.nn.Linear):
    """Module whose state holds a value that is not a tensor."""

    def __init__(self, extra: object) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"vocabulary": ["a"]}, b"bytes", None, 1.5])
def test_extra_state_is_named_and_stays_where_it_is_left_out(extra: object) -> None:
    message = rf"0\._extra_state is a {type(extra).__name__}, not a tensor; use isthmus"
    with pytest.raises(isthmus.ScriptError, match=message):
        SharedState(torch.nn.Sequential(Extra(extra)))
    model = torch.nn.Sequential(Extra(extra))
    for shared in (SharedState(model, "trainable"), SharedState(model, ["*.weight", "*.bias"])):
        shared.load({name: torch.ones_like(tensor) for name, tensor in shared.live().items()})
        assert shared.buffers(shared.live()) == []
    assert model[0].weight.sum() == 4
    assert model[0].extra is extra


def with_buffer(tensor: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("odd", tensor)
    return model


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (torch.eye(3).to_sparse(), r"odd is a tensor of layout torch\.sparse_coo"),
        (torch.eye(3).to_sparse_csr(), r"odd is a tensor of layout torch\.sparse_csr"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "odd is a nested tensor"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "odd is a quantized tensor"),
        (torch.ones(3, device="meta"), "odd is on the meta device"),
        (torch.ones(3, dtype=torch.complex64), r"odd has dtype torch\.complex64, which cannot be sent"),
    ],
)
def test_odd_tensors_are_named_and_stay_where_they_are_left_out(odd: torch.Tensor, message: str) -> None:
    model = with_buffer(odd)
    with pytest.raises(isthmus.ScriptError, match=message):
        SharedState(model)
    shared = SharedState(model, lambda name: name != "odd")
    shared.load({name: torch.ones_like(tensor) for name, tensor in shared.live().items()})
    assert (list(shared.live()), shared.buffers(shared.live())) == (["weight", "bias"], [])
    assert shared.names().find(model.weight) == "weight"  # type: ignore[arg-type]


def test_lazy_modules_need_a_forward_pass_or_to_be_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(2), torch.nn.Linear(2, 1))
    with pytest.raises(isthmus.ScriptError, match=r"0\.weight has no shape yet \(a lazy module\): run a forward pass"):
        SharedState(model)
    assert list(SharedState(model, ["1.*"]).live()) == ["1.weight", "1.bias"]
    model(torch.ones(1, 3))
    assert list(SharedState(model).live()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_quantized_modules_can_be_left_out() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(2, 2)), {torch.nn.Linear})
    model = torch.nn.ModuleDict({"fixed": quantized, "head": torch.nn.Linear(2, 1)})
    assert list(SharedState(model, ["head.*"]).live()) == ["head.weight", "head.bias"]
    with pytest.raises(isthmus.ScriptError, match=r"fixed\.0\."):
        SharedState(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(1, 1).parameters(), "takes the model itself: .*, not <generator object"),
        ("model.pt", "takes the model itself: .*, not 'model.pt'"),
        (torch.nn.Linear, r"not the class Linear: make one, Linear\(\.\.\.\)"),
        (torch.nn.Linear(1, 1).state_dict(), "takes the model itself: .*, not OrderedDict"),
    ],
)
def test_an_object_that_is_not_a_model_is_an_error(model: object, message: str) -> None:
    with pytest.raises(isthmus.ScriptError, match=message):
        next(isthmus.rounds(model))  # type: ignore[arg-type, call-overload]


def test_an_evaluation_that_is_not_a_function_is_an_error() -> None:
    with pytest.raises(isthmus.ScriptError, match=r"evaluate must be a function .*, not {'accuracy': 0.5}: pass the"):
        next(iter(isthmus.rounds(torch.nn.Linear(1, 1), evaluate={"accuracy": 0.5})))  # type: ignore[arg-type]


@pytest.mark.parametrize("parameters", [5, [1], torch.nn.Linear(1, 1).parameters()])
def test_parameters_that_select_by_no_name_are_an_error(parameters: object) -> None:
    with pytest.raises(isthmus.ScriptError, match='parameters must be "trainable", a list of patterns or a function'):
        SharedState(torch.nn.Linear(1, 1), parameters)  # type: ignore[arg-type]
