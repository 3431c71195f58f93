"""Integers that one client contributes, and the bounds that they keep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.codecs import Residual
from isthmus.secure_aggregation.encoding.history import History
from isthmus.secure_aggregation.encoding.rounding import Rounding
from isthmus.secure_aggregation.fixed_point import (
    SCALARS,
    Contribution,
    UpdateError,
    dequantise,
    mean_change,
    quantise,
)
from isthmus.secure_aggregation.layout import (
    LayoutError,
    Parameters,
    evaluation_layout,
    levels,
    make_layout,
    wire_specs,
)
from isthmus.tensors import State, specs_of

from .secure_rounds import BUFFERS, model, trained

hostile = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 3.4e38, -3.4e38, 1e-45, 1.0, -1.0, 1 + 2**-23, 0.99999994]),
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@given(
    bits=st.sampled_from([16, 32]),
    max_clients=st.one_of(st.integers(1, 32), st.integers(1, 30_000)),
    max_examples=st.integers(1, 1_000_000),
    examples=st.integers(1, 10_000_000),
    clip=st.floats(1e-6, 1e6),
    values=hnp.arrays(np.float32, 9, elements=hostile),
    base=hnp.arrays(np.float32, 9, elements=hostile),
    counter=st.integers(-(2**62), 2**62),
    dtype=dtypes,
    algorithm=st.sampled_from(["FedAvg", "FedNova", "SCAFFOLD"]),
    divisor=st.floats(1e-9, 1e9),
    metric=st.floats(allow_nan=True, allow_infinity=True),
)
@settings(max_examples=150)
def test_no_sum_over_the_clients_of_a_job_leaves_the_ring(
    bits: int, max_clients: int, max_examples: int, examples: int, clip: float, values: np.ndarray, base: np.ndarray,
    counter: int, dtype: torch.dtype, algorithm: str, divisor: float, metric: float,
) -> None:  # fmt: skip
    """Each client's integers, times the largest number of clients, are within the ring: any sum of them is."""
    parameters = Parameters(algorithm, bits, max_clients, max_examples, clip, {"loss": 100.0})
    finite = {"w": (values, base)}
    state = {name: torch.from_numpy(old.copy()).to(dtype).nan_to_num() for name, (_, old) in finite.items()}
    new = {name: torch.from_numpy(one.copy()).to(dtype).nan_to_num() for name, (one, _) in finite.items()}
    state["n"], new["n"] = torch.tensor([0, -5]), torch.tensor([counter, counter])
    layout = make_layout(parameters, state, buffers=["n"])
    given_numbers = {"steps": divisor, "travel": divisor}
    try:
        found = quantise(
            layout,
            state,
            new,
            Contribution(examples, given_numbers, {"loss": metric}, {"loss": metric}, float(examples)),
        )
    except UpdateError as error:
        assert "NaN or infinity" in str(error)  # a difference that the dtype does not hold
        return
    for name, tensor in found.tensors.items():
        assert tensor.dtype != torch.int16 or not name.startswith("slope/")
        ring = 2 ** (8 * tensor.element_size() - 1)
        assert all(abs(number) * max_clients < ring for number in tensor.reshape(-1).tolist()), name
        if name == "w":
            assert all(abs(number) <= levels(layout) for number in tensor.tolist())
    assert levels(layout) * max_clients <= 2 ** (bits - 1) - 1
    assert [(spec.name, spec.dtype, list(spec.shape)) for spec in specs_of(found.tensors)] == [
        (spec.name, spec.dtype, list(spec.shape)) for spec in wire_specs(layout)
    ]


@given(st.lists(hostile, min_size=1, max_size=20), st.sampled_from([np.float32, np.float64]))
def test_rounding_goes_to_a_neighbour_and_preserves_whole_numbers(numbers: list[float], dtype: type) -> None:
    values = torch.tensor(np.array(numbers, dtype))
    rounded = Rounding().round(values.clone())
    assert torch.equal(rounded, rounded.round())
    assert bool(((rounded >= values.floor()) & (rounded <= values.ceil())).all())
    whole = values.round()
    assert torch.equal(Rounding().round(whole.clone()), whole)


@given(st.floats(-100, 100), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=25)
def test_rounding_is_unbiased(number: float, dtype: torch.dtype) -> None:
    """The mean of 2^16 roundings is within 6 standard errors, at most 0.012, of the number."""
    count = 1 << 16
    values = torch.full((count,), number, dtype=dtype)
    mean = float(Rounding().round(values.clone()).double().mean())
    assert abs(mean - float(values[0].double())) < 6 * 0.5 / math.sqrt(count)


