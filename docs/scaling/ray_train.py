"""A recipe on the workers of a Ray cluster: `python ray_train.py RECIPE WORKERS [KEY=VALUE ...]`.

Ray starts the processes and tells each its rank, as torchrun does. RECIPE and the recipe's output have to lie where
every worker sees them.
"""

import sys

import ray.train
from ray.train.torch import TorchTrainer


def work(config: dict) -> None:
    """What each worker does."""
    import veneer

    result = veneer.train(config["recipe"], config["overrides"], resume=True)
    ray.train.report(result.metrics)


if __name__ == "__main__":
    import torch

    recipe, workers, *overrides = sys.argv[1:]
    scaling = ray.train.ScalingConfig(num_workers=int(workers), use_gpu=torch.cuda.is_available())
    trainer = TorchTrainer(work, train_loop_config={"recipe": recipe, "overrides": overrides}, scaling_config=scaling)
    print(trainer.fit().metrics)
