"""The learning rate as a plain function of the step."""


def one_cycle(step: int, total_steps: int, peak_fraction: float, first: float, peak: float, last: float) -> float:
    """One-cycle value at `step` of `total_steps`: linear from `first` to `peak`, then linear to `last`.

    The two-phase policy of Smith and Topin (2018, https://arxiv.org/abs/1708.07120) with the phase ends of
    `torch.optim.lr_scheduler.OneCycleLR`: the peak stands at step `peak_fraction * total_steps - 1`, which need
    not be a whole number, and the last value at step `total_steps - 1`.
    """
    peak_step, last_step = peak_fraction * total_steps - 1, total_steps - 1
    if step <= peak_step and peak_step > 0:
        return first + (peak - first) * step / peak_step
    peak_step = min(peak_step, last_step - 1e-9)  # a run of one step has no way down: it stands at its end
    return peak + (last - peak) * (step - peak_step) / (last_step - peak_step)


def triangular(step: int, step_size: int, min_lr: float, max_lr: float) -> float:
    """Cyclical learning rate: linear from `min_lr` to `max_lr` in `step_size` steps and back in as many, again and again.

    The triangular policy of Smith (2017, https://arxiv.org/abs/1506.01186), equal to `torch.optim.lr_scheduler.CyclicLR`.
    """
    away_from_peak = abs(step / step_size % 2 - 1)
    return max_lr - (max_lr - min_lr) * away_from_peak
