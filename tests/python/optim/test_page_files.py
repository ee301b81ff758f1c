"""State in a file, under a budget of memory: the same bits, and what is refused."""

import copy
import os

import pytest
import torch
from optimizers import (
    BUDGET,
    PAGE_BYTES,
    PAGED_SHAPES,
    clones,
    in_file,
    is_in_pages,
    make_parameters,
    nothing_changes,
    over_8_bits,
    over_all,
    parameters_of,
    same_run,
    set_gradients,
    stepped,
    take_steps,
)
from torch import nn

from qlora_native.optim import paged_optimizer


@over_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_under_a_budget_give_the_same_bits(optimizer_class, dtype, tmp_path):
    parameters = make_parameters(dtype, PAGED_SHAPES)
    options = {"stochastic_rounding": dtype is torch.bfloat16, "lr": 1e-2}

    def make(parameters, **paging):
        torch.manual_seed(3)
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.3}]
        return optimizer_class(groups, **options, **paging)

    plain = make(clones(parameters))
    optimizers = [
        make(clones(parameters), page_bytes=PAGE_BYTES),
        make(clones(parameters), page_file=tmp_path),
        make(clones(parameters), **in_file(tmp_path)),
    ]
    for step in range(2):
        for optimizer in (plain, *optimizers):
            take_steps(optimizer, [step])
    pages = [max(p.pages for p in one.paging_report().parts) for one in (plain, *optimizers)]
    assert pages[0] == pages[2] == 1
    assert pages[1] == pages[3] >= 3
    assert all(same_run(plain, optimizer) for optimizer in optimizers)


@over_all
def test_steps_on_some_of_the_pages_give_the_same_bits(optimizer_class, tmp_path):
    """Parameters without a gradient are passed over, and pages of theirs alone are not touched."""
    parameters = make_parameters(shapes=[(700, 1024), (300,), (700, 1024), (20, 4096)])
    a = optimizer_class(parameters)
    b = optimizer_class(clones(parameters), **in_file(tmp_path))
    have_gradients = ((0, 1, 2, 3), (2,), (3, 0), (1,), (1, 2, 3))
    for step, indices in enumerate(have_gradients):
        for optimizer in (a, b):
            take_steps_of(optimizer, step, indices)
    assert same_run(a, b)
    assert [b.state[p]["step"].item() for p in parameters_of(b)] == [2, 3, 3, 3]


def take_steps_of(optimizer, step, indices):
    for i, p in enumerate(parameters_of(optimizer)):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        p.grad = gradient if i in indices else None
    optimizer.step()


@over_all
def test_the_report_counts_what_a_step_moves(optimizer_class, tmp_path):
    optimizer = optimizer_class(make_parameters(shapes=PAGED_SHAPES), **in_file(tmp_path))
    report = optimizer.paging_report()
    assert report.bytes > BUDGET
    assert report.moved_to_device_bytes == report.moved_to_host_bytes == 0
    moved = []
    for step in range(4):
        take_steps(optimizer, [step])
        report = optimizer.paging_report()
        assert {part.strategy for part in report.parts} == {"file"}
        assert report.device_bytes + report.host_bytes + report.unknown_bytes == report.bytes
        assert report.device_bytes <= BUDGET
        moved.append((report.moved_to_device_bytes, report.moved_to_host_bytes))
    assert moved[-1] == moved[-2]  # of the last step alone
    to_device, to_host = moved[-1]
    assert 0 < to_host <= report.bytes
    assert 0 < to_device <= report.bytes
    assert to_device == to_host  # as much comes as goes


@over_all
def test_a_state_that_fits_its_budget_moves_nothing(optimizer_class, tmp_path):
    optimizer = optimizer_class(
        make_parameters(shapes=PAGED_SHAPES), **in_file(tmp_path, resident_bytes=20_000_000)
    )
    take_steps(optimizer, range(3))
    report = optimizer.paging_report()
    assert report.device_bytes == report.bytes
    assert report.moved_to_device_bytes == report.moved_to_host_bytes == 0


@over_all
def test_new_pages_have_moved_nothing_yet(optimizer_class, tmp_path):
    """The account of a step is of the pages that it walked, not of those made since."""
    optimizer = optimizer_class(make_parameters(shapes=PAGED_SHAPES), **in_file(tmp_path))
    take_steps(optimizer, range(2))
    parts = len(optimizer.paging_report().parts)
    optimizer.add_param_group({"params": make_parameters(shapes=[(40,)])})
    report = optimizer.paging_report()
    assert len(report.parts) == parts
    assert report.moved_to_device_bytes >= 0
    assert report.moved_to_host_bytes >= 0
    take_steps(optimizer, [2])
    # The last page is walked for each of the groups.
    moved = optimizer.paging_report().moved_to_host_bytes
    assert 0 < moved <= report.bytes + PAGE_BYTES


