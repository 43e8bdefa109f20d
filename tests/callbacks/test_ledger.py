import json
from types import SimpleNamespace

from pipeline.callbacks.ledger import Ledger


def line(step: int) -> str:
    return json.dumps({"epoch": 0, "step": step, "keys": ["a"]}) + "\n"


def test_a_resumed_ledger_forgets_what_is_trained_again_on_every_former_rank(tmp_path):
    for rank in range(3):
        (tmp_path / f"rank-{rank}.jsonl").write_text(line(1) + line(2) + line(3))
    with (tmp_path / "rank-0.jsonl").open("a") as file:
        file.write('{"epoch": 0, "st')  # cut short by a crash
    ledger = Ledger(tmp_path, rank=0, keys=lambda samples: [str(s) for s in samples])
    ledger.on_train_start(SimpleNamespace(global_step=2, is_global_zero=True, world_size=1), None)
    for rank in range(3):
        assert (tmp_path / f"rank-{rank}.jsonl").read_text() == line(1) + line(2)


def test_one_line_a_step_holds_the_keys_of_all_its_micro_batches(tmp_path):
    import torch

    ledger = Ledger(tmp_path, rank=1, keys=lambda samples: [f"k{s}" for s in samples])
    trainer = SimpleNamespace(global_step=0, is_global_zero=False, world_size=2, current_epoch=4)
    ledger.on_train_start(trainer, None)
    for step, samples in ((0, [3, 1]), (1, [2])):
        trainer.global_step = step
        ledger.on_train_batch_end(trainer, None, None, SimpleNamespace(sample_N=torch.tensor(samples)), 0)
    (written,) = (tmp_path / "rank-1.jsonl").read_text().splitlines()
    assert json.loads(written) == {"epoch": 4, "step": 1, "keys": ["k3", "k1", "k2"]}
