import torch

from pipeline.evaluation.metrics import Sums
from tests.multiprocess.ranks import run_ranks, with_group


def batch(count: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits, label = torch.randn(count, 8, generator=generator), torch.randint(8, (count,), generator=generator)
    return torch.nn.functional.cross_entropy(logits, label, reduction="none"), logits, label, torch.ones(count)


def test_scores_are_means_over_real_images_alone():
    loss, logits, label, weight = batch(20, 0)
    weight[15:] = 0
    sums = Sums(torch.device("cpu"))
    sums.add(loss[:7], logits[:7], label[:7], weight[:7])
    sums.add(loss[7:], logits[7:], label[7:], weight[7:])
    sums.add(loss[:0], logits[:0], label[:0], weight[:0])
    scores = sums.merged()
    best = logits[:15].argsort(dim=1, descending=True)
    assert scores.images == 15
    assert scores.top1 == (best[:, 0] == label[:15]).double().mean()
    assert scores.top5 == (best[:, :5] == label[:15, None]).any(1).double().mean()
    torch.testing.assert_close(scores.loss, loss[:15].double().mean().item())


def test_fewer_than_five_classes_have_a_top_5():
    sums = Sums(torch.device("cpu"))
    sums.add(torch.zeros(2), torch.eye(2), torch.tensor([0, 0]), torch.ones(2))
    assert (sums.merged().top1, sums.merged().top5) == (0.5, 1.0)


def rank_sums(rank, world):
    sums = Sums(torch.device("cpu"))
    columns = [column[rank::world] for column in batch(11, 3)]
    sums.add(*columns)
    return sums.merged()


def test_scores_do_not_depend_on_ranks():
    sums = Sums(torch.device("cpu"))
    sums.add(*batch(11, 3))
    for scores in run_ranks(3, with_group, rank_sums):
        assert (scores.images, scores.top1, scores.top5) == (11, sums.merged().top1, sums.merged().top5)
        torch.testing.assert_close(scores.loss, sums.merged().loss, rtol=1e-14, atol=0)