@over_all
def test_room_is_reserved_for_all_parameters_at_once(optimizer_class, tmp_path):
    parameters = make_parameters(shapes=[(5000,), (300,)])
    frozen = nn.Parameter(torch.ones(5000, dtype=torch.uint8), requires_grad=False)
    optimizer = optimizer_class([*parameters, frozen], page_file=tmp_path)
    reserved = optimizer.paging_report().bytes
    assert reserved > 0
    assert not optimizer.state
    take_steps_of(optimizer, 0, [0])
    take_steps_of(optimizer, 1, [1])
    assert optimizer.paging_report().bytes == reserved
    optimizer.add_param_group({"params": make_parameters(shapes=[(70_000,)])})
    assert optimizer.paging_report().bytes > reserved + 70_000
    assert is_in_pages(optimizer)
    assert not list(tmp_path.iterdir())  # the file has no name


@over_all
def test_a_group_that_is_added_keeps_the_state_of_the_others(optimizer_class, tmp_path):
    parameters = make_parameters(shapes=[*PAGED_SHAPES, (70_000,)])
    optimizers = [
        stepped(optimizer_class, clones(parameters[:-1]), steps=2, **paging)
        for paging in ({}, in_file(tmp_path))
    ]
    for optimizer in optimizers:
        optimizer.add_param_group({"params": clones(parameters[-1:]), "lr": 0.1})
        take_steps(optimizer, range(2, 4))
    assert same_run(*optimizers)


# ---- what is refused


def bad_files(tmp_path):
    (tmp_path / "file").touch()
    return {
        "missing": (tmp_path / "none", FileNotFoundError, "want a directory"),
        "no directory": (tmp_path / "file", NotADirectoryError, "file"),
        "too large": (tmp_path, OSError, r"no file of \d+ bytes"),
    }


@over_all
@pytest.mark.parametrize("how", ["missing", "no directory", "too large"])
def test_a_file_that_cannot_be_is_an_error_of_the_constructor(optimizer_class, how, tmp_path):
    folder, error, message = bad_files(tmp_path)[how]
    shape = (1 << 44,) if how == "too large" else (300,)
    p = nn.Parameter(torch.ones(1).expand(shape))
    with pytest.raises(error, match=message):
        optimizer_class([p], page_file=folder)
    assert p.shape == shape
    assert (p[:3] == 1).all()


@over_all
def test_a_disk_without_room_leaves_the_groups_as_they_were(optimizer_class, tmp_path):
    optimizer = stepped(
        optimizer_class, make_parameters(shapes=[(5000,), (30,)]), page_file=tmp_path
    )
    huge = nn.Parameter(torch.ones(1).expand(1 << 44))
    before = optimizer.paging_report()
    with nothing_changes(optimizer), pytest.raises(OSError, match=r"no file of \d+ bytes"):
        optimizer.add_param_group({"params": [huge]})
    assert optimizer.paging_report() == before
    assert is_in_pages(optimizer)
    take_steps(optimizer, [3])
    assert optimizer.state[parameters_of(optimizer)[0]]["step"] == 4


@over_all
def test_a_folder_that_is_gone_refuses_new_groups_alone(optimizer_class, tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    parameters = make_parameters(shapes=[(5000,), (30,)])
    optimizer = stepped(optimizer_class, parameters, page_file=folder)
    same = stepped(optimizer_class, make_parameters(shapes=[(5000,), (30,)]))
    folder.rmdir()
    with nothing_changes(optimizer), pytest.raises(FileNotFoundError, match="want a directory"):
        optimizer.add_param_group({"params": make_parameters(shapes=[(40,)])})
    for one in (optimizer, same):
        take_steps(one, [3])
    assert same_run(optimizer, same)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@over_all
def test_a_folder_that_may_not_be_written_is_refused(optimizer_class, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            optimizer_class(make_parameters(shapes=[(30,)]), page_file=tmp_path)
    finally:
        tmp_path.chmod(0o700)


@over_all
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_bytes": 100}, "page_bytes is 100, want at least"),
        ({"page_bytes": -1}, "page_bytes is -1, want at least"),
        ({"paging": "disk"}, "paging is 'disk', want 'automatic', 'managed' or 'pinned'"),
        ({"resident_bytes": 100, "page_file": "."}, "resident_bytes is .*, want at least"),
        ({"paging": "pinned", "page_file": "."}, "strategy is pinned, on the CPU want"),
    ],
    ids=str,
)
def test_paging_that_cannot_be_is_refused_by_the_constructor(optimizer_class, options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class(make_parameters(shapes=PAGED_SHAPES), **options)


@over_all
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resident_bytes": 1 << 30}, "resident_bytes is for .* give page_file too"),
        ({"paging": "managed"}, "strategy is managed, on the CPU want"),
        ({"paging": "pinned"}, "strategy is pinned, on the CPU want"),
    ],
    ids=str,
)
def test_paging_of_another_device_is_refused_by_the_first_step(optimizer_class, options, message):
    """Parameters may be moved until then."""
    parameters = make_parameters(shapes=PAGED_SHAPES)
    optimizer = optimizer_class(parameters, **options)
    set_gradients(0, parameters)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state