def test_a_quantised_update_is_unbiased() -> None:
    base = {"w": torch.zeros(200_000)}
    new = {"w": torch.full((200_000,), 1.2345e-3)}
    layout = make_layout(Parameters(bits=16, max_clients=20, max_examples=100), base)
    found = quantise(layout, base, new, Contribution(30)).tensors["w"].double()
    expected = 1.2345e-3 * levels(layout) * 30 / 100
    assert 0 < expected < 1
    assert abs(float(found.mean()) - expected) < 6 * 0.5 / math.sqrt(200_000)


def test_two_roundings_of_an_update_use_different_randomness() -> None:
    base = {"w": torch.zeros(1000)}
    new = {"w": torch.rand(1000)}
    layout = make_layout(Parameters(max_clients=3), base)
    first, second = (quantise(layout, base, new, Contribution(30)).tensors["w"] for _ in range(2))
    assert not torch.equal(first, second)
    same = [quantise(layout, base, new, Contribution(30), bytes).tensors["w"] for _ in range(2)]
    assert torch.equal(*same)


def test_clipped_coordinates_are_counted() -> None:
    base = {"w": torch.zeros(6), "n": torch.tensor([0, 0])}
    new = {"w": torch.tensor([0.1, -0.5, 0.51, -9.0, 0.0, 3e38]), "n": torch.tensor([3, 2**62])}
    layout = make_layout(Parameters(max_clients=3, max_examples=10, clip=0.5), base, buffers=["n"])
    found = quantise(layout, base, new, Contribution(10))
    assert found.clipped == 4
    sums = dequantise(layout, found.tensors, 1)
    assert sums.scalars["clipped"] == 4
    assert sums.clipped_share == 0.5
    single = levels(layout) * (1 - 2**-23)  # single precision does not hold the largest integer itself
    assert single <= found.tensors["w"][2] <= levels(layout)
    assert -levels(layout) <= found.tensors["w"][3] <= -single


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("parameters", [Parameters(max_clients=3), Parameters(max_clients=3, clip_norm=1.0)])
def test_values_that_are_not_finite_are_refused(value: float, parameters: Parameters) -> None:
    base = {"w": torch.zeros(3)}
    layout = make_layout(parameters, base)
    with pytest.raises(UpdateError, match="NaN"):
        quantise(layout, base, {"w": torch.tensor([0.0, value, 0.0])}, Contribution(1))


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_left_out_is_added_to_the_next_change(rotation: bool, dtype: torch.dtype) -> None:
    """Over all rounds, a client has sent its changes but for the last residual."""
    base = {"w": torch.zeros(3000, dtype=dtype), "b": torch.zeros(3, dtype=dtype)}
    parameters = Parameters(max_clients=3, max_examples=10, rotation=rotation, keep=0.25, clip=16.0)
    residual: Residual | None = None
    changed, received = torch.zeros(3000, dtype=torch.float64), torch.zeros(3000, dtype=torch.float64)
    for number in range(5):
        layout = make_layout(parameters, base, seed=bytes([number]))
        new = {name: torch.rand_like(tensor) for name, tensor in base.items()}
        found = quantise(layout, base, new, Contribution(10), residual=residual)
        residual = found.residual
        tensor = layout.tensors[0]
        received += mean_change(layout, tensor, found.tensors["w"], base["w"], 10.0).double()
        changed += new["w"].double()
    assert residual is not None
    rest = residual.read("w", (3000,), 0, 3000)
    assert rest is not None
    assert residual.read("b", (3,), 0, 3) is None  # small tensors are sent whole
    torch.testing.assert_close(received + rest.double(), changed, atol=2e-3, rtol=0)
    assert float((received / changed).mean()) > 0.5  # without feedback: a quarter


def test_all_coordinates_leave_no_residual() -> None:
    base = {"w": torch.zeros(3000)}
    layout = make_layout(Parameters(max_clients=3), base)
    assert quantise(layout, base, base, Contribution(10), residual=Residual()).residual is None


def test_a_frozen_tensor_that_changed_is_refused() -> None:
    base = {"w": torch.zeros(3), "frozen": torch.ones(2)}
    layout = make_layout(Parameters(max_clients=3), base, frozen=["frozen"])
    with pytest.raises(UpdateError, match=r"frozen required no gradient .* unfreeze it"):
        quantise(layout, base, {"w": torch.zeros(3), "frozen": torch.zeros(2)}, Contribution(1))


