"""Training written out plainly, in float64: what the loop, and that of several processes, are compared with."""

import copy

import torch
from torch.nn import functional

from cifar_resnet.data.loaders import Batch
from cifar_resnet.training.model import build_model


class Doubled:
    """A loader's batches in float64."""

    def __init__(self, loader):
        self.loader, self.steps, self.count = loader, loader.steps, loader.count

    def epoch(self, epoch, first_step=0):
        return (Batch(images.double(), labels, weight) for images, labels, weight in self.loader.epoch(epoch, first_step))

    def plain(self, size):
        return (Batch(images.double(), labels, weight) for images, labels, weight in self.loader.plain(size))


def doubled(state):
    """The state of a run, to be trained in float64; Muon's arithmetic too."""
    for model in (state.model, state.averaged or state.model):
        model.double()
    if hasattr(state.optimizer, "dtype"):
        state.optimizer.dtype = torch.float64
    return state


def newton_schulz(matrix):
    """Jordan's iteration on one matrix: five coefficients' worth of it, three times."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x if wide is matrix else x.T


def muon(kernel, buffer, gradient, lr, momentum):
    """One step of one kernel, in place: Nesterov momentum, the kernel scaled to the norm sqrt(outputs), and away."""
    buffer.mul_(momentum).add_(gradient)
    direction = newton_schulz((gradient + momentum * buffer).flatten(1)).view_as(kernel)
    kernel.mul_(len(kernel) ** 0.5 / kernel.norm()).sub_(lr * direction)


class PlainTraining:
    """A run of a recipe in torch's own words: NCHW layout, its optimizers, its OneCycleLR.

    Of several ranks all are simulated here: each has BatchNorm statistics of its own, made of its share of the batch.
    """

    def __init__(self, recipe, total_steps, ranks=1):
        self.recipe, self.total_steps, self.done = recipe, total_steps, 0
        model = build_model(recipe).to(memory_format=torch.contiguous_format).double().train()
        self.models = [copy.deepcopy(model) for _ in range(ranks)]
        self.averages = [[] for _ in range(ranks)]  # the weights after every update of the average
        self.optimizers = [self._optimizer(model) for model in self.models]
        for optimizer in self.optimizers:
            cycled = recipe.base_momentum is not None
            optimizer.schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, recipe.max_lr, total_steps=total_steps, pct_start=recipe.peak_epoch / recipe.epochs,
                anneal_strategy="linear", cycle_momentum=cycled, base_momentum=recipe.base_momentum or 0,
                max_momentum=recipe.momentum, div_factor=recipe.div_factor, final_div_factor=recipe.final_div_factor,
            )  # fmt: skip

    def _optimizer(self, model):
        recipe, parameters = self.recipe, list(model.parameters())
        self.kernels = []
        if recipe.optimizer in ("adam", "adamw"):
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
            return kind(parameters, 1, betas=(recipe.momentum, 0.999), weight_decay=recipe.weight_decay)
        if recipe.optimizer == "muon":
            self.kernels = [name for name, p in model.named_parameters() if p.dim() == 4 and name != "prep.0.weight"]
            model.buffers_of_muon = {name: torch.zeros_like(model.get_parameter(name)) for name in self.kernels}
            parameters = [p for name, p in model.named_parameters() if name not in self.kernels]
        return torch.optim.SGD(parameters, 1, recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay)

    @property
    def lr(self):
        return self.optimizers[0].param_groups[0]["lr"]

    def _loss(self, model, images, labels):
        output = model(images).float()  # the loss is in float32 whatever the network is in
        if self.recipe.loss == "nll":
            return functional.nll_loss(output, labels, reduction="sum")
        return functional.cross_entropy(output, labels, label_smoothing=self.recipe.label_smoothing, reduction="sum")

    def _gradients(self, models, images, labels, weight):
        """`weight` times those of the mean loss of the whole batch, by name; and that loss."""
        total, loss = {}, 0.0
        for rank, model in enumerate(models):
            model.zero_grad()
            part = slice(len(labels) * rank // len(models), len(labels) * (rank + 1) // len(models))
            share = self._loss(model, images[part].contiguous(), labels[part]) / len(labels)
            share.backward()
            loss += share.item()
            for name, parameter in model.named_parameters():
                total[name] = total.get(name, 0) + weight * parameter.grad
        return total, loss

    def step(self, images, labels, batch_weight=1.0):
        """One step; gives the loss before it."""
        recipe = self.recipe
        gradients, loss = self._gradients(self.models, images, labels, batch_weight)
        if self.done >= self.total_steps * (1 - recipe.sam_share) - 0.5:
            # the gradients come from copies that stand where the loss is higher
            moved = copy.deepcopy(self.models)
            weights = {name: p.detach() for name, p in self.models[0].named_parameters() if p.dim() > 1}
            length = sum((weight.norm() * gradients[name].norm()) ** 2 for name, weight in weights.items()) ** 0.5
            for model in moved:
                for name, weight in weights.items():
                    model.get_parameter(name).data += recipe.sam_radius * weight.norm() ** 2 * gradients[name] / length
            gradients, _ = self._gradients(moved, images, labels, batch_weight)
        if recipe.grad_clip:
            gradients = {name: gradient.clamp(-recipe.grad_clip, recipe.grad_clip) for name, gradient in gradients.items()}
        for model, optimizer, averages in zip(self.models, self.optimizers, self.averages, strict=True):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone()
            for name in self.kernels:
                lr = self.lr * recipe.muon_lr_factor
                muon(model.get_parameter(name).data, model.buffers_of_muon[name], gradients[name], lr, recipe.muon_momentum)
            optimizer.step()
            if (self.done + 1) % recipe.ema_every == 0:
                averages.append(copy.deepcopy(model.state_dict()))
        for optimizer in self.optimizers:
            if self.done + 1 < self.total_steps:
                optimizer.schedule.step()
        self.done += 1
        return loss

    def weights(self):
        """Those after the last step; BatchNorm statistics are the mean over the ranks."""
        return mean_of([model.state_dict() for model in self.models])

    def average(self):
        """Of the weights after every update, each in proportion to decay^(updates since); the first weights are not among them."""
        decays = [self.recipe.ema_decay**since for since in reversed(range(len(self.averages[0])))]
        return mean_of([mean_of(averages, decays) for averages in self.averages])


def mean_of(states, weights=None):
    """The weighted mean of state dicts, integers aside."""
    weights = weights or [1.0] * len(states)
    floats = [name for name, value in states[0].items() if value.is_floating_point()]
    return {name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) / sum(weights) for name in floats}