# ---- a budget that kinds of state share


@over_8_bits
def test_a_budget_is_shared_so_that_each_kind_of_state_has_its_two_pages(optimizer_class, tmp_path):
    """Much 32-bit state leaves the 8-bit state the pages that it needs."""
    parameters = make_parameters(shapes=[*[(90_000,)] * 12, (1100, 1024)])
    paging = in_file(tmp_path, resident_bytes=2 * BUDGET, min_8bit_size=100_000)
    a = stepped(optimizer_class, parameters, steps=2, **paging)
    b = stepped(
        optimizer_class,
        make_parameters(shapes=[p.shape for p in parameters]),
        steps=2,
        min_8bit_size=100_000,
    )
    assert same_run(a, b)
    report = a.paging_report()
    assert sorted(part.bits for part in report.parts) == [8, 32]
    assert report.device_bytes <= 2 * BUDGET
    assert all(part.moved_to_host_bytes > 0 for part in report.parts)


@over_8_bits
def test_a_budget_too_small_to_share_says_whose_share_it_is(optimizer_class, tmp_path):
    parameters = make_parameters(shapes=[*[(90_000,)] * 12, (1100, 1024)])
    message = r"want at least \d+, .*\(the share of \d+-bit state on cpu; all is resident_bytes 9\)"
    with pytest.raises(ValueError, match=message):
        optimizer_class(parameters, **in_file(tmp_path, resident_bytes=9, min_8bit_size=100_000))


@over_all
def test_a_directory_is_tried_also_where_nothing_is_trained(optimizer_class, tmp_path):
    frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)
    with pytest.raises(FileNotFoundError, match="want a directory"):
        optimizer_class([frozen], page_file=tmp_path / "missing")
    with pytest.raises(ValueError, match="page_file is ''"):
        optimizer_class([frozen], page_file="")


@over_all
def test_a_forked_child_writes_nothing_into_the_file(optimizer_class, tmp_path):
    optimizer = stepped(
        optimizer_class, make_parameters(shapes=[(5000,), (300,)]), page_file=tmp_path
    )
    saved = copy.deepcopy(optimizer.state_dict())
    child = os.fork()
    if child == 0:
        refused = 0
        for attempt in (
            lambda: optimizer.load_state_dict(saved),
            lambda: (optimizer.state.clear(), optimizer.step()),
        ):
            try:
                attempt()
            except NotImplementedError as error:
                refused += "forked" in str(error)
        os._exit(0 if refused == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    after = optimizer.state_dict()
    for i, state in saved["state"].items():
        assert all(torch.equal(value, after["state"][i][name]) for name, value in state.items())


@over_all
def test_a_file_that_cannot_be_written_is_told_when_the_step_is_done(
    optimizer_class, tmp_path, monkeypatch
):
    parameters = make_parameters(shapes=[(5000,), (300,)])
    optimizer = stepped(
        optimizer_class, [{"params": [p]} for p in parameters], steps=1, page_file=tmp_path
    )
    reference = stepped(
        optimizer_class,
        [{"params": [p]} for p in make_parameters(shapes=[(5000,), (300,)])],
        steps=1,
    )

    class Unwritable:
        def __init__(self, step):
            self.prepare, self.real = step.prepare, step.run

        def run(self):
            self.real()
            raise OSError(28, "No space left on device", str(tmp_path))

    def make_calls(*arguments):
        calls = real(*arguments)
        return [calls[0]._replace(step=Unwritable(calls[0].step)), *calls[1:]]

    real = paged_optimizer.make_calls
    monkeypatch.setattr(paged_optimizer, "make_calls", make_calls)
    set_gradients(1, parameters_of(optimizer), parameters_of(reference))
    with pytest.raises(OSError, match="No space left"):
        optimizer.step()
    monkeypatch.undo()
    reference.step()
    assert same_run(optimizer, reference)  # all parameters have taken the step
