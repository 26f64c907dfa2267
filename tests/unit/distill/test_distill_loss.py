"""The three terms of the loss, by hand."""

import copy

import pytest
import torch

from tasks.core.denoiser import Denoiser
from tasks.core.training import mixed_precision
from tasks.distill.images import Batch, with_noise
from tasks.distill.loss import feature_error, sublayer_outputs, transfer_loss
from tests.unit.distill.toy import tiny_dit, tiny_unet


def batch_for(denoiser: Denoiser) -> Batch:
    labels = torch.zeros(4, dtype=torch.int64) if denoiser.num_classes else None
    return with_noise(denoiser.schedule, torch.zeros(4, 1, 8, 8), labels, torch.Generator().manual_seed(0))


def loss(student, teacher, lam, features=0.0, data=1.0):
    return transfer_loss(student, teacher, batch_for(teacher), data, lam, features, False).item()


def test_the_teachers_prediction_is_a_term():
    teacher, other = tiny_dit(), tiny_dit()
    other.model.proj_out_2.bias.data += 1.0
    assert loss(teacher, teacher, 3.0) == loss(teacher, teacher, 0.0)  # nothing to learn from oneself
    assert loss(other, teacher, 3.0, data=0.0) == pytest.approx(3.0, rel=1e-4) and loss(other, teacher, 0.0, data=0.0) == 0
    assert loss(other, teacher, 3.0) - loss(other, teacher, 0.0) == pytest.approx(3.0, rel=1e-4)  # off by 1 everywhere


def test_a_teacher_without_weight_is_not_evaluated():
    student = tiny_dit()

    class Silent(Denoiser):
        def __call__(self, *args):
            raise AssertionError("evaluated")

    teacher = Silent(tiny_dit().model, student.schedule)
    assert loss(student, teacher, 0.0) > 0
    with pytest.raises(AssertionError, match="evaluated"):
        loss(student, teacher, 1.0)


def test_feature_error_is_relative_to_the_teacher_layer_by_layer():
    theirs = [torch.full((2, 3), 10.0), torch.tensor([[1.0, 1.0], [2.0, 2.0]])]
    mine = [torch.full((2, 3), 11.0), torch.tensor([[1.0, 1.0], [2.0, 4.0]])]
    assert feature_error(theirs, theirs) == 0
    # layer 1: 1 / 100 for both images; layer 2: 0 and (4 / 2) / 4
    assert feature_error(mine, theirs).item() == pytest.approx((0.01 + (0 + 0.5) / 2) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_error_has_the_gradient_that_autograd_finds(dtype):
    theirs = torch.randn(5, 3, 4).to(dtype)
    mine = (theirs + 0.1 * torch.randn(5, 3, 4)).to(dtype).requires_grad_()
    plain = mine.detach().float().requires_grad_()
    distance, loudness = (plain - theirs.float()).square().sum((1, 2)), theirs.float().square().sum((1, 2))
    (distance / loudness).mean().backward()
    feature_error([mine], [theirs]).backward()
    assert mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad.float(), plain.grad, rtol=1e-5 if dtype == torch.float32 else 0.03, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_sublayer_outputs_become_a_term_and_leave_no_hook(make):
    teacher, other = make(), make()
    assert loss(teacher, teacher, 0.0, features=1.0) == loss(teacher, teacher, 0.0)
    name = teacher.sublayers()[0].name
    [module for module in other.model.get_submodule(name).modules() if hasattr(module, "bias")][-1].bias.data += 1.0
    assert loss(other, teacher, 0.0, features=1.0) > loss(other, teacher, 0.0)
    assert not teacher.model.get_submodule(name)._forward_hooks


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_every_sublayer_is_recorded_in_order(make):
    denoiser, batch = make(), batch_for(make())
    with sublayer_outputs(denoiser) as outputs:
        denoiser(batch.x, batch.t, batch.labels)
    assert len(outputs) == len(denoiser.sublayers())
    assert all(output.grad_fn is None and output.shape[0] == 4 for output in outputs)
    with sublayer_outputs(denoiser, record=False) as outputs:
        denoiser(batch.x, batch.t, batch.labels)
    assert outputs == []


def test_the_gradient_comes_from_the_student_alone():
    teacher = tiny_dit()
    student = copy.copy(teacher)
    student.model = copy.deepcopy(teacher.model).requires_grad_(True)
    transfer_loss(student, teacher, batch_for(teacher), 1.0, 1.0, 1.0, False).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert any(p.grad is not None for p in student.model.parameters())


def test_attention_stays_in_fp32_under_bf16_autocast_and_comes_back_in_bf16():
    query = torch.randn(2, 3, 5, 4).bfloat16()
    with mixed_precision("cpu", True):
        found = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    exact = torch.nn.functional.scaled_dot_product_attention(*[query.float()] * 3)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
