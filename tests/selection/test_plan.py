from __future__ import annotations

import copy
import hashlib
import json
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_fx.errors import PlanError
from stp_fx.selection import PrunePlan

names = st.sampled_from(["conv.weight", "conv.bias", "layer1.0.conv1.weight", "token", "größe:0"])


@st.composite
def plans(draw, sizes=None):
    if sizes is None:
        sizes = draw(st.dictionaries(st.tuples(names, st.integers(0, 3)), st.integers(1, 40), max_size=6))
    kept = {}
    for key, size in sizes.items():
        mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        kept[key] = [k for k in range(size) if mask[k]] or [draw(st.integers(0, size - 1))]
    return PrunePlan(kept, sizes)


def remove(tensors, plan):
    for (name, dim), kept in plan.kept.items():
        tensors = {**tensors, name: tensors[name].take(kept, axis=dim)}
    return tensors


@given(plans())
@settings(max_examples=80, deadline=None)
def test_json_round_trip(plan):
    text = plan.to_json()
    again = PrunePlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert again.digest() == plan.digest()
    assert hash(again) == hash(plan)
    assert again.sizes == plan.sizes
    assert PrunePlan.from_json(text.encode()) == plan


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_removing_a_then_b_is_removing_both_at_once(data):
    shapes = {"w": (5, 7, 3), "b": (5,), "v": (4, 6)}
    tensors = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    axes = st.sampled_from([("w", 0), ("w", 1), ("w", 2), ("b", 0), ("v", 0), ("v", 1)])

    def draw_plan(current):
        keys = data.draw(st.lists(axes, unique=True))
        return data.draw(plans({(n, d): current[n].shape[d] for n, d in keys}))

    first = draw_plan(tensors)
    between = remove(tensors, first)
    second = draw_plan(between)
    after = remove(between, second)
    third = draw_plan(after)
    at_once = remove(tensors, first.then(second))
    for name in tensors:
        np.testing.assert_array_equal(at_once[name], after[name])
    assert first.then(second).then(third) == first.then(second.then(third))
    empty = PrunePlan({}, {})
    assert first.then(empty) == first == empty.then(first)


def test_plain_data():
    plan = PrunePlan(
        {("b", 0): range(2), ("a", 1): (0, 2), ("a", 0): np.array([1], dtype=np.int32)},
        {("b", 0): 3, ("a", 1): 4, ("a", 0): 2},
    )
    assert list(plan.kept) == list(plan.sizes) == [("a", 0), ("a", 1), ("b", 0)]
    assert all(kept.dtype == np.int64 for kept in plan.kept.values())
    assert plan.sizes == {("a", 0): 2, ("a", 1): 4, ("b", 0): 3}
    assert plan.summary().splitlines() == [
        "3 axes of 2 tensors shortened, 4 of 9 indices removed", "  a:0 1/2", "  a:1 2/4", "  b:0 2/3",
    ]  # fmt: skip
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan
        assert twin.digest() == plan.digest()


def test_the_callers_arrays_are_copied():
    mine = np.array([0, 2])
    plan = PrunePlan({("a", 0): mine}, {("a", 0): 3})
    mine[0] = 1
    assert plan.kept["a", 0].tolist() == [0, 2]


def test_equality_and_digest():
    one = PrunePlan({("a", 0): [0, 1]}, {("a", 0): 3})
    assert one == PrunePlan({("a", 0): (0, 1)}, {("a", 0): 3})
    others = [
        PrunePlan({("a", 0): [0, 2]}, {("a", 0): 3}),
        PrunePlan({("a", 0): [0, 1]}, {("a", 0): 4}),
        PrunePlan({("a", 1): [0, 1]}, {("a", 1): 3}),
        PrunePlan({("b", 0): [0, 1]}, {("b", 0): 3}),
        PrunePlan({}, {}),
    ]
    assert all(one != other for other in others)
    assert len({one.digest(), *(other.digest() for other in others)}) == 6
    assert one != "plan"
    assert len(one.digest()) == 64
    assert others[-1].digest() == hashlib.sha256(b"stp_fx_plan 1\n").hexdigest()


