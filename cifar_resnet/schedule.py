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
