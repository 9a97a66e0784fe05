"""DeepSpeed engines, ZeRO partitions, optimizers and averages of the weights."""
