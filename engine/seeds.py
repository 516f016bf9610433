"""The seeds of a run: that of its weights and that of its data order, as they were found. No torch.

Evaluations follow from no seed: they score the same rows whatever the run's are.
"""

from engine.ledger import Line


def lines(config, order: int, weights: int) -> list[Line]:
    """Whether `config`, an engine.config.Config, has its seeds in effect: one line where both are `seed`, else two.

    order: the data order's own seed. weights: that of the generator that drew the initial weights.
    """
    seed, wanted = config.run.seed, config.order_seed
    of_order, of_weights = "the data order's own seed", "the generator's that drew the initial weights"
    if config.run.data_seed < 0:
        found = str(order) if order == weights else f"{order} of the data order, {weights} of the weights"
        return [Line("seed", str(seed), found, f"{of_order}, and {of_weights}", seed == order == weights)]
    return [
        Line("seed", str(seed), str(weights), of_weights, seed == weights),
        Line("data_seed", str(wanted), str(order), of_order, wanted == order),
    ]