def test_a_tensor_of_another_shape_is_refused() -> None:
    base = {"w": torch.zeros(3)}
    layout = make_layout(Parameters(max_clients=3), base)
    for trained_w in (torch.zeros(4), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(UpdateError, match="another shape or dtype"):
            quantise(layout, base, {"w": trained_w}, Contribution(1))


@pytest.mark.parametrize("algorithm", ["FedNova", "SCAFFOLD"])
def test_a_missing_divisor_is_refused(algorithm: str) -> None:
    base = {"w": torch.zeros(3)}
    layout = make_layout(Parameters(algorithm, max_clients=3), base)
    with pytest.raises(UpdateError, match="needs the number of"):
        quantise(layout, base, base, Contribution(1))


def test_what_does_not_fit_is_reported_to_the_client() -> None:
    base = {"w": torch.zeros(3)}
    layout = make_layout(Parameters(max_clients=3, max_examples=100, metrics={"loss": 10.0}), base)
    found = quantise(
        layout, base, base, Contribution(1000, metrics={"loss": 11.0, "perplexity": 3.0}, evaluation={"f1": 0.5})
    )
    assert (found.capped, found.limited, found.unbounded) == (True, ("metric.loss",), ("f1", "perplexity"))
    sums = dequantise(layout, found.tensors, 1)
    assert (sums.weight, sums.capped, sums.limited) == (100, 1, 1)
    assert sums.metrics["loss"].mean == 10


def test_metrics_are_means_over_the_clients_that_report_them() -> None:
    base = {"w": torch.zeros(3)}
    layout = make_layout(Parameters(max_clients=3, metrics={"loss": 100.0, "accuracy": 1.0}), base)
    clients = [
        Contribution(100, metrics={"loss": 0.5}, evaluation={"accuracy": 0.9}, evaluation_examples=10),
        Contribution(300, metrics={"loss": 0.1}, evaluation={"accuracy": 0.5}, evaluation_examples=2.5),
        Contribution(50, metrics={"loss": math.nan}, evaluation={"accuracy": 0.1}, evaluation_examples=0),
    ]
    total = torch.zeros(len(layout.scalars), dtype=torch.int64)
    for client in clients:
        total += quantise(layout, base, base, client).tensors[SCALARS]
    sums = dequantise(layout, {"w": torch.zeros(3, dtype=torch.int32), SCALARS: total}, 3)
    assert sums.weight == 450
    assert sums.metrics["loss"].mean == pytest.approx((50 + 30) / 400, abs=1e-6)
    assert sums.metrics["loss"].examples == 400
    assert "accuracy" not in sums.metrics
    assert sums.evaluation["accuracy"].mean == pytest.approx((9 + 1.25) / 12.5, abs=1e-6)
    assert sums.evaluation["accuracy"].examples == 12.5


def test_an_evaluation_alone_has_only_scalars() -> None:
    layout = evaluation_layout(Parameters(max_clients=4, metrics={"accuracy": 1.0}))
    found = quantise(layout, {}, {}, Contribution(0, evaluation={"accuracy": 0.75}, evaluation_examples=8))
    assert list(found.tensors) == [SCALARS]
    sums = dequantise(layout, found.tensors, 1)
    assert sums.evaluation["accuracy"].mean == 0.75
    assert not sums.implausible


@given(
    values=hnp.arrays(np.float32, (3, 12), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    bits=st.sampled_from([16, 32]),
    clip_norm=st.floats(1e-3, 1e3),
)
def test_no_client_is_longer_than_the_norm_under_differential_privacy(
    values: np.ndarray, bits: int, clip_norm: float
) -> None:
    """Sensitivity in exact integer arithmetic: the norm of the integers is at most the number of levels."""
    base = {"a": torch.from_numpy(values[0]), "b": torch.from_numpy(values[1])}
    new = {"a": torch.from_numpy(values[1]), "b": torch.from_numpy(values[2])}
    layout = make_layout(Parameters(bits=bits, max_clients=5, clip_norm=clip_norm), base)
    found = quantise(layout, base, new, Contribution(77)).tensors
    squares = sum(number**2 for name in base for number in found[name].tolist())
    assert squares <= levels(layout) ** 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("layout.bits = 8", "8 bits"),
        ("layout.max_clients = 0", "out of range"),
        ("layout.max_examples = float('nan')", "out of range"),
        ("layout.keep_fraction = 2", "not a share"),
        ("layout.bits = 16; layout.max_clients = 40000", "no room for 40000"),
        ("layout.noise.noise_multiplier = 1; layout.noise.kind = 1", "needs a bound"),
        ("layout.noise.clip_norm = -1", "out of range"),
        ("layout.tensors[0].name = 'v'", "not in the model"),
        ("layout.tensors.append(layout.tensors[0])", "occurs twice"),
        ("layout.tensors[0].bits = 64", "as integers of 64 bits"),
        ("layout.tensors[1].bits = 0", "as integers of 32 bits"),
        ("layout.tensors[0].divisor = 'loss'", "unknown divisor"),
        ("layout.tensors[0].weighted = False", "not weighted"),
        ("layout.tensors[0].clip = float('inf')", "has the clip"),
        ("layout.tensors[1].clip = 2.0**53", "may leave 63 bits"),
        ("layout.tensors[0].shape[0] = 4", "instead of"),
        ("layout.scalars[0].name = 'labels'", "not known"),
        ("layout.scalars[0].least = 0.5", "does not contain 0"),
        ("layout.scalars[0].most = 1e300", "does not fit 63 bits"),
        ("layout.scalars[0].most = float('inf')", "no finite bounds"),
        ("layout.scalars.append(layout.scalars[0])", "occurs twice"),
    ],
)
def test_a_client_refuses_a_layout_that_does_not_fit(change: str, problem: str) -> None:
    base = {"w": torch.zeros(3), "n": torch.zeros(2, dtype=torch.int64)}
    layout = make_layout(Parameters(max_clients=3), base, buffers=["n"])
    quantise(layout, base, base, Contribution(1))
    exec(change, {"layout": layout})  # noqa: S102
    with pytest.raises(LayoutError, match=problem):
        quantise(layout, base, base, Contribution(1))


