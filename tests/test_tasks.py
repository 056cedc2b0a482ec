"""Tasks of recurrent networks: targets follow the stated rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkbench.data import tasks
from ntkbench.errors import BadInput

SEEDS = st.integers(0, 10**6)


@given(N=st.integers(1, 6), T=st.integers(2, 40), seed=SEEDS)
def test_a_flipflop_holds_the_last_pulse_of_each_channel(N, T, seed):
    trials = tasks.trials("flipflop", N, T, seed)
    assert set(np.unique(trials.inputs)) <= {-1.0, 0.0, 1.0}
    for i, bit in np.ndindex(N, 3):
        held = 0.0
        for t in range(T):
            held = trials.inputs[i, t, bit] or held
            assert trials.targets[i, t, bit] == held
            assert trials.mask[i, t, bit] == (held != 0)


def test_pulses_come_as_often_as_stated_and_either_way():
    pulses = tasks.trials("flipflop", 200, 50).inputs
    assert (pulses != 0).mean() == pytest.approx(tasks.PULSES, abs=0.01)
    assert abs(pulses[pulses != 0].mean()) < 0.05


@given(N=st.integers(1, 8), T=st.integers(5, 40), seed=SEEDS)
def test_a_delayed_response_is_the_cue_and_nothing_before_the_go_signal(N, T, seed):
    trials = tasks.trials("delayed_response", N, T, seed)
    go = trials.inputs[..., 2] > 0.5
    assert (go.sum(1) == T // 5).all()
    assert go[:, -1].all()
    assert not trials.targets[~go].any()
    assert trials.mask.all()
    cue = trials.inputs[:, : T // 5, :2].mean(1)
    for i in range(N):
        answer = trials.targets[i, go[i]]
        np.testing.assert_allclose(np.linalg.norm(answer, axis=1), 1, rtol=1e-6)
        turns = np.arctan2(answer[0, 1], answer[0, 0]) / (2 * np.pi / tasks.ANGLES)
        assert abs(turns - round(float(turns))) < 1e-5
        np.testing.assert_allclose(answer, np.broadcast_to(cue[i], answer.shape), atol=6 * tasks.NOISE)


@given(N=st.integers(1, 8), T=st.integers(5, 40), seed=SEEDS)
def test_a_match_is_of_the_stimuli_that_were_shown(N, T, seed):
    trials, epoch = tasks.trials("match_to_sample", N, T, seed), T // 5
    sample = trials.inputs[:, :epoch].mean(1).argmax(1)
    test = trials.inputs[:, -2 * epoch : -epoch].mean(1).argmax(1)
    answers = trials.targets[:, -epoch:]
    np.testing.assert_array_equal(answers[:, :, 1], np.broadcast_to((sample != test)[:, None], (N, epoch)))
    np.testing.assert_array_equal(answers.sum(2), 1)
    assert trials.mask[:, -epoch:].all()
    assert not trials.mask[:, :-epoch].any()
    between = trials.inputs[:, epoch : -2 * epoch]
    assert between.shape[1] >= epoch, "a delay to remember the sample in"
    assert np.abs(between).max() < 7 * tasks.NOISE


@pytest.mark.parametrize("task", tasks.TASKS)
def test_trials_are_seeded_and_fewer_are_the_first_of_more(task):
    many, few, others = (tasks.trials(task, *args) for args in ((40, 15, 3), (4, 15, 3), (40, 15, 4)))
    for name in ("inputs", "targets", "mask"):
        np.testing.assert_array_equal(getattr(many, name)[:4], getattr(few, name))
        assert getattr(many, name).dtype == np.float32
    assert not np.array_equal(many.inputs, others.inputs)
    assert len(np.unique(many.inputs.reshape(40, -1), axis=0)) == 40, "trials repeat, and so do rows of Theta"
    assert len(np.unique(many.targets.reshape(40, -1), axis=0)) > 1
    assert tasks.channels(task) == (many.inputs.shape[2], many.targets.shape[2])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("flipflops", 3, 9), "unknown task 'flipflops' .did you mean 'flipflop'"),
        (("flipflop", 3, 1), "T of at least 2; got N=3, T=1"),
        (("delayed_response", 3, 4), "T of at least 5; got N=3, T=4"),
        (("match_to_sample", 0, 9), "N of at least 1 .*; got N=0, T=9"),
    ],
)
def test_impossible_sizes_of_tasks_are_refused(asked, says):
    with pytest.raises(BadInput, match=says):
        tasks.trials(*asked)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_loss_is_the_share_of_power_missed_within_the_mask(task):
    import torch

    trials = tasks.trials(task, 6, 10)
    loss, targets = trials.loss(), torch.from_numpy(trials.targets)
    elsewhere = (1 - torch.from_numpy(trials.mask)) * 100
    assert float(loss(targets + elsewhere)) == 0
    assert float(loss(torch.zeros_like(targets))) == pytest.approx(1)
    assert float(loss(0.5 * targets.double())) == pytest.approx(0.25)
