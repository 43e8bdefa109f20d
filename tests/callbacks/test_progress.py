import io
from types import SimpleNamespace

from rich.console import Console

from pipeline.callbacks import progress
from pipeline.callbacks.journal import Row
from pipeline.callbacks.progress import ProgressReport


def test_output_to_a_file_is_lines_with_speed_waiting_loss_accuracy_and_time_left(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    text = io.StringIO()
    report = ProgressReport(Console(file=text, width=40), steps=20)
    trainer = SimpleNamespace(global_step=0)
    report.on_train_start(trainer, None)
    trainer.global_step = 10
    report.append(
        Row(
            step=10,
            epoch=0.5,
            split="train",
            loss=1.25,
            top1=0.5,
            top5=1,
            images=80,
            images_per_s=99.6,
            data_wait=0.031,
        )
    )
    report.on_train_batch_end(trainer, None, None, None, 0)
    report.append(Row(step=20, epoch=1.0, split="val", loss=0.5, top1=0.975, top5=1, images=40))
    report.close()
    train, validation = text.getvalue().splitlines()
    assert train.startswith("step 10/20  100 images/s  waiting 3%  loss 1.250  top-1 50.0%")
    assert train.endswith("min left")
    assert validation == "epoch 1.00  step 20  validation top-1 97.50%  top-5 100.00%  loss 0.5000  (40 images)"


def test_an_evaluation_says_how_fast_it_is_since_this_start_and_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said = io.StringIO()
    with progress.EvaluationProgress(Console(file=said, width=100), 1000, 400) as bar:
        now[0] += 11
        bar.say("population statistics, 512 of 8,192 images")
        now[0] += 9
        bar.begin()
        now[0] += 12
        bar.at(460)
        bar.at(470)  # too early for another line
        now[0] += 30
        bar.at(610)
    assert said.getvalue().splitlines() == [
        "400 of 1,000 images  population statistics, 512 of 8,192 images",
        "460 of 1,000 images  5.0 images/s  108 s left",
        "610 of 1,000 images  5.0 images/s  78 s left",
    ]
