"""Which weights decay. The learning rate of each step is tested in test_training.py."""

from torch import nn

from megatron_sphinx.training.optimizer import OptimizerConfig, parameter_groups


def test_matrices_decay_vectors_do_not_and_experts_have_a_group_of_their_own():
    model = nn.ModuleDict({"matrix": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "frozen": nn.Linear(4, 4)})
    model["frozen"].requires_grad_(False)
    model["expert"] = nn.Linear(4, 5, bias=False)
    model["expert"].weight.allreduce = False  # as megatron-core tells an expert's weight
    shared, vectors, experts = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert [id(weight) for weight in shared["params"]] == [id(model["matrix"].weight)]
    assert {id(weight) for weight in vectors["params"]} == {
        id(weight) for weight in (model["matrix"].bias, model["norm"].weight, model["norm"].bias)
    }
    assert [id(weight) for weight in experts["params"]] == [id(model["expert"].weight)]
    assert [group["weight_decay"] for group in (shared, vectors, experts)] == [0.3, 0.0, 0.3]
    assert experts["moe"]
    assert "moe" not in shared
