"""The average of the weights: against a plain restatement, apart from the network, and restored."""

import torch
from torch import nn

from train.averaging import WeightAverage


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def train_a_step(trained, generator):
    trained(torch.rand(2, 1, 5, 5, generator=generator) + 3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += torch.rand(parameter.shape, generator=generator)


def test_it_keeps_more_of_itself_step_by_step_up_to_the_decay():
    trained = network()
    average = WeightAverage(trained, decay=0.3)
    generator = torch.Generator().manual_seed(1)
    mean = trained[0].weight.detach().clone()
    variance = trained[1].running_var.clone()
    for step, kept in enumerate([0.1, 2 / 11, 3 / 12, 0.3, 0.3]):
        train_a_step(trained, generator)
        average.update(trained, step)
        mean = kept * mean + (1 - kept) * trained[0].weight.detach()
        variance = kept * variance + (1 - kept) * trained[1].running_var
    torch.testing.assert_close(average.network[0].weight, mean)
    torch.testing.assert_close(average.network[1].running_var, variance)
    assert average.network[1].num_batches_tracked == 5


def test_it_is_a_network_of_its_own_that_is_not_trained():
    trained = network()
    average = WeightAverage(trained, decay=0.9)
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    before = average.network[0].weight.clone()
    train_a_step(trained, torch.Generator().manual_seed(1))
    assert torch.equal(average.network[0].weight, before)
    assert trained.training


def test_it_goes_on_from_its_state():
    trained = network()
    one, other = WeightAverage(trained, decay=0.9), WeightAverage(trained, decay=0.9)
    generator = torch.Generator().manual_seed(1)
    train_a_step(trained, generator)
    one.update(trained, 0)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    train_a_step(trained, generator)
    for average in (one, other):
        average.update(trained, 1)
    assert all(torch.equal(one.state_dict()[name], value) for name, value in other.state_dict().items())