def test_empty_plans():
    whole = PrunePlan({("a", 0): [0, 1, 2]}, {("a", 0): 3})
    assert whole.is_empty
    assert whole == PrunePlan({}, {})
    assert whole.kept == {}
    assert not PrunePlan({("a", 0): [0]}, {("a", 0): 2}).is_empty
    assert json.loads(whole.to_json()) == {"stp_fx_plan": 1, "cuts": []}


def test_json_shares_indices_and_writes_runs():
    key, other = ("conv.weight", 0), ("bn.weight", 0)
    plan = PrunePlan({key: [0, 1, 4, 5, 6, 9], other: [0, 1, 4, 5, 6, 9]}, {key: 12, other: 12})
    assert json.loads(plan.to_json()) == {
        "stp_fx_plan": 1,
        "cuts": [{"size": 12, "kept": [0, 1, [4, 6], 9], "axes": [["bn.weight", 0], ["conv.weight", 0]]}],
    }


def test_plans_that_do_not_follow():
    first = PrunePlan({("a", 0): [0, 2]}, {("a", 0): 4})
    with pytest.raises(PlanError, match=r"a:0: the first leaves 2 indices, the second is for an axis of 3"):
        first.then(PrunePlan({("a", 0): [0]}, {("a", 0): 3}))


@pytest.mark.parametrize(
    ("kept", "size", "message"),
    [
        ([0, 0], 3, r"w:1: kept indices must ascend without duplicates; got 0 before 0"),
        ([2, 1], 3, "got 2 before 1"),
        ([0, 3], 3, "w:1: kept index 3 is out of range for an axis of 3"),
        ([-1, 1], 3, "kept index -1 is out of range"),
        ([], 3, "at least one index"),
        ([0.0, 1.0], 3, "flat sequence of integers; got float64"),
        ([[0], [1]], 3, "flat sequence"),
        ([[0], [1, 2]], 3, "flat sequence"),
        ([True, False], 3, "flat sequence"),
        ([2**70], 3, "flat sequence"),
        ([2**63], 3, "out of range"),
        ("01", 3, "flat sequence"),
        (None, 3, "flat sequence"),
        ([0], 0, "w:1: the size of an axis is a positive integer; got 0"),
        ([0], 2.0, "positive integer"),
        ([0], True, "positive integer"),
    ],
)
def test_bad_entries(kept, size, message):
    with pytest.raises(PlanError, match=message):
        PrunePlan({("w", 1): kept}, {("w", 1): size})


@pytest.mark.parametrize("key", ["w", ("w",), ("w", -1), ("w", "0"), (0, 0), ("", 0), ("w", True)])
def test_bad_keys(key):
    with pytest.raises(PlanError, match="key is"):
        PrunePlan({key: [0]}, {key: 2})


def test_keys_must_match():
    with pytest.raises(PlanError, match=r"\('w', 0\) has no size"):
        PrunePlan({("w", 0): [0]}, {})
    with pytest.raises(PlanError, match=r"\('w', 0\) has no kept indices"):
        PrunePlan({}, {("w", 0): 2})
    with pytest.raises(PlanError, match="two mappings"):
        PrunePlan([], {})