def test_a_job_whose_sums_do_not_fit_is_refused() -> None:
    base = {"w": torch.zeros(3)}
    with pytest.raises(LayoutError, match="maxExamples"):
        make_layout(Parameters(max_clients=1000, max_examples=10**12, metrics={"loss": 1e9}), base)
    with pytest.raises(LayoutError, match="16 bits has no room"):
        make_layout(Parameters(bits=16, max_clients=40_000), base)


def test_the_layout_depends_on_shapes_and_public_results_only() -> None:
    base = model()
    one = make_layout(Parameters(max_clients=9), base, BUFFERS, ["frozen"], History(), b"seed")
    assert one == make_layout(
        Parameters(max_clients=9), {n: t + 0 for n, t in base.items()}, BUFFERS, ["frozen"], None, b"seed"
    )
    names = [tensor.name for tensor in one.tensors]
    assert "frozen" not in names
    assert "empty" not in names
    exact = {tensor.name for tensor in one.tensors if tensor.bits == 64}
    assert exact == {"bn.num_batches_tracked", "mask", "bytes"}


def test_contributions_do_not_share_memory_with_the_update() -> None:
    base: State = model()
    update = trained(base, 1, seed=4)[0]
    before = {name: tensor.clone() for name, tensor in update.tensors.items()}
    layout = make_layout(Parameters(max_clients=3), base, BUFFERS, ["frozen"])
    quantise(layout, base, update.tensors, Contribution(5))
    assert all(torch.equal(before[name], update.tensors[name]) for name in before)


@pytest.mark.parametrize("algorithm", ["FedAvg", "SCAFFOLD", "FedNova"])
@pytest.mark.parametrize("bits", [16, 32])
def test_integers_may_take_the_memory_of_the_base(algorithm: str, bits: int) -> None:
    base = {"a": torch.randn(300, 7), "half": torch.randn(40).half(), "double": torch.randn(9).double(),
            "count": torch.tensor(3)}  # fmt: skip
    trained = {name: tensor + 1 for name, tensor in base.items()}
    layout = make_layout(Parameters(algorithm=algorithm, bits=bits), base)
    contribution = Contribution(3, {"steps": 2.0, "travel": 0.5})
    expected = quantise(layout, base, trained, contribution, bytes).tensors
    held = dict(base)
    found = quantise(layout, held, trained, contribution, bytes, consume=True).tensors
    assert not held
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    taken = {tensor.data_ptr() for tensor in found.values()} & {base["a"].data_ptr()}
    assert bool(taken) == (bits == 32 or algorithm == "SCAFFOLD")  # its slopes have 32 bits
