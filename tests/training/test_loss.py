import torch
from torch import nn

from pipeline.training.loss import Loss, share_of_global_mean


def test_shares_add_up_to_the_global_mean_for_any_split():
    loss_N = torch.arange(7.0)
    for sizes in ((7,), (4, 3), (7, 0), (3, 2, 2, 0)):
        ranks = [share_of_global_mean(part, 7, len(sizes), 1) for part in loss_N.split(sizes)]
        torch.testing.assert_close(torch.stack(ranks).mean(), loss_N.mean())  # DDP takes the mean over ranks


def test_accumulation_gives_back_what_lightning_divides():
    loss_N = torch.arange(6.0)
    pieces = [share_of_global_mean(part, 6, 1, 3) / 3 for part in loss_N.split(2)]
    torch.testing.assert_close(sum(pieces), loss_N.mean())


def test_loss_of_each_image_with_smoothing_and_auxiliary_head():
    logits, auxiliary = torch.randn(4, 5), torch.randn(4, 5)
    label = torch.tensor([0, 4, 2, 2])
    expected = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(
        Loss(0.1, 0.3).per_image(logits, auxiliary, label), expected(logits, label) + 0.3 * expected(auxiliary, label)
    )
    assert Loss().per_image(logits[:0], None, label[:0]).sum() == 0
    assert Loss().per_image(logits.bfloat16(), None, label).dtype == torch.float32


def test_the_loss_of_two_labels_is_that_of_soft_ones():
    logits, auxiliary = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    label, partner = torch.tensor([0, 4, 2, 2]), torch.tensor([1, 1, 2, 0])
    share = torch.tensor([1.0, 0.3, 0.6, 0.0]).double()
    soft = share[:, None] * nn.functional.one_hot(label, 5) + (1 - share)[:, None] * nn.functional.one_hot(partner, 5)
    expected = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(
        Loss(0.1, 0.3).of_mixed(logits, auxiliary, label, partner, share),
        expected(logits, soft) + 0.3 * expected(auxiliary, soft),
    )
