"""Who is told of a run's course, and of what."""

import shutil
from types import SimpleNamespace

import pytest
from run_helpers import Listener, assert_same_run, content

from cifar_resnet import Watcher, Watchers, load_checkpoint, train
from cifar_resnet.errors import UsageError


def test_a_watcher_hears_of_every_step_and_epoch_once(tiny_recipe, tmp_path, no_figures):
    heard = []

    class Keeping:  # no Watcher, and without warn
        def begin(self, recipe, run_dir, environment, data, state):
            heard.append(("begin", run_dir, len(data.train), state.epoch))

        def step(self, step, state):
            heard.append(("step", step.epoch, step.step, step.steps))

        def epoch(self, epoch):
            heard.append(("epoch", epoch.metrics["epoch"]))

    checkpoint = train(tiny_recipe, tmp_path / "run", watcher=Keeping())
    steps = [[("step", epoch, step, 3) for step in (1, 2, 3)] + [("epoch", epoch)] for epoch in (1, 2)]
    assert heard == [("begin", tmp_path / "run", 70, 0), *steps[0], *steps[1]]
    assert len(checkpoint.history) == 2


def test_the_metrics_of_every_epoch_are_handed_to_a_function(tiny_recipe, tmp_path, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    told = []
    checkpoints = [train(tiny_recipe, on_epoch=told.append) for _ in range(2)]  # as a cell that is run twice
    assert [each.path.parent.as_posix() for each in checkpoints] == ["runs/digits-1", "runs/digits-2"]
    assert told == checkpoints[0].history + checkpoints[1].history
    assert type(told[0]) is dict


def test_progress_is_shown_where_it_is_asked_for_or_seen(tiny_recipe, tmp_path, monkeypatch, no_figures, capsys):
    for number, (asked, seen, lines) in enumerate([(None, False, 0), (None, True, 2), (False, True, 0), (True, False, 2)]):
        monkeypatch.setattr("cifar_resnet.jobs.watch.visible", lambda seen=seen: seen)
        heard = Listener()
        train(tiny_recipe, tmp_path / str(number), progress=asked, watcher=heard)
        assert capsys.readouterr().out.count("train loss") == lines


@pytest.mark.parametrize("watcher", ["tensorboard", Watcher, SimpleNamespace(on_epoch=print)])
def test_a_watcher_that_would_hear_nothing_is_refused(watcher, tiny_recipe, tmp_path):
    with pytest.raises(UsageError, match="is no object with one of the methods reading, begin, step, epoch, warn"):
        train(tiny_recipe, tmp_path / "run", watcher=watcher)
    assert not (tmp_path / "run").exists()


def test_watchers_are_closed_with_what_ended_them():
    """Where the second cannot be opened, the first is closed."""
    seen = []

    class Opened(Watcher):
        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            seen.append(kind)

    class Broken(Opened):
        def __enter__(self):
            raise OSError("no")

    with pytest.raises(OSError, match="no"), Watchers(Opened(), Broken()):
        pass
    with pytest.raises(KeyError), Watchers(Opened()):
        raise KeyError
    assert seen == [OSError, KeyError]


class Meddles(Watcher):
    """Writes into all that it is given."""

    def begin(self, recipe, run_dir, environment, data, state):
        environment["began"] = object()
        environment["startup_seconds"].clear()

    def epoch(self, epoch):
        epoch.metrics["mine"] = epoch.metrics.pop("seconds")
        epoch.metrics["test_accuracy"] = 100.0


def test_what_a_watcher_writes_into_what_it_is_given_stays_out_of_the_run(tiny_recipe, tiny_run, tmp_path, no_figures):
    train(tiny_recipe, tmp_path / "run", watcher=Meddles())
    assert_same_run(content(tmp_path / "run"), content(tiny_run))
    assert load_checkpoint(tmp_path / "run").environment.keys() == load_checkpoint(tiny_run).environment.keys()


@pytest.mark.parametrize(("method", "call", "done"), [("step", 2, (0, 2)), ("epoch", 1, (1, 0)), ("epoch", 2, (2, 0))])
def test_a_run_whose_watcher_fails_is_kept(tiny_recipe, tiny_run, tmp_path, no_figures, method, call, done):
    calls = []

    def fails(*_):
        calls.append(method)
        if len(calls) == call:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny_recipe, tmp_path / "run", watcher=SimpleNamespace(**{method: fails}))
    kept = content(tmp_path / "run")
    assert (kept["epoch"], kept["step"]) == done
    train(resume=tmp_path / "run")
    assert_same_run(content(tmp_path / "run"), content(tiny_run))


def test_a_run_that_has_diverged_is_not_kept_where_its_watcher_fails(tiny_recipe, tmp_path, no_figures):
    def step(step, state):
        if step.step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny_recipe.replace(optimizer="sgd", max_lr=1e30), tmp_path / "run", watcher=SimpleNamespace(step=step))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.posix  # Windows keeps a folder in which a file is open
@pytest.mark.parametrize("lose", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("moved"))])
def test_a_run_whose_folder_goes_while_it_trains_is_kept(tiny_recipe, tiny_run, tmp_path, no_figures, lose):
    def on_epoch(row):
        if row["epoch"] == 1:
            lose(tmp_path / "run")

    checkpoint = train(tiny_recipe, tmp_path / "run", on_epoch=on_epoch)
    assert checkpoint.finished
    assert_same_run(content(tmp_path / "run"), content(tiny_run))