def document(**changes):
    cut = {"size": 6, "kept": [0, [2, 4]], "axes": [["w", 0]], **changes}
    return json.dumps({"stp_fx_plan": 1, "cuts": [{k: v for k, v in cut.items() if v != "drop"}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON"),
        ("", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        (b"\xff\xfe\x00", "invalid JSON"),
        (3, "JSON text; got int"),
        ("[]", '"stp_fx_plan" is expected'),
        ("{}", '"stp_fx_plan" is expected'),
        ('{"stp_fx_plan": 2, "cuts": []}', "plan version 2 is unknown; this stp_fx reads version 1"),
        ('{"stp_fx_plan": true, "cuts": []}', "plan version True"),
        ('{"stp_fx_plan": 1}', "plan: fields cuts, stp_fx_plan are expected; got stp_fx_plan"),
        ('{"stp_fx_plan": 1, "cuts": [], "x": 1}', "got cuts, stp_fx_plan, x"),
        ('{"stp_fx_plan": 1, "cuts": [], "cuts": []}', "'cuts' is given twice"),
        ('{"stp_fx_plan": 1, "cuts": {}}', '"cuts" is a list'),
        ('{"stp_fx_plan": 1, "cuts": [3]}', r"cuts\[0\]: an object is expected; got 3"),
        (document(size="drop"), r"cuts\[0\]: fields axes, kept, size"),
        (document(size=0), r"cuts\[0\] \(w:0\): size is an integer"),
        (document(size=True), "size is an integer"),
        (document(size=10**15), "size is an integer in"),
        (document(kept=[]), "kept is a list of at least one"),
        (document(kept="0-3"), "kept is a list"),
        (document(kept=[1.0]), "an item of kept is an index"),
        (document(kept=[True]), "an item of kept is an index"),
        (document(kept=[[0, 1, 2]]), "an item of kept is an index"),
        (document(kept=[[0, "1"]]), "an item of kept is an index"),
        (document(kept=[[3, 1]]), r"cuts\[0\] \(w:0\): \[3, 1\] is out of range, or backwards"),
        (document(kept=[6]), "6 is out of range"),
        (document(kept=[-1]), "-1 is out of range"),
        (document(kept=[[0, 10**12]]), "out of range"),
        (document(kept=[1, 1]), r"ascend without duplicates; got 1 after 1"),
        (document(kept=[[2, 4], 3]), "got 3 after 4"),
        (document(axes=[]), "at least one"),
        (document(axes=[["w"]]), r"an axis is \[tensor name, dimension\]"),
        (document(axes=[["w", 0.0]]), "an axis is"),
        (document(axes=[["w", -1]]), "dimension >= 0"),
        (document(axes=[["w", 0], ["w", 0]]), "axis w:0 is listed twice"),
        (document(axes=[["w", 0], 5]), "an axis is"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(PlanError, match=message):
        PrunePlan.from_json(text)


def test_a_short_text_cannot_ask_for_much_memory():
    cut = {"size": 1 << 28, "kept": [[0, (1 << 28) - 2]], "axes": [["a", 0]]}
    small = {"size": 1 << 21, "kept": [[0, (1 << 21) - 2]]}
    few = [{**small, "axes": [[str(k), 0]]} for k in range(3)]
    for cuts in ([cut], few):
        tracemalloc.start()
        with pytest.raises(PlanError, match=r"asks for more than \d+ indices; .*give `axes`"):
            PrunePlan.from_json(json.dumps({"stp_fx_plan": 1, "cuts": cuts}))
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
        tracemalloc.stop()
    many = {**small, "axes": [[str(k), 0] for k in range(100)]}  # axes of one cut share their indices
    plan = PrunePlan.from_json(json.dumps({"stp_fx_plan": 1, "cuts": [many]}))
    assert len({id(kept) for kept in plan.kept.values()}) == 1
    assert PrunePlan.from_json(plan.to_json(), plan.sizes) == plan
    known = {(str(k), 0): 1 << 21 for k in range(3)}
    assert len(PrunePlan.from_json(json.dumps({"stp_fx_plan": 1, "cuts": few}), known).kept) == 3


def test_a_text_from_elsewhere_speaks_of_known_axes_only():
    plan = PrunePlan({("a", 0): [0, 2], ("b", 1): [0, 2]}, {("a", 0): 3, ("b", 1): 3})
    text = plan.to_json()
    assert PrunePlan.from_json(text, {("a", 0): 3, ("b", 1): 3, ("c", 0): 9}) == plan
    with pytest.raises(PlanError, match=r"axis 'b' dim 1 of 3; there is one of 4"):
        PrunePlan.from_json(text, {("a", 0): 3, ("b", 1): 4})
    # 2 GiB an entry if it were believed
    cut = {"size": 1 << 28, "kept": [[0, (1 << 28) - 2]], "axes": [["a", 0]]}
    with pytest.raises(PlanError, match=r"of 268435456; there is one of 3"):
        PrunePlan.from_json(json.dumps({"stp_fx_plan": 1, "cuts": [cut] * 100}), {("a", 0): 3})
