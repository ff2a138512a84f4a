"""FSDP2: what is a part of its own, and what is refused; that it trains as one process: test_train.py."""

import pytest
import torch
from torch import nn

import parallel
from config import UserError


def test_blocks_are_the_members_of_the_outermost_lists():
    inner = nn.ModuleList([nn.Linear(2, 2)])
    block = nn.Sequential(nn.Linear(2, 2), inner)
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ModuleList([block, nn.Linear(3, 3)])))
    assert parallel.blocks(network) == [block, network[1][0][1]]


def test_a_parameter_that_is_a_single_number_is_refused_by_name():
    network = nn.Linear(2, 2)
    network.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="train.shard: temperature is a single number"):
        parallel.shard(network, False, torch.device("cpu"), 2)
